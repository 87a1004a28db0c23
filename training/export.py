"""Turn a finished run into files that others load.

    python training/export.py RUN --name vit_pico_patch8_pmae.mae_imagenette --to DIR --dtype float16

writes `NAME.safetensors` (the encoder, native timm keys), `NAME.decoder.safetensors` and `NAME.json` (provenance).
"""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from perceptual_mae_models.version import __version__
from training.networks.autoencoder import MaskedAutoencoder, build_autoencoder
from training.recipes import Recipe
from training.run.checkpoint import write_atomically


def versions() -> dict[str, str]:
    """Versions of whatever decides the bits of a run."""
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "pillow")}
    return {"perceptual_mae_models": __version__, "python": platform.python_version(), **packages}


def export_run(out: Path, network: MaskedAutoencoder, recipe: Recipe, progress: dict[str, Any]) -> None:
    """Write `encoder.safetensors` and `decoder.safetensors` into a run folder.

    Both carry the recipe in their metadata: the decoder is rebuilt from its file alone.
    """
    metadata = {"recipe": json.dumps(dataclasses.asdict(recipe)), "progress": json.dumps(progress)}
    write_atomically(out / "encoder.safetensors", network.encoder.state_dict(), metadata)
    write_atomically(out / "decoder.safetensors", network.decoder.state_dict(), metadata)


def load_autoencoder(encoder: VisionTransformer, decoder_file: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """Put a saved decoder behind its encoder.

    Args:
        encoder: The encoder that was trained with it, loaded.
        decoder_file: A `decoder.safetensors` of `export_run`.

    Returns:
        The autoencoder and the recipe it was trained with.

    Raises:
        RuntimeError: If the decoder is of another encoder's shape.
    """
    with safe_open(decoder_file, framework="pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
    network = build_autoencoder(
        encoder,
        decoder_dim=recipe.decoder_dim,
        decoder_depth=recipe.decoder_depth,
        decoder_heads=recipe.decoder_heads,
        mask_ratio=recipe.mask_ratio,
    )
    network.decoder.load_state_dict(load_file(decoder_file))
    return network, recipe
