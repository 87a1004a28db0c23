"""One page that says what evaluations found: tables, plots and pictures in a single HTML file that asks for no other.

It is made of one or several `results.json` as `training/evaluate.py` writes them. The same files give the same bytes.
"""

import base64
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from perceptual_mae_models.images import refuse_programs
from training.report.chapters import Chapter
from training.report.plots import Plot, draw_plots, draw_swatch
from training.report.results import Part, Source, flatten, group_sources, list_differences, parse, place_figures
from training.report.tables import Entry, Figures, Protocol, Table, build_table, find_protocol, list_headlines

WIDEST_PICTURE = 1600
"""Pixels, to which pictures are shrunk."""
NOT_WRITTEN = ("picture", "right")
"""By-products for programs: a path, and which images are classified rightly."""


@dataclass(frozen=True)
class Picture:
    """A picture, or what is wrong with it."""

    caption: str
    uri: str
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Cost:
    """What some figures of an entry share."""

    label: str
    settings: str
    seconds: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """All figures of a protocol."""

    protocol: Protocol
    count: int
    table: Table
    shared: str
    """By-products and settings that all its figures have in common."""
    costs: dict[str, list[Cost]]
    """By model."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What was found on the same images."""

    title: str
    parts: tuple[Part, ...]
    sources: tuple[Source, ...]
    differences: tuple[str, ...]
    """In settings or versions between its files."""
    summary: Table
    plots: list[Plot]
    sections: tuple[Section, ...]
    pictures: tuple[Picture, ...]


@dataclass(kw_only=True)
class Model:
    """What is known of a model."""

    name: str
    number: int
    """Decides its colour and marker."""
    parameters: float | None = None
    gflop: float | None = None
    """Of an image."""
    seconds: float | None = None
    """An image, of extracting features in the run that made the results."""
    fingerprints: list[str] = field(default_factory=list)


def build_section(name: str, figures: Figures) -> Section:
    """A protocol's table and by-products."""
    own = {key: figure for key, figure in figures.items() if figure.column.protocol == name}
    details = [flatten({k: v for k, v in figure.detail.items() if k not in NOT_WRITTEN}) for figure in own.values()]
    shared = {key: text for key, text in details[0].items() if all(one.get(key) == text for one in details)}
    grouped: dict[tuple[Entry, str, str], list[str]] = {}
    for figure, detail in zip(own.values(), details, strict=True):
        rest = _join({key: text for key, text in detail.items() if key not in shared})
        grouped.setdefault((figure.entry, f"{figure.seconds:.1f}", rest), []).append(figure.setting)
    costs: dict[str, list[Cost]] = {}
    for (entry, seconds, by_products), settings in grouped.items():
        cost = Cost(entry.label, ", ".join(dict.fromkeys(settings)), seconds, by_products)
        costs.setdefault(entry.name, []).append(cost)
    table = build_table(own, list(dict.fromkeys(column for _, column in own)), notes=True)
    return Section(protocol=find_protocol(name), count=len(own), table=table, shared=_join(shared), costs=costs)


def _join(facts: Mapping[tuple[str, ...], str]) -> str:
    """Facts in a line, those below one name together."""
    texts = []
    for name, found in itertools.groupby(facts.items(), key=lambda fact: fact[0][0]):
        inner = [(".".join(key[1:]), text) for key, text in found]
        if inner[0][0]:
            texts.append(f"{name} ({', '.join(f'{key}: {text}' for key, text in inner)})")
        else:
            texts.append(f"{name}: {inner[0][1]}")
    return "; ".join(texts)


def load_pictures(sources: Sequence[Source]) -> tuple[Picture, ...]:
    """Every picture that a result speaks of, once."""
    captions: dict[tuple[Path, str], dict[str, dict[str, None]]] = {}
    for source in sources:
        for result in source.results:
            if "picture" in result["detail"]:
                place = source.path.parent, str(result["detail"]["picture"])
                title = find_protocol(result["protocol"]).title
                captions.setdefault(place, {}).setdefault(title, {})[result["model"]] = None
    return tuple(
        _load(folder, name, "; ".join(f"{title}: {', '.join(models)}" for title, models in found.items()))
        for (folder, name), found in captions.items()
    )


def _load(folder: Path, name: str, caption: str) -> Picture:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        return Picture(caption, "", problem=f"{name} lies outside the folder of results.json")
    return load_picture(folder / name, name, caption)


def load_picture(path: Path, name: str, caption: str) -> Picture:
    """A picture as the page will hold it, or what is wrong with it."""
    try:
        with Image.open(path) as opened:
            refuse_programs(opened)
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read: {error}"
        return Picture(caption, "", problem=problem)
    image.thumbnail((WIDEST_PICTURE, 4 * WIDEST_PICTURE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=88, method=4)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(caption, uri, *image.size)


def describe_models(groups: Sequence[tuple[Sequence[Source], Figures]]) -> dict[str, Model]:
    """The models of a report by name, numbered in the order in which they appear.

    Args:
        groups: Files about the same images, with their figures.
    """
    models: dict[str, Model] = {}
    for sources, figures in groups:
        names = {entry.name for entry, _ in figures}
        for source in sources:
            images = sum(part.images or 0 for part in source.parts)
            for result in source.results:
                plain, marked = result["model"], source.mark(result["model"])
                name = marked if marked in names else plain
                model = models.setdefault(name, Model(name=name, number=len(models)))
                facts = source.models.get(plain, {})
                model.parameters = facts.get("parameters", model.parameters)
                model.gflop = facts.get("gflop", model.gflop)
                if result.get("extraction_seconds") and images:
                    model.seconds = result["extraction_seconds"] / images
                if result.get("fingerprint") not in (None, *model.fingerprints):
                    model.fingerprints.append(str(result["fingerprint"]))
    return models


def find_costs(models: Iterable[Model]) -> dict[str, tuple[float, str]]:
    """What an image costs, by model: in GFLOP, or in seconds where that is known of none."""
    models = list(models)
    if any(model.gflop for model in models):
        return {model.name: (model.gflop, "GFLOP an image") for model in models if model.gflop}
    unit = "seconds an image, as measured"
    return {model.name: (model.seconds, unit) for model in models if model.seconds}


def build_data_set(sources: Sequence[Source], figures: Figures, models: Mapping[str, Model]) -> DataSet:
    """Everything about the same images."""
    columns = list(dict.fromkeys(column for _, column in figures))
    here = [models[name] for name in dict.fromkeys(entry.name for entry, _ in figures)]
    widest = max(sources, key=lambda source: len(source.parts))
    return DataSet(
        title=widest.title,
        parts=widest.parts,
        sources=tuple(sources),
        differences=tuple(list_differences(sources)),
        summary=build_table(figures, list_headlines(columns), on_side=False),
        plots=draw_plots(figures, {model.name: model.number for model in here}, find_costs(here)),
        sections=tuple(build_section(name, figures) for name in dict.fromkeys(column.protocol for column in columns)),
        pictures=load_pictures(sources),
    )


def write_report(
    found: Sequence[tuple[Path, Any]], out: Path, chapters: Sequence[Chapter] = (), folder: Path = Path()
) -> None:
    """Write a report of evaluations.

    Args:
        found: Every `results.json`'s path and content. Pictures are looked for beside it.
        out: The HTML file to write.
        chapters: What stands before the evaluations.
        folder: Where the paths of their pictures begin.

    Raises:
        ValueError: If there is none, or one is not what `training/evaluate.py` writes, or contradicts itself.
    """
    if not found:
        raise ValueError("no results.json: nothing to report")
    sources = [source for path, content in found for source in parse(path, content)]
    groups = [(group, place_figures(group)) for group in group_sources(sources)]
    models = describe_models(groups)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = itertools.count()
    environment.filters["code"] = mark_names
    environment.filters["inline"] = lambda svg: Markup(number_names(svg, next(numbers)))
    page = environment.get_template("page.html").render(
        data_sets=[build_data_set(group, figures, models) for group, figures in groups],
        models=models,
        sources=sources,
        figures=sum(len(figures) for _, figures in groups),
        chapters=chapters,
        shown={path: load_picture(folder / path, path, caption) for one in chapters for caption, path in one.pictures},
        swatches={name: draw_swatch(model.number) for name, model in models.items()},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")  # names of files may have what UTF-8 has not


def mark_names(text: str) -> Markup:
    """What stands between backticks, as code."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def number_names(svg: str, number: int) -> str:
    """The same drawing with names of its own: a page holds a name once."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1p{number}-", svg)
