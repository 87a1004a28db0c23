"""Measure what a step costs on this machine.

    python training/benchmark.py --methods mae ls_gan_p msg_gan_p stylegan2_ada_p --baseline     # ratios in one run
    python training/benchmark.py --methods mae --precision bf16 --json mae.json
    python training/benchmark.py --methods mae --processes 2     # two processes against one with as many threads
    python training/benchmark.py --methods mae --data photos/    # what the loader gives, beside the step

Images are random: it is compute that is measured. The methods take turns within each round, so that a machine that
slows down slows all of them; figures are medians over rounds. Steps in which a penalty is due are measured apart and
counted as often as they happen. Memory is that of a fresh process, above what it holds before the networks exist.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from training.cost import matmul_peak, measure_cost, processor_name
from training.data.images import ImageSource, RandomViews, create_loader
from training.data.sampler import DeterministicBatchSampler
from training.draws import draw
from training.penalties import penalties
from training.recipes import METHODS, AdversarialRecipe, Recipe
from training.run.clock import StepClock
from training.run.memory import call_in_fresh_process, resident_mb
from training.step import training_step
from training.team import autocast, create_team

BASELINE = "transformers.ViTMAEForPreTraining"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    methods: tuple[str, ...] = ("mae",)
    """Recipes of training/recipes.py."""
    model: str = "vit_base_patch16_pmae"
    """Encoder, an architecture name of `pmae list`."""
    batch_size: int = 8
    """Images a step, over all processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks' forward pass."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    d_width: int | None = None
    """The discriminator's width instead of the recipe's."""
    compile: bool = False
    """torch.compile the networks."""
    grad_checkpointing: bool = False
    """Compute blocks twice instead of keeping what is inside them."""
    baseline: bool = False
    """Also time Hugging Face's ViTMAE of the same shape with the same optimiser."""
    rounds: int = 5
    """Turns that each method gets."""
    memory: bool = True
    """Measure peak memory too, each method in a process of its own."""
    processes: int = 1
    """Above 1: compare that many processes of one thread with one process of that many threads (CPU)."""
    data: Path | None = None
    """Also measure the loader alone, on a folder or .tar of images: images a second of one core."""
    json: Path | None = None
    """Write the results there."""


class Contestant:
    """A method whose steps can be timed one by one.

    Args:
        method: A recipe's name, or `BASELINE`.
        options: What to measure.
        device: Where.
    """

    def __init__(self, method: str, options: Options, device: torch.device) -> None:
        self.method = method
        self.recipe = resolve_recipe("mae" if method == BASELINE else method, options)
        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        local = options.batch_size // world_size
        self.share = slice(rank * local, (rank + 1) * local)
        self.kinds = kinds_of_step(self.recipe)
        self.run = self._baseline(device) if method == BASELINE else self._ours(options, device)
        self.seconds: dict[int, list[float]] = {step: [] for step in self.kinds}
        self.shares: dict[int, dict[str, float]] = {step: {} for step in self.kinds}

    def _ours(self, options: Options, device: torch.device) -> Callable[[int], None]:
        team = create_team(self.recipe, device)
        team.network.grad_checkpointing = options.grad_checkpointing
        for player in (team.player, *([team.adversary.player] if team.adversary else [])):
            distribute = DistributedDataParallel if torch.distributed.is_initialized() else lambda network: network
            player.prepare(distribute, compiled=options.compile)
        images = torch.rand(self.share.stop - self.share.start, 3, *team.network.image_size, device=device)
        self.clock = StepClock(device)

        def run(step: int) -> None:
            draws = draw(self.recipe, step, team.network, self.share).to(device)
            self.clock.mark("draws")
            training_step(team, images, draws, step, mark=self.clock.mark)

        return run

    def _baseline(self, device: torch.device) -> Callable[[int], None]:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        team = create_team(self.recipe, device)  # for its shapes and its optimiser's groups
        encoder = team.network.encoder
        first: Any = encoder.blocks[0]
        heads: int = first.attn.num_heads
        config = ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=heads,
            intermediate_size=4 * encoder.embed_dim,
            image_size=team.network.image_size[0],
            patch_size=team.network.patch_size,
            decoder_hidden_size=self.recipe.decoder_dim,
            decoder_num_hidden_layers=self.recipe.decoder_depth,
            decoder_num_attention_heads=self.recipe.decoder_heads,
            decoder_intermediate_size=4 * self.recipe.decoder_dim,
            mask_ratio=self.recipe.mask_ratio,
            norm_pix_loss=self.recipe.norm_pix_loss,
        )
        network: nn.Module = ViTMAEForPreTraining(config)
        network.to(device).train()
        optimizer = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad], lr=1e-4, betas=self.recipe.betas, fused=True
        )
        images = torch.rand(self.share.stop - self.share.start, 3, *team.network.image_size, device=device)
        self.clock = StepClock(device)

        def run(step: int) -> None:
            with autocast(self.recipe, device.type):
                loss = network(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def time(self, step: int, device: torch.device) -> None:
        """Run a step of the kind of `step` and note its seconds, and the shares of its parts."""
        self.clock.mark("")
        start = time.perf_counter()
        self.run(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[step].append(time.perf_counter() - start)
        self.shares[step] = self.clock.pop_shares()

    @property
    def share_by_part(self) -> dict[str, float]:
        """Shares of a step's time, each kind of step counted as often as it happens."""
        weights = {step: statistics.median(self.seconds[step]) * count for step, count in self.kinds.items()}
        parts = {part for shares in self.shares.values() for part in shares}
        return {
            part: sum(weights[step] * self.shares[step].get(part, 0.0) for step in weights) / sum(weights.values())
            for part in sorted(parts)
        }

    @property
    def seconds_per_step(self) -> float:
        """Median, lazy steps averaged in."""
        total = sum(self.kinds.values())
        return sum(statistics.median(self.seconds[step]) * count for step, count in self.kinds.items()) / total


def resolve_recipe(method: str, options: Options) -> Recipe:
    """The recipe that a method is measured with."""
    recipe = replace(METHODS[method](options.model), batch_size=options.batch_size, precision=options.precision)
    if options.d_width is not None and isinstance(recipe, AdversarialRecipe):
        recipe = replace(recipe, d_width=options.d_width)
    return recipe


def kinds_of_step(recipe: Recipe) -> dict[int, int]:
    """One step for each set of penalties that can be due together, and how many of a whole cycle are like it."""
    if not isinstance(recipe, AdversarialRecipe):
        return {0: 1}
    intervals = [penalty.every for penalty in penalties(recipe) if penalty.every]
    steps_of: dict[tuple[bool, ...], list[int]] = {}
    for step in range(math.lcm(*intervals)):
        steps_of.setdefault(tuple(step % every == 0 for every in intervals), []).append(step)
    return {steps[0]: len(steps) for steps in steps_of.values()}


def measure(options: Options) -> dict[str, Any]:
    """Time the methods in turns.

    Returns:
        `results`, a dict a method, and `machine`.
    """
    cuda = options.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    names = [*options.methods, *([BASELINE] if options.baseline else [])]
    contestants = [Contestant(name, options, device) for name in names]
    peaks = []
    for contestant in contestants:  # warm-up: allocations, autotuning, compilation
        for step in contestant.kinds:
            contestant.run(step)
        contestant.clock.pop_shares()
    for _ in range(options.rounds):
        peaks.append(matmul_peak(device, options.precision))
        for contestant, step in ((c, step) for c in contestants for step in c.kinds):
            contestant.time(step, device)
    peak = max(peaks)
    results = []
    for contestant in contestants:
        cost = measure_cost(contestant.recipe)
        seconds = contestant.seconds_per_step
        share = contestant.share.stop - contestant.share.start
        memory = peak_memory_mb(contestant.method, options, cuda=cuda) if options.memory else None
        results.append(
            {
                "method": contestant.method,
                "model": options.model,
                "batch_size": options.batch_size,
                "dtype": options.precision,
                "device": str(device),
                "seconds_per_step": seconds,
                "seconds_per_image": seconds / options.batch_size,
                "gflop_per_image": cost.gflop_per_image,
                "gflop_by_part": cost.gflop,
                "peak_fraction": cost.gflop_per_image * share / seconds / peak,
                "peak_memory_mb": memory,
                "seconds_by_kind": {str(s): statistics.median(t) for s, t in contestant.seconds.items()},
                "share_by_part": contestant.share_by_part,
                "parameters": cost.parameters,
            }
        )
    return {"results": results, "machine": describe_machine(device, peak, options)}


def peak_memory_mb(method: str, options: Options, *, cuda: bool) -> float:
    """Peak memory of steps in a fresh process, above what it held before the networks existed, in 2^20 bytes."""
    return call_in_fresh_process(_measure_memory, method, options, cuda)


def _measure_memory(method: str, options: Options, cuda: bool) -> float:
    if method == BASELINE:
        import transformers.models.vit_mae.modeling_vit_mae  # noqa: F401  (a library is no part of a step)
    before = resident_mb("VmRSS")
    contestant = Contestant(method, options, torch.device("cuda" if cuda else "cpu"))
    for step in [*contestant.kinds, *contestant.kinds]:  # the first one runs before the optimisers hold anything
        contestant.run(step)
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_mb("VmHWM") - before


def describe_machine(device: torch.device, peak: float, options: Options) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "matmul_peak_gflops": peak,
        "torch": torch.__version__,
        "rounds": options.rounds,
    }


def compare_processes(options: Options) -> dict[str, Any]:
    """One process with many threads against many processes with one, in turns."""
    speeds: dict[str, list[float]] = {"one process": [], f"{options.processes} processes": []}
    arguments = ["--methods", *options.methods, "--model", options.model, "--batch-size", str(options.batch_size)]
    arguments += ["--precision", options.precision, "--device", "cpu", "--rounds", "3", "--no-memory"]
    arguments += ["--compile"] if options.compile else []
    arguments += ["--grad-checkpointing"] if options.grad_checkpointing else []
    arguments += [] if options.d_width is None else ["--d-width", str(options.d_width)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    for _ in range(options.rounds):
        for name, launch, threads in zip(speeds, ([], launcher), (options.processes, 1), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "results.json"
                command = [sys.executable, *launch, __file__, *arguments, "--json", str(file)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                speeds[name].append(1 / json.loads(file.read_text())["results"][0]["seconds_per_image"])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    one, many = medians.values()
    return {"images_per_second": medians, "ratio": many / one, "rounds": options.rounds}


def measure_loader(data: Path, recipe: Recipe, image_size: tuple[int, int], num_images: int = 256) -> float:
    """Images a second that one loader core decodes, crops and flips."""
    source = ImageSource(data)
    sampler = DeterministicBatchSampler(len(source), 32, range(num_images // 32), recipe.seed)
    loader = create_loader(RandomViews(source, image_size, recipe.crop_scale, recipe.seed), sampler, workers=0)
    start = time.process_time()  # of this one thread's core, however busy the others are
    count = sum(len(batch.images) for batch in loader)
    return count / (time.process_time() - start)


def show(measured: dict[str, Any]) -> str:
    """A table of the results, with ratios to the first method."""
    first = measured["results"][0]
    lines = [json.dumps(measured["machine"])]
    for result in measured["results"]:
        memory = result["peak_memory_mb"]
        parts = ", ".join(f"{part} {share:.0%}" for part, share in result["share_by_part"].items())
        lines.append(
            f"{result['method']:<36} {result['seconds_per_step']:8.3f} s/step"
            f"  {result['seconds_per_step'] / first['seconds_per_step']:5.2f} x {first['method']}"
            f"  {result['gflop_per_image']:7.1f} GFLOP/image  {result['peak_fraction']:4.0%} of matmul peak"
            + (f"  {memory:7.0f} MB" if memory is not None else "")
            + (f"  ({parts})" if parts else "")
        )
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measure, print and write."""
    if unknown := [method for method in options.methods if method not in METHODS]:
        raise SystemExit(f"benchmark.py: --methods {', '.join(unknown)}: there are {', '.join(METHODS)}")
    if options.rounds < 1:
        raise SystemExit(f"benchmark.py: --rounds is {options.rounds}: it must be at least 1")
    if options.processes > 1 and (len(options.methods) > 1 or options.baseline or options.data):
        raise SystemExit("benchmark.py: --processes compares one method, without --baseline and --data")
    if options.processes > 1:
        measured = compare_processes(options)
        print(json.dumps(measured, indent=2))
    else:
        if "WORLD_SIZE" in os.environ:
            if options.device == "auto" and torch.cuda.is_available():
                raise SystemExit("benchmark.py: several processes are timed on the CPU alone: --device cpu")
            torch.distributed.init_process_group("gloo")
        measured = measure(options)
        if int(os.environ.get("RANK", 0)):
            return
        print(show(measured))
        if options.data:
            recipe = resolve_recipe(options.methods[0], options)
            size = create_team(recipe, torch.device("cpu")).network.image_size
            measured["loader_images_per_second_per_core"] = measure_loader(options.data, recipe, size)
            print(f"loader: {measured['loader_images_per_second_per_core']:.0f} images/s of one core")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
