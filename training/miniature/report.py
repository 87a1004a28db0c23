"""What the cells found, as `RESULTS.md` and a picture of what features are worth while they are learned.

Everything in them is made of the cells' JSON files alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot

from training.evaluate.intervals import Interval, student_interval
from training.miniature.choice import (
    ARM_NAMED,
    FEATURES,
    Results,
    choose,
    find_default,
    find_sixth,
    list_figures,
    plan,
    tried,
    tuning_figure,
)
from training.miniature.study import (
    ARMS,
    BETWEEN,
    CAUSES,
    CLOCK,
    EVALUATIONS,
    FLOORS,
    LABELLED_PHI,
    MODEL,
    NETWORKS,
    REMEDIES,
    TABLES,
    Part,
)
from training.report.markdown import write_tables
from training.report.tables import Column, Entry, Figure, Figures, Table, build_table

CURVES = "curves.png"
FRONT = (
    Column("knn", "k=20", "accuracy"),
    Column("linear", "", "accuracy"),
    Column("few_shot", "10", "accuracy"),
    Column("reconstruction", "image", "l1"),
    Column("reconstruction", f"image, {NETWORKS[0]}", "fd"),
)
"""What the front page of the repository shows of the study."""


def read_column(row: dict[str, Any]) -> Column:
    """The column of a figure; a setting that is an outcome, such as a learning rate, makes none of its own."""
    return Column(row["protocol"], "" if row["protocol"] == "linear" else row["setting"], row["metric"])


def judges_features(column: Column) -> bool:
    """Whether a column is shown among those of frozen and fine-tuned features."""
    return column.protocol in ("linear", "few_shot", "finetune") or (column.protocol, column.setting) == ("knn", "k=20")


def judges_images(column: Column) -> bool:
    """Whether a column is shown among those of reconstructions."""
    return column.protocol == "reconstruction" and column.metric in ("l1", "psnr", "ssim", "fd")


def judges_dense(column: Column) -> bool:
    """Whether a column is shown among those of segmentation and detection."""
    return column.metric in ("miou", "box_ap")


def cells_of(found: Results, part: Part) -> list[dict[str, Any]]:
    """The results of a table's cells, with those of equal epochs that they are to be held against."""
    beside: dict[Part, tuple[str, ...]] = {"clock": (CLOCK,), "cause": BETWEEN}
    also = [f"epochs-{arm}-0" for arm in beside.get(part, ())]
    return [result for name, result in found.items() if result["cell"]["part"] == part or name in also]


def gather(found: Results, part: Part, images: str, shown: Callable[[Column], bool]) -> Figures:
    """The figures of a table: means over seeds with Student's interval, or of a single seed with its test's.

    Args:
        found: Results by their cells' names.
        part: Whose cells; floors come with them where they have the figure.
        images: Name of the evaluation.
        shown: Tells columns that are wanted.
    """
    names = [arm.name for arm in (*ARMS, *CAUSES)] + list(FLOORS)
    cells = cells_of(found, part)
    values: dict[tuple[str, Column], list[dict[str, Any]]] = {}
    for result in (*cells, *(result for result in found.values() if result["cell"]["part"] == "floor")):
        arm = result["cell"]["arm"]
        for row in list_figures(result):
            if row["images"] == images and shown(column := read_column(row)):
                values.setdefault((arm, column), []).append(row)
        for name, cost in list_costs(result, sum(other["cell"]["arm"] == arm for other in cells)):
            fixed = {"value": {"mean": cost, "low": cost, "high": cost}, "setting": ""}
            values.setdefault((arm, Column("pretraining", "", name)), []).append(fixed)
    order = sorted(values, key=lambda key: (names.index(key[0]), key[1].protocol == "pretraining"))
    helped = list_helped(cells)
    return {
        (Entry(arm, ""), column): Figure(
            entry=Entry(arm, ""),
            column=column,
            value=summarise(values[arm, column]),
            setting="",
            ranked=arm not in (*FLOORS, LABELLED_PHI) and not (column.protocol == "reconstruction" and arm in helped),
        )
        for arm, column in order
    }


def list_costs(result: dict[str, Any], seeds: int) -> Iterator[tuple[str, float]]:
    """What a cell's encoder cost, and how many seeds its row is of; nothing of floors."""
    if result["cell"]["method"]:
        yield "seeds", seeds
        yield "epochs", result["cell"]["epochs"]
        yield "minutes", result["cost"]["seconds"] / 60
        yield "GFLOP an image", result["cost"]["gflop_per_image"]


def list_helped(cells: list[dict[str, Any]]) -> list[str]:
    """Arms whose reconstructions take something from the original."""
    return list(dict.fromkeys(result["cell"]["arm"] for result in cells if result["recipe"]["norm_pix_loss"]))


def check_alike(found: Results) -> None:
    """Refuse to put figures into one table that do not belong together.

    Raises:
        ValueError: If two cells were judged on different images, by different settings or by different networks, or
            if two cells whose times are compared ran on different machines or in different precision.
    """
    known: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, result in found.items():
        part = result["cell"]["part"]
        if part in ("epochs", "cause", "clock", "long"):
            timed = result["machine"] | {"precision": result["recipe"].get("precision")}
            judge_facts(known, "long" if part == "long" else "epochs", name, timed)
        for images, evaluation in result["evaluations"].items():
            facts = {f"{part} {key}": value for part in ("data", "settings") for key, value in evaluation[part].items()}
            facts |= {
                f"{row['metric']}'s network of {row['setting']}": row["detail"]["weights"]
                for row in evaluation["results"]
                if row["protocol"] == "reconstruction" and "weights" in row["detail"]
            }
            judge_facts(known, images, name, facts)


def judge_facts(known: dict[tuple[str, str], tuple[str, Any]], group: str, name: str, facts: dict[str, Any]) -> None:
    """Note what a cell's figures rest on, or refuse it where another cell of the group differs."""
    for fact, value in facts.items():
        first, expected = known.setdefault((group, fact), (name, value))
        if value != expected:
            raise ValueError(f"{group}: {fact} of {name} is {value}, of {first} {expected}: run one of them again")


def summarise(rows: list[dict[str, Any]]) -> Interval:
    """A figure of one or several seeds."""
    if len(rows) == 1:
        return Interval(**rows[0]["value"])
    return student_interval([row["value"]["mean"] for row in rows])


def tabulate(figures: Figures) -> Table:
    """All columns of some figures, in the order of their first appearance, those of cost last."""
    columns = list(dict.fromkeys(column for _, column in figures))
    columns.sort(key=lambda column: column.protocol == "pretraining")
    return build_table(figures, columns, on_side=False)


def describe_part(found: Results, part: Part) -> Iterator[str]:
    """A chapter: its tables, or that there is none yet."""
    table, cells = TABLES[part], cells_of(found, part)
    if all(result["cell"]["part"] != part for result in cells):
        yield f"## {table.title}\n\nNo cell of it has run yet.\n"
        return
    yield (
        f"## {table.title}\n\nFeatures are `{FEATURES}`; raw pixels have no class token. A row of several seeds is "
        "their mean with Student's 95 % interval. Intervals of a single seed, and of floors, are those of the test "
        "images (of few-shot, of the draws) and hold nothing of what another seed would give. Bold is the best of a "
        "column, floors aside.\n"
    )
    if helped := list_helped(cells):
        yield (
            f"Reconstructions of {', '.join(f'`{arm}`' for arm in helped)} take each patch's mean and contrast from "
            "the original, because its prediction has none: they are not to be compared with those of the others.\n"
        )
    if part == "cause":
        yield (
            "`l1_image` has neither of the perceptual terms, `ls_gan_p` both, `no_features` the adversary alone, "
            "`no_adversary` the features alone, of a discriminator that learns to judge but teaches nothing else. "
            "`labelled_phi` takes features of EfficientNet-Lite0, which has learned ImageNet's labels, and is no "
            "method: it shows what better features would give. Distances by that network say nothing of it.\n"
        )
    if part == "long" and (default := find_default(found)):
        yield f"The package's default is `{default}_imagenette`, the best by linear probe on the tuning images.\n"
    for images in EVALUATIONS[part]:
        for shown in (judges_features, judges_images, judges_dense):
            figures = gather(found, part, images, shown)
            if any(column.protocol != "pretraining" for _, column in figures):
                yield write_tables([(images, tabulate(figures))], "images")


def describe_front(found: Results) -> str:
    """The table of the repository's front page: of equal epochs, and of long runs where there are any."""
    tables = []
    for part in ("epochs", "long"):
        figures = gather(found, part, "imagenette", lambda column: column in FRONT)
        wanted = {key: figure for key, figure in figures.items() if key[1].metric not in ("epochs", "GFLOP an image")}
        if cells_of(found, part):
            tables.append((f"{TABLES[part].epochs:g} epochs", tabulate(wanted)))
    return write_tables(tables, "learned for")


def write_lines(lines: list[str], otherwise: str) -> str:
    """A table of lines, or a sentence where it has a head alone."""
    return ("\n".join(lines) if len(lines) > 2 else otherwise) + "\n"


def describe_tuning(found: Results) -> Iterator[str]:
    """What was tried, on the training images held back, and what was taken."""
    yield f"## {TABLES['tune'].title}\n"
    yield (
        f"{TABLES['tune'].epochs:g} epochs on nine tenths of the training images; linear probe on the last tenth, %. "
        "The best is taken, the first of equals, by every adversarial method.\n"
    )
    lines = ["| method | flags beside the method's own | accuracy | taken |", "| --- | --- | --- | --- |"]
    for arm in ARMS:
        accuracies = tried(arm, found)
        if accuracies is None:
            continue
        for number, (flags, accuracy) in enumerate(zip(arm.trials, accuracies, strict=True)):
            taken = "yes" if number == choose(arm, found) else ""
            lines.append(f"| {arm.name} | {' '.join(flags) or 'none'} | {100 * accuracy:.1f} | {taken} |")
    yield write_lines(lines, "No method's trials are complete yet.")


def describe_remedies(found: Results) -> Iterator[str]:
    """What was changed to help, on the training images held back."""
    yield f"## {TABLES['remedy'].title}\n"
    yield (
        f"As in the table of tuning: {TABLES['remedy'].epochs:g} epochs, linear probe on the tenth held back, %, with "
        "its test's 95 % interval (one seed).\n"
    )
    lines = ["| name | method | flags | accuracy | minutes |", "| --- | --- | --- | --- | --- |"]
    chosen = choose(ARM_NAMED["ls_gan_p"], found)
    names = [f"tune-ls_gan_p-{chosen}", *(f"remedy-{arm.name}-0" for arm in REMEDIES)]
    for result in (found[name] for name in names if name in found):
        cell, value = result["cell"], Interval(**tuning_figure(result))
        mean, low, high = (f"{100 * number:.1f}" for number in (value.mean, value.low, value.high))
        flags = " ".join(cell["flags"]) or "none"
        minutes = f"{result['cost']['seconds'] / 60:.0f}"
        lines.append(f"| {cell['arm']} | {cell['method']} | {flags} | {mean} [{low}, {high}] | {minutes} |")
    yield write_lines(lines, "No cell of it has run yet.")
    sixth = find_sixth(found)
    if sixth is not None:
        yield (
            f"`{sixth}` is above `ls_gan_p` and both controls, and becomes a sixth method.\n"
            if sixth
            else "No remedy is above `ls_gan_p` and both controls: there is no sixth method.\n"
        )


def describe_study(found: Results, findings: str = "") -> str:
    """`RESULTS.md`; `findings` is the chapter that somebody wrote.

    Raises:
        ValueError: If results do not belong together.
    """
    check_alike(found)
    planned = [name for name, _ in plan(found)]
    missing = [name.partition("-")[0] for name in planned if name not in found]
    parts: list[Part] = ["epochs", "cause", "clock", "long"]
    machines = dict.fromkeys(name_machine(result["machine"]) for result in found.values())
    lines = [
        "# The paper's table in miniature: results\n",
        "Made by `python training/miniature/run.py --report-only` of the files in `results/`; "
        "[the protocol](README.md) says what they are.\n",
        f"{len(planned) - len(missing)} of {len(planned)} cells of `{MODEL}` have run"
        + (f", on: {'; '.join(machines)}. " if machines else ". ")
        + (
            f"Missing: {', '.join(f'{missing.count(part)} of {part}' for part in dict.fromkeys(missing))}."
            if missing
            else ""
        )
        + "\n",
        *([findings] if findings else []),
        *(line for part in parts for line in describe_part(found, part)),
        *describe_tuning(found),
        *describe_remedies(found),
    ]
    if any(result.get("curve") for result in found.values()):
        lines.append(f"## While learning\n\n![k-NN against images seen and against time]({CURVES})\n")
    return "\n".join(lines)


def name_machine(machine: dict[str, str]) -> str:
    """A processor, and which instructions it has: there are several of one name."""
    return f"{machine['processor']} ({machine['capability']})"


def list_evaluations(found: Results) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What `training/report` makes a page of: every cell's evaluations, without pictures, which no file here holds."""
    for name, result in found.items():
        for images, evaluation in result["evaluations"].items():
            rows = [
                {**row, "detail": {key: value for key, value in row["detail"].items() if key != "picture"}}
                for row in evaluation["results"]
            ]
            yield Path(name, images, "results.json"), {**evaluation, "results": rows}


def draw_curves(found: Results, path: Path) -> None:
    """k-NN of val images among each other, against images seen and against time, of the cells with equal epochs.

    Args:
        found: Results by their cells' names.
        path: The PNG to write.
    """
    figure = Plot(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, arm in enumerate(ARMS):
        first = True
        for result in found.values():
            if (result["cell"]["part"], result["cell"]["arm"]) != ("epochs", arm.name):
                continue
            knn = [100 * point["knn"] for point in result["curve"]]
            images = [point["images"] for point in result["curve"]]
            minutes = [count / result["cost"]["images_per_second"] / 60 for count in images]
            thousands = [count / 1000 for count in images]
            for axis, x in zip(axes, (thousands, minutes), strict=True):
                axis.plot(x, knn, color=f"C{number}", linewidth=1.2, marker=".", label=arm.name if first else None)
            first = False
    for axis, label in zip(axes, ("thousands of images seen", "minutes"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN accuracy, %")
    axes[0].legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
