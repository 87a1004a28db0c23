"""Images into batches of transformed pixels, here or in worker processes; what cannot be read travels as data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from perceptual_mae_models.images import ImageError, ImageInput, image_name, open_image

Transform = Callable[[Image.Image], Tensor]

MAX_ASPECT = 200
"""Longer to shorter side of an image. Fitting the short side of a strip to a network would enlarge the other without
limit: of a file of 6 kB to gigabytes."""


@dataclass(frozen=True)
class Loaded:
    """A batch between decoding and encoding: (n, 3, H, W) normalised pixels, and what could not be read, as data."""

    names: tuple[str, ...]
    pixels: Tensor
    broken: tuple[ImageError, ...]


def _load(numbered: Iterable[tuple[int, ImageInput]], transform: Transform) -> Loaded:
    names, pixels, broken = [], [], []
    for index, image in numbered:
        name = image_name(image, index)
        try:
            rgb = open_image(image)
            if max(rgb.size) > MAX_ASPECT * min(rgb.size):
                size = " x ".join(map(str, rgb.size))
                raise ImageError(name, f"{size} is a strip, more than {MAX_ASPECT} times as long as wide")
        except ImageError as error:
            broken.append(ImageError(name, error.reason))
            continue
        names.append(name)
        pixels.append(transform(rgb))
    return Loaded(tuple(names), torch.stack(pixels) if pixels else torch.empty(0), tuple(broken))


def load_here(images: Iterable[ImageInput], batch_size: int, transform: Transform) -> Iterator[Loaded]:
    """Loads images batch by batch in this process; a generator is read as it is needed."""
    numbered = enumerate(images)
    while batch := list(islice(numbered, batch_size)):
        yield _load(batch, transform)


def read_opened(images: Iterable[Any]) -> None:
    """Decodes the images that Pillow has opened: worker processes would share the place in their files."""
    for image in images:
        if isinstance(image, Image.Image):
            with suppress(Exception):  # decoders fail with anything; whoever opens it again will say so
                image.load()


class Batches(Dataset[Loaded]):
    """Whole batches as items: one message a batch from a worker, and broken images cost no collating."""

    def __init__(self, images: Sequence[Any] | NDArray[Any], batch_size: int, transform: Transform) -> None:
        self.images = images
        self.batch_size = batch_size
        self.transform = transform

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index: int) -> Loaded:
        start = index * self.batch_size
        return _load(enumerate(self.images[start : start + self.batch_size], start), self.transform)
