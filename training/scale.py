"""What runs of every size would cost on many GPUs, on paper: hours, loader cores, storage, failures.

    python training/scale.py                                               # counts the costs: minutes
    python training/scale.py --counted training/SCALE.md                   # takes the counts from an older report
    python training/scale.py --gpu-peak-tflops 989 --cores-per-node 192    # what if?

Arithmetic, parameters and checkpoint bytes are counted on the real networks; `Assumptions` are assumed unless they
say measured. training/SCALE.md holds the output for the defaults and what it means.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from training.cost import IMAGENET_IMAGES, compute_seconds, count_fp32_gflop, count_gflop, fake_team
from training.data.stream import MAX_LANES
from training.recipes import METHODS, Recipe

ENCODERS = {"B": "vit_base_patch16_pmae", "L": "vit_large_patch16_pmae", "H": "vit_huge_patch14_pmae"}
ALL_METHODS = ("mae", "ms_ssim", "ls_gan_p", "msg_gan_p", "stylegan2_ada_p")
RUNS = {"B": ALL_METHODS, "L": ALL_METHODS, "H": ("mae", "stylegan2_ada_p")}
GPUS = (8, 16, 32, 64, 128, 256, 512)
BATCH = Recipe.batch_size
BEGIN, END = "<!-- begin: python training/scale.py -->", "<!-- end: python training/scale.py -->"


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
    with fake_team(replace(recipe, ema_decay=None)) as team:
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def table_of_assumptions(a: Assumptions) -> str:
    """Every field."""
    return table(("assumption", "value"), [(f"`{k}`", f"{v:,g}") for k, v in dataclasses.asdict(a).items()])


def table_of_counts(costs: Costs) -> str:
    """What `read_counts` reads."""
    rows = []
    for (size, method), c in costs.items():
        parts = ", ".join(f"{part} {value:.2f}" for part, value in c.gflop.items())
        numbers = f"{c.learned:,}", f"{4 * c.learned / 1e6:.0f}", f"{c.checkpoint:,}", f"{c.checkpoint_ema:,}"
        rows.append((size, method, f"{c.all_gflop:.2f}", f"{c.fp32_gflop:.2f}", parts, *numbers))
    header = (
        "ViT",
        "method",
        "GFLOP an image",
        "in float32",
        "by part",
        "learned",
        "gradient MB",
        "checkpoint bytes",
        "with average",
    )
    return table(header, rows)


def read_counts(report: str) -> Costs:
    """The counts of an older report, exactly; a ValueError if it has none."""
    costs = {}
    for line in report.partition("### Counted")[2].partition("###")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in RUNS:
            parts = [part.rsplit(" ", 1) for part in cells[4].split(", ")]
            learned, checkpoint, with_ema = (int(cells[i].replace(",", "")) for i in (5, 7, 8))
            gflop = {name: float(value) for name, value in parts}
            costs[cells[0], cells[1]] = Counts(gflop, float(cells[3]), learned, checkpoint, with_ema)
    if not costs:
        raise ValueError("no table under '### Counted'")
    return costs


def table_of_hours(costs: Costs, data: Data, a: Assumptions) -> str:
    """Hours without failures, and the bottleneck."""

    def cell(c: Counts, gpus: int) -> str:
        seconds, bottleneck = step_seconds(c, gpus, a, streamed=data.streamed)
        return f"{data.steps * seconds / 3600:.1f} {bottleneck}"

    rows = [(*key, *(cell(c, gpus) for gpus in GPUS)) for key, c in costs.items()]
    return table(("ViT", "method", *(f"{gpus} GPUs" for gpus in GPUS)), rows)


def table_of_demand(costs: Costs, a: Assumptions) -> str:
    """What the GPUs ask of loader and storage if neither held them up."""

    def cell(c: Counts, gpus: int) -> str:
        speed = BATCH / sum(gpu_seconds(c, gpus, a).values())
        return f"{speed:,.0f} / {speed / a.loader_images_per_second:,.0f} / {speed * a.bytes_per_image / 1e9:.2f}"

    shown = (8, 64, 512)
    read = {n: nodes(n, a) * a.storage_bytes_per_second / 1e9 for n in shown}
    there = [f"there are {loader_cores(n, a, streamed=False):,} / {read[n]:g}" for n in shown]
    return table(
        ("ViT", "method", *(f"{gpus} GPUs" for gpus in shown)),
        [("", "", *there), *((*key, *(cell(c, gpus) for gpus in shown)) for key, c in costs.items())],
    )


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


def table_of_saturation(costs: Costs, a: Assumptions) -> str:
    """`saturation`, and how many GPUs the loader cores of a node feed, now and three times as fast."""
    free, rows = a.cores_per_node - a.gpus_per_node, []
    for key, c in costs.items():
        cores, fixed, reduce = saturation(c, a)
        streams = "yes" if cores <= min(MAX_LANES, free / a.gpus_per_node) else "no"
        row = (*key, f"{cores:.1f}", f"{free / cores:.1f}", f"{free / cores / 3:.1f}", streams)
        rows.append((*row, f"{fixed:,.0f} ({BATCH / fixed:.0f})", f"{reduce:,.0f} ({BATCH / reduce:.0f})"))
    loader = "loader cores a GPU", "GPUs a node feeds", "if 3 x as fast", "a stream keeps up"
    crossings = "fixed part > compute from GPUs (local batch)", "all-reduce > compute from GPUs (local batch)"
    return table(("ViT", "method", *loader, *crossings), rows)


def table_of_failures(costs: Costs, data: Data, gpu_numbers: Sequence[int], a: Assumptions) -> str:
    """Time lost at the default interval and at Young's, and the failure rates that a run survives."""
    rows = []
    for (size, method), c in costs.items():
        for gpus in gpu_numbers if method in RUNS["H"] else ():
            step, _ = step_seconds(c, gpus, a, streamed=data.streamed)
            write, restart = c.checkpoint / a.checkpoint_bytes_per_second, restart_seconds(data, gpus, a)
            mtbf = 3600 * a.gpu_mtbf_hours / gpus
            cells = [size, method, str(gpus), f"{mtbf / 3600:,.0f}", f"{write:.1f}", f"{restart / 60:.0f}"]
            for interval in (a.checkpoint_steps * step, best_interval(write, mtbf)):
                given = write, interval, restart
                survived = 86400 / survivable_mtbf(*given, a.tolerable_loss)
                cells += [f"{interval / 60:.1f}", f"{lost_share(*given, mtbf):.2%}"]
                cells += [f"{simulate_lost_share(*given, mtbf):.2%}", f"{survived:.1f}"]
            rows.append(cells)
    columns = "lost", "simulated", "survives a day"
    header = "ViT", "method", "GPUs", "MTBF h", "write s", "restart min", "minutes apart", *columns
    return table((*header, "Young's minutes", *columns), rows)


def report(costs: Costs, a: Assumptions) -> str:
    """All tables."""
    sections = {
        "Counted": table_of_counts(costs),
        "Assumed": table_of_assumptions(a),
        f"{IMAGENET.title}: hours and bottleneck": table_of_hours(costs, IMAGENET, a),
        f"{BILLION.title}: hours and bottleneck": table_of_hours(costs, BILLION, a),
        "Demand: images/s / loader cores / GB/s of storage": table_of_demand(costs, a),
        "Saturation": table_of_saturation(costs, a),
        f"Failures: {IMAGENET.title}": table_of_failures(costs, IMAGENET, (8, 64, 512), a),
        f"Failures: {BILLION.title}": table_of_failures(costs, BILLION, (64, 512), a),
    }
    return "\n\n".join(f"### {title}\n\n{body}" for title, body in sections.items())


def main(
    assumptions: tyro.conf.OmitArgPrefixes[Assumptions], counted: Path | None = None, into: Path | None = None
) -> None:
    """Print the tables.

    Args:
        assumptions: The machine.
        counted: Take the counts from this report instead of counting.
        into: Also put the tables into this document, between its two markers.
    """
    keys = [(size, method) for size in RUNS for method in RUNS[size]]
    try:
        costs = read_counts(counted.read_text()) if counted else {k: count(METHODS[k[1]](ENCODERS[k[0]])) for k in keys}
        tables = report(costs, assumptions)
        print(tables)
        if into:
            before, begin, rest = into.read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if not (begin and end):
                raise ValueError(f"{into} lacks the markers {BEGIN} and {END}")
            into.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"scale.py: {error}") from error


if __name__ == "__main__":
    tyro.cli(main)
