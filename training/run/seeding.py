"""Every random draw of a run is a function of the seed and of where in the run it happens.

Nothing is drawn from a state that a run carries along, so a resumed run, another number of workers or another number
of processes draws the same numbers, and a checkpoint holds no generator.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, stream: str, *place: int) -> int:
    """A 63-bit seed for one draw.

    Args:
        seed: The run's seed.
        stream: What is drawn, such as "order" or "mask": streams are independent of each other.
        place: Where in the run, such as (epoch, index) or (step,).
    """
    digest = hashlib.blake2b(repr((seed, stream, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, *place: int) -> torch.Generator:
    """A CPU generator for one draw, see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *place))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global generators of Python, NumPy and torch (CPU) draw from `seed`; after it, as if nothing was.

    For libraries that take no generator: timm's and torchvision's transforms.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
