"""The figures of cells, in tables: means over seeds, differences seed by seed, and what they cost."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from training.evaluate.intervals import Interval, student_interval
from training.miniature.choice import Results, list_figures
from training.miniature.study import ARMS, BETWEEN, CAUSES, CLOCK, FLOORS, LABELLED_PHI, NETWORK_NAMES, Part
from training.report.tables import Column, Entry, Figure, Figures, Table, build_table

COST = "pretraining"
"""Stands for a protocol in columns of costs."""


def read_column(row: dict[str, Any]) -> Column:
    """The column of a figure; a setting that is an outcome, such as a learning rate, makes none of its own."""
    region, comma, network = row["setting"].partition(", ")
    setting = f"{region}{comma}{NETWORK_NAMES.get(network, network)}"
    return Column(row["protocol"], "" if row["protocol"] == "linear" else setting, row["metric"])


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
    cells = cells_of(found, part)
    floors = [result for result in found.values() if result["cell"]["part"] == "floor"]
    values: dict[tuple[str, Column], list[Interval]] = {}
    for result in (*cells, *floors):
        arm = result["cell"]["arm"]
        for column, value in figures_of(result, images, shown).items():
            values.setdefault((arm, column), []).append(value)
        for name, cost in list_costs(result, sum(other["cell"]["arm"] == arm for other in cells)):
            values.setdefault((arm, Column(COST, "", name)), []).append(Interval(cost, cost, cost))
    names = [arm.name for arm in (*ARMS, *CAUSES)] + list(FLOORS)
    order = sorted(values, key=lambda key: (names.index(key[0]), key[1].protocol == COST))
    aside = {*FLOORS, LABELLED_PHI}
    figures = tabulated((arm, column, summarise(values[arm, column])) for arm, column in order)
    return {
        key: replace(figure, ranked=key[0].name not in aside and may_lead(cells, key[0].name, key[1]))
        for key, figure in figures.items()
    }


def figures_of(result: dict[str, Any], images: str, shown: Callable[[Column], bool]) -> dict[Column, Interval]:
    """The figures of one cell that a table shows."""
    rows = [(read_column(row), row) for row in list_figures(result) if row["images"] == images]
    return {column: Interval(**row["value"]) for column, row in rows if shown(column)}


def tabulated(values: Iterable[tuple[str, Column, Interval]]) -> Figures:
    """Arms, columns and values as what tables are built of."""
    return {
        (Entry(arm, ""), column): Figure(entry=Entry(arm, ""), column=column, value=value, setting="")
        for arm, column, value in values
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


def list_untaught(cells: list[dict[str, Any]]) -> list[str]:
    """Arms that never learned to rebuild what is visible."""
    return list(dict.fromkeys(result["cell"]["arm"] for result in cells if result["recipe"]["loss_on"] == "hidden"))


def may_lead(cells: list[dict[str, Any]], arm: str, column: Column) -> bool:
    """Whether a figure of an arm's reconstructions compares with those of the others; all other figures do."""
    if column.protocol != "reconstruction":
        return True
    return arm not in list_helped(cells) and (column.setting.startswith("hidden") or arm not in list_untaught(cells))


def summarise(values: list[Interval]) -> Interval:
    """A figure of one or several seeds."""
    return values[0] if len(values) == 1 else student_interval([value.mean for value in values])


def differences(found: Results, part: Part, images: str, to: str) -> Figures:
    """How far the features of the other arms are above those of one, over seeds that both have: two at least.

    The seed decides order, crops and masks of both, so that what they share drops out.
    """
    own = {result["cell"]["number"]: result for result in cells_of(found, part) if result["cell"]["arm"] == to}
    values: dict[tuple[str, Column], list[float]] = {}
    for result in cells_of(found, part):
        arm, number = result["cell"]["arm"], result["cell"]["number"]
        if arm == to or number not in own:
            continue
        other = figures_of(own[number], images, judges_features)
        for column, value in figures_of(result, images, judges_features).items():
            values.setdefault((arm, column), []).append(value.mean - other[column].mean)
    names = [arm.name for arm in ARMS]
    order = sorted((key for key in values if len(values[key]) > 1), key=lambda key: names.index(key[0]))
    figures = tabulated((*key, student_interval(values[key])) for key in order)
    return {key: replace(figure, ranked=False) for key, figure in figures.items()}


def tabulate(figures: Figures) -> Table:
    """All columns of some figures, in the order of their first appearance, those of cost last."""
    columns = list(dict.fromkeys(column for _, column in figures))
    columns.sort(key=lambda column: column.protocol == COST)
    return build_table(figures, columns, on_side=False)
