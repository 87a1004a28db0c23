"""The order of the images: a pure function of the seed and of the step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from training.run.seeding import generator


class ImageKey(NamedTuple):
    """One view of one image: together with the seed it decides crop and flip."""

    epoch: int
    image: int


class DeterministicBatchSampler(Sampler[list[ImageKey]]):
    """One process's share of every global batch, from any step on.

    The epochs' permutations form one endless sequence; global batch s is its slice [s * B, (s + 1) * B). Every image is
    seen exactly once an epoch, a batch may span two epochs, and a run that starts at step s reads what a run from 0
    would have read there. The slice is cut contiguously, so the processes' shares joined in rank order are the batch of
    a single process.

    Args:
        num_images: Size of the data set.
        batch_size: Images a step over all processes, a multiple of `world_size`.
        steps: The steps to yield.
        seed: The run's seed.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If the batch cannot be shared equally.
    """

    def __init__(
        self, num_images: int, batch_size: int, steps: range, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} cannot be shared equally by {world_size} processes")
        self.num_images = num_images
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        local = batch_size // world_size
        self.share = slice(rank * local, (rank + 1) * local)  # this process's part of a global batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[ImageKey]]:
        orders: dict[int, torch.Tensor] = {}
        for step in self.steps:
            batch = []
            for position in range(self.share.start, self.share.stop):
                epoch, place = divmod(step * self.batch_size + position, self.num_images)
                if epoch not in orders:
                    # a batch touches two epochs at once where it spans their border
                    orders = {e: order for e, order in orders.items() if e == epoch - 1}
                    orders[epoch] = torch.randperm(self.num_images, generator=generator(self.seed, "order", epoch))
                batch.append(ImageKey(epoch, int(orders[epoch][place])))
            yield batch
