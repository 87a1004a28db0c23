"""The weight files of a run: an encoder that timm loads, and the decoder that goes behind it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import nn

from perceptual_mae_models import reconstruction
from perceptual_mae_models.autoencoder import MaskedAutoencoder, build_autoencoder
from perceptual_mae_models.convert import save_weights
from perceptual_mae_models.weights import describe_size
from training.recipes import Recipe, recipe_from_json


def build_from_recipe(encoder: nn.Module, recipe: Recipe) -> MaskedAutoencoder:
    """Put the recipe's decoder, fresh, behind an encoder.

    Raises:
        ValueError: If the encoder is no ViT that can be masked.
    """
    return build_autoencoder(
        encoder,
        decoder_dim=recipe.decoder_dim,
        decoder_depth=recipe.decoder_depth,
        decoder_heads=recipe.decoder_heads,
        mask_ratio=recipe.mask_ratio,
        multi_scale=recipe.multi_scale,
    )


def build_random_encoder(recipe: Recipe) -> nn.Module:
    """The recipe's encoder, for images of the recipe's size."""
    return timm.create_model(recipe.model, pretrained=False, num_classes=0, img_size=recipe.img_size)


def save_run_weights(out: Path, network: MaskedAutoencoder, recipe: Recipe, progress: dict[str, Any]) -> None:
    """Write `encoder.safetensors` and `decoder.safetensors` into a run folder.

    Both carry the recipe in their metadata: the decoder is rebuilt from its file alone.
    """
    metadata = {
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "progress": json.dumps(progress),
        **describe_size(network.encoder),
    }
    save_weights(out / "encoder.safetensors", network.encoder.state_dict(), metadata)
    save_weights(out / "decoder.safetensors", network.decoder.state_dict(), metadata)


def read_recipe(file: Path) -> Recipe:
    """The recipe that a weight file of `save_run_weights` carries.

    Raises:
        CheckpointError: If the file is broken or carries none.
    """
    return recipe_from_json(reconstruction.read_recipe(file))


def open_run(folder: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """The autoencoder that a finished run left, and the recipe it was trained with.

    Raises:
        FileNotFoundError: If it left none.
        RuntimeError: If its files do not fit its recipe.
    """
    encoder_file, decoder_file = (folder / f"{part}.safetensors" for part in ("encoder", "decoder"))
    for file in (encoder_file, decoder_file):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; a run writes it at its end")
    encoder = build_random_encoder(read_recipe(decoder_file))
    encoder.load_state_dict(load_file(encoder_file))
    return load_autoencoder(encoder, decoder_file)


def open_embedded(name: str) -> tuple[MaskedAutoencoder, Recipe]:
    """The autoencoder whose weights come with the package, see `perceptual_mae_models.reconstruction.open_shipped`.

    Raises:
        FileNotFoundError: If the package holds no decoder of it.
    """
    network, recipe = reconstruction.open_shipped(name)
    return network, recipe_from_json(recipe)


def load_autoencoder(encoder: nn.Module, decoder_file: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """Put a saved decoder behind its encoder, see `perceptual_mae_models.reconstruction.load_autoencoder`.

    Returns:
        The autoencoder and the recipe it was trained with.

    Raises:
        RuntimeError: If the decoder is of another encoder's shape.
        ValueError: If the encoder is no ViT that can be masked.
    """
    network, recipe = reconstruction.load_autoencoder(encoder, decoder_file)
    return network, recipe_from_json(recipe)
