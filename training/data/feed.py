"""From what `--data` says to the batches of one process, whether the images have numbers or come as a stream."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from perceptual_mae_models.images import ImageError
from training.data.images import Batch, ImageSource, RandomViews, create_loader
from training.data.sampler import DeterministicBatchSampler
from training.data.stream import STREAM_PREFIX, ImageStream, StreamViews, create_stream_loader
from training.recipes import Recipe


@dataclass(frozen=True)
class Feed:
    """The images of a run.

    Args:
        spec: See `training/data/readers.py` and `training/data/stream.py`.
        split: Split of a Hugging Face data set.
        column: Its image column; None: the only one.
        epoch_images: Images that make an epoch of a stream; None: what it says about itself.
        cache: Keep decoded images in memory.
    """

    spec: str
    split: str = "train"
    column: str | None = None
    epoch_images: int | None = None
    cache: bool = False

    def open(self) -> ImageSource | ImageStream:
        """Open it.

        Raises:
            FileNotFoundError: If there is no image.
            ValueError: If it cannot be read, or knows itself how many images make an epoch.
        """
        if self.spec.startswith(STREAM_PREFIX):
            return ImageStream(self.spec, split=self.split, column=self.column, epoch_images=self.epoch_images)
        if self.epoch_images is not None:
            raise ValueError(f"--epoch-images is for streams: {self.spec} knows how many images it has")
        return ImageSource(self.spec, cache=self.cache, split=self.split, column=self.column)


def num_images(source: ImageSource | ImageStream) -> int | None:
    """Images of an epoch, where that is known."""
    return source.epoch_images if isinstance(source, ImageStream) else len(source)


def describe_data(feed: Feed, source: ImageSource | ImageStream, num_processes: int) -> dict[str, Any]:
    """What must stay the same when a run is resumed; a stream's order depends on the number of processes too."""
    name = PurePath(source.spec).name
    if name in ("", ".."):
        name = Path(source.spec).resolve().name
    described = {"name": name, "images": num_images(source)}
    # left out where they are the defaults, as by older runs
    described |= {"split": feed.split} if feed.split != Feed.split else {}
    described |= {"column": feed.column} if feed.column else {}
    return {**described, "processes": num_processes} if isinstance(source, ImageStream) else described


def preview(source: ImageSource | ImageStream, count: int) -> list[Image.Image]:
    """Some images that decode: evenly spaced ones, or the first of a stream."""
    if isinstance(source, ImageStream):
        return source.preview(count)
    images: list[Image.Image] = []
    for index in range(0, len(source), max(1, len(source) // count)):
        try:
            images.append(source.load(index))
        except ImageError:  # noqa: PERF203  (a broken image is left out of the picture)
            continue
    return images[:count]


def batches(
    source: ImageSource | ImageStream,
    recipe: Recipe,
    image_size: tuple[int, int],
    steps: range,
    *,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterable[Batch]:
    """One process's share of the batches of `steps`.

    Args:
        source: An open feed.
        recipe: Batch size, crops and seed.
        image_size: Height and width of the views in pixels.
        steps: Optimiser steps.
        rank: This process.
        world_size: Number of processes.
        workers: Loader processes.
    """
    if isinstance(source, ImageStream):
        stream = StreamViews(
            source,
            image_size,
            recipe.crop_scale,
            recipe.seed,
            batch_size=recipe.batch_size,
            steps=steps,
            rank=rank,
            world_size=world_size,
        )
        return create_stream_loader(stream, workers=workers)
    sampler = DeterministicBatchSampler(
        len(source), recipe.batch_size, steps, recipe.seed, rank=rank, world_size=world_size
    )
    return create_loader(RandomViews(source, image_size, recipe.crop_scale, recipe.seed), sampler, workers=workers)
