"""What a recipe costs: arithmetic counted on the real step, parameters, memory, hours. Nothing here is typed in.

The step runs on fake tensors, which have shapes and no content, under torch's counters; so an encoder of any size is
counted within seconds and without its memory.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
    activation_bytes: int
    """Kept between forward and backward pass."""
    parameters: dict[str, int]
    """Numbers by network."""
    state_bytes: int
    """Weights, gradients, optimiser state and average, whatever the batch."""

    @property
    def gflop_per_image(self) -> float:
        """All parts together."""
        return sum(self.gflop.values())


def measure_cost(recipe: Recipe) -> Cost:
    """Count a recipe's cost; without that of a timm model as phi, whose weights fake tensors cannot hold.

    Raises:
        ValueError: If the recipe's model is unknown or cannot be pretrained.
    """
    recipe = _without_timm_phi(recipe)
    _, activation_bytes = _count_pass(_without_lazy_terms(recipe), fused=True)
    with fake_team(recipe) as team:
        networks: dict[str, nn.Module] = {
            "encoder": team.network.encoder,
            "decoder": team.network.decoder,
            **({"discriminator": team.adversary.player.network} if team.adversary else {}),
        }
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    learned = sum(parameters.values())
    averaged = parameters["encoder"] + parameters["decoder"] if recipe.ema_decay else 0
    return Cost(count_gflop(recipe), activation_bytes, parameters, 4 * (4 * learned + averaged))


@functools.cache
def count_gflop(recipe: Recipe) -> dict[str, float]:
    """10^9 floating point operations an image and step, by part; see `Cost`."""
    recipe = _without_timm_phi(recipe)
    gflop, _ = _count_pass(recipe)
    if isinstance(recipe, AdversarialRecipe):
        gflop |= {p.name: gflop[p.name] / p.every for p in penalties(recipe) if p.every}
    return gflop


def matmul_peak(device: torch.device, precision: str, *, seconds: float = 0.3) -> float:
    """Measure the fastest matrix product of this machine, in GFLOP/s, with the threads torch uses now.

    Args:
        device: Where.
        precision: "bf16" or "fp32", in torch's present settings (TF32 where it is switched on).
        seconds: How long to try.
    """
    size = 8192 if device.type == "cuda" else 2048
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


def describe(recipe: Recipe, *, num_images: int, per_device: int, peak_tflops: float, utilisation: float) -> str:
    """Say what a run would do and cost.

    Args:
        recipe: The run.
        num_images: Size of the data set.
        per_device: Images of one pass on one device.
        peak_tflops: The device's matrix-product peak, 10^12 operations a second.
        utilisation: Share of the peak that the run reaches.
    """
    cost, steps = measure_cost(recipe), recipe.num_steps(num_images)
    hours = cost.gflop_per_image * 1e9 * steps * recipe.batch_size / (peak_tflops * 1e12 * utilisation) / 3600
    lines = [f"{name:<20} {value}" for name, value in dataclasses.asdict(recipe).items()]
    lines += ["", "parameters (10^6)"]
    lines += [f"  {name:<18} {number / 1e6:.1f}" for name, number in cost.parameters.items()]
    lines += ["", "GFLOP per image and step, forward and backward"]
    lines += [f"  {name:<18} {value:.2f}" for name, value in cost.gflop.items()]
    lines += [
        f"  {'all':<18} {cost.gflop_per_image:.2f}",
        "",
        f"memory per device    {cost.state_bytes / 2**30:.2f} GiB of weights, gradients and optimiser state"
        f" + {per_device} images of {cost.activation_bytes / 2**20:.1f} MiB"
        f" = {(cost.state_bytes + per_device * cost.activation_bytes) / 2**30:.2f} GiB, before torch's own overhead",
        f"steps                {steps} of {recipe.batch_size} images; {num_images} images an epoch",
        f"device hours         {hours:.1f} at {utilisation:.0%} of {peak_tflops:g} TFLOP/s",
    ]
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
        yield create_team(recipe, torch.device("cpu"), encoder=encoder)


def _count_pass(recipe: Recipe, *, fused: bool = False) -> tuple[dict[str, float], int]:
    """GFLOP by part and bytes kept for the backward pass, for one image of a step in which every penalty is due."""
    recipe = replace(recipe, batch_size=_SAMPLES)
    # torch has formulas for plain arithmetic, and only fused attention keeps as little as a run does
    attention = nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
    gflop: dict[str, float] = {}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with fake_team(recipe) as team, _FlopCounter() as counter, attention:
        images = torch.zeros(_SAMPLES, 3, *team.network.image_size)
        draws = draw(recipe, 0, team.network, slice(0, _SAMPLES))

        def mark(part: str) -> None:
            gflop[part] = gflop.get(part, 0.0) + counter.pop() / 1e9 / _SAMPLES

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if team.adversary:
                adversarial_pass(team, team.adversary, images, draws, 0, 1.0, mark)
            else:
                plain_pass(team, images, draws, 1.0)
                mark("autoencoder")
        weights = {p.untyped_storage()._cdata for module in team.modules().values() for p in module.parameters()}
    kept_bytes = sum(size for storage, size in kept.items() if storage not in weights)
    return {part: value for part, value in gflop.items() if value}, kept_bytes // _SAMPLES


class _FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas; torch's FlopCounterMode also tracks modules, which second derivatives break."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def pop(self) -> int:
        """Operations since the last call."""
        flops, self.flops = self.flops, 0
        return flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _without_timm_phi(recipe: Recipe) -> Recipe:
    if isinstance(recipe, AdversarialRecipe) and recipe.phi.startswith("timm:"):
        return replace(recipe, phi="discriminator", phi_file=None)
    return recipe


def _without_lazy_terms(recipe: Recipe) -> Recipe:
    return replace(recipe, r1_gamma=0.0, path_weight=0.0) if isinstance(recipe, AdversarialRecipe) else recipe
