"""The weight files of a run: an encoder that timm loads, and the decoder that goes behind it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import perceptual_mae_models  # registers the encoders in timm
from perceptual_mae_models.autoencoder import MaskedAutoencoder, build_autoencoder
from training.recipes import Recipe, recipe_from_json
from training.run.checkpoint import write_atomically


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


def save_run_weights(out: Path, network: MaskedAutoencoder, recipe: Recipe, progress: dict[str, Any]) -> None:
    """Write `encoder.safetensors` and `decoder.safetensors` into a run folder.

    Both carry the recipe in their metadata: the decoder is rebuilt from its file alone.
    """
    metadata = {"recipe": json.dumps(dataclasses.asdict(recipe)), "progress": json.dumps(progress)}
    write_atomically(out / "encoder.safetensors", network.encoder.state_dict(), metadata)
    write_atomically(out / "decoder.safetensors", network.decoder.state_dict(), metadata)


def read_recipe(file: Path) -> Recipe:
    """The recipe that a weight file of `save_run_weights` carries."""
    with safe_open(file, framework="pt") as opened:
        return recipe_from_json(json.loads(opened.metadata()["recipe"]))


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
    encoder = timm.create_model(read_recipe(decoder_file).model, pretrained=False, num_classes=0)
    encoder.load_state_dict(load_file(encoder_file))
    return load_autoencoder(encoder, decoder_file)


def open_embedded(name: str) -> tuple[MaskedAutoencoder, Recipe]:
    """The autoencoder whose weights come with the package.

    Args:
        name: A model of `pmae list` whose weights are in the package, with or without its tag.

    Raises:
        FileNotFoundError: If the package holds no decoder of it.
    """
    encoder: Any = timm.create_model(name, pretrained=False, num_classes=0)
    tag = f"{name.partition('.')[0]}.{encoder.pretrained_cfg['tag']}"
    file = Path(perceptual_mae_models.__file__).parent / "pretrained" / f"{tag}.decoder.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{name}: there is no decoder of it in the package")
    return load_autoencoder(timm.create_model(name, pretrained=True, num_classes=0), file)


def load_autoencoder(encoder: nn.Module, decoder_file: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """Put a saved decoder behind its encoder.

    Args:
        encoder: The encoder that was trained with it, loaded: a timm ViT.
        decoder_file: A `decoder.safetensors` of `save_run_weights`.

    Returns:
        The autoencoder and the recipe it was trained with.

    Raises:
        RuntimeError: If the decoder is of another encoder's shape.
        ValueError: If the encoder is no ViT that can be masked.
    """
    recipe = read_recipe(decoder_file)
    network = build_from_recipe(encoder, recipe)
    network.decoder.load_state_dict(load_file(decoder_file))
    return network, recipe
