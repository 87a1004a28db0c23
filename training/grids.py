"""Pictures of reconstructions on fixed images with fixed masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from perceptual_mae_models.autoencoder import MaskedAutoencoder, random_masking
from perceptual_mae_models.reconstruction import middle, rebuild
from training.recipes import Recipe
from training.run.seeding import generator


def labelled_rows(
    rows: Mapping[str, Tensor], title: str, note: str, *, scale: int = 3, gap: int = 14, margin: int = 36
) -> Image.Image:
    """A picture with a row for each batch of images.

    Args:
        rows: (N, 3, H, W) in [0, 1] by label; the same N, H and W in all.
        title: Above them.
        note: Below the title.
        scale: Screen pixels a side of an image's pixel.
        gap: Between images, in screen pixels.
        margin: Around the picture, in screen pixels.
    """
    count, _, height, width = next(iter(rows.values())).shape
    font = ImageFont.load_default(16)
    tile_w, tile_h, label_w = width * scale, height * scale, 16 + round(max(font.getlength(label) for label in rows))
    size = 2 * margin + label_w + count * (tile_w + gap) - gap, 92 + len(rows) * (tile_h + gap) - gap + margin
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 26), title, "#1b1f24", ImageFont.load_default(24))
    draw.text((margin, 58), note, "#6a737d", ImageFont.load_default(14))
    for row, (label, images) in enumerate(rows.items()):
        top = 92 + row * (tile_h + gap)
        draw.text((margin, top + tile_h // 2 - 10), label, "#1b1f24", font)
        for column, image in enumerate(images):
            tile = to_pil_image(image).resize((tile_w, tile_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + label_w + column * (tile_w + gap), top))
    return canvas


class FixedGrid:
    """The same images under the same masks, rebuilt by whatever network is given.

    Args:
        images: Of any size; the middle of each is taken.
        network: Tells image and grid size.
        recipe: Its seed decides the masks.
    """

    def __init__(self, images: Sequence[Image.Image], network: MaskedAutoencoder, recipe: Recipe) -> None:
        self.images = torch.stack([middle(image, network.image_size) for image in images])  # (count, 3, H, W)
        self.noise = torch.rand(len(self.images), network.num_patches, generator=generator(recipe.seed, "grid"))
        self.recipe = recipe

    def save(self, network: MaskedAutoencoder, path: Path) -> None:
        """Write a PNG, a row of each: images, what the encoder sees, every patch predicted, hidden ones predicted.

        Of a multi-scale decoder there follow its coarser scales, enlarged.
        """
        device, training = network.mean.device, network.training
        images, masking = self.images.to(device), random_masking(self.noise.to(device), network.mask_ratio)
        views = rebuild(network.eval(), images, masking, norm_pix_loss=self.recipe.norm_pix_loss)
        network.train(training)
        coarse = [interpolate(image, images.shape[2:], mode="nearest-exact") for image in views.coarse]
        rows = torch.cat([images, views.masked, views.rebuilt, views.pasted, *coarse])
        save_image(make_grid(rows.cpu(), nrow=len(images), padding=2, pad_value=1.0), path)
