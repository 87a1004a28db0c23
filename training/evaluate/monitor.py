"""What an encoder's features are worth while it is being trained: k-NN on held-out images, every few epochs.

The images are decoded once, to bytes at the encoder's input size. Measuring leaves the encoder and every generator as
they were, so a run ends with the same bits whether or not it is watched.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from perceptual_mae_models.features import FeatureExtractor
from training.config import Monitor
from training.data.feed import num_images
from training.data.images import ImageSource, evenly_by_class
from training.data.readers import FolderReader
from training.data.stream import ImageStream
from training.evaluate.duplicates import find_duplicates
from training.evaluate.features import cut, fingerprint_data, load_views
from training.evaluate.knn import TEMPERATURE, knn_predict
from training.recipes import Recipe
from training.run.schedule import steps_of

NEIGHBOURS = 20
IMAGES_KEPT = 20_000
"""Of the held-out images, and of the bank, evenly spaced ones of every class: at 224 pixels a side, 3 GB each."""
BATCH_SIZE = 128


def check_held_out(held_out: ImageSource, bank: ImageSource | None, seen: ImageSource | None) -> None:
    """Refuse images that would say nothing about features.

    Args:
        held_out: The images to be judged by.
        bank: Their neighbours; None: they are each other's.
        seen: What the encoder learns from, where that can be compared.

    Raises:
        ValueError: If there are no labels or a single class, too few neighbours, other classes in the bank, or if the
            held-out images are those of `seen` or `bank`.
    """
    for flag, source in (("--knn-data", held_out), ("--knn-bank", bank)):
        if source is None:
            continue
        try:
            labels = set(source.labels)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error
        if len(labels) < 2:
            raise ValueError(f"{flag} {source.spec} has one class: put the images of each class into a folder")
        if min(labels) < 0:
            raise ValueError(f"{flag} {source.spec} has negative labels, by which data sets mark hidden ones")
    if bank is not None and bank.classes != held_out.classes:
        raise ValueError(f"--knn-data {held_out.spec} and --knn-bank {bank.spec} do not hold the same classes")
    voters = len(held_out) - 1 if bank is None else len(bank)
    if voters < NEIGHBOURS:
        raise ValueError(f"{voters} neighbours are too few for k-NN with k = {NEIGHBOURS}: give more images")
    for flag, other in (("--data", seen), ("--knn-bank", bank)):
        if other is not None and _overlap(held_out, other):
            raise ValueError(f"--knn-data {held_out.spec} holds images of {flag} {other.spec}: hold others out")


def describe_doubles(held_out: ImageSource, bank: ImageSource) -> str:
    """What to say of held-out images that are in the bank as well, byte for byte; "" if none is."""
    doubles = find_duplicates(bank, held_out)
    if doubles.first is None:
        return ""
    first, second = doubles.first
    return (
        f"k-NN: {doubles.images} of {doubles.compared[0]} images of {held_out.spec} are, byte for byte, in {bank.spec}"
        f" too (the first: {first}, which is {second} there), and find themselves"
    )


def _overlap(a: ImageSource, b: ImageSource) -> bool:
    """Whether two sources are the same images, or one folder lies in the other."""
    if isinstance(a.reader, FolderReader) and isinstance(b.reader, FolderReader):
        one, other = Path(a.spec).resolve(), Path(b.spec).resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            return True
    # reading both is worth it only where it can be true
    return len(a) == len(b) and fingerprint_data(a) == fingerprint_data(b)


class Watch(NamedTuple):
    """When a run measures its features, and how."""

    every: int
    """Steps between measurements; 0: never."""
    measure: Callable[[], dict[str, float]] | None
    """Gives the metrics of the encoder as it is; None: there are none."""


def open_watch(
    settings: Monitor,
    recipe: Recipe,
    seen: ImageSource | ImageStream,
    encoder: nn.Module,
    *,
    workers: int = 0,
    main: bool = True,
    begun: bool = False,
) -> Watch:
    """What a run measures on the way, where its command names held-out images.

    Args:
        settings: Name the images.
        recipe: Of the run.
        seen: What is learned from.
        encoder: What is measured: the run changes its weights in place.
        workers: Processes that decode.
        main: Whether this is the main process: the others keep no images and measure nothing.
        begun: Whether the run is resumed. The search for doubles reads every file, and was done when it began.

    Raises:
        ValueError: If nothing follows from these images, or epochs cannot be counted.
        FileNotFoundError: If there are none.
        ImageError: If one does not decode.
    """
    if settings.knn_data is None:
        return Watch(0, None)
    size = num_images(seen)
    every = steps_of("--knn-every", settings.knn_every, size, recipe.batch_size, way_out="--epoch-images")
    held_out, bank = ImageSource(settings.knn_data, split=settings.knn_split, flag="--knn-data"), None
    if settings.knn_bank is not None:
        bank = ImageSource(settings.knn_bank, split=settings.knn_bank_split, flag="--knn-bank")
    check_held_out(held_out, bank, seen if isinstance(seen, ImageSource) else None)
    if not main:
        return Watch(every, lambda: {})
    if bank and not begun and (doubles := describe_doubles(held_out, bank)):
        print(doubles, file=sys.stderr)
    for kept in (held_out, *([bank] if bank else [])):
        if len(kept) > IMAGES_KEPT:
            print(f"k-NN: {IMAGES_KEPT} of the {len(kept)} images of {kept.spec}, evenly spaced", file=sys.stderr)
    knn = KnnMonitor(encoder, held_out, bank, workers=workers)
    return Watch(every, lambda: {"knn": knn(encoder)})


class _Kept:
    """A source's images, as the encoder's transform leaves them before it standardises their colours."""

    def __init__(self, source: ImageSource, geometry: v2.Compose, workers: int) -> None:
        labels = torch.tensor(source.labels)
        numbers = evenly_by_class(labels, IMAGES_KEPT)
        self.labels = labels[numbers]
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed from the global generator
            self.views = torch.cat(list(load_views(source, geometry, cut(numbers.tolist(), BATCH_SIZE), workers)))


class KnnMonitor:
    """Weighted k-NN accuracy (Caron et al. 2021; k = 20, T = 0.07) of an encoder on fixed images.

    Features are the means of the patch tokens, of unaugmented images without a mask, in float32. Without a bank every
    image is classified by all others.

    Args:
        encoder: A timm ViT that tells transform and input size.
        held_out: Labelled images.
        bank: Labelled images to be their neighbours; None: the held-out images themselves.
        workers: Processes that decode.

    Raises:
        ImageError: At an image that does not decode.
    """

    def __init__(
        self,
        encoder: nn.Module,
        held_out: ImageSource,
        bank: ImageSource | None = None,
        *,
        workers: int = 0,
    ) -> None:
        training = encoder.training
        transform: Any = FeatureExtractor(encoder).transform
        encoder.train(training)
        *geometry, _, self.normalise = transform.transforms  # … to a float tensor in [0, 1], to zero mean
        bytes_at_size = v2.Compose([*geometry, v2.PILToTensor()])
        self.held_out = _Kept(held_out, bytes_at_size, workers)
        self.bank = None if bank is None else _Kept(bank, bytes_at_size, workers)

    def __call__(self, encoder: nn.Module) -> float:
        """The accuracy, in [0, 1], of an encoder of the same architecture; it stays in its mode and on its device.

        Raises:
            ValueError: If a feature is not finite.
        """
        training = encoder.training
        extractor = FeatureExtractor(encoder)  # in evaluation mode
        try:
            queries = self._encode(extractor, self.held_out)
            bank = queries if self.bank is None else self._encode(extractor, self.bank)
        finally:
            encoder.train(training)
        known, alone = (self.bank or self.held_out).labels, self.bank is None
        found = knn_predict(bank, known, queries, [NEIGHBOURS], temperature=TEMPERATURE, leave_one_out=alone)
        return (found[NEIGHBOURS] == self.held_out.labels).double().mean().item()

    def _encode(self, extractor: FeatureExtractor, kept: _Kept) -> Tensor:
        batches = kept.views.split(BATCH_SIZE)
        features = torch.cat([extractor.encode(self.normalise(views.float() / 255)) for views in batches])
        if not features.isfinite().all():
            raise ValueError("features of --knn-data are not finite")
        return features
