"""A folder or a tar of images as uint8 tensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from perceptual_mae_models.images import ImageError, open_image
from training.data.sampler import DeterministicBatchSampler, ImageKey
from training.run.seeding import derive_seed


class ImageSource:
    """The images of a folder (any nesting) or of a .tar file, by number, through timm's readers.

    Args:
        root: A folder, or a .tar file.
        cache: Keep every decoded image in memory, 4 bytes a pixel; each loader process keeps its own.

    Raises:
        FileNotFoundError: If `root` does not exist or holds no image.
        ValueError: If `root` is a file but no .tar.
    """

    def __init__(self, root: Path, *, cache: bool = False) -> None:
        if not root.exists():
            raise FileNotFoundError(f"--data {root}: no such folder or tar file")
        if root.is_file() and root.suffix != ".tar":
            raise ValueError(f"--data {root}: give a folder of images or an uncompressed .tar of them")
        self.root = root
        self.decoded: dict[int, Image.Image] | None = {} if cache else None
        # a tar is opened anew for every image: a handle shared by forked workers would be a shared file position
        options: dict[str, Any] = {"cache_tarfiles": False} if root.is_file() else {}
        try:
            self.reader = create_reader("", str(root), **options)
        except (RuntimeError, ValueError) as error:  # a folder, a tar without any image
            raise FileNotFoundError(f"--data {root}: no image found") from error

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Path of an image inside the source."""
        return str(self.reader.filename(index))

    @property
    def classes(self) -> list[str]:
        """Names of the folders that the images lie in, by label."""
        return list(self.reader.class_to_idx if hasattr(self.reader, "class_to_idx") else self.reader.class_name_to_idx)

    @property
    def labels(self) -> list[int]:
        """Label of every image."""
        if hasattr(self.reader, "targets"):
            return [int(target) for target in self.reader.targets]
        return [int(target) for _, target in self.reader.samples]

    def load(self, index: int) -> Image.Image:
        """Decode an image to RGB; not to be written to.

        Raises:
            ImageError: If it does not decode.
        """
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        stream, _ = self.reader[index]
        with stream:
            try:
                image = open_image(Image.open(stream))
            except (OSError, ImageError) as error:
                raise ImageError(self.name(index), str(error)) from error
        if self.decoded is not None:
            self.decoded[index] = image
        return image


class Batch(NamedTuple):
    """What the loader yields."""

    images: Tensor
    """(N, 3, H, W) uint8."""
    broken: list[int]
    """Numbers of images that did not decode; the next one that does stands in for each."""


class RandomViews(Dataset[tuple[Tensor, list[int]]]):
    """MAE's augmentation (random resized crop, bicubic; horizontal flip), drawn from the seed, epoch and image alone.

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
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=crop_scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: ImageKey) -> tuple[Tensor, list[int]]:
        broken: list[int] = []
        for offset in range(len(self.source)):
            index = (key.image + offset) % len(self.source)
            try:
                image = self.source.load(index)
                break
            except ImageError:
                broken.append(index)
        else:
            raise ImageError(str(self.source.root), f"none of its {len(self.source)} images decodes")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", *key))
            return self.transform(image), broken


def _collate(items: list[tuple[Tensor, list[int]]]) -> Batch:
    return Batch(torch.stack([view for view, _ in items]), [index for _, broken in items for index in broken])


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
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    return loader
