"""When what happens: the learning rate, a function of the step alone, and what is counted in epochs."""

import torch
from timm.scheduler import CosineLRScheduler


def create_scheduler(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then a half-cosine to 0."""
    return CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup_steps, warmup_t=warmup_steps, warmup_prefix=True, t_in_epochs=False
    )


def steps_of(flag: str, epochs: float, num_images: int | None, batch_size: int, *, way_out: str) -> int:
    """Steps that epochs take, at least one.

    Raises:
        ValueError: If the size of the data set is not known; names the flag and the way out.
    """
    if num_images is None:
        raise ValueError(f"{flag} counts epochs, and this stream does not know its size: give {way_out}")
    return max(1, round(epochs * num_images / batch_size))
