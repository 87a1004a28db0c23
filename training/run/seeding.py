"""Every random draw of a run is a function of the seed and of where in the run it happens.

Nothing is drawn from a state that a run carries along, so a resumed run, another number of workers or another number
of processes draws the same numbers, and a checkpoint holds no generator.
"""

import hashlib

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
