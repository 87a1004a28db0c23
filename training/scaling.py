"""A model of large runs: seconds of a step by what the machine does, and what failures cost.

`training/scale.py` makes tables of it; training/SCALE.md says what it rests on.
"""

import math
import random
from dataclasses import dataclass

from training.cost import IMAGENET_IMAGES, compute_seconds, count_fp32_gflop, count_gflop, fake_team
from training.data.stream import MAX_LANES
from training.recipes import Recipe

BATCH = Recipe.batch_size


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The machine, and what is expected of it. Defaults: eight A100 a node."""

    gpu_peak_tflops: float = 312.0
    """Matrix-product peak of a GPU in bf16, 10^12 operations a second; an A100's by its data sheet."""
    gpu_fp32_peak_tflops: float = 19.5
    """The same in float32."""
    utilisation: float = 0.4
    """Share of these peaks that large batches reach."""
    fixed_seconds: float = 0.02
    """Time of a step that no further GPU shortens: launches, optimisers, draws."""
    gpus_per_node: int = 8
    """GPUs that share a node's cores, network and storage."""
    cores_per_node: int = 96
    """Processor cores of a node; each GPU's own process takes one, loader workers share the others."""
    node_bytes_per_second: float = 200e9
    """What a GPU sends to another of its node."""
    network_bytes_per_second: float = 25e9
    """What a GPU sends to another node: 200 Gbit/s each."""
    overlap: float = 0.5
    """Share of the compute time behind which the all-reduce can hide; 0: none of it does."""
    storage_bytes_per_second: float = 2e9
    """What a node reads."""
    bytes_per_image: float = 37e3
    """Of a stored image; measured: see SCALE.md."""
    loader_images_per_second: float = 247.0
    """What a loader core decodes, crops and flips; measured: see SCALE.md."""
    gpu_mtbf_hours: float = 50_000.0
    """GPU hours between interruptions."""
    checkpoint_bytes_per_second: float = 1e9
    """What the main process writes; all others wait for it."""
    checkpoint_steps: int = 500
    """Steps between checkpoints: pretrain.py's --checkpoint-every."""
    restart_minutes: float = 10.0
    """From a failure to the first step after it, without what was lost."""
    tolerable_loss: float = 0.1
    """Share of the time that failures and checkpoints may take from a run that counts as surviving."""


@dataclass(frozen=True)
class Counts:
    """What is counted of a recipe; everything else here follows from it exactly."""

    gflop: dict[str, float]
    """10^9 operations an image and step, by part, to two decimals."""
    fp32_gflop: float
    """Those of them that run in float32."""
    learned: int
    """Parameters with a gradient, all networks."""
    checkpoint: int
    """Bytes of the tensors in a checkpoint."""
    checkpoint_ema: int
    """The same with --ema-decay."""

    @property
    def all_gflop(self) -> float:
        """All parts together."""
        return sum(self.gflop.values())

    def image_seconds(self, a: Assumptions) -> float:
        """What an image's arithmetic takes on one GPU."""
        seconds = compute_seconds(self.all_gflop, self.fp32_gflop, a.gpu_peak_tflops, a.gpu_fp32_peak_tflops)
        return seconds / a.utilisation


@dataclass(frozen=True)
class Data:
    """Images of a run."""

    title: str
    seen: int
    """Images that the run sees, again or not."""
    streamed: bool
    """Read by training/data/stream.py."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return round(self.seen / BATCH)


IMAGENET = Data("ImageNet-1K, 300 epochs", 300 * IMAGENET_IMAGES, streamed=False)
BILLION = Data("A billion images, streamed once", 10**9, streamed=True)

Costs = dict[tuple[str, str], Counts]
"""By size of the encoder and method."""


def count(recipe: Recipe) -> Counts:
    """Count a recipe's arithmetic and tensors."""
    gflop = {part: round(value, 2) for part, value in count_gflop(recipe).items()}
    return Counts(gflop, round(count_fp32_gflop(recipe), 2), *count_tensors(recipe))


def count_tensors(recipe: Recipe) -> tuple[int, int, int]:
    """Numbers that learn; bytes of a checkpoint (all modules, two Adam moments); the same with an average."""
    with fake_team(recipe) as team:
        groups = [group for optimizer in team.optimizers().values() for group in optimizer.param_groups]
        learned = [p for group in groups for p in group["params"] if p.requires_grad]
        states = {name: sum(t.nbytes for t in m.state_dict().values()) for name, m in team.modules().items()}
        checkpoint = sum(states.values()) + 2 * sum(p.nbytes for p in learned)
        return sum(p.numel() for p in learned), checkpoint, checkpoint + states["network"]


def ring_seconds(num_bytes: float, gpus: int, bytes_per_second: float) -> float:
    """All-reduce over a ring: each GPU sends 2 (n - 1) / n of the bytes."""
    return 2 * (gpus - 1) / gpus * num_bytes / bytes_per_second


def nodes(gpus: int, a: Assumptions) -> int:
    """Nodes that hold so many GPUs."""
    return math.ceil(gpus / a.gpus_per_node)


def loader_cores(gpus: int, a: Assumptions, *, streamed: bool) -> int:
    """Cores that load images; a process serves a stream with at most `MAX_LANES` workers."""
    cores = nodes(gpus, a) * a.cores_per_node - gpus
    return min(cores, MAX_LANES * gpus) if streamed else cores


def gpu_seconds(costs: Counts, gpus: int, a: Assumptions) -> dict[str, float]:
    """Seconds of a step by what the GPUs do, of the all-reduce only what does not hide behind the backward pass."""
    compute = BATCH / gpus * costs.image_seconds(a)
    link = a.node_bytes_per_second if gpus <= a.gpus_per_node else a.network_bytes_per_second
    reduce = ring_seconds(4 * costs.learned, gpus, link)
    return {"compute": compute, "fixed": a.fixed_seconds, "all-reduce": max(0.0, reduce - a.overlap * compute)}


def step_seconds(costs: Counts, gpus: int, a: Assumptions, *, streamed: bool) -> tuple[float, str]:
    """Seconds of a step, and its bottleneck. Images are loaded while the GPUs compute: the slower of them decides."""
    parts = gpu_seconds(costs, gpus, a)
    sources = {
        "GPUs": sum(parts.values()),
        "loader": BATCH / a.loader_images_per_second / loader_cores(gpus, a, streamed=streamed),
        "storage": BATCH * a.bytes_per_image / (nodes(gpus, a) * a.storage_bytes_per_second),
    }
    slowest = max(sources, key=lambda name: sources[name])
    return sources[slowest], max(parts, key=lambda name: parts[name]) if slowest == "GPUs" else slowest


def lost_share(write: float, interval: float, restart: float, mtbf: float) -> float:
    """Share of the time that checkpoints and failures take, to first order in interval / mtbf.

    Args:
        write: Seconds that a checkpoint takes.
        interval: Seconds between checkpoints.
        restart: Seconds from a failure to the next step.
        mtbf: Mean seconds between failures of the whole machine.
    """
    return write / interval + (interval / 2 + restart) / mtbf


def best_interval(write: float, mtbf: float) -> float:
    """Young's (1974) interval, where `lost_share` is least."""
    return math.sqrt(2 * write * mtbf)


def survivable_mtbf(write: float, interval: float, restart: float, tolerable: float) -> float:
    """Mean seconds between failures at which `lost_share` is `tolerable`; infinite if checkpoints alone exceed it."""
    left = tolerable - write / interval
    return (interval / 2 + restart) / left if left > 0 else math.inf


def simulate_lost_share(
    write: float, interval: float, restart: float, mtbf: float, *, failures: int = 20_000, seed: int = 0
) -> float:
    """By drawing failures what `lost_share` approximates; nothing fails during a restart."""
    draw = random.Random(seed)
    useful = spent = 0.0
    for _ in range(failures):
        uptime = draw.expovariate(1 / mtbf)
        useful += uptime // (interval + write) * interval  # what came after the last checkpoint is lost
        spent += uptime + restart
    return 1 - useful / spent


def restart_seconds(data: Data, gpus: int, a: Assumptions) -> float:
    """A restart; a stream, at half of the run, is read again from its beginning, at the storage's speed at best."""
    again = data.seen / 2 * a.bytes_per_image / (nodes(gpus, a) * a.storage_bytes_per_second)
    return 60 * a.restart_minutes + (again if data.streamed else 0.0)


def saturation(costs: Counts, a: Assumptions) -> tuple[float, float, float]:
    """Where more hardware stops helping.

    Returns:
        Loader cores that one computing GPU needs; the numbers of GPUs from which a step's fixed part, and from which
        its all-reduce between nodes (all of it), takes longer than its compute.
    """
    images_per_second = 1 / costs.image_seconds(a)
    fixed = BATCH / images_per_second / a.fixed_seconds
    # compute / n = 2 (n - 1) / n x bytes / bandwidth, solved for n
    reduce = 1 + BATCH / images_per_second * a.network_bytes_per_second / (2 * 4 * costs.learned)
    return images_per_second / a.loader_images_per_second, fixed, reduce
