"""Plots of a report, as SVG that stands in a page: its text in the page's font, its colours from the page's CSS.

Colours are the custom properties `--s0` … `--s7` of the models, `--line` of the grid and the colour of the text, so a
page has one plot for light and dark. The same figures give the same bytes.
"""

import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from training.evaluate.intervals import Interval
from training.report.tables import Column, Entry, Figures, find_metric, find_protocol, list_headlines

COLOURS = 8
MARKERS = "os^DvPX*"
_TEXT, _LINE, _SERIES = "#fd0000", "#fd0001", "#fe00{:02x}"  # stand in for the page's colours
_INCHES = 4.4, 3.0
_AGAINST_COMPUTE = ("linear", "finetune", "knn")
"""Of a representation, the first of these that was run is drawn. Dense protocols see images of another size than the
one that a model's compute is of."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Figures of a model."""

    number: int
    """Of the model: decides colour and marker."""
    points: tuple[tuple[float, Interval], ...]
    """x, and y in the metric's unit."""
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """A plot with its caption."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Plot:
    """Plots that share axes and models."""

    title: str
    note: str
    names: tuple[str, ...]
    """Of the models that are in it."""
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What runs along x."""

    label: str
    range: tuple[float, float]
    """Of what is drawn; the same in plots that stand side by side."""
    log: bool = False
    ticks: Mapping[float, str] | None = None
    """By default, whatever fits."""


def draw(series: Sequence[Series], axis: Axis, y_label: str, limits: tuple[float, float], alt: str) -> str:
    """One plot: lines with bands, or points with bars where they are not joined.

    Args:
        series: What to draw.
        axis: Of x.
        y_label: Metric and unit.
        limits: Of y.
        alt: What it shows, for those who do not see it.

    Returns:
        An `<svg>` element.
    """
    canvas = Canvas(figsize=_INCHES, layout="constrained")
    axes = canvas.subplots()
    for one in series:
        _draw_series(axes, one)
    axes.set_ylim(*limits)
    axes.set_xlabel(axis.label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    _set_x(axes, axis)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _to_svg(canvas, alt)


def draw_swatch(number: int) -> str:
    """The line and marker of a model, for a legend."""
    canvas = Canvas(figsize=(0.4, 0.2))
    axes = canvas.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _draw_series(axes, Series(number=number, points=tuple((x, Interval(0, 0, 0)) for x in (0, 1, 2))), [1])
    axes.set_xlim(0, 2)
    return _to_svg(canvas, "")


def _draw_series(axes: Axes, series: Series, marked: list[int] | None = None) -> None:
    colour = _SERIES.format(series.number % COLOURS)
    # the shape goes on where the colours begin anew, so that no two of 64 models look alike
    marker = MARKERS[(series.number + series.number // COLOURS) % len(MARKERS)]
    xs, values = [x for x, _ in series.points], [value for _, value in series.points]
    means = [value.mean for value in values]
    if series.joined:
        low, high = [value.low for value in values], [value.high for value in values]
        if low != high:
            axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(xs, means, color=colour, linewidth=1.8, marker=marker, markersize=5.5, markevery=marked)
    else:
        reach = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
        axes.errorbar(xs, means, yerr=reach, fmt=marker, color=colour, markersize=6.5, capsize=3, elinewidth=1.3)


def _set_x(axes: Axes, axis: Axis) -> None:
    low, high = axis.range
    if axis.log:
        margin = max(high / low, 2) ** 0.08
        axes.set_xscale("log")
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.08 * (high - low) or high
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if axis.ticks:
        axes.xaxis.set_major_locator(FixedLocator(list(axis.ticks)))
        axes.set_xticks(list(axis.ticks), labels=list(axis.ticks.values()))


def _to_svg(canvas: Canvas, alt: str) -> str:
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        canvas.patch.set_visible(False)
        for axes in canvas.axes:
            axes.patch.set_visible(False)
            axes.tick_params(colors=_TEXT, labelsize=10, length=3)
            for label in (axes.xaxis.label, axes.yaxis.label):
                label.set(color=_TEXT, fontsize=10)
            for spine in axes.spines.values():
                spine.set_edgecolor(_LINE)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(canvas).print_svg(buffer, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    width, height = (round(72 * inches) for inches in canvas.get_size_inches())
    name = f'role="img" aria-label="{escape(alt)}"' if alt else 'aria-hidden="true"'
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" {name}>', svg, count=1)
    svg = svg.replace(_TEXT, "currentColor").replace(_LINE, "var(--line)")
    return re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--s{int(found[1], 16)})", svg)


# --- the plots of a data set -----------------------------------------------------------------------------------------

Drawn = dict[Entry, list[Series]]


def draw_plots(figures: Figures, numbers: Mapping[str, int], costs: Mapping[str, tuple[float, str]]) -> list[Plot]:
    """Every plot that the figures of a data set allow.

    Args:
        figures: Of one data set.
        numbers: Of the models, by name, for colours and markers.
        costs: Of an image, by model: a number above 0, and its unit.
    """
    kinds = _plot_labels(figures, numbers), _plot_costs(figures, numbers, costs), _plot_severities(figures, numbers)
    return [plot for kind in kinds for plot in kind]


def _plot_labels(figures: Figures, numbers: Mapping[str, int]) -> Iterable[Plot]:
    kinds = (
        ("Accuracy against labels", r"(\d+(?:\.\d+)?)%", "share of the training labels"),
        ("Accuracy against images a class", r"(\d+)", "labelled training images a class"),
    )
    for title, pattern, label in kinds:
        drawn: Drawn = {}
        ticks: dict[float, str] = {}
        for column, amount in _matching(figures, "few_shot", pattern):
            ticks[float(amount)] = column.setting
            for entry, value in _values(figures, column).items():
                before = drawn[entry][0].points if entry in drawn else ()
                points = tuple(sorted((*before, (float(amount), value)), key=lambda point: point[0]))
                drawn[entry] = [Series(number=numbers[entry.name], points=points)]
        note = "Logistic regression on few labels; bands are 95 % intervals over the draws."
        for column, _ in _matching(figures, "linear", ".*") if "%" in pattern and drawn else ():
            ticks[100.0] = "100%"
            note += " At 100 %, apart: the linear probe, another classifier, with its interval over the images."
            for entry, value in _values(figures, column).items():
                one = Series(number=numbers[entry.name], points=((100.0, value),), joined=False)
                drawn.setdefault(entry, []).append(one)
        if drawn:
            axis = Axis(label=label, range=(min(ticks), max(ticks)), log=True, ticks=ticks)
            yield _assemble(title, note, drawn, axis, "accuracy, %")


def _plot_costs(figures: Figures, numbers: Mapping[str, int], costs: Mapping[str, tuple[float, str]]) -> Iterable[Plot]:
    """Of each representation one protocol, if several models of known cost have it."""
    for unit in dict.fromkeys(unit for _, unit in costs.values()):
        drawn: dict[Column, Drawn] = {}
        left_out: set[str] = set()
        for features in dict.fromkeys(entry.features for entry, _ in figures):
            column = _of_compute(figures, features)
            values = {e: v for e, v in _values(figures, column).items() if e.features == features} if column else {}
            shown = {entry: value for entry, value in values.items() if costs.get(entry.name, (0, ""))[1] == unit}
            if column is None or len(shown) < 2:
                continue
            left_out |= {entry.name for entry in values if entry not in shown}
            for entry, value in shown.items():
                one = Series(number=numbers[entry.name], points=((costs[entry.name][0], value),), joined=False)
                drawn.setdefault(column, {})[entry] = [one]
        if not drawn:
            continue
        known = [one.points[0][0] for found in drawn.values() for series in found.values() for one in series]
        log = max(known) / min(known) >= 5
        axis = Axis(label=f"{unit}{', log scale' * log}", range=(min(known), max(known)), log=log)
        names: list[str] = []
        panels: list[Panel] = []
        for column, found in drawn.items():
            plot = _assemble("", "", found, axis, find_metric(column.metric).heading)
            names += plot.names
            title = find_protocol(column.protocol).title
            panels += [Panel(f"{panel.caption} · {title}", panel.svg) for panel in plot.panels]
        note = "Bars are 95 % intervals."
        if left_out:
            note += f" Not drawn, as their cost is nothing or not known: {', '.join(sorted(left_out))}."
        yield Plot("Quality against compute", note, tuple(dict.fromkeys(names)), tuple(panels))


def _of_compute(figures: Figures, features: str) -> Column | None:
    headlines = list_headlines(dict.fromkeys(column for entry, column in figures if entry.features == features))
    found = [column for name in _AGAINST_COMPUTE for column in headlines if column.protocol == name]
    return found[0] if found else None


def _plot_severities(figures: Figures, numbers: Mapping[str, int]) -> Iterable[Plot]:
    """The mean over the corruptions, which has no interval in the results."""
    found: dict[Entry, dict[float, list[float]]] = {}
    corruptions = set()
    for column, severity in _matching(figures, "shift", r".+/(\d+)"):
        corruptions.add(column.setting.rpartition("/")[0])
        for entry, value in _values(figures, column).items():
            found.setdefault(entry, {}).setdefault(float(severity), []).append(value.mean)
    for column in [column for column, _ in _matching(figures, "shift", "clean subset|clean")]:
        for entry, value in _values(figures, column).items():
            if entry in found and (0.0 not in found[entry] or column.setting == "clean subset"):
                found[entry][0.0] = [value.mean]
    drawn: Drawn = {}
    for entry, by_severity in found.items():
        means = {severity: statistics.fmean(values) for severity, values in sorted(by_severity.items())}
        points = tuple((severity, Interval(mean, mean, mean)) for severity, mean in means.items())
        drawn[entry] = [Series(number=numbers[entry.name], points=points)]
    severities = sorted({x for found in drawn.values() for x, _ in found[0].points})
    ticks = {x: f"{x:g}" if x else "clean" for x in severities}
    note = f"Mean over {len(corruptions)} corruptions of the test images; their own figures are in the tables."
    if drawn:
        axis = Axis(label="severity", range=(min(ticks), max(ticks)), ticks=ticks)
        yield _assemble("Accuracy against severity", note, drawn, axis, "accuracy, %")


def _matching(figures: Figures, protocol: str, pattern: str) -> list[tuple[Column, str]]:
    """The accuracy columns of a protocol whose setting is as wanted, with the number in it."""
    found = []
    for column in dict.fromkeys(column for _, column in figures):
        match = re.fullmatch(pattern, column.setting)
        if match and column.protocol == protocol and column.metric == "accuracy":
            found.append((column, match[match.lastindex or 0]))
    return found


def _values(figures: Figures, column: Column) -> dict[Entry, Interval]:
    """The figures of a column in the unit that they are shown in."""
    scale = find_metric(column.metric).scale
    return {
        entry: Interval(scale * figure.value.mean, scale * figure.value.low, scale * figure.value.high)
        for (entry, at), figure in figures.items()
        if at == column
    }


def _assemble(title: str, note: str, drawn: Drawn, axis: Axis, y_label: str) -> Plot:
    """A panel a representation, all with the same axes."""
    values = [value for found in drawn.values() for one in found for _, value in one.points]
    low, high = min(value.low for value in values), max(value.high for value in values)
    margin = 0.05 * (high - low) or 1.0
    limits = low - margin, high + margin
    panels = []
    for label in dict.fromkeys(entry.label for entry in drawn):
        series = [one for entry, found in drawn.items() if entry.label == label for one in found]
        alt = f"{y_label} against {axis.label}, {label}; the tables hold the same figures"
        panels.append(Panel(label, draw(series, axis, y_label, limits, alt)))
    return Plot(title, note, tuple(dict.fromkeys(entry.name for entry in drawn)), tuple(panels))
