"""What runs of every size would cost on many GPUs, on paper: hours, loader cores, storage, failures.

    python training/scale.py                                               # counts the costs: minutes
    python training/scale.py --counted training/SCALE.md                   # takes the counts from an older report
    python training/scale.py --gpu-peak-tflops 989 --cores-per-node 192    # what if?

Arithmetic, parameters and checkpoint bytes are counted on the real networks; `Assumptions` are assumed unless they
say measured. training/SCALE.md holds the output for the defaults and what it means.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

import perceptual_mae_models  # noqa: F401  (registers the encoders in timm)
from training.data.stream import MAX_LANES
from training.recipes import METHODS
from training.scaling import (
    BATCH,
    BILLION,
    IMAGENET,
    Assumptions,
    Costs,
    Counts,
    Data,
    best_interval,
    count,
    gpu_seconds,
    loader_cores,
    lost_share,
    nodes,
    restart_seconds,
    saturation,
    simulate_lost_share,
    step_seconds,
    survivable_mtbf,
)

ENCODERS = {"B": "vit_base_patch16_pmae", "L": "vit_large_patch16_pmae", "H": "vit_huge_patch14_pmae"}
ALL_METHODS = ("mae", "ms_ssim", "ls_gan_p", "msg_gan_p", "stylegan2_ada_p")
RUNS = {"B": ALL_METHODS, "L": ALL_METHODS, "H": ("mae", "stylegan2_ada_p")}
GPUS = (8, 16, 32, 64, 128, 256, 512)
BEGIN, END = "<!-- begin: python training/scale.py -->", "<!-- end: python training/scale.py -->"


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
