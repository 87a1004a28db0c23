"""Every random number of a step, drawn for the global batch so that each process takes its share of the same draw."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from perceptual_mae_models.autoencoder import MaskedAutoencoder
from training.ada import AdaNoise, draw_ada_noise
from training.recipes import AdversarialRecipe, Recipe
from training.run.seeding import generator


@dataclass(frozen=True)
class Draws:
    """One process's random numbers of one step, sample by sample."""

    mask: Tensor
    """(N, L) uniform: decides the masks."""
    ada: AdaNoise | None = None
    """Decides the augmentation before the discriminator."""
    epsilon: Tensor | None = None
    """(N,) uniform: where between real and fake the gradient penalty looks."""
    path: Tensor | None = None
    """(N / 2, 3, H, W) normal: the direction in image space of the path length, for every second sample."""

    def to(self, device: torch.device) -> "Draws":
        """Move to a device; a GPU does not wait for it."""

        def send(numbers: Tensor) -> Tensor:
            return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)

        return Draws(
            send(self.mask),
            None if self.ada is None else AdaNoise(*map(send, self.ada)),
            None if self.epsilon is None else send(self.epsilon),
            None if self.path is None else send(self.path),
        )

    def split(self, parts: int) -> Iterator["Draws"]:
        """Cut into micro-batches of equal size, a multiple of two."""
        n = self.mask.shape[0] // parts
        for start in range(0, n * parts, n):
            yield Draws(
                self.mask[start : start + n],
                None if self.ada is None else self.ada.share(slice(start, start + n)),
                None if self.epsilon is None else self.epsilon[start : start + n],
                None if self.path is None else self.path[start // 2 : (start + n) // 2],
            )


def draw(recipe: Recipe, step: int, network: MaskedAutoencoder, share: slice) -> Draws:
    """Draw one process's share of a step's random numbers, on the CPU.

    Args:
        recipe: Its seed decides the numbers, its method which are needed.
        step: The optimiser step.
        network: Tells the number of patches and the image's size.
        share: The process's part of the global batch.
    """
    n = recipe.batch_size
    mask = torch.rand(n, network.num_patches, generator=generator(recipe.seed, "mask", step))[share]
    if not isinstance(recipe, AdversarialRecipe):
        return Draws(mask)
    ada = epsilon = path = None
    if recipe.ada_target is not None:
        ada = draw_ada_noise(n, generator(recipe.seed, "ada", step)).share(share)
    if recipe.adversarial_loss == "wgan_gp":
        epsilon = torch.rand(n, generator=generator(recipe.seed, "epsilon", step))[share]
    if recipe.path_weight and step >= recipe.adversarial_start and step % recipe.path_every == 0:
        shape = (3, *network.image_size)
        # one generator a sample: an image of noise for a whole global batch would be gigabytes on every process
        samples = range(share.start, share.stop, 2)
        path = torch.stack([torch.randn(shape, generator=generator(recipe.seed, "path", step, i)) for i in samples])
    return Draws(mask, ada, epsilon, path)


def draw_ahead(recipe: Recipe, steps: range, network: MaskedAutoencoder, share: slice) -> Iterator[Draws]:
    """`draw` of every step, each while the step before it is computed: path-length noise takes its time."""
    if not steps:
        return
    with ThreadPoolExecutor(max_workers=1) as beside:
        coming = beside.submit(draw, recipe, steps[0], network, share)
        for step in steps:
            drawn = coming.result()
            if step != steps[-1]:
                coming = beside.submit(draw, recipe, step + 1, network, share)
            yield drawn
