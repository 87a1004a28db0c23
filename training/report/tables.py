"""Figures of evaluations as tables: what makes a column, how a figure is written, which one leads."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from training.evaluate.intervals import Interval

WIDEST = 12
"""Columns, above which a table is turned on its side."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is written."""

    title: str
    scale: float = 1
    digits: int = 3
    unit: str = ""
    better: Literal["higher", "lower", "unknown"] = "higher"

    @property
    def heading(self) -> str:
        """Title, unit, and an arrow where less is better."""
        return ", ".join(filter(None, (self.title, self.unit))) + (" ↓" if self.better == "lower" else "")

    def text(self, value: float) -> str:
        """A figure in this metric's unit, without the unit."""
        return f"{self.scale * value:.{self.digits}f}"


def _share(title: str) -> Metric:
    return Metric(title=title, scale=100, digits=1, unit="%")


METRICS = {
    "accuracy": _share("accuracy"),
    "pixel_accuracy": _share("pixel accuracy"),
    "miou": _share("mIoU"),
    "box_ap": _share("box AP"),
    "box_ap50": _share("box AP50"),
    "mask_ap": _share("mask AP"),
    "mask_ap50": _share("mask AP50"),
    "l1": Metric(title="L1", better="lower"),
    "psnr": Metric(title="PSNR", digits=2, unit="dB"),
    "ssim": Metric(title="SSIM"),
    "ms_ssim": Metric(title="MS-SSIM"),
    "fid": Metric(title="FID", digits=2, better="lower"),
    "kid": Metric(title="KID", digits=4, better="lower"),
    "inception_score": Metric(title="Inception Score", digits=2),
    "fd": Metric(title="Frechet distance", digits=2, better="lower"),
    "kd": Metric(title="kernel distance", digits=4, better="lower"),
    "score": Metric(title="score", digits=2),
    "seeds": Metric(title="seeds", digits=0, better="unknown"),
    "epochs": Metric(title="epochs", digits=1, better="unknown"),
    "minutes": Metric(title="minutes", digits=1, better="unknown"),
}
"""By name in small letters; of any other it is not known which way is better."""


def find_metric(name: str) -> Metric:
    """How a metric is written; one that is not known, as it is."""
    return METRICS.get(name.lower(), Metric(title=name, better="unknown"))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a report says of a protocol, and which of its figures stand for it."""

    title: str
    about: str = ""
    settings: str = ".*"
    """Regular expression of the settings for the summary; if none of these was run, its first one."""
    metrics: str = ".*"
    """The same for metrics."""
    chosen: bool = False
    """The setting is an outcome, such as a learning rate, so figures of different settings share a column."""


PROTOCOLS = {
    "knn": Protocol(
        title="k-NN",
        about="Weighted vote of the k most similar training images. Intervals: Wilson's, over the test images.",
        settings="k=20",
    ),
    "linear": Protocol(
        title="linear",
        about="A linear layer on frozen features; its learning rate, beneath each figure, is chosen on held-back "
        "training images. Intervals: Wilson's, over the test images.",
        chosen=True,
    ),
    "few_shot": Protocol(
        title="few-shot",
        about="Logistic regression on a share of the labels, or on so many images a class. Intervals: Student's, over "
        "the draws of training images; what other test images would give is not in them.",
    ),
    "reconstruction": Protocol(
        title="reconstruction",
        about="Masked test images, rebuilt; hidden counts the hidden patches, image the prediction of every patch. "
        "Intervals: normal, over the test images; of distances between sets of images, as the by-products say.",
        settings="hidden.*",
        metrics="l1|psnr|fid|fd",
    ),
    "finetune": Protocol(
        title="fine-tuning",
        about="The whole encoder learns the labels. Intervals: Wilson's, over the test images of a single run; what "
        "another seed would give is not in them.",
    ),
    "segmentation": Protocol(
        title="segmentation",
        about="A decoder learns to name every pixel, on a frozen encoder or together with it. Intervals: bootstrap "
        "over the test images of a single run.",
        metrics="miou",
    ),
    "detection": Protocol(
        title="detection",
        about="A detector learns on a frozen encoder or together with it. Intervals: bootstrap over the test images of "
        "a single run.",
        metrics="box_ap|mask_ap",
    ),
    "shift": Protocol(
        title="shifted images",
        about="Classifiers that learned from undamaged images, on other sets of the same classes and on damaged test "
        "images at severities 1 to 5. Intervals: over the images.",
        settings="[^/]+|corruptions/mean",
    ),
}
"""By name; any other is shown under its own name, with all its figures in the summary."""


def find_protocol(name: str) -> Protocol:
    """What is known of a protocol."""
    return PROTOCOLS.get(name, Protocol(title=name.replace("_", " ")))


@dataclass(frozen=True)
class Entry:
    """What is judged: a row of a table."""

    name: str
    """Of the model."""
    features: str
    """The representation; empty where the whole model is judged."""

    @property
    def label(self) -> str:
        """The representation in words."""
        return self.features or "whole model"


@dataclass(frozen=True)
class Column:
    """What it is judged by."""

    protocol: str
    setting: str
    """Empty where the protocol chooses it."""
    metric: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a results.json, in its place."""

    entry: Entry
    column: Column
    value: Interval
    setting: str
    seconds: float = 0.0
    detail: dict[str, object] = field(default_factory=dict)
    ranked: bool = True
    """Whether it may lead its column."""


Figures = dict[tuple[Entry, Column], Figure]


@dataclass(frozen=True)
class Cell:
    """A figure, written."""

    mean: str
    interval: str
    """Empty where there is none."""
    mark: Literal["", "best", "close"]
    note: str = ""


@dataclass(frozen=True)
class Head:
    """A cell of the head of a table."""

    text: str
    notes: tuple[str, ...] = ()
    """Lines below it."""
    columns: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Line:
    """A row of a table, below the name of a model where it has several."""

    label: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """A table, to be laid out."""

    corner: str
    heads: tuple[tuple[Head, ...], ...]
    """One row of heads, or two."""
    groups: tuple[tuple[str, tuple[Line, ...]], ...]
    """Rows below a heading, which may be empty."""


def list_headlines(columns: Iterable[Column]) -> list[Column]:
    """The columns that stand for their protocols, in the same order, those of a protocol together."""
    kept = []
    for name, found in _by_protocol(columns).items():
        protocol = find_protocol(name)
        settings = _prefer(protocol.settings, [column.setting for column in found])
        metrics = _prefer(protocol.metrics, [column.metric for column in found])
        kept += [column for column in found if column.setting in settings and column.metric in metrics]
    return kept


def _by_protocol(columns: Iterable[Column]) -> dict[str, list[Column]]:
    grouped: dict[str, list[Column]] = {}
    for column in columns:
        grouped.setdefault(column.protocol, []).append(column)
    return grouped


def _prefer(wanted: str, found: Sequence[str]) -> set[str]:
    return {name for name in found if re.fullmatch(wanted, name, re.IGNORECASE)} or {found[0]}


def rank(values: dict[Entry, Interval], better: str) -> dict[Entry, Literal["", "best", "close"]]:
    """The best of a column, and those whose intervals overlap its interval.

    A figure whose interval has no width, such as that of a single draw, overlaps none: it has no interval.
    """
    marks: dict[Entry, Literal["", "best", "close"]] = dict.fromkeys(values, "")
    if len(values) < 2 or better == "unknown":
        return marks
    lead = (max if better == "higher" else min)(values.values(), key=lambda value: value.mean)
    for entry, value in values.items():
        if value.mean == lead.mean:
            marks[entry] = "best"
        elif value.low < value.high and lead.low < lead.high and value.low <= lead.high and lead.low <= value.high:
            marks[entry] = "close"
    return marks


def write_column(column: Column, figures: Figures, *, notes: bool) -> dict[Entry, Cell]:
    """The cells of a column.

    Args:
        column: Which.
        figures: All of them.
        notes: Say which setting was chosen, where the protocol chooses it.
    """
    found = {entry: figure for (entry, at), figure in figures.items() if at == column}
    metric = find_metric(column.metric)
    marks = rank({entry: figure.value for entry, figure in found.items() if figure.ranked}, metric.better)
    cells = {}
    for entry, figure in found.items():
        mean, low, high = (metric.text(x) for x in (figure.value.mean, figure.value.low, figure.value.high))
        interval = f"[{low}, {high}]" if figure.value.low < figure.value.high else ""
        note = figure.setting if notes and not column.setting else ""
        cells[entry] = Cell(mean, interval, marks.get(entry, ""), note)
    return cells


def build_table(
    figures: Figures, columns: Sequence[Column], *, notes: bool = False, on_side: bool | None = None
) -> Table:
    """Entries against columns.

    Args:
        figures: Those of one data set.
        columns: What to show.
        notes: See `write_column`.
        on_side: Columns as rows. None: if there are too many.
    """
    written = {column: write_column(column, figures, notes=notes) for column in columns}
    entries = list(dict.fromkeys(entry for entry, column in figures if column in written))
    # a model's rows stand together, whatever the order of files and protocols
    first = {entry.name: index for index, entry in reversed(list(enumerate(entries)))}
    entries.sort(key=lambda entry: first[entry.name])
    if len(columns) > max(WIDEST, len(entries)) if on_side is None else on_side:
        return _on_its_side(written, entries)
    heads = _heads([_column_head(column, columns) for column in columns])
    named = [(name, tuple(found)) for name, found in groupby(entries, key=lambda entry: entry.name)]

    def line(label: str, entry: Entry) -> Line:
        return Line(label, tuple(written[column].get(entry) for column in columns))

    if all(len(found) == 1 for _, found in named):
        flat = [line(" · ".join(filter(None, (entry.name, entry.features))), entry) for entry in entries]
        return Table("model", heads, (("", tuple(flat)),))
    return Table(
        "model", heads, tuple((name, tuple(line(entry.label, entry) for entry in found)) for name, found in named)
    )


def _on_its_side(written: dict[Column, dict[Entry, Cell]], entries: Sequence[Entry]) -> Table:
    """A row a column, those whose settings begin alike, as in NAME/1 and NAME/2, together."""
    metrics = list(dict.fromkeys(find_metric(column.metric).heading for column in written))
    groups: dict[str, list[Line]] = {"": []}  # first, or its rows would seem to belong to the group above
    for column, cells in written.items():
        named = re.fullmatch("([^/,:]+)/([^/]+)", column.setting)
        group, label = named.groups() if named else ("", column.setting)
        if len(metrics) > 1:
            label = f"{label} · {find_metric(column.metric).heading}"
        groups.setdefault(group, []).append(Line(label, tuple(cells.get(entry) for entry in entries)))
    heads = _heads([(entry.name, (), entry.label) for entry in entries])
    return Table(
        metrics[0] if len(metrics) == 1 else "",
        heads,
        tuple((name, tuple(found)) for name, found in groups.items() if found),
    )


def _column_head(column: Column, columns: Sequence[Column]) -> tuple[str, tuple[str, ...], str]:
    """Text above, notes above, text below: what a protocol's columns share stands above."""
    siblings = [other for other in columns if other.protocol == column.protocol]
    facts = (
        (column.setting, len({other.setting for other in siblings})),
        (find_metric(column.metric).heading, len({other.metric for other in siblings})),
    )
    above = tuple(text for text, kinds in facts if kinds == 1 and text)
    below = " · ".join(text for text, kinds in facts if kinds > 1)
    return find_protocol(column.protocol).title, above, below


def _heads(parts: Sequence[tuple[str, tuple[str, ...], str]]) -> tuple[tuple[Head, ...], ...]:
    upper: list[Head] = []
    lower: list[Head] = []
    for (text, notes), found in groupby(parts, key=lambda part: part[:2]):
        below = [part[2] for part in found]
        if below == [""]:
            upper.append(Head(text, notes, rows=2))
        else:
            upper.append(Head(text, notes, columns=len(below)))
            lower += [Head(text) for text in below]
    if not lower:
        return (tuple(Head(head.text, head.notes) for head in upper),)
    return tuple(upper), tuple(lower)
