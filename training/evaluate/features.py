"""Frozen features of labelled images, computed once and kept on disk.

A folder of the cache belongs to one combination of weights, transform and data. In it lies a file for every few
thousand images, written when complete: an interrupted extraction goes on where it stopped.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from perceptual_mae_models.convert import save_weights
from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import ImageError
from perceptual_mae_models.loading import Transform
from training.data.images import LOADER_PATIENCE, ImageSource
from training.data.readers import HUB_PREFIX

IMAGES_A_FILE = 4096
IMAGES_READ = 100_000
"""Most files that are read to tell one set of images from another."""
READERS = 16
"""Threads that read them: storage of a network answers one at a time slowly."""


@dataclass(frozen=True)
class Features:
    """Frozen features with their labels, in the order of their source."""

    rows: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64."""
    classes: tuple[str, ...]
    """Names, by label."""
    groups: tuple[str, ...] | None = None
    """For each image what it belongs to (a patient, a film), where the user said how to tell; see `split.py`."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Tensor) -> "Features":
        """Some of them, by number."""
        groups = None if self.groups is None else tuple(self.groups[index] for index in indices.tolist())
        return Features(self.rows[indices], self.labels[indices], self.classes, groups)

    def columns(self, part: slice) -> "Features":
        """The same images with some of the features' columns."""
        return Features(self.rows[:, part], self.labels, self.classes, self.groups)


class _Views(Dataset[Tensor | ImageError]):
    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | ImageError:
        try:
            return self.transform(self.source.load(index))
        except ImageError as error:  # an exception would reach the main process as text
            return error


def cut(numbers: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of images in batches, the last one perhaps smaller."""
    return [list(numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]


def load_items(dataset: "Dataset[Any]", batches: Sequence[list[int]], workers: int) -> Iterator[list[Any]]:
    """Items of a data set, a batch at a time.

    Args:
        dataset: By number. Gives an `ImageError` in place of an item whose image does not decode.
        batches: Numbers of the items of each batch.
        workers: Processes that decode.

    Raises:
        ImageError: At an image that does not decode: a figure over fewer images is another one.
        RuntimeError: If nothing comes for `LOADER_PATIENCE`.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        timeout=LOADER_PATIENCE if workers else 0,
    )
    for items in loader:
        if broken := next((item for item in items if isinstance(item, ImageError)), None):
            raise broken
        yield items


def load_views(
    source: ImageSource, transform: Transform, batches: Sequence[list[int]], workers: int
) -> Iterator[Tensor]:
    """Transformed images, (n, 3, H, W), a batch at a time.

    Args:
        source: The images.
        transform: What is done to each.
        batches: See `load_items`, as for the rest.
        workers: See there.
    """
    return map(torch.stack, load_items(_Views(source, transform), batches, workers))


def extract(
    extractor: FeatureExtractor,
    source: ImageSource,
    *,
    batch_size: int = 128,
    workers: int = 0,
    cache: Path | None = None,
) -> Tensor:
    """Features of every image of a source, in order.

    Args:
        extractor: The encoder, with its transform and pooling.
        source: The images.
        batch_size: Images a forward pass.
        workers: Processes that decode.
        cache: Folder to keep features in, and to take them from.

    Returns:
        (N, D) float32.

    Raises:
        ImageError: At an image that does not decode: an accuracy over fewer images is another one.
        ValueError: If a feature is not finite.
    """
    folder = cache and find_cache(extractor, source, cache)
    files = {start: folder and folder / f"{start:09d}.safetensors" for start in range(0, len(source), IMAGES_A_FILE)}
    rows: dict[int, Tensor] = {}
    missing: dict[int, list[list[int]]] = {}
    for start, file in files.items():
        numbers = range(start, min(start + IMAGES_A_FILE, len(source)))
        if file and file.exists() and len(kept := load_file(file)["features"]) == len(numbers):
            rows[start] = kept
        else:
            missing[start] = cut(numbers, batch_size)
    # one loader for all files: its workers go on while a file is written
    views = load_views(
        source, extractor.transform, [batch for batches in missing.values() for batch in batches], workers
    )
    for start, batches in missing.items():
        file, started = files[start], time.monotonic()
        features = torch.cat([extractor.encode(images) for images in itertools.islice(views, len(batches))])
        if broken := int((~features.isfinite()).any(dim=1).sum()):
            name = extractor.metadata["model"]
            raise ValueError(
                f"{name} gives features that are not finite for {broken} images: damaged weights, or --dtype"
            )
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            cost = {"seconds": f"{time.monotonic() - started:.3f}"}
            save_weights(file, {"features": features}, {**extractor.metadata, **cost})
        rows[start] = features
    return torch.cat([rows[start] for start in files])


def find_cache(extractor: FeatureExtractor, source: ImageSource, cache: Path) -> Path:
    """The folder of a cache that belongs to these weights, this transform and these images."""
    return cache / f"{fingerprint_model(extractor)}-{fingerprint_data(source)}"


def extraction_seconds(folder: Path) -> float:
    """What the features in a folder of the cache took, whoever computed them."""
    seconds = 0.0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            seconds += float(opened.metadata().get("seconds", 0))
    return seconds


def fingerprint_model(extractor: FeatureExtractor) -> str:
    """Sixteen hexadecimal digits that change with architecture, weights, transform, pooling and arithmetic."""
    model = extractor.model  # its text shows what weights do not: activations, strides, epsilons
    facts = (model, extractor.metadata["model"], extractor.transform, extractor.pool, extractor.dtype, timm.__version__)
    return hashlib.sha256(repr((facts, fingerprint_weights(model))).encode()).hexdigest()[:16]


def fingerprint_weights(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with names and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Scan:
    """What one pass over the files of a source, undecoded, says about it."""

    fingerprint: str
    """Sixteen hexadecimal digits that change with names, labels or content."""
    digests: dict[int, bytes]
    """Digests of the files by number: of all, or of every so manieth where there are very many."""


_scans: WeakKeyDictionary[ImageSource, Scan] = WeakKeyDictionary()


def scan_data(source: ImageSource) -> Scan:
    """Read a source's files, once for each source; of more than `IMAGES_READ` evenly spaced ones."""
    if source not in _scans:
        digest = hashlib.sha256()
        for index in range(len(source)):
            digest.update(f"{source.name(index)}\n".encode("utf-8", "surrogateescape"))
        try:
            digest.update(repr((source.labels, source.classes)).encode())
        except ValueError:  # without labels it is a set of images still
            digest.update(b"no labels")
        every = -(-len(source) // IMAGES_READ)
        numbers = range(0, len(source), every)
        threads = 1 if source.spec.startswith(HUB_PREFIX) else READERS  # nobody says that its files may be read at once
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda index: hashlib.sha256(source.reader.read(index)).digest(), numbers)
            digests = dict(zip(numbers, found, strict=True))
        digest.update(b"".join(digests.values()))
        _scans[source] = Scan(digest.hexdigest()[:16], digests)
    return _scans[source]


def combine(*fingerprints: str) -> str:
    """Sixteen hexadecimal digits that change with any of several fingerprints."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:16]


def fingerprint_data(source: ImageSource) -> str:
    """The fingerprint of `scan_data`."""
    return scan_data(source).fingerprint
