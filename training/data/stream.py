"""Endless batches from a streamed Hugging Face data set: no download, no random access, the same batches every time.

A process reads its share of the shards in a few *lanes*, each a shuffled stream of its own; step s takes its images
from lane s mod lanes. Which worker serves a lane changes nothing, so the number of workers changes the speed only, and
where a lane stands follows from the step alone, so a run that starts at step s reads what a run from 0 would have read
there. It gets there by reading, without decoding, what the current epoch had consumed before.

- The order depends on the number of processes and on the batch size, unlike a map-style source's.
- An epoch is `epoch_images` images. Every image is seen once in it only as far as the lanes' shards hold equally many;
  which shards share a lane is drawn anew every epoch, so no image is left out for good. Without a known size there is
  one endless epoch, the order is drawn anew on every pass, and a resumed run reads again all that it had consumed.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from perceptual_mae_models.images import ImageError
from training.data.hub import image_bytes, load_hub_dataset, without_decoding
from training.data.images import MAX_BROKEN_RUN, Batch, RandomView, decode
from training.run.seeding import derive_seed, generator
from training.run.signals import ignore_in_workers

STREAM_PREFIX = "hf-stream:"
MAX_LANES = 8  # per process: the most workers that can serve it, a power of 2
ROWS_PER_READ = 16

Example = tuple[str, bytes]
"""Name and encoded image."""


class ImageStream:
    """The shards of a streamed data set.

    Args:
        spec: `hf-stream:` and what `training/data/hub.py` says.
        split: Which split.
        column: The image column; None: the only one.
        epoch_images: Images that make an epoch; None: what the data set says about itself, if it does.

    Raises:
        ValueError: If the data set cannot be read or its image column is not clear.
    """

    def __init__(
        self, spec: str, *, split: str = "train", column: str | None = None, epoch_images: int | None = None
    ) -> None:
        self.spec = spec
        name = spec.removeprefix(STREAM_PREFIX)
        try:
            self.dataset, self.column = without_decoding(load_hub_dataset(name, split, streaming=True), name, column)
        except ValueError as error:
            raise ValueError(f"--data {error}") from error
        self.num_shards: int = self.dataset.num_shards
        splits = self.dataset.info.splits or {}
        known = splits[split].num_examples if split in splits else None
        self.epoch_images: int | None = epoch_images or known or None

    def examples(self, shard: int) -> Iterator[Example]:
        """The images of one shard, in its order."""
        # iter(batch_size), because plain iteration inside a loader process would divide the shard between processes
        row = count()
        for rows in self.dataset.shard(self.num_shards, shard).iter(batch_size=ROWS_PER_READ):
            for value in rows[self.column]:
                name = f"shard {shard}, row {next(row)}"
                name = f"{name} ({value['path']})" if value and value["path"] else name
                try:
                    yield name, image_bytes(value)
                except OSError:  # a broken image, and so the end of the run only where they are many
                    yield name, b""

    def preview(self, number: int) -> list[Image.Image]:
        """The first images that decode."""
        examples = chain.from_iterable(map(self.examples, range(self.num_shards)))
        return list(islice((image for image, broken in stand_ins(examples) if not broken), number))


def stand_ins(examples: Iterable[Example]) -> Iterator[tuple[Image.Image, list[str]]]:
    """Decode; in the place of a broken image comes the next one that is not, which keeps its own place, too.

    Places and examples stay in step, so that skipping examples does not require to know which of them are broken.

    Yields:
        For every example the image, and in a list what is wrong with the example, by its name, if it is broken.

    Raises:
        ImageError: If very many in a row are broken.
    """
    broken: list[str] = []
    for name, data in examples:
        try:
            image = decode(data, name)
        except ImageError as error:
            broken.append(str(error))
            if len(broken) == MAX_BROKEN_RUN:
                raise ImageError(name, f"as the {len(broken) - 1} images before it: {error.reason}") from error
            continue
        yield from ((image, [missing]) for missing in broken)
        yield image, []
        broken = []


def shuffled(examples: Iterable[Example], size: int, draws: torch.Generator) -> Iterator[Example]:
    """Every example once, each drawn from a buffer of `size` that the following ones fill up."""
    buffer: list[Example] = []
    for example in examples:
        if len(buffer) < size:
            buffer.append(example)
            continue
        place = int(torch.randint(size, (), generator=draws))
        yield buffer[place]
        buffer[place] = example
    yield from (buffer[place] for place in torch.randperm(len(buffer), generator=draws).tolist())


class StreamViews(IterableDataset[Batch]):
    """One process's share of every global batch of a stream, from any step on.

    Args:
        stream: Where the images come from.
        image_size: Height and width of the views in pixels.
        crop_scale: Share of the area that a crop covers, least and most.
        seed: The run's seed.
        batch_size: Images a step over all processes, a multiple of `world_size`.
        steps: The steps to yield.
        rank: This process.
        world_size: Number of processes.
        buffer: Encoded images from which a lane draws; each lane keeps so many in memory.

    Raises:
        ValueError: If the batch cannot be shared equally.
    """

    def __init__(
        self,
        stream: ImageStream,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float],
        seed: int,
        *,
        batch_size: int,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
        buffer: int = 1000,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} cannot be shared equally by {world_size} processes")
        self.stream, self.seed, self.steps, self.buffer = stream, seed, steps, buffer
        self.rank, self.world_size = rank, world_size
        self.view = RandomView(image_size, crop_scale)
        self.share = batch_size // world_size
        self.epoch_steps = max(1, stream.epoch_images // batch_size) if stream.epoch_images else steps.stop
        self.lanes = MAX_LANES
        while self.lanes > 1 and self.lanes * world_size > stream.num_shards:
            self.lanes //= 2

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        readers: dict[int, tuple[int, Iterator[tuple[Image.Image, list[str]]]]] = {}  # lane -> its epoch, its images
        # the loader takes batches from its workers in turn; `workers` divides `lanes`, so a lane stays with its worker
        for step in self.steps[worker::workers]:
            epoch, lane = step // self.epoch_steps, step % self.lanes
            if lane not in readers or readers[lane][0] != epoch:
                begin = epoch * self.epoch_steps
                served = len(range(begin + (lane - begin) % self.lanes, step, self.lanes))  # batches, by this lane
                readers[lane] = epoch, stand_ins(islice(self.examples(epoch, lane), served * self.share, None))
            yield self._batch(step, readers[lane][1])

    def examples(self, epoch: int, lane: int) -> Iterator[Example]:
        """One lane of one epoch, endless: where its shards hold too few images, they come again in another order."""
        place, places = self.rank * self.lanes + lane, self.world_size * self.lanes
        for number in count():
            order = torch.randperm(
                self.stream.num_shards, generator=generator(self.seed, "shards", epoch, number)
            ).tolist()
            examples: Iterator[Example]
            if places <= len(order):
                examples = chain.from_iterable(map(self.stream.examples, order[place::places]))
            else:  # fewer shards than processes: each reads all of them and keeps one image in `places`
                examples = islice(chain.from_iterable(map(self.stream.examples, order)), place, None, places)
            draws = generator(self.seed, "shuffle", epoch, number, place)
            empty = True
            for example in shuffled(examples, self.buffer, draws):
                empty = False
                yield example
            if empty:
                raise ImageError(self.stream.spec, f"process {self.rank} finds no image in its shards")

    def _batch(self, step: int, images: Iterator[tuple[Image.Image, list[str]]]) -> Batch:
        views, names = [], []
        for number, (image, broken) in enumerate(islice(images, self.share)):
            views.append(self.view(image, derive_seed(self.seed, "stream", step, self.rank * self.share + number)))
            names += broken
        return Batch(torch.stack(views), names)


def create_stream_loader(views: StreamViews, *, workers: int) -> Iterable[Batch]:
    """A loader over the stream's steps. The number of workers changes the speed only.

    Args:
        views: The stream's views.
        workers: Loader processes, rounded down to a number that divides the lanes; 0 loads in this process.
    """
    workers = max((number for number in (1, 2, 4, 8) if number <= min(workers, views.lanes)), default=0)
    # no timeout: a resumed run reads again, before its first batch, what the epoch had consumed, which may take hours
    loader: DataLoader[Any] = DataLoader(
        views,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_in_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    return loader
