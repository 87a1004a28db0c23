"""Masked images rebuilt: the autoencoders whose weights come with the package, and pictures of what they do.

```python
from perceptual_mae_models.autoencoder import given_masking
from perceptual_mae_models.reconstruction import middle, open_shipped, rebuild

network, recipe = open_shipped("vit_pico_patch8_pmae.mae_imagenette")
images = middle(image, network.image_size).unsqueeze(0)              # (1, 3, 64, 64) in [0, 1]
hidden = torch.rand(1, network.num_patches) < 0.5                    # any patches
views = rebuild(network, images, given_masking(hidden), norm_pix_loss=recipe["norm_pix_loss"])
```
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn
from torchvision.transforms import v2

from perceptual_mae_models.autoencoder import (
    MaskedAutoencoder,
    Masking,
    build_autoencoder,
    hidden_pixels,
)
from perceptual_mae_models.images import open_image
from perceptual_mae_models.vision_transformer_pmae import decoder_beside, list_encoders
from perceptual_mae_models.weights import CheckpointError


def read_recipe(file: Path) -> dict[str, Any]:
    """The recipe, as data, that a weight file of pretraining carries in its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is broken or carries no recipe.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        recipe = json.loads(metadata["recipe"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: no weight file with a recipe ({type(error).__name__}: {error})") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{file}: its recipe is no set of fields")
    return recipe


def load_autoencoder(encoder: nn.Module, decoder_file: Path) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """Put a saved decoder behind its encoder.

    Args:
        encoder: The encoder that was trained with it, loaded: a timm ViT.
        decoder_file: A `decoder.safetensors` of a run, or one of the package.

    Returns:
        The autoencoder and the recipe it was trained with, as data.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file carries no recipe, or its tensors do not fit it or the encoder.
        ValueError: If the encoder is no ViT that can be masked.
    """
    recipe = read_recipe(decoder_file)
    try:
        network = build_autoencoder(
            encoder,
            decoder_dim=recipe["decoder_dim"],
            decoder_depth=recipe["decoder_depth"],
            decoder_heads=recipe["decoder_heads"],
            mask_ratio=recipe["mask_ratio"],
            multi_scale=recipe.get("multi_scale", False),  # runs of before the field had the plain decoder
        )
    except KeyError as error:
        raise CheckpointError(f"{decoder_file}: its recipe says nothing of {error}") from error
    try:
        network.decoder.load_state_dict(load_file(decoder_file))
    except RuntimeError as error:  # torch's message names the tensors
        raise CheckpointError(f"{decoder_file}: not the decoder of this encoder. {error}") from error
    return network, recipe


def shipped_autoencoders() -> list[str]:
    """Names, `<arch>.<tag>`, of the models whose encoder and decoder both come with the package; defaults first."""
    return [
        name
        for architecture in list_encoders()
        for name, cfg in get_arch_pretrained_cfgs(architecture).items()
        if cfg.file and Path(cfg.file).is_file() and decoder_beside(Path(cfg.file)).is_file()
    ]


def open_shipped(name: str) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """The autoencoder whose weights come with the package.

    Args:
        name: A model of `pmae list` whose weights are in the package, with or without its tag.

    Returns:
        The autoencoder, in evaluation mode, and the recipe it was trained with, as data.

    Raises:
        FileNotFoundError: If the package holds no decoder of it.
        CheckpointError: If a file is broken.
    """
    encoder: Any = timm.create_model(name, pretrained=False, num_classes=0)
    file = encoder.pretrained_cfg.get("file")
    if not file or not (decoder := decoder_beside(Path(file))).is_file():
        raise FileNotFoundError(f"{name}: there is no decoder of it in the package")
    network, recipe = load_autoencoder(timm.create_model(name, pretrained=True, num_classes=0), decoder)
    return network.eval(), recipe


def middle(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The middle of an image of any mode, its short side fitted to a height and width: (3, H, W) in [0, 1]."""
    fit = v2.Compose([v2.Resize(max(size), antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    pixels: Tensor = fit(open_image(image))
    return pixels.float() / 255


class Views(NamedTuple):
    """Pictures of one pass of an autoencoder: (N, 3, H, W) in [0, 1], unless said otherwise."""

    hidden: Tensor
    """(N, 1, H, W) bool: which pixels the encoder did not see."""
    masked: Tensor
    """What the encoder sees: hidden patches in the mean colour that networks take for nothing."""
    rebuilt: Tensor
    """Every patch predicted."""
    pasted: Tensor
    """Visible patches as they are, to the bit; hidden ones predicted."""
    coarse: tuple[Tensor, ...]
    """Of a multi-scale decoder every coarser scale, (N, 3, h, w), fine to coarse; else none."""


@torch.no_grad()
def rebuild(network: MaskedAutoencoder, images: Tensor, masking: Masking, *, norm_pix_loss: bool) -> Views:
    """Rebuild images under a mask.

    With `norm_pix_loss` the prediction has no brightness or contrast of its own: each patch takes those of the
    original, as in MAE's figures, so that the colours of hidden patches come partly from the original.

    With everything hidden the encoder sees its class token alone; with nothing hidden `pasted` is the image itself.

    Args:
        network: The autoencoder, on the device of the images, in evaluation mode.
        images: (N, 3, H, W) in [0, 1].
        masking: Of `random_masking` or `given_masking`.
        norm_pix_loss: How the network was trained: its recipe tells.

    Returns:
        The pictures.
    """
    latent, skips = network.encode(images, masking.ids_keep)
    preds = network.decode(latent, skips, masking.ids_restore)
    if norm_pix_loss:
        preds = network.take_contrast(preds, images)
    hidden = hidden_pixels(masking.mask, network.patch_size, network.grid_size)
    rebuilt, *coarse = (image.clamp(0, 1) for image in network.images(preds))
    return Views(
        hidden=hidden,
        masked=torch.where(hidden, network.mean, images),  # 0 in the standardised space is ImageNet's mean colour
        rebuilt=rebuilt,
        pasted=torch.where(hidden, rebuilt, images),
        coarse=tuple(coarse),
    )
