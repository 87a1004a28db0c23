"""What a repository of weights holds, made of facts that live elsewhere: timm's registry, a run, its evaluations.

config.json              read by timm and transformers, without our package
README.md                the model card
model.safetensors        the encoder, timm's own keys
decoder.safetensors      what rebuilds images behind it
recipe.json              the resolved recipe, data, cost and versions of the run
results.json             figures of evaluations
manifest.json            size and SHA-256 of all the others, which `perceptual_mae_models/hub.py` checks
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg

from perceptual_mae_models.files import replace_file
from perceptual_mae_models.hub import MANIFEST, WEIGHTS, sha256_of
from perceptual_mae_models.vision_transformer_pmae import EMBEDDED, decoder_beside, facts_of, list_encoders
from training.hub.card import write_card

CONFIG, CARD, DECODER, RECIPE, RESULTS = (
    "config.json",
    "README.md",
    "decoder.safetensors",
    "recipe.json",
    "results.json",
)

TIMM_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_pico_patch8_pmae": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "depth": 8}),
    "vit_tiny_patch16_pmae": ("vit_tiny_patch16_224", {}),
    "vit_small_patch16_pmae": ("vit_small_patch16_224", {}),
    "vit_base_patch16_pmae": ("vit_base_patch16_224", {}),
    "vit_large_patch16_pmae": ("vit_large_patch16_224", {}),
    "vit_huge_patch14_pmae": ("vit_huge_patch14_224", {}),
}
"""timm's own architecture of the same shape, and the arguments that make it so: for those without our package."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights to publish, and everything known of them."""

    name: str
    """`<architecture>.<tag>`."""
    encoder: Path
    decoder: Path
    provenance: dict[str, Any]
    """Recipe, data, cost, versions, final metrics, results: what `training/export.py` writes."""


def registered_tags() -> list[str]:
    """Tags whose repository is ours, by name; those of other authors live in theirs."""
    return [name for name in list_encoders(tags=True) if str(facts_of(name).hf_hub_id).rpartition("/")[2] == name]


def facts_of_own(name: str, method: str, *, repository: str, license_name: str) -> PretrainedCfg:
    """The facts of a tag that is registered nowhere: those that its architecture and method decide, and what is given.

    Args:
        name: `<architecture>.<tag>`.
        method: Of the recipe; decides the paper that is named.
        repository: ORGANISATION/NAME on the Hub.
        license_name: Of the weights, as the Hub writes it.

    Raises:
        ValueError: If there is no such architecture, or the name or method is none that can be published.
    """
    architecture, _, tag = name.partition(".")
    if architecture not in TIMM_TWINS or not tag or "." in tag:
        raise ValueError(f"{name} is not <architecture>.<tag>; architectures: {', '.join(TIMM_TWINS)}")
    twins = [facts_of(other) for other in registered_tags() if other.startswith(f"{architecture}.{method}_")]
    if not twins:
        raise ValueError(f"{method} is not a method whose weights are published")
    return replace(twins[0], tag=tag, hf_hub_id=repository, license=license_name, file=None, notes=None)


def name_of(cfg: PretrainedCfg) -> str:
    """`<architecture>.<tag>`."""
    return f"{cfg.architecture}.{cfg.tag}"


def open_embedded_weights(name: str) -> Weights | None:
    """The weights of a tag that the package holds, with their provenance; None where it holds none."""
    encoder = EMBEDDED / f"{name}.safetensors"
    if not encoder.exists():
        return None
    provenance = json.loads((EMBEDDED / f"{name}.json").read_text(encoding="utf-8"))
    return Weights(name=name, encoder=encoder, decoder=decoder_beside(encoder), provenance=provenance)


def build_config(cfg: PretrainedCfg) -> dict[str, Any]:
    """`config.json` of a tag, as timm writes it, under timm's own architecture name."""
    architecture, model_args = TIMM_TWINS[str(cfg.architecture)]
    if cfg.input_size != facts_of(str(cfg.architecture)).input_size:
        model_args = {**model_args, "img_size": cfg.input_size[-1]}
    with torch.device("meta"):
        with_sizes = timm.create_model(architecture, num_classes=0, **model_args)
    kept = ("tag", "fixed_input_size", "crop_pct", "interpolation", "first_conv", "classifier", "license", "paper_ids")
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": with_sizes.num_features,
        "dtype": "float32",  # for transformers, which would compute in the float16 of the file
        "global_pool": "token",
        **({"model_args": model_args} if model_args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": list(cfg.input_size),
            "crop_mode": cfg.crop_mode,
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            "num_classes": 0,
            "pool_size": None,
            "paper_name": cfg.paper_name,
            **{key: getattr(cfg, key) for key in kept},
        },
    }


def describe_files(cfg: PretrainedCfg, weights: Weights | None) -> dict[str, str]:
    """The text files of a tag's repository by name; without weights only those that need none."""
    config = build_config(cfg)
    provenance = weights.provenance if weights else None
    files = {CONFIG: as_json(config), CARD: write_card(cfg, config, provenance)}
    if provenance:
        files[RECIPE] = as_json({key: provenance[key] for key in ("recipe", "data", "cost", "versions")})
        files[RESULTS] = as_json({key: provenance[key] for key in ("final_metrics", "results")})
    return files


def write_repository(
    cfg: PretrainedCfg, weights: Weights | None, folder: Path, *, with_weights: bool = True
) -> list[Path]:
    """Write a tag's repository.

    Args:
        cfg: Its facts, of `vision_transformer_pmae.facts_of` or `facts_of_own`.
        weights: What is published; None for a tag that has none yet, whose page says so.
        folder: Where the files go.
        with_weights: Also copy the weights; without, everything that describes them.

    Returns:
        The files, the manifest last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, text in describe_files(cfg, weights).items():
        (folder / file).write_text(text, encoding="utf-8")
        written.append(folder / file)
    if weights:
        sources = {WEIGHTS: weights.encoder, DECODER: weights.decoder}
        if with_weights:
            for file, source in sources.items():
                replace_file(folder / file, partial(shutil.copyfile, source))
                written.append(folder / file)
        entries = {path.name: path for path in written} | sources
        (folder / MANIFEST).write_text(as_json(build_manifest(cfg, entries)), encoding="utf-8")
        written.append(folder / MANIFEST)
    return written


def build_manifest(cfg: PretrainedCfg, files: Mapping[str, Path]) -> dict[str, Any]:
    """Where a tag's files are to go; their sizes and digests, by the names they have in the repository."""
    return {
        "name": name_of(cfg),
        "repository": cfg.hf_hub_id,
        "files": {
            file: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for file, path in sorted(files.items())
        },
    }


def as_json(value: Any) -> str:
    """JSON as people read it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
