"""The command `training/evaluate.py`: models x protocols, on labelled images or on data of a protocol's own.

Features and runs are kept below `--out`, so a second call, or one after an interruption, computes only what is missing.
`results.json` holds every figure with its interval, seed and cost, `report.html` shows them.
"""

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource
from training.evaluate.detection import run_detection
from training.evaluate.features import Features, extract, fingerprint_data, fingerprint_model
from training.evaluate.fidelity import open_judges, run_reconstruction
from training.evaluate.finetune import classify, fine_tune, run_finetune
from training.evaluate.models import PIXELS, describe_model, open_autoencoder, open_model
from training.evaluate.options import DENSE, LABELLED, Options
from training.evaluate.protocols import ON_FEATURES
from training.evaluate.report import write_report
from training.evaluate.rows import Row
from training.evaluate.segmentation import run_segmentation
from training.evaluate.shift import Classifiers, check_settings, linear_classifiers, run_shift
from training.evaluate.split import check_pair, find_duplicates, name_groups
from training.evaluate.tables import find_metric
from training.run.checkpoint import CheckpointError
from training.run.folder import RunError, versions
from training.run.signals import EXIT_INTERRUPTED, Interrupted

Result = dict[str, Any]
"""A row of results.json."""


def find_split(data: Path, names: tuple[str, ...]) -> str:
    """The folder or tar of a split.

    Raises:
        FileNotFoundError: If there is none.
    """
    for name in names:
        for ending in ("", ".tar", ".tar.gz"):
            if (path := data / f"{name}{ending}").exists():
                return str(path)
    raise FileNotFoundError(
        f"--data {data}: holds no {' or '.join(names)}, as a folder or .tar; or give --train, --test"
    )


def open_sources(options: Options) -> dict[str, ImageSource]:
    """The `test` images and, where a protocol learns classes, the `train` images; none for dense protocols.

    Raises:
        FileNotFoundError: If they are missing.
        ValueError: If it is not said where they are.
    """
    asked = set(options.protocols)
    wanted = ("train", "test") if asked & LABELLED else ("test",) if "reconstruction" in asked else ()
    given = {"train": options.train, "test": options.test}
    if options.data:
        if options.train or options.test:
            raise ValueError("give either --data or --train and --test")
        names = {"train": ("train",), "test": ("val", "test")}
        given = {split: find_split(options.data, names[split]) for split in wanted}
    splits = {"train": options.train_split, "test": options.test_split}
    sources = {}
    for split in wanted:
        place = given[split]
        if place is None:
            raise ValueError(f"give --data DIR with train and val in it, or --train and --test (missing: {split})")
        sources[split] = ImageSource(place, split=splits[split])
    return sources


def check_before(options: Options, sources: dict[str, ImageSource], prints: dict[str, str]) -> None:
    """Refuse at once what would fail after hours.

    Raises:
        ValueError: If test images are the training images, k is too large, a model has no decoder to rebuild with, data
            of a dense protocol are not given, or a protocol of one process is asked of several.
    """
    if "train" in sources and prints["train"] == prints["test"]:
        raise ValueError("--train and --test are the same images: nothing would follow from such a test")
    if "knn" in options.protocols and not 1 <= min(options.settings.k) <= max(options.settings.k) <= len(
        sources["train"]
    ):
        raise ValueError(
            f"--k is {options.settings.k}: at least 1 and at most the {len(sources['train'])} training images"
        )
    if "reconstruction" in options.protocols:
        for name in options.models:
            open_autoencoder(name)
        open_judges(options.reconstruction, len(sources["test"]), options.settings.seed, "cpu")
    if "shift" in options.protocols:
        check_settings(options.shift, len(sources["test"]))
    for protocol in sorted(DENSE & set(options.protocols)):
        if getattr(options, protocol).data is None:
            raise ValueError(f"--protocols {protocol}: say on which images, by --{protocol}.data")
    alone = set(options.protocols) - DENSE - {"finetune"}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and alone:
        raise ValueError(f"--protocols {' '.join(sorted(alone))}: run these in one process, not under a launcher")


def load_features(extractor: FeatureExtractor, source: ImageSource, options: Options) -> Features:
    """Features with labels, from the cache where it has them."""
    groups = name_groups(source, options.groups) if options.groups else None
    rows = extract(
        extractor,
        source,
        batch_size=options.batch_size,
        workers=options.workers,
        cache=options.out / "features",
    )
    return Features(rows, torch.tensor(source.labels), tuple(source.classes), groups)


def judge_features(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[Result]:
    """Every protocol on every representation of a frozen model: what it learned from `train`, it shows on `test`."""
    protocols = [protocol for protocol in options.protocols if protocol in ON_FEATURES]
    shifts = "shift" in options.protocols
    if not protocols and not shifts:
        return
    settings, place = options.settings, options.place
    extractor, representations = open_model(name, device=place.device, dtype=options.dtype, seed=settings.seed)
    started = time.monotonic()
    train, test = (load_features(extractor, sources[split], options) for split in ("train", "test"))
    check_pair(train, test)
    facts = {"fingerprint": fingerprint_model(extractor), "extraction_seconds": time.monotonic() - started}
    for representation, columns in representations.items():
        for protocol in protocols:
            for row in ON_FEATURES[protocol](train.columns(columns), test.columns(columns), settings):
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


def judge_dense(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[Result]:
    """Segmentation and detection, where they are asked for."""
    if name.startswith(PIXELS):
        return
    if "segmentation" in options.protocols:
        for row in run_segmentation(name, options.segmentation, options.place):
            yield result_of(name, row)
    if "detection" in options.protocols:
        for row in run_detection(name, options.detection, options.place):
            yield result_of(name, row)


JUDGES = (judge_features, judge_finetuned, judge_reconstruction, judge_dense)


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
    writes = os.environ.get("RANK", "0") == "0"
    duplicates = find_duplicates(sources["train"], sources["test"]) if "train" in sources else None
    if duplicates and duplicates.images and writes:
        print(duplicates)
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "data": describe_data(sources, prints),
        "duplicates": duplicates and dataclasses.asdict(duplicates),
        "settings": describe_settings(options),
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        "models": {},
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        found["models"][name] = describe_model(name)
        for judge in JUDGES:
            for result in judge(name, sources, options):
                found["results"].append(result)
                if result["protocol"] in DENSE:
                    found["data"][result["protocol"]] = result["detail"]["data"]
                if writes:
                    print(show(result), flush=True)
        # after each model: what is found stays, whatever happens to the next
        if writes:
            write(found, options.out)
    return found


def write(found: dict[str, Any], out: Path) -> None:
    """Write results.json and report.html."""
    partial = out / ".partial_results.json"
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(out / "results.json")
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


def describe_settings(options: Options) -> dict[str, Any]:
    """The settings of the protocols that run."""
    described = dataclasses.asdict(options.settings)
    for protocol in ("finetune", "shift", "reconstruction", "segmentation", "detection"):
        if protocol in options.protocols:
            described[protocol] = dataclasses.asdict(getattr(options, protocol))
    return described


def show(result: Result) -> str:
    """One line of the table."""
    metric = find_metric(result["metric"])
    mean, low, high = (metric.text(result["value"][name]) for name in ("mean", "low", "high"))
    head = f"{result['model']:<44} {result['features']:<8} {result['protocol']:<14} {result['setting']:<20}"
    return f"{head} {result['metric']:<16} {mean:>6} {metric.unit:<2} [{low}, {high}]"


def main(options: Options) -> None:
    """Evaluate, print, write."""
    try:
        found = evaluate(options)
    except Interrupted as interruption:
        print(f"evaluate.py: stopped by {interruption}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from interruption
    except (ValueError, OSError, RuntimeError, RunError, CheckpointError, ImageError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    if os.environ.get("RANK", "0") == "0":
        print(f"{options.out / 'results.json'}: {len(found['results'])} figures, shown by report.html beside it")
