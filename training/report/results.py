"""`results.json` files, read back: checked, those about the same images together, every figure in its place."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluate.intervals import Interval
from training.report.tables import PROTOCOLS, Column, Entry, Figure, Figures, find_protocol


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that were learned from or tested on."""

    role: str
    name: str
    images: int | None
    fingerprint: str
    """Empty, where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a results.json says about the same images."""

    path: Path
    parts: tuple[Part, ...]
    settings: dict[str, str]
    versions: dict[str, str]
    date: str
    """Empty, if it does not say."""
    duplicates: str
    """What there is to say of test images that were learned from; empty, if nothing."""
    results: list[dict[str, Any]]
    models: dict[str, dict[str, float]]
    """`parameters` and `gflop` an image, where they are known."""
    weights: dict[str, str]
    """Of models, the fingerprint of their weights, where it is known."""

    def mark(self, model: str) -> str:
        """The name of a model that is another one in another file."""
        return f"{model} ({self.path})"

    @property
    def title(self) -> str:
        """Names of the images."""
        return " → ".join(dict.fromkeys(part.name for part in self.parts))

    @property
    def about(self) -> str:
        """When and by what it was made, as far as it says."""
        known = ("perceptual_mae_models", "torch")
        facts = [self.date, *(f"seed {seed}" for key, seed in self.settings.items() if key == "seed")]
        return " · ".join(
            filter(None, [*facts, *(f"{key} {self.versions[key]}" for key in known if key in self.versions)])
        )

    @property
    def prints(self) -> frozenset[tuple[str, str]]:
        """What the images are."""
        return frozenset((part.role, part.fingerprint or part.name) for part in self.parts)


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the results.json that training/evaluate.py writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    parse(path, content)
    return content


def parse(path: Path, content: Any) -> list[Source]:
    """Check the content of a results.json and part it by what was evaluated on.

    Its "data" are `train` and `test`, and, by a protocol's name, those of protocols that have data of their own.

    Raises:
        ValueError: If something is missing, of the wrong kind, empty or not finite.
    """
    try:
        sources = list(_part(path, content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a results.json of training/evaluate.py: {why}") from error
    if not sources:
        raise ValueError(f"{path} holds no results: let training/evaluate.py finish a model first")
    return sources


def _part(path: Path, content: dict[str, Any]) -> Iterator[Source]:
    checked = [_check_result(result) for result in content["results"]]
    parts = tuple(_read_part(role, facts) for role, facts in content["data"].items())
    settings = dict(content.get("settings", {}))
    apart = [part for part in parts if any(result["protocol"] == part.role for result in checked)]
    roles = {part.role for part in apart}
    alone = [
        ((part,), [result for result in checked if result["protocol"] == part.role], settings.pop(part.role, {}), "")
        for part in apart
    ]
    # a protocol's own data are not the others', even if it has not run yet
    rest = tuple(part for part in parts if part.role not in {*roles, *PROTOCOLS})
    others = [result for result in checked if result["protocol"] not in roles]
    found = [(rest, others, settings, _describe_duplicates(content.get("duplicates"))), *alone]
    for own, results, chosen, duplicates in found:
        if results and not own:
            raise ValueError(f"it does not say on which images {results[0]['protocol']} was evaluated")
        if results:
            yield Source(
                path=path,
                parts=own,
                settings=_join_names(chosen),
                versions=_join_names(content.get("versions", {})),
                date=str(content.get("date", "")),
                duplicates=duplicates,
                results=results,
                models={
                    name: {key: float(facts[key]) for key in ("parameters", "gflop") if facts.get(key) is not None}
                    for name, facts in content.get("models", {}).items()
                },
                weights={
                    name: facts["weights"] for name, facts in content.get("models", {}).items() if facts.get("weights")
                },
            )


def _read_part(role: str, facts: Mapping[str, Any]) -> Part:
    images = facts.get("images")
    return Part(
        role=role,
        name=str(facts["name"]),
        images=None if images is None else int(images),
        fingerprint=str(facts.get("fingerprint", "")),
    )


def _describe_duplicates(found: Mapping[str, Any] | None) -> str:
    if not found or not found["images"]:
        return ""
    first = f", such as {' and '.join(map(str, found['first']))}" if found.get("first") else ""
    asked, known = found["compared"]
    among = f"of {asked:,} test images that were compared with {known:,} training images"
    return f"{found['images']:,} {among} are, byte for byte, among these{first}."


def _join_names(content: Mapping[str, Any]) -> dict[str, str]:
    return {".".join(names): text for names, text in flatten(content).items()}


def _check_result(result: dict[str, Any]) -> dict[str, Any]:
    for key in ("model", "features", "protocol", "setting", "metric"):
        if not isinstance(result[key], str):
            raise TypeError(f"{key} is {result[key]!r}, which is no text")
    value = Interval(**{key: float(result["value"][key]) for key in ("mean", "low", "high")})
    if not all(map(math.isfinite, (value.mean, value.low, value.high))):
        raise ValueError(f"{result['model']}, {result['protocol']} {result['setting']}: {result['metric']} not finite")
    seconds: dict[str, Any] = {key: float(result[key]) for key in ("seconds", "extraction_seconds") if key in result}
    return {**result, **seconds, "value": value, "detail": dict(result.get("detail", {}))}


def flatten(content: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Nested facts as texts, each by the names that lead to it."""
    flat: dict[tuple[str, ...], str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= {(str(key), *rest): text for rest, text in flatten(value).items()}
        else:
            flat[str(key),] = _plain(value)
    return flat


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def group_sources(sources: Sequence[Source]) -> list[list[Source]]:
    """Files about the same images together.

    A file that used the test images alone, such as one of reconstructions, goes with the files that tested on the
    same images, unless these learned from different ones.
    """
    groups: dict[frozenset[tuple[str, str]], list[Source]] = {}
    for source in sources:
        wider = {other.prints for other in sources if source.prints < other.prints}
        groups.setdefault(wider.pop() if len(wider) == 1 else source.prints, []).append(source)
    return list(groups.values())


def place_figures(sources: Sequence[Source]) -> Figures:
    """Every figure of files about the same images at its entry and column.

    Where files have other figures or weights for a model of the same name, its name is followed by the file's.

    Raises:
        ValueError: If a file says two things about the same.
    """
    told_apart = _find_conflicts(sources)
    figures: Figures = {}
    for source in sources:
        for result in source.results:
            name = source.mark(result["model"]) if result["model"] in told_apart else result["model"]
            figure = Figure(
                entry=Entry(name, result["features"]),
                column=_column(result),
                value=result["value"],
                setting=result["setting"],
                seconds=result.get("seconds", 0.0),
                detail=result["detail"],
                # what takes each patch's mean and contrast from the original is no rival of what does not
                ranked=not (result["protocol"] == "reconstruction" and result["detail"].get("norm_pix_loss")),
            )
            known = figures.setdefault((figure.entry, figure.column), figure)
            if (known.value, known.setting) != (figure.value, figure.setting):
                raise ValueError(f"{source.path} says two things about {name}, {' '.join(_words(figure.column))}")
    return figures


def _find_conflicts(sources: Sequence[Source]) -> set[str]:
    said: dict[tuple[str, ...], set[object]] = {}
    for source in sources:
        for result in source.results:
            model, features = result["model"], result["features"]
            fact = result["value"], result["setting"]
            said.setdefault((model, features, *_words(_column(result))), set()).add(fact)
            if "fingerprint" in result:
                said.setdefault((model,), set()).add(result["fingerprint"])
            if model in source.weights:
                said.setdefault((model, "weights"), set()).add(source.weights[model])
    return {model for (model, *_), facts in said.items() if len(facts) > 1} if len(sources) > 1 else set()


def _column(result: Mapping[str, Any]) -> Column:
    chosen = find_protocol(result["protocol"]).chosen
    return Column(result["protocol"], "" if chosen else result["setting"], result["metric"])


def _words(column: Column) -> tuple[str, str, str]:
    return column.protocol, column.setting, column.metric


def list_differences(sources: Sequence[Source]) -> list[str]:
    """Settings and versions in which files about the same images differ."""
    lines = []
    for what in ("settings", "versions"):
        told: list[dict[str, str]] = [getattr(source, what) for source in sources]
        for key in dict.fromkeys(key for one in told for key in one):
            values = {str(source.path): one[key] for source, one in zip(sources, told, strict=True) if key in one}
            if len(set(values.values())) > 1:
                lines.append(f"{key}: " + "; ".join(f"{value} in {path}" for path, value in values.items()))
    return lines
