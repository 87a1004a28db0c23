"""The learning rate, a function of the step alone."""

import torch
from timm.scheduler import CosineLRScheduler


def create_scheduler(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then a half-cosine to 0."""
    return CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup_steps, warmup_t=warmup_steps, warmup_prefix=True, t_in_epochs=False
    )
