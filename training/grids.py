"""Pictures of reconstructions on fixed images with fixed masks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

from training.losses.pixel import normalise_patches
from training.networks.autoencoder import MaskedAutoencoder, Reconstruction
from training.recipes import Recipe
from training.run.seeding import generator


@torch.no_grad()
def reconstruct(network: MaskedAutoencoder, images: Tensor, noise: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Pictures of what the network does.

    With `norm_pix_loss` the prediction has no brightness or contrast of its own: each patch takes those of the
    original, as in MAE's figures.

    Args:
        network: The autoencoder.
        images: (N, 3, H, W) in [0, 1].
        noise: (N, L), decides the masks.
        recipe: Tells the space of the prediction.

    Returns:
        (N, 3, H, W) images in [0, 1]: `original`, `masked` (hidden patches grey), `rebuilt` (every patch predicted),
        `pasted` (visible patches as they are, hidden ones predicted) and, from a multi-scale decoder, `<h>x<w>` for
        every coarser scale, enlarged to full size.
    """
    output: Reconstruction = network(images, noise)
    target, pred = network.target(images), output.pred.float()
    if recipe.norm_pix_loss:
        _, mean, std = normalise_patches(target)
        pred = pred * std + mean
    hidden = output.mask.unsqueeze(-1)  # (N, L, 1)
    coarse = [image.clamp(0, 1) for image in network.images(output.preds)[1:]] if network.num_scales > 1 else []
    return {
        "original": images,
        "masked": network.to_images(target * (1 - hidden)),  # 0 in the standardised space is ImageNet's mean colour
        "rebuilt": network.to_images(pred),
        "pasted": network.to_images(target * (1 - hidden) + pred * hidden),
        **{f"{x.shape[2]}x{x.shape[3]}": interpolate(x, images.shape[2:], mode="nearest-exact") for x in coarse},
    }


class FixedGrid:
    """The same images under the same masks, rebuilt by whatever network is given.

    Args:
        images: Of any size; the middle of each is taken.
        network: Tells image and grid size.
        recipe: Its seed decides the masks.
    """

    def __init__(self, images: Sequence[Image.Image], network: MaskedAutoencoder, recipe: Recipe) -> None:
        height, width = network.image_size
        crop = v2.Compose(
            [v2.Resize(max(height, width), antialias=True), v2.CenterCrop((height, width)), v2.PILToTensor()]
        )
        self.images = torch.stack([crop(image) for image in images]).float() / 255  # (count, 3, H, W)
        self.noise = torch.rand(len(self.images), network.num_patches, generator=generator(recipe.seed, "grid"))
        self.recipe = recipe

    def save(self, network: MaskedAutoencoder, path: Path) -> None:
        """Write a PNG, a row for each kind of picture that `reconstruct` makes, in its order."""
        device = network.mean.device
        training = network.training
        network.eval()
        views = reconstruct(network, self.images.to(device), self.noise.to(device), self.recipe)
        network.train(training)
        save_image(
            make_grid(torch.cat(list(views.values())).cpu(), nrow=len(self.images), padding=2, pad_value=1.0), path
        )
