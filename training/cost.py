"""What a recipe costs: arithmetic counted on the real step, parameters, memory, hours. Nothing here is typed in.

The step runs on fake tensors, which have shapes and no content, under torch's counters; so an encoder of any size is
counted within seconds and without its memory.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.draws import draw
from training.penalties import penalties
from training.recipes import AdversarialRecipe, Recipe
from training.step import adversarial_pass, plain_pass
from training.team import Team, create_encoder, create_team

_SAMPLES = 4  # a whole group of the minibatch statistic
IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Cost:
    """Cost of one image in one step, forward and backward, lazy penalties spread over their interval."""

    gflop: dict[str, float]
    """10^9 floating point operations (a multiply-add is two) by part of the step."""
    fp32_gflop: float
    """Those of them that run in float32: all of a float32 run, the islands of a bf16 one."""
    activation_bytes: int
    """Most that is kept for backward passes at once, an image; steps with a lazy penalty need more."""
    cast_bytes: int
    """The same whatever the batch: weights cast or scaled for the pass."""
    parameters: dict[str, int]
    """Numbers by network."""
    state_bytes: int
    """Weights, gradients, optimiser state and average, whatever the batch."""

    @property
    def gflop_per_image(self) -> float:
        """All parts together."""
        return sum(self.gflop.values())


def measure_cost(recipe: Recipe, *, grad_checkpointing: bool = False) -> Cost:
    """Count a recipe's cost; without that of a timm model as phi, whose weights fake tensors cannot hold.

    Args:
        recipe: What runs.
        grad_checkpointing: Whether the autoencoder's blocks keep nothing for backward passes and run twice; it changes
            `activation_bytes` alone here.

    Raises:
        ValueError: If the recipe's model is unknown or cannot be pretrained.
    """
    recipe = _without_timm_phi(recipe)
    few, many = (_count_kept(_without_lazy_terms(recipe), samples, grad_checkpointing) for samples in (8, 16))
    with fake_team(recipe) as team:
        networks: dict[str, nn.Module] = {
            "encoder": team.network.encoder,
            "decoder": team.network.decoder,
            **({"discriminator": team.adversary.player.network} if team.adversary else {}),
        }
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    learned = sum(parameters.values())
    copies = parameters["encoder"] + parameters["decoder"] if recipe.ema_decay else 0
    if isinstance(recipe, AdversarialRecipe) and recipe.phi == "snapshot":
        copies += parameters["discriminator"]
    return Cost(
        gflop=count_gflop(recipe),
        fp32_gflop=count_fp32_gflop(recipe),
        activation_bytes=(many - few) // 8,
        cast_bytes=max(0, 2 * few - many),
        parameters=parameters,
        state_bytes=4 * (4 * learned + copies),
    )


def count_gflop(recipe: Recipe, *, before_start: bool = False) -> dict[str, float]:
    """10^9 floating point operations an image and step, by part; see `Cost`.

    Args:
        recipe: Of the step.
        before_start: Of a step before `adversarial_start`.
    """
    return {part: everything for part, (everything, _) in _count(recipe, before_start=before_start).items()}


def count_fp32_gflop(recipe: Recipe, *, before_start: bool = False) -> float:
    """Those of `count_gflop`, all parts together, that run in float32."""
    return sum(float32 for _, float32 in _count(recipe, before_start=before_start).values())


@functools.cache
def _count(recipe: Recipe, *, before_start: bool) -> dict[str, tuple[float, float]]:
    """By part of the step: all operations, and those in float32."""
    recipe = _without_timm_phi(recipe)
    gflop: dict[str, tuple[float, float]] = {}
    # torch has formulas for plain arithmetic
    with fake_team(recipe) as team, _FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):

        def mark(part: str) -> None:
            found = counter.pop()
            if any(found):
                before = gflop.get(part, (0.0, 0.0))
                gflop[part] = before[0] + found[0] / 1e9 / _SAMPLES, before[1] + found[1] / 1e9 / _SAMPLES

        _fake_pass(recipe, _SAMPLES, team, mark, plain=before_start)
    if isinstance(recipe, AdversarialRecipe) and not before_start:
        for penalty in penalties(recipe):
            if penalty.every:
                everything, float32 = gflop[penalty.name]
                gflop[penalty.name] = everything / penalty.every, float32 / penalty.every
    return gflop


def compute_seconds(gflop: float, fp32_gflop: float, peak_tflops: float, fp32_peak_tflops: float) -> float:
    """The least time that arithmetic takes, each part at its own peak.

    Args:
        gflop: 10^9 operations, all of them.
        fp32_gflop: Those in float32. TF32 is off in training.
        peak_tflops: 10^12 operations a second, in bf16.
        fp32_peak_tflops: The same in float32.
    """
    return (gflop - fp32_gflop) / 1e3 / peak_tflops + fp32_gflop / 1e3 / fp32_peak_tflops


def matmul_peak(device: torch.device, precision: str, *, seconds: float = 0.3) -> float:
    """Measure the fastest matrix product of this machine, in GFLOP/s, with the threads torch uses now.

    Args:
        device: Where.
        precision: "bf16" or "fp32", in torch's present settings (TF32 where it is switched on).
        seconds: How long to try.
    """
    # small on processors: where they have no bf16 units, 2048 takes more than a minute
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return 2 * size**3 / best / 1e9


def describe(
    recipe: Recipe,
    *,
    num_images: int | None,
    devices: int,
    micro_batches: int,
    peak_tflops: float,
    fp32_peak_tflops: float,
    utilisation: float,
    grad_checkpointing: bool = False,
) -> str:
    """Say what a run would do and cost.

    Args:
        recipe: The run.
        num_images: Size of the data set; None: a stream that does not say, whose recipe says `steps`.
        devices: Processes, one a device.
        micro_batches: Passes a step is cut into on each.
        peak_tflops: The device's matrix-product peak in bf16, 10^12 operations a second.
        fp32_peak_tflops: The same in float32.
        utilisation: Share of the peaks that the run reaches.
        grad_checkpointing: Whether the autoencoder's blocks are computed twice, which costs up to a third more time
            and is not in the hours.
    """
    cost, steps = measure_cost(recipe, grad_checkpointing=grad_checkpointing), recipe.num_steps(num_images)
    plain_steps = min(steps, recipe.adversarial_start if isinstance(recipe, AdversarialRecipe) else 0)
    seconds = compute_seconds(cost.gflop_per_image, cost.fp32_gflop, peak_tflops, fp32_peak_tflops)
    seconds *= steps - plain_steps
    if plain_steps:
        before = sum(count_gflop(recipe, before_start=True).values()), count_fp32_gflop(recipe, before_start=True)
        seconds += compute_seconds(*before, peak_tflops, fp32_peak_tflops) * plain_steps
    hours = seconds * recipe.batch_size / utilisation / 3600
    fixed, image = cost.state_bytes + cost.cast_bytes, cost.activation_bytes
    per_device = recipe.batch_size // (devices * micro_batches)
    lines = [f"{name:<20} {value}" for name, value in dataclasses.asdict(recipe).items()]
    lines += ["", "parameters (10^6)"]
    lines += [f"  {name:<18} {number / 1e6:.1f}" for name, number in cost.parameters.items()]
    lines += ["", "GFLOP per image and step, forward and backward"]
    lines += [f"  {name:<18} {value:.2f}" for name, value in cost.gflop.items()]
    lines += [
        f"  {'all':<18} {cost.gflop_per_image:.2f}, {cost.fp32_gflop:.2f} of them in float32",
        "",
        f"devices              {devices}, with {micro_batches} pass(es) a step (--devices, --micro-batches)",
        f"memory per device    {fixed / 2**30:.2f} GiB of weights, gradients and optimiser state"
        f" + {per_device} images of {image / 2**20:.1f} MiB"
        f" = {(fixed + per_device * image) / 2**30:.2f} GiB, before torch's own overhead",
        f"steps                {steps} of {recipe.batch_size} images"
        + ("" if num_images is None else f"; {num_images} images an epoch"),
        f"device hours         {hours:{'.1f' if hours >= 10 else '.2g'}} at {utilisation:.0%} of matrix-product peaks"
        f" of {peak_tflops:g} TFLOP/s, in float32 {fp32_peak_tflops:g}"
        " (--peak-tflops, --fp32-peak-tflops, --assumed-utilisation)",
    ]
    if grad_checkpointing:
        lines.append("not counted          the second pass through the autoencoder's blocks: its time")
    if _without_timm_phi(recipe) != recipe:
        lines.append("not counted          phi, which sees every image and its reconstruction: its passes and weights")
    return "\n".join(lines)


@contextmanager
def fake_team(recipe: Recipe) -> Iterator[Team]:
    """A team of shapes without content, in the mode that computes with such."""
    with torch.device("meta"):
        encoder = create_encoder(recipe)
    with FakeTensorMode():
        for module in encoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        # an average of fake weights would be taken for a bug, and is in no count that is made here
        yield create_team(replace(recipe, ema_decay=None), torch.device("cpu"), encoder=encoder)


def _fake_pass(recipe: Recipe, samples: int, team: Team, mark: Callable[[str], None], *, plain: bool = False) -> None:
    """A step in which every penalty is due, on fake tensors; `plain`: as before the discriminator starts."""
    images = torch.zeros(samples, 3, *team.network.image_size)
    if isinstance(recipe, AdversarialRecipe):
        recipe = replace(recipe, adversarial_start=0)  # all that is ever drawn
    draws = draw(replace(recipe, batch_size=samples), 0, team.network, slice(0, samples))
    if team.adversary and not plain:
        adversarial_pass(team, team.adversary, images, draws, 0, 1.0, mark)
    else:
        plain_pass(team, images, draws, 1.0)
        mark("autoencoder")


def _count_kept(recipe: Recipe, samples: int, grad_checkpointing: bool = False) -> int:
    """Most bytes that autograd keeps at once in a step, weights themselves left out."""
    with fake_team(recipe) as team:
        team.network.grad_checkpointing = grad_checkpointing
        weights = {p.untyped_storage()._cdata for module in team.modules().values() for p in module.parameters()}
        ledger = _Ledger(weights)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(ledger, tensor), lambda kept: kept.tensor):
            _fake_pass(recipe, samples, team, lambda part: None)
    return ledger.most


class _Ledger:
    """Counts the storages that autograd holds on to: each once, while anybody holds it.

    Args:
        free: Storages that do not count.
    """

    def __init__(self, free: set[int]) -> None:
        self.free = free
        self.holders: dict[int, int] = {}
        self.live = self.most = 0

    def change(self, tensor: Tensor, by: int) -> None:
        """One holder more or less."""
        storage = tensor.untyped_storage()
        before = self.holders.get(storage._cdata, 0)
        self.holders[storage._cdata] = before + by
        if storage._cdata not in self.free and 0 in (before, before + by):
            self.live += by * storage.nbytes()
            self.most = max(self.most, self.live)


class _Kept:
    """A tensor that autograd keeps; it leaves the books with the graph."""

    def __init__(self, ledger: _Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.change(tensor, 1)

    def __del__(self) -> None:
        self.ledger.change(self.tensor, -1)


class _FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas; torch's FlopCounterMode also tracks modules, which second derivatives break."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.float32 = 0

    def pop(self) -> tuple[int, int]:
        """Operations since the last call: all, and those in float32."""
        found = self.flops, self.float32
        self.flops = self.float32 = 0
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            if args[0].dtype == torch.float32:
                self.float32 += flops
        return out


def _without_timm_phi(recipe: Recipe) -> Recipe:
    if isinstance(recipe, AdversarialRecipe) and recipe.phi.startswith("timm:"):
        return replace(recipe, phi="discriminator", phi_file=None)
    return recipe


def _without_lazy_terms(recipe: Recipe) -> Recipe:
    return replace(recipe, r1_gamma=0.0, path_weight=0.0) if isinstance(recipe, AdversarialRecipe) else recipe


def processor_name() -> str:
    """What the operating system calls the CPU."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()
