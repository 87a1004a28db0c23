"""Turn a finished run into files that others load.

    python training/export.py RUN --name vit_pico_patch8_pmae.mae_imagenette --to DIR --data-terms TEXT --hardware TEXT

writes `NAME.safetensors` (the encoder, native timm keys), `NAME.decoder.safetensors` and `NAME.json` (provenance:
recipe, data and its terms, cost, versions, final metrics, results of evaluations, digests of both files).
"""

import dataclasses
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

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


def load_autoencoder(encoder: nn.Module, decoder_file: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """Put a saved decoder behind its encoder.

    Args:
        encoder: The encoder that was trained with it, loaded: a timm ViT.
        decoder_file: A `decoder.safetensors` of `export_run`.

    Returns:
        The autoencoder and the recipe it was trained with.

    Raises:
        RuntimeError: If the decoder is of another encoder's shape.
        ValueError: If the encoder is no ViT that can be masked.
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


def main(
    run: Annotated[Path, tyro.conf.Positional],
    name: str,
    to: Path,
    data_terms: str,
    hardware: str,
    dtype: Literal["float32", "float16"] = "float16",
    results: tuple[Path, ...] = (),
) -> None:
    """Export a finished run's weights with their provenance.

    Args:
        run: A run folder that holds encoder.safetensors and decoder.safetensors.
        name: `<architecture>.<tag>` of the weights.
        to: Folder to write to.
        data_terms: Terms of use of the images.
        hardware: What the run was done on.
        dtype: Precision on disk.
        results: JSON files of evaluations to record.
    """
    description = json.loads((run / "recipe.json").read_text())
    files = {}
    for part, suffix in (("encoder", ""), ("decoder", ".decoder")):
        source, target = run / f"{part}.safetensors", to / f"{name}{suffix}.safetensors"
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        state = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(source).items()}
        broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
        if broken:
            raise SystemExit(f"export.py: {', '.join(broken)} of {source} cannot be held in {dtype}")
        write_atomically(target, state, metadata)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        files[target.name] = {"sha256": digest, "bytes": target.stat().st_size, "dtype": dtype}
    progress = json.loads(metadata["progress"])
    provenance = {
        "name": name,
        "recipe": description["recipe"],
        "data": {**description["data"], "terms": data_terms},
        "cost": {"steps": progress["step"], "seconds": round(progress["seconds"]), "hardware": hardware},
        "final_metrics": progress["metrics"],
        "versions": description["versions"],
        "results": [json.loads(path.read_text()) for path in results],
        "files": files,
    }
    (to / f"{name}.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print("\n".join(f"wrote {to / file}" for file in (*files, f"{name}.json")))


if __name__ == "__main__":
    tyro.cli(main)
