"""Pictures of reconstructions on fixed images with fixed masks."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource
from training.networks.autoencoder import MaskedAutoencoder
from training.recipes import Recipe
from training.run.seeding import generator
from training.step import reconstruct


class FixedGrid:
    """The same images under the same masks, rebuilt by whatever network is given.

    Args:
        source: Where the images come from; some that decode are taken, evenly spaced over it.
        network: Tells image and grid size.
        recipe: Its seed decides the masks.
        count: How many images.
    """

    def __init__(self, source: ImageSource, network: MaskedAutoencoder, recipe: Recipe, *, count: int = 8) -> None:
        height, width = (side * network.patch_size for side in network.grid_size)
        crop = v2.Compose(
            [v2.Resize(max(height, width), antialias=True), v2.CenterCrop((height, width)), v2.PILToTensor()]
        )
        images: list[Tensor] = []
        for index in range(0, len(source), max(1, len(source) // count)):
            try:
                images.append(crop(source.load(index)))
            except ImageError:  # noqa: PERF203  (a broken image is left out of the picture)
                continue
        self.images = torch.stack(images[:count]).float() / 255  # (count, 3, H, W)
        length = network.grid_size[0] * network.grid_size[1]
        self.noise = torch.rand(len(self.images), length, generator=generator(recipe.seed, "grid"))
        self.recipe = recipe

    def save(self, network: MaskedAutoencoder, path: Path) -> None:
        """Write a PNG; its rows are the originals, masked, rebuilt, and rebuilt with the visible patches pasted in."""
        device = network.mean.device
        training = network.training
        network.eval()
        views = reconstruct(network, self.images.to(device), self.noise.to(device), self.recipe)
        network.train(training)
        save_image(
            make_grid(torch.cat(list(views.values())).cpu(), nrow=len(self.images), padding=2, pad_value=1.0), path
        )
