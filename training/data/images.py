"""Images of a source as batches of uint8 tensors."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from perceptual_mae_models.images import ImageError, open_image
from training.data.readers import PartReader, Reader, open_reader, read_patiently
from training.data.sampler import DeterministicBatchSampler, ImageKey
from training.run.seeding import derive_seed
from training.run.signals import ignore_in_workers

MAX_BROKEN_RUN = 1000
"""So many broken images in a row are no accident."""
LOADER_PATIENCE = 1800.0
"""Seconds, after which a batch that does not come ends the run, instead of keeping all GPUs waiting."""


class ImageSource:
    """Images by number, decoded.

    Args:
        spec: A folder, a .tar, shards or a Hugging Face data set, see `training/data/readers.py`.
        reader: The images, where they are open already; `spec` then only names them.
        cache: Keep every decoded image in memory, 4 bytes a pixel; each loader process keeps its own.
        split: Split of a Hugging Face data set.
        column: Its image column, where it has several.
        label_column: Its column of classes, where it has several.
        flag: What the user gave `spec` by, for messages.

    Raises:
        FileNotFoundError: If `spec` does not exist or holds no image.
        ValueError: If `spec` is of no kind that can be read.
    """

    def __init__(
        self,
        spec: str | Path,
        *,
        reader: Reader | None = None,
        cache: bool = False,
        split: str = "train",
        column: str | None = None,
        label_column: str | None = None,
        flag: str = "--data",
    ) -> None:
        self.spec = str(spec)
        if reader is None:
            try:
                reader = open_reader(self.spec, split=split, column=column, label_column=label_column)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"{flag} {error}") from error
        self.reader: Reader = reader
        self.decoded: dict[int, Image.Image] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """What an image is called inside the source."""
        return self.reader.name(index)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label: of the folders that the images lie in, where nothing else says so."""
        return self.reader.classes

    @property
    def labels(self) -> list[int]:
        """Label of every image."""
        return self.reader.labels

    def load(self, index: int) -> Image.Image:
        """Decode an image to RGB; not to be written to.

        Raises:
            ImageError: If it cannot be read or does not decode.
            StorageError: If that is the storage's fault.
        """
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        try:
            data = read_patiently(self.reader, index)
        except OSError as error:
            raise ImageError(self.name(index), str(error)) from error
        image = decode(data, self.name(index))
        if self.decoded is not None:
            self.decoded[index] = image
        return image


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, ascending and evenly spaced from 0 on; all if there are fewer."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def evenly_by_class(labels: Tensor, limit: int) -> Tensor:
    """Numbers of at most `limit` images, ascending: evenly spaced in the order of their classes.

    Args:
        labels: (N,) int64.
        limit: At least 1.
    """
    return labels.argsort(stable=True)[evenly(len(labels), limit)].sort().values


def keep_some(source: ImageSource, limit: int | None) -> ImageSource:
    """At most so many of a source's images: evenly spaced in the order of their classes, where they have any."""
    if limit is None or limit >= len(source):
        return source
    try:
        labels = torch.tensor(source.labels)
    except ValueError:
        labels = torch.zeros(len(source))
    return ImageSource(source.spec, reader=PartReader(source.reader, evenly_by_class(labels, limit).tolist()))


def decode(data: bytes, name: str) -> Image.Image:
    """An encoded image as upright RGB.

    Args:
        data: A whole image file.
        name: What to call it in a message.

    Raises:
        ImageError: If it does not decode.
    """
    try:
        return open_image(Image.open(io.BytesIO(data)))
    except ImageError as error:
        raise ImageError(name, error.reason) from error
    except Image.DecompressionBombError as error:
        raise ImageError(name, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # on hostile bytes Pillow's parsers fail with whatever they stumble over
        raise ImageError(name, "not an image" if data else "empty") from error


class Batch(NamedTuple):
    """What the loader yields."""

    images: Tensor
    """(N, 3, H, W) uint8."""
    broken: list[str]
    """Images that did not decode, each with the reason; the next one that does stands in for each."""


class RandomView:
    """MAE's augmentation: random resized crop, bicubic; horizontal flip.

    Args:
        image_size: Height and width of the views in pixels.
        crop_scale: Share of the area that a crop covers, least and most.
    """

    def __init__(self, image_size: tuple[int, int], crop_scale: tuple[float, float]) -> None:
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """A (3, H, W) uint8 view that the image and the seed alone decide."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            view: Tensor = self.transform(image)
            return view


class RandomViews(Dataset[tuple[Tensor, list[str]]]):
    """Augmented views of a source's images, drawn from the seed, epoch and image alone.

    Args:
        source: Where the images come from.
        image_size: Height and width of the views in pixels.
        crop_scale: Share of the area that a crop covers, least and most.
        seed: The run's seed.
    """

    def __init__(
        self, source: ImageSource, image_size: tuple[int, int], crop_scale: tuple[float, float], seed: int
    ) -> None:
        self.source = source
        self.seed = seed
        self.view = RandomView(image_size, crop_scale)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: ImageKey) -> tuple[Tensor, list[str]]:
        broken: list[str] = []
        for offset in range(min(len(self.source), MAX_BROKEN_RUN)):
            index = (key.image + offset) % len(self.source)
            try:
                image = self.source.load(index)
                break
            except ImageError as error:
                broken.append(str(error))
        else:
            which = (
                "none of its" if len(broken) == len(self.source) else f"from {self.source.name(key.image)} on, none of"
            )
            raise ImageError(self.source.spec, f"{which} {len(broken)} images decodes: {broken[-1]}")
        # those behind the first are named when their own turn comes
        return self.view(image, derive_seed(self.seed, "view", *key)), broken[:1]


def _collate(items: list[tuple[Tensor, list[str]]]) -> Batch:
    return Batch(torch.stack([view for view, _ in items]), [name for _, broken in items for name in broken])


def create_loader(views: RandomViews, sampler: DeterministicBatchSampler, *, workers: int) -> Iterable[Batch]:
    """A loader over the sampler's steps. The number of workers changes the speed only.

    Args:
        views: The data set.
        sampler: Decides which views make a batch.
        workers: Loader processes; 0 loads in this process.
    """
    loader: DataLoader[Any] = DataLoader(
        views,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=ignore_in_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        timeout=LOADER_PATIENCE if workers else 0,
    )
    return loader
