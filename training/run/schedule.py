"""When what happens: the learning rate, a function of the step alone, and what is counted in epochs."""

import torch
from timm.scheduler import CosineLRScheduler

from training.recipes import AdversarialRecipe, Recipe


def create_scheduler(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then a half-cosine to 0."""
    return CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup_steps, warmup_t=warmup_steps, warmup_prefix=True, t_in_epochs=False
    )


def check_steps(recipe: Recipe, total_steps: int, images: int | None) -> None:
    """Refuse what could not be scheduled.

    Raises:
        ValueError: If all steps are warm-up, a step would take images twice, or epochs cannot be counted.
    """
    if images is not None and recipe.batch_size > images:
        raise ValueError(
            f"--batch-size {recipe.batch_size} is more than there are images, {images}: give a smaller one"
        )
    if round(recipe.warmup * total_steps) >= total_steps:
        raise ValueError(f"--warmup {recipe.warmup:g}: none of the {total_steps} steps comes after it")
    phi_refresh_steps(recipe, images)


def phi_refresh_steps(recipe: Recipe, num_images: int | None) -> int:
    """Steps between renewals of phi's snapshot; 0: there is none.

    Raises:
        ValueError: If epochs are asked for and the size of the data set is not known.
    """
    if not isinstance(recipe, AdversarialRecipe) or recipe.phi != "snapshot":
        return 0
    return steps_of("--phi-refresh", recipe.phi_refresh, num_images, recipe.batch_size)


def steps_of(flag: str, epochs: float, num_images: int | None, batch_size: int) -> int:
    """Steps that epochs take, at least one.

    Raises:
        ValueError: If the size of the data set is not known; names the flag.
    """
    if num_images is None:
        raise ValueError(f"{flag} counts epochs, and this stream does not know its size: give --epoch-images")
    return max(1, round(epochs * num_images / batch_size))
