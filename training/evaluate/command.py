"""The command `training/evaluate.py`: models x protocols, on labelled images or on data of a protocol's own.

Features and runs are kept below `--out`, so a second call, or one after an interruption, extracts and trains only what
is missing of them; what follows from features is computed again. `results.json` holds every figure with its interval,
seed and cost, `report.html` shows them.
"""

import dataclasses
import datetime
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.files import replace_text
from training.data.images import ImageSource
from training.evaluate.classifiers import Classifiers, linear_classifiers
from training.evaluate.detection import run_detection
from training.evaluate.duplicates import find_duplicates
from training.evaluate.features import (
    Features,
    extract,
    extraction_seconds,
    find_cache,
    fingerprint_data,
    fingerprint_model,
)
from training.evaluate.fidelity import run_reconstruction
from training.evaluate.finetune import classify, fine_tune, run_finetune
from training.evaluate.models import PIXELS, describe_model, open_model
from training.evaluate.options import Options
from training.evaluate.protocols import ON_FEATURES
from training.evaluate.rows import Row
from training.evaluate.segmentation import run_segmentation
from training.evaluate.shift import run_shift
from training.evaluate.sources import Dense, check_before, label, open_dense, open_sources
from training.report.page import write_report
from training.report.results import read_results
from training.report.tables import find_metric
from training.run.folder import versions
from training.run.signals import EXIT_INTERRUPTED, Interrupted

PACKAGES = (
    "numpy",
    "pycocotools",
    "scikit-learn",
    "scipy",
    "segmentation-models-pytorch",
    "torch-fidelity",
)
"""Whose versions decide figures, besides those of pretraining."""

Result = dict[str, Any]
"""A row of results.json."""


def load_features(extractor: FeatureExtractor, source: ImageSource, options: Options) -> Features:
    """Features with labels, from the cache where it has them."""
    cache = options.out / "features"
    rows = extract(extractor, source, batch_size=options.batch_size, workers=options.workers, cache=cache)
    return label(rows, source, options)


def judge_features(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[Result]:
    """Every protocol on every representation of a frozen model: what it learned from `train`, it shows on `test`."""
    protocols = [protocol for protocol in options.protocols if protocol in ON_FEATURES]
    shifts = "shift" in options.protocols
    if not protocols and not shifts:
        return
    settings, place = options.settings, options.place
    extractor, representations = open_model(name, device=place.device, dtype=options.dtype, seed=settings.seed)
    train, test = (load_features(extractor, sources[split], options) for split in ("train", "test"))
    folders = (find_cache(extractor, sources[split], options.out / "features") for split in ("train", "test"))
    facts = {"fingerprint": fingerprint_model(extractor), "extraction_seconds": sum(map(extraction_seconds, folders))}
    for representation, columns in representations.items():
        for protocol in protocols:
            for row in ON_FEATURES[protocol](train.columns(columns), test.columns(columns), settings, place.device):
                yield result_of(name, row, representation, facts)
    if shifts:
        probes = linear_classifiers(
            extractor,
            train,
            representations,
            place,
            epochs=settings.epochs,
            share=settings.hold_back,
            seed=settings.seed,
        )
        for representation, row in run_shift(probes, sources["test"], options.shift, place, seed=settings.seed):
            yield result_of(name, row, representation, facts)


def judge_finetuned(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[Result]:
    """The model with all its weights learning from `train`, on `test` and on what `shift` makes of it."""
    if "finetune" not in options.protocols or name.startswith(PIXELS):
        return
    train, test, seed, place = sources["train"], sources["test"], options.settings.seed, options.place
    tuned = fine_tune(name, train, options.finetune, seed, place)
    for row in run_finetune(tuned, test, place):
        yield result_of(name, row)
    if "shift" in options.protocols:
        classifiers = Classifiers(
            kind="finetune",
            classes=tuple(train.classes),
            logits=lambda source: {"": classify(tuned.network, source, place)},
            fingerprint=fingerprint_model(FeatureExtractor(tuned.network)),
            facts={"": {}},
        )
        for _, row in run_shift(classifiers, test, options.shift, place, seed=seed):
            yield result_of(name, row)


def judge_reconstruction(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[Result]:
    """Reconstructions of the test images, where that is asked for."""
    if "reconstruction" in options.protocols:
        seed, place = options.settings.seed, options.place
        for row in run_reconstruction(name, sources["test"], options.reconstruction, seed, place):
            yield result_of(name, row)


def judge_dense(name: str, dense: Dense, options: Options) -> Iterator[Result]:
    """Segmentation and detection, where they are asked for."""
    if name.startswith(PIXELS):
        return
    seed = options.settings.seed
    if dense.segmentation:
        segmentation = dataclasses.replace(options.segmentation, seed=seed)
        for row in run_segmentation(name, dense.segmentation, segmentation, options.place):
            yield result_of(name, row)
    if dense.detection:
        detection = dataclasses.replace(options.detection, seed=seed)
        for row in run_detection(name, dense.detection, detection, options.place):
            yield result_of(name, row)


def result_of(name: str, row: Row, representation: str = "", facts: dict[str, Any] | None = None) -> Result:
    """A figure with whose it is."""
    return {"model": name, "features": representation, **dataclasses.asdict(row), **(facts or {})}


def evaluate(options: Options) -> dict[str, Any]:
    """Run everything, write results.json and report.html; returns the content of the first.

    Raises:
        ValueError: If models, images or settings do not allow it.
        FileNotFoundError: If images or weights are missing.
        RuntimeError: If weights do not fit, or a loss is not finite.
        ImageError: If an image does not decode.
        Interrupted: If a signal asked what is trained to stop; the same command goes on.
    """
    sources = open_sources(options)
    prints = {split: fingerprint_data(source) for split, source in sources.items()}
    check_before(options, sources, prints)
    dense = open_dense(options)
    writes = os.environ.get("RANK", "0") == "0"
    duplicates = find_duplicates(sources["train"], sources["test"]) if "train" in sources else None
    if duplicates and duplicates.images and writes:
        print(duplicates)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "data": {**describe_data(sources, prints), **dense.facts},
        "duplicates": duplicates and dataclasses.asdict(duplicates),
        "settings": describe_settings(options),
        "versions": {**versions(), **{name: version(name) for name in PACKAGES}},
        "models": {name: describe_model(name, options.settings.seed) for name in options.models},
        "results": [],
    }
    keep_earlier(found, options)
    options.out.mkdir(parents=True, exist_ok=True)
    on_images = (judge_features, judge_finetuned, judge_reconstruction)
    judges: list[Callable[[str], Iterator[Result]]] = [partial(j, sources=sources, options=options) for j in on_images]
    judges.append(partial(judge_dense, dense=dense, options=options))
    for name, judge in itertools.product(options.models, judges):
        results: list[Result] = []
        ended = False
        try:
            for result in judge(name):
                results.append(result)
                if writes:
                    print(show(result), flush=True)
            ended = True
        finally:  # what is found stays, whatever happens next
            add_results(found, results, ended=ended)
            if writes and results:
                write(found, options.out)
    return found


def add_results(found: dict[str, Any], results: list[Result], *, ended: bool) -> None:
    """Put figures in place of those that an earlier command left of the same models, protocols and classifiers.

    Args:
        found: The content of results.json.
        results: The figures.
        ended: Whether they are all; if not, those of an earlier command stay, which may have ended.
    """

    def kind(result: Result) -> tuple[str, ...]:
        return result["model"], result["protocol"], str(result["detail"].get("classifier"))

    if ended:
        new = set(map(kind, results))
        found["results"] = [result for result in found["results"] if kind(result) not in new]
    else:
        old = set(map(kind, found["results"]))
        results = [result for result in results if kind(result) not in old]
    found["results"] += results


def keep_earlier(found: dict[str, Any], options: Options) -> None:
    """Add to `found` what an earlier command left in the folder.

    Raises:
        ValueError: If that is about other images or other weights, or made in another way.
    """
    file = options.out / "results.json"
    if not file.exists():
        return
    earlier = read_results(file)
    for part in ("data", "settings", "versions"):
        now = json.loads(json.dumps(found[part]))
        for key in earlier[part].keys() & now.keys():
            if earlier[part][key] != now[key]:
                raise ValueError(
                    f"{file} has figures of other {part} ({key}: {earlier[part][key]}, now {now[key]}): "
                    "give another --out, or delete it"
                )
        found[part] = {**earlier[part], **found[part]}
    found["duplicates"] = found["duplicates"] or earlier.get("duplicates")
    for name, facts in earlier.get("models", {}).items():
        known, now = (said.get("fingerprint") for said in (facts, found["models"].get(name, facts)))
        if known != now:
            raise ValueError(
                f"{file} has figures of another {name} (weights or transform): give another --out, or delete it"
            )
    found["models"] = {**earlier.get("models", {}), **found["models"]}
    found["results"] = earlier["results"]


def write(found: dict[str, Any], out: Path) -> None:
    """Write results.json and report.html."""
    replace_text(out / "results.json", json.dumps(found, indent=2) + "\n")
    if found["results"]:
        write_report([(out / "results.json", found)], out / "report.html")


def describe_data(sources: dict[str, ImageSource], prints: dict[str, str]) -> dict[str, Any]:
    """What was evaluated on, by split."""
    return {
        split: {"name": short_name(source.spec), "images": len(source), "fingerprint": prints[split]}
        for split, source in sources.items()
    }


def short_name(spec: str) -> str:
    """The last part of a path, with its folder's name where it is called by the split alone."""
    path = PurePath(spec)
    return "/".join(path.parts[-2:]) if path.name.partition(".")[0] in ("train", "val", "test") else path.name


SETTINGS_OF = {
    "knn": ("k",),
    "linear": ("epochs", "hold_back"),
    "shift": ("epochs", "hold_back"),
    "few_shot": ("shots", "draws"),
}
"""Which of the common settings a protocol heeds, besides the seed."""


def describe_settings(options: Options) -> dict[str, Any]:
    """The settings of the protocols that run."""
    used = {"seed", *(name for protocol in options.protocols for name in SETTINGS_OF.get(protocol, ()))}
    described = {key: value for key, value in dataclasses.asdict(options.settings).items() if key in used}
    described |= {"dtype": options.dtype, "groups": options.groups}
    for protocol in ("finetune", "shift", "reconstruction", "segmentation", "detection"):
        if protocol in options.protocols:
            chosen = dataclasses.asdict(getattr(options, protocol))
            # what they were run on stands elsewhere, and the seed is the one above
            described[protocol] = {
                key: value for key, value in chosen.items() if key not in ("data", "encoder", "seed")
            }
    return described


def show(result: Result) -> str:
    """One line of the table."""
    metric = find_metric(result["metric"])
    mean, low, high = (metric.text(result["value"][name]) for name in ("mean", "low", "high"))
    head = f"{result['model']:<44} {result['features']:<8} {result['protocol']:<14} {result['setting']:<20}"
    return f"{head} {result['metric']:<16} {mean:>6} {metric.unit:<2} [{low}, {high}]"


def interrupt(number: int, _: object) -> None:
    """Leave a computation without checkpoints; what is found stays. Training has its own way, see `StopRequest`."""
    raise Interrupted(f"{signal.Signals(number).name}: what is found is written, the same command goes on")


def main(options: Options) -> None:
    """Evaluate, print, write."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        found = evaluate(options)
    except Interrupted as interruption:
        print(f"evaluate.py: stopped by {interruption}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from interruption
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    if os.environ.get("RANK", "0") == "0":
        print(f"{options.out / 'results.json'}: {len(found['results'])} figures, shown by report.html beside it")
