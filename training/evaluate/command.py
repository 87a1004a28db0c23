"""The command `training/evaluate.py`: models x representations x protocols on one pair of labelled sets.

Features are kept below `--out`, so a second call, or one after an interruption, computes only what is missing.
`results.json` holds every figure with its interval, seed and cost.
"""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from perceptual_mae_models.features import FeatureExtractor, Precision
from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource
from training.evaluate.features import Features, extract, fingerprint_data, fingerprint_model
from training.evaluate.models import open_model
from training.evaluate.protocols import PROTOCOLS, Settings
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
    protocols: tuple[Literal["knn", "linear", "few_shot"], ...] = ("knn", "linear", "few_shot")
    """What to run."""
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


def open_pair(options: Options) -> tuple[ImageSource, ImageSource]:
    """The training and the test images.

    Raises:
        FileNotFoundError: If either is missing.
        ValueError: If it is not said where they are.
    """
    if options.data:
        return ImageSource(find_split(options.data, ("train",))), ImageSource(find_split(options.data, ("val", "test")))
    if not options.train or not options.test:
        raise ValueError("give --data DIR with train and val in it, or both --train and --test")
    return ImageSource(options.train), ImageSource(options.test)


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


def evaluate(options: Options) -> dict[str, Any]:
    """Run every protocol on every representation of every model; the content of results.json.

    Raises:
        ValueError: If models, images or settings do not allow it.
        FileNotFoundError: If images or weights are missing.
        ImageError: If an image does not decode.
    """
    train_source, test_source = open_pair(options)
    results = []
    for name in options.models:
        extractor, representations = open_model(
            name, device=options.device, dtype=options.dtype, seed=options.settings.seed
        )
        started = time.monotonic()
        train, test = (load_features(extractor, source, options) for source in (train_source, test_source))
        check_pair(train, test)
        extraction = time.monotonic() - started
        for representation, columns in representations.items():
            for protocol in options.protocols:
                for row in PROTOCOLS[protocol](train.columns(columns), test.columns(columns), options.settings):
                    results.append(
                        {
                            "model": name,
                            "fingerprint": fingerprint_model(extractor),
                            "features": representation,
                            **dataclasses.asdict(row),
                            "extraction_seconds": extraction,
                        }
                    )
                    print(show(results[-1]), flush=True)
    return {
        "data": {
            split: {"name": Path(source.spec).name, "images": len(source), "fingerprint": fingerprint_data(source)}
            for split, source in (("train", train_source), ("test", test_source))
        },
        "settings": dataclasses.asdict(options.settings),
        "results": results,
        "versions": {**versions(), "scikit-learn": version("scikit-learn")},
    }


def show(result: dict[str, Any]) -> str:
    """One line of the table."""
    accuracy = {name: f"{100 * value:5.1f}" for name, value in result["accuracy"].items()}
    return (
        f"{result['model']:<44} {result['features']:<8} {result['protocol']:<9} {result['setting']:<9}"
        f" {accuracy['mean']} %  [{accuracy['low']}, {accuracy['high']}]"
    )


def main(options: Options) -> None:
    """Evaluate, print, write."""
    try:
        results = evaluate(options)
    except (ValueError, FileNotFoundError, ImageError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{options.out / 'results.json'}: {len(results['results'])} figures")
