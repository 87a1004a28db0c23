"""Images into batches of transformed pixels, here or in worker processes; what cannot be read travels as data."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from perceptual_mae_models.images import ImageError, ImageInput, image_name, open_image

Transform = Callable[[Image.Image], Tensor]

MAX_ASPECT = 200
"""Longer to shorter side of an image. Fitting the short side of a strip to a network would enlarge the other without
limit: of a file of 6 kB to gigabytes."""


@dataclass(frozen=True)
class Loaded:
    """A batch between decoding and encoding: (n, 3, H, W) normalised pixels, and what could not be read, as data."""

    names: tuple[str, ...]
    pixels: NDArray[np.float32]
    """No tensor: between processes it would take shared memory, of which containers have 64 MB, and hang for more."""
    broken: tuple[ImageError, ...]


Named = tuple[str, ImageInput | ImageError]
"""An image with what it is called; or that it could not be read."""


def _load(named: Iterable[Named], transform: Transform) -> Loaded:
    names, pixels, broken = [], [], []
    for name, image in named:
        try:
            if isinstance(image, ImageError):
                raise image
            rgb = open_image(image)
            if max(rgb.size) > MAX_ASPECT * min(rgb.size):
                size = " x ".join(map(str, rgb.size))
                raise ImageError(name, f"{size} is a strip, more than {MAX_ASPECT} times as long as wide")
        except ImageError as error:
            broken.append(ImageError(name, error.reason))
            continue
        names.append(name)
        pixels.append(transform(rgb))
    stacked = torch.stack(pixels) if pixels else torch.empty(0)
    return Loaded(tuple(names), stacked.numpy(), tuple(broken))


def load_here(images: Iterable[ImageInput], batch_size: int, transform: Transform) -> Iterator[Loaded]:
    """Loads images batch by batch in this process; a generator is read as it is needed."""
    for batch in _batches(images, batch_size):
        yield _load(batch, transform)


def load_in_workers(
    images: Iterable[ImageInput], batch_size: int, transform: Transform, workers: int
) -> Iterator[Loaded]:
    """Loads images batch by batch in other processes, in order; a generator is read two batches a worker ahead."""
    loader: DataLoader[Loaded] = DataLoader(
        _Reading(transform), sampler=_Asked(images, batch_size), batch_size=None, num_workers=workers
    )
    yield from loader


def _batches(images: Iterable[ImageInput], batch_size: int) -> Iterator[list[Named]]:
    numbered = enumerate(images)
    while batch := list(islice(numbered, batch_size)):
        yield [(image_name(image, index), image) for index, image in batch]


class _Asked(Sampler[list[Named]]):
    """Batches of images as what a worker is asked for: it need not know the others, of which there may be millions."""

    def __init__(self, images: Iterable[ImageInput], batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size

    def __iter__(self) -> Iterator[list[Named]]:
        for batch in _batches(self.images, self.batch_size):
            yield [(name, _decoded(image)) for name, image in batch]


def _decoded(image: ImageInput | ImageError) -> ImageInput | ImageError:
    """What Pillow has opened as pixels, for another process: it would share the place in its file."""
    if not isinstance(image, Image.Image):
        return image
    try:
        return open_image(image)
    except ImageError as error:
        return error


class _Reading(Dataset[Loaded]):
    """Whole batches as items: one message a batch from a worker, and broken images cost no collating."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __getitem__(self, batch: Any) -> Loaded:
        return _load(batch, self.transform)
