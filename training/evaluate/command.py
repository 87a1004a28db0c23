"""The command `training/evaluate.py`: models x representations x protocols on one pair of labelled sets.

Features are kept below `--out`, so a second call, or one after an interruption, computes only what is missing.
`results.json` holds every figure with its interval, seed and cost.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from perceptual_mae_models.features import FeatureExtractor, Precision, default_device
from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource
from training.evaluate.features import Features, extract, fingerprint_data, fingerprint_model
from training.evaluate.models import open_autoencoder, open_model
from training.evaluate.protocols import ON_FEATURES, Settings, run_reconstruction
from training.evaluate.split import check_pair, name_groups
from training.run.folder import versions


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate, and how."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """timm names, hf-hub: ids, NAME@FILE, NAME@random, pixels:16."""
    data: Path | None = None
    """A folder with train and val (or test) in it: folders or tars."""
    train: str | None = None
    """Instead of --data: labelled images to learn from; a folder, .tar, .tar.gz, idx file or hf: data set."""
    test: str | None = None
    """Instead of --data: labelled images to be judged by."""
    train_split: str = "train"
    """Split of --train, where that is an hf: data set."""
    test_split: str = "test"
    """Split of --test, where that is an hf: data set."""
    protocols: tuple[Literal["knn", "linear", "few_shot", "reconstruction"], ...] = ("knn", "linear", "few_shot")
    """What to run; reconstruction needs a decoder."""
    out: Path = Path("evaluation")
    """Where results.json and the features go."""
    groups: str | None = None
    """Regular expression whose group names what an image belongs to (patient, film): never on both sides of a cut."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    batch_size: int = 128
    """Images a forward pass; changes the speed only."""
    workers: int = 0
    """Processes that decode images."""
    device: str | None = None
    """By default a GPU where there is one."""
    dtype: Precision = "float32"
    """Arithmetic of the encoders."""


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
    """The `test` images and, where a protocol learns from any, the `train` images.

    Raises:
        FileNotFoundError: If they are missing.
        ValueError: If it is not said where they are.
    """
    wanted = ("train", "test") if set(options.protocols) & ON_FEATURES.keys() else ("test",)
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
        ValueError: If test images are the training images, k is too large, or a model has no decoder to rebuild with.
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


def judge_features(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[dict[str, Any]]:
    """Every protocol on every representation of a model: what it learned from `train`, it shows on `test`."""
    protocols = [protocol for protocol in options.protocols if protocol in ON_FEATURES]
    if not protocols:
        return
    extractor, representations = open_model(
        name, device=options.device, dtype=options.dtype, seed=options.settings.seed
    )
    started = time.monotonic()
    train, test = (load_features(extractor, sources[split], options) for split in ("train", "test"))
    check_pair(train, test)
    facts = {"fingerprint": fingerprint_model(extractor), "extraction_seconds": time.monotonic() - started}
    for representation, columns in representations.items():
        for protocol in protocols:
            for row in ON_FEATURES[protocol](train.columns(columns), test.columns(columns), options.settings):
                yield {"model": name, "features": representation, **dataclasses.asdict(row), **facts}


def judge_reconstruction(name: str, sources: dict[str, ImageSource], options: Options) -> Iterator[dict[str, Any]]:
    """Reconstructions of the test images, where that is asked for."""
    if "reconstruction" in options.protocols:
        device = options.device or default_device()
        for row in run_reconstruction(name, sources["test"], options.settings, options.batch_size, device):
            yield {"model": name, "features": "", **dataclasses.asdict(row)}


def evaluate(options: Options) -> dict[str, Any]:
    """Run everything and write results.json; returns its content.

    Raises:
        ValueError: If models, images or settings do not allow it.
        FileNotFoundError: If images or weights are missing.
        RuntimeError: If weights do not fit.
        ImageError: If an image does not decode.
    """
    sources = open_sources(options)
    prints = {split: fingerprint_data(source) for split, source in sources.items()}
    check_before(options, sources, prints)
    found: dict[str, Any] = {
        "data": {
            split: {"name": Path(source.spec).name, "images": len(source), "fingerprint": prints[split]}
            for split, source in sources.items()
        },
        "settings": dataclasses.asdict(options.settings),
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        for judge in (judge_features, judge_reconstruction):
            for result in judge(name, sources, options):
                found["results"].append(result)
                print(show(result), flush=True)
        # after each model: what is found stays, whatever happens to the next
        (options.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def show(result: dict[str, Any]) -> str:
    """One line of the table."""
    scale, unit = {"accuracy": (100, "%"), "psnr": (1, "dB")}.get(result["metric"], (1, ""))
    digits = 1 if scale == 100 else 3
    mean, low, high = (f"{scale * result['value'][name]:.{digits}f}" for name in ("mean", "low", "high"))
    head = f"{result['model']:<44} {result['features']:<8} {result['protocol']:<14} {result['setting']:<8}"
    return f"{head} {result['metric']:<8} {mean:>6} {unit:<2} [{low}, {high}]"


def main(options: Options) -> None:
    """Evaluate, print, write."""
    try:
        found = evaluate(options)
    except (ValueError, OSError, RuntimeError, ImageError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    print(f"{options.out / 'results.json'}: {len(found['results'])} figures")
