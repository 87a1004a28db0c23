"""Accuracy where test images are not like training images.

That is: on other labelled sets of the same classes (ImageNet-V2, -A, -R, -Sketch and their like), and on the test
images under common corruptions (see `corruptions.py`).

Features of the corrupted images are not kept: 65 copies would be gigabytes. What is kept, below `place.out / "shift"`,
is each image's predicted class, so an interrupted evaluation repeats at most one corruption at one severity.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from perceptual_mae_models.convert import save_weights
from training.data.images import ImageSource, evenly
from training.evaluate.classifiers import Classifiers
from training.evaluate.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSource, draw_examples
from training.evaluate.features import fingerprint_data
from training.evaluate.intervals import Interval, sample_interval, share_interval
from training.evaluate.rows import Place, Row
from training.settings import refuse

CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class ShiftSettings:
    """Which shifts."""

    data: tuple[str, ...] = ()
    """Other labelled sets: folders, tars or hf: data sets whose classes are among those of the training images."""
    split: str = "test"
    """Split of those that are hf: data sets."""
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    """How to damage the test images."""
    severities: tuple[int, ...] = SEVERITIES
    """How much, 1 to 5."""
    images: int | None = None
    """Damage so many of the test images, evenly spaced over them. None: all."""

    def __post_init__(self) -> None:
        def some(values: Collection[object], known: Collection[object]) -> bool:
            return len(set(values)) == len(values) and set(values) <= set(known)

        checks = {
            "data": (some(self.data, self.data), "sets of which none is given twice"),
            "corruptions": (some(self.corruptions, CORRUPTIONS), f"some of {', '.join(CORRUPTIONS)}, none twice"),
            "severities": (bool(self.severities) and some(self.severities, SEVERITIES), "some of 1 to 5, none twice"),
        }
        refuse(self, checks, "shift.")


def match_labels(names: Sequence[str], labels: Sequence[int], classes: Sequence[str], where: str) -> Tensor:
    """Labels of a set as numbers of the classes that were learned.

    Classes are the same if they are called the same. Where a set's are all called by numbers and those that were
    learned are not, the numbers are theirs, from 0, as in ImageNet-V2's folders.

    Args:
        names: Of the set's classes; those without an image do not matter.
        labels: Numbers of `names`, one an image.
        classes: Names of the classes that were learned.
        where: The set, for messages.

    Returns:
        (N,) int64.

    Raises:
        ValueError: If a class was not learned, or labels are hidden.
    """
    if min(labels) < 0:
        raise ValueError(f"{where}: negative labels, by which data sets mark hidden ones")
    present = {label: names[label] for label in sorted(set(labels))}
    numbers = {name: number for number, name in enumerate(classes)}
    if _are_numbers(present.values()) and not _are_numbers(classes):
        numbers = {name: int(name) for name in present.values() if int(name) < len(classes)}
    if foreign := [name or "(images in no folder)" for name in present.values() if name not in numbers]:
        raise ValueError(
            f"{where}: {len(foreign)} of its classes were not learned, such as {', '.join(foreign[:5])}; "
            f"the {len(classes)} that were are called {', '.join(classes[:3])}, …"
        )
    return torch.tensor([numbers[present[label]] for label in labels])


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


@dataclass(frozen=True)
class ShiftedSet:
    """A labelled set to test on."""

    name: str
    source: ImageSource
    labels: Tensor
    """(N,), numbers of the classes that were learned."""
    among: Tensor
    """(K,), the classes to choose from, ascending."""


def open_shifted(settings: ShiftSettings, classes: tuple[str, ...]) -> list[ShiftedSet]:
    """The other labelled sets, with labels as numbers of the classes that are learned.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If a class of it is not among those.
    """
    found = []
    names = [Path(spec).name.removesuffix(".gz").removesuffix(".tar") for spec in settings.data]
    for spec, name in zip(settings.data, names, strict=True):
        source = ImageSource(spec, split=settings.split, flag="--shift.data")
        labels = match_labels(source.classes, source.labels, classes, spec)
        present = labels.unique()
        # to choose from one class would always be right
        among = present if len(present) > 1 else torch.arange(len(classes))
        clear = names.count(name) == 1 and name != CLEAN
        found.append(ShiftedSet(name if clear else spec, source, labels, among))
    return found


def check_number(settings: ShiftSettings, images: int) -> None:
    """Refuse more images than there are: `run_shift` does at its beginning, a command may earlier.

    Raises:
        ValueError: If there are not so many test images.
    """
    ok = settings.images is None or 1 <= settings.images <= images
    refuse(settings, {"images": (ok, f"1 to {images}, which the test set has")}, "shift.")


def run_shift(
    classifiers: Classifiers, test: ImageSource, settings: ShiftSettings, place: Place, *, seed: int = 0
) -> Iterator[tuple[str, Row]]:
    """Accuracy on the test images, on every shifted set and under every corruption.

    On a shifted set the classes to choose from are those that it has images of (Hendrycks et al. 2021, on ImageNet-A
    and -R); all of them, if it has a single one. The row's `clean` is the accuracy on the test images of these classes
    among the same choice, which is what the shift is to be compared with.

    Settings are `clean`, `clean subset` where not all test images are damaged, the sets' names, `CORRUPTION/SEVERITY`,
    `CORRUPTION/mean` over its severities and `corruptions/mean` over all. Intervals are over images.

    Args:
        classifiers: What to judge.
        test: The test images, of classes that were learned.
        settings: Which shifts.
        place: Where predictions and a picture of the corruptions go.
        seed: Decides what corruptions draw.

    Yields:
        The name of a classifier and a row of it. Its seconds hold the features of images that are not kept.

    Raises:
        ValueError: If a setting is impossible, a class was not learned or logits are not finite.
        FileNotFoundError: If a set is missing.
        ImageError: If an image does not decode.
    """
    check_number(settings, len(test))
    shifted = open_shifted(settings, classifiers.classes)
    labels = match_labels(test.classes, test.labels, classifiers.classes, test.spec)
    started = time.monotonic()
    clean = classifiers.logits(test)
    everything = torch.arange(len(classifiers.classes))
    right = {key: predict(logits, everything) == labels for key, logits in clean.items()}
    yield from _rows(CLEAN, right, classifiers, time.monotonic() - started, {"images": len(test)})
    for item in shifted:
        yield from _judge_shifted(classifiers, item, clean, labels)
    if settings.corruptions:
        yield from _judge_corrupted(classifiers, test, labels, right, settings, place, seed)


def predict(logits: Tensor, among: Tensor) -> Tensor:
    """The likeliest of some classes.

    Args:
        logits: (N, C).
        among: (K,), numbers of classes.

    Returns:
        (N,), numbers of classes.

    Raises:
        ValueError: If a logit is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("a classifier gives logits that are not finite: damaged weights, or --dtype")
    return among[logits[:, among].argmax(dim=1)]


def _rows(
    setting: str,
    right: Mapping[str, Tensor],
    classifiers: Classifiers,
    seconds: float,
    detail: dict[str, object],
    clean: Mapping[str, float | None] | None = None,
) -> Iterator[tuple[str, Row]]:
    """A row of each classifier, whose (N,) or, for means over K settings, (K, N) bool say what it gets right."""
    for key, values in right.items():
        facts = {"classifier": classifiers.kind, **classifiers.facts[key], **detail}
        yield (
            key,
            Row(
                protocol="shift",
                setting=setting,
                metric="accuracy",
                value=share_interval(values) if values.ndim == 1 else _mean_interval(values),
                seconds=seconds,
                detail=facts if clean is None else {**facts, "clean": clean[key]},
            ),
        )


def _mean_interval(right: Tensor) -> Interval:
    """Interval of the mean over K settings of the same images, (K, N): images are independent, K answers not."""
    if len(right) == 1:
        return share_interval(right[0])
    interval = sample_interval(right.double().mean(dim=0))
    return Interval(interval.mean, max(0.0, interval.low), min(1.0, interval.high))


def _share(right: Tensor) -> float | None:
    return right.double().mean().item() if len(right) else None


def _judge_shifted(
    classifiers: Classifiers, item: ShiftedSet, clean: Mapping[str, Tensor], labels: Tensor
) -> Iterator[tuple[str, Row]]:
    started = time.monotonic()
    logits = classifiers.logits(item.source)
    right = {key: predict(values, item.among) == item.labels for key, values in logits.items()}
    same = torch.isin(labels, item.labels)
    compared = {key: _share(predict(values[same], item.among) == labels[same]) for key, values in clean.items()}
    detail: dict[str, object] = {"images": len(item.labels), "classes": len(item.labels.unique())}
    detail["among"] = len(item.among)
    yield from _rows(item.name, right, classifiers, time.monotonic() - started, detail, compared)


def _judge_corrupted(
    classifiers: Classifiers,
    test: ImageSource,
    labels: Tensor,
    clean: Mapping[str, Tensor],
    settings: ShiftSettings,
    place: Place,
    seed: int,
) -> Iterator[tuple[str, Row]]:
    numbers = evenly(len(test), settings.images or len(test))
    count = len(numbers)
    labels, clean = labels[numbers], {key: right[numbers] for key, right in clean.items()}
    if count < len(test):
        yield from _rows("clean subset", clean, classifiers, 0.0, {"images": count})
    picture, number = place.out / "pictures" / "corruptions.png", numbers[count // 2]
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_examples(test.load(number), settings.corruptions, test.name(number), seed=seed, number=number).save(picture)
    data, found, seconds = fingerprint_data(test), {}, {}
    for name in settings.corruptions:
        detail: dict[str, object] = {"images": count, "family": CORRUPTIONS[name].family}
        for severity in settings.severities:
            source = CorruptedSource(test, numbers, name, severity, seed)
            predicted, spent = _predict_corrupted(classifiers, source, data, place.out / "shift")
            right = {key: values == labels for key, values in predicted.items()}
            yield from _rows(f"{name}/{severity}", right, classifiers, spent, detail)
            found[name, severity], seconds[name, severity] = right, spent
        places = [(name, severity) for severity in settings.severities]
        stacked = {key: torch.stack([found[at][key] for at in places]) for key in clean}
        spent = sum(seconds[at] for at in places)
        yield from _rows(f"{name}/mean", stacked, classifiers, spent, {**detail, "severities": settings.severities})
    everything = {key: torch.stack([right[key] for right in found.values()]) for key in clean}
    detail = {"images": count, "severities": settings.severities, "picture": str(picture.relative_to(place.out))}
    compared = {key: _share(right) for key, right in clean.items()}
    yield from _rows("corruptions/mean", everything, classifiers, sum(seconds.values()), detail, compared)


def _predict_corrupted(
    classifiers: Classifiers, source: CorruptedSource, data: str, folder: Path
) -> tuple[dict[str, Tensor], float]:
    """(N,) predicted classes of each classifier and the seconds it took, kept in a file."""
    # the strengths, because they may change between versions
    facts = (classifiers.fingerprint, data, source.numbers, source.corruption, source.severity, source.seed)
    strengths = CORRUPTIONS[source.corruption].strengths, CORRUPTIONS[source.corruption].least
    file = folder / f"{hashlib.sha256(repr((facts, strengths)).encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        started = time.monotonic()
        everything = torch.arange(len(classifiers.classes))
        logits = classifiers.logits(source)
        # by number: a classifier's name may be empty
        found = {str(n): predict(logits[key], everything) for n, key in enumerate(classifiers.facts)}
        seconds = torch.tensor(time.monotonic() - started, dtype=torch.float64)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"corruption": source.corruption, "severity": str(source.severity)}
        save_weights(file, {**found, "seconds": seconds}, metadata)
    kept = load_file(file)
    return {key: kept[str(n)] for n, key in enumerate(classifiers.facts)}, kept["seconds"].item()
