"""The images that a command names, and whether its protocols can follow from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data.coco import CocoSource
from training.data.images import ImageSource, keep_some
from training.data.masks import MaskSource
from training.evaluate.dense import DenseData, DenseSettings
from training.evaluate.detection import open_detection
from training.evaluate.features import Features
from training.evaluate.few_shot import count_shots
from training.evaluate.fidelity import open_judges
from training.evaluate.finetune_recipe import check_batch, resolve_recipe
from training.evaluate.models import PIXELS, check_name, open_autoencoder
from training.evaluate.options import DENSE, LABELLED, LEARNING, Options
from training.evaluate.segmentation import open_segmentation
from training.evaluate.shift import check_number, open_shifted
from training.evaluate.split import check_pair, hold_back, name_groups, refuse_copies
from training.run.engine import count_processes


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
        names = {"train": ("train",), "test": ("test", "val")}
        given = {split: find_split(options.data, names[split]) for split in wanted}
    splits = {"train": options.train_split, "test": options.test_split}
    sources = {}
    for split in wanted:
        place = given[split]
        if place is None:
            raise ValueError(f"give --data DIR with train and val in it, or --train and --test (missing: {split})")
        flag = "--data" if options.data else f"--{split}"
        source = ImageSource(
            place, split=splits[split], column=options.column, label_column=options.label_column, flag=flag
        )
        sources[split] = keep_some(source, getattr(options, f"{split}_images"))
    return sources


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The data of the dense protocols that were asked for."""

    segmentation: DenseData[MaskSource] | None
    detection: DenseData[CocoSource] | None

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What results.json says of them, by protocol."""
        opened = {"segmentation": self.segmentation, "detection": self.detection}
        return {protocol: data.facts for protocol, data in opened.items() if data}


def open_dense(options: Options) -> Dense:
    """Open the data of the dense protocols, all images and masks looked at.

    Raises:
        ValueError: If it cannot be learned from.
        FileNotFoundError: If there is none.
        ImageError: If an image or mask does not decode.
    """
    asked, groups = options.protocols, options.groups
    return Dense(
        segmentation=open_segmentation(options.segmentation, groups) if "segmentation" in asked else None,
        detection=open_detection(options.detection, groups) if "detection" in asked else None,
    )


def check_before(options: Options, sources: dict[str, ImageSource], prints: dict[str, str]) -> None:
    """Refuse at once what would fail after hours.

    Raises:
        ValueError: If a name means nothing, nothing can be learned from these images, a model has no decoder to rebuild
            with, data of a dense protocol are not given, or a protocol of one process is asked of several.
        FileNotFoundError: If weights or images are missing.
    """
    check_models(options)
    if "train" in sources:
        check_learning(options, sources, prints)
    if "reconstruction" in options.protocols:
        for name in options.models:
            open_autoencoder(name)
        open_judges(options.reconstruction, len(sources["test"]), options.settings.seed, "cpu")
    for protocol in sorted(DENSE & set(options.protocols)):
        settings: DenseSettings = getattr(options, protocol)
        settings.find_data()
    alone = set(options.protocols) - DENSE - {"finetune"}
    if count_processes() > 1 and alone:
        raise ValueError(f"--protocols {' '.join(sorted(alone))}: run these in one process, not under a launcher")


def check_models(options: Options) -> None:
    """The part of `check_before` about models.

    Raises:
        ValueError: If none is named, one twice, one means nothing, or none has the weights that all protocols train.
        FileNotFoundError: If weights are missing.
    """
    if not options.models:
        raise ValueError("name a model, such as vit_pico_patch8_pmae")
    for name in options.models:
        check_name(name)
        if options.models.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    if not set(options.protocols) - LEARNING and all(name.startswith(PIXELS) for name in options.models):
        raise ValueError(f"--protocols {' '.join(options.protocols)}: pixels have no weights to train; name a model")


def check_learning(options: Options, sources: dict[str, ImageSource], prints: dict[str, str]) -> None:
    """The part of `check_before` about labels.

    Raises:
        ValueError: If test images are the training images, classes or groups of the two do not fit, or there are too
            few images for what a protocol takes of them.
        FileNotFoundError: If a shifted set is missing.
    """
    if prints["train"] == prints["test"]:
        raise ValueError("--train and --test are the same images: nothing would follow from such a test")
    settings, protocols = options.settings, options.protocols
    train, test = (label(torch.empty(len(sources[split]), 0), sources[split], options) for split in ("train", "test"))
    check_pair(train, test)
    refuse_copies(sources["train"], sources["test"])
    if "knn" in protocols:
        settings.neighbours(len(train))
    if {"linear", "shift"} & set(protocols):
        hold_back(train, settings.hold_back, settings.seed)
    if "few_shot" in protocols:
        for amount in settings.shots:
            count_shots(train.labels, amount)
    if "finetune" in protocols:
        for name in options.models:
            if not name.startswith(PIXELS):
                check_batch(resolve_recipe(name, options.finetune, settings.seed), len(train))
    if "shift" in protocols:
        check_number(options.shift, len(test))
        open_shifted(options.shift, train.classes)


def label(rows: Tensor, source: ImageSource, options: Options) -> Features:
    """Rows of a source's images with its labels, classes and groups."""
    groups = name_groups(source, options.groups) if options.groups else None
    return Features(rows, torch.tensor(source.labels), tuple(source.classes), groups)
