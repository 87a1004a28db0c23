"""What a checkpoint's configuration says, against what the model of this package computes with the same tensors."""

from collections.abc import Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from perceptual_mae_models.convert_sources import Source
from perceptual_mae_models.weights import CheckpointError


def compare_facts(source: Source, encoder: Any) -> list[str]:
    """Compare a source's facts with a model.

    Args:
        source: What was read.
        encoder: timm's `VisionTransformer` that the tensors are for.

    Returns:
        What a user should know, a sentence each.

    Raises:
        CheckpointError: If the same tensors would compute something else.
    """
    if source.format == "perceptual-mae-release":
        return [
            f"the release computes norms with epsilon 1e-5 unless configured otherwise, this model with"
            f" {encoder.norm.eps:g}: features may differ slightly"
        ]
    if source.format == "timm":
        return _timm_notes(source.facts, encoder)
    if source.format != "huggingface":
        return []
    facts, heads = source.facts, encoder.blocks[0].attn.num_heads
    if not facts:
        return [f"no config.json beside the file: {heads} attention heads and exact GELU are taken for granted"]
    expected = {"num_attention_heads": heads, "hidden_act": "gelu"}
    wrong = [f"{key} {facts[key]}, not {value}" for key, value in expected.items() if facts.get(key, value) != value]
    if wrong:
        raise CheckpointError(f"config.json: {', '.join(wrong)}: this model would compute other features")
    notes = []
    if facts.get("layer_norm_eps", encoder.norm.eps) != encoder.norm.eps:
        notes.append(
            f"config.json: norms with epsilon {facts['layer_norm_eps']:g}, this model with {encoder.norm.eps:g}, MAE's"
            " own: features may differ slightly"
        )
    if facts.get("model_type", "vit_mae") != "vit_mae":
        notes.append(
            f"config.json: a {facts['model_type']}, whose preprocessing may differ from this model's (ImageNet's mean"
            " and deviation)"
        )
    return notes


def _timm_notes(facts: Mapping[str, Any], encoder: Any) -> list[str]:
    """`compare_facts` of timm's config.json, whose tensors say nothing of heads and preprocessing either."""
    given, cfg = facts.get("model_args") or {}, facts.get("pretrained_cfg") or {}
    heads = encoder.blocks[0].attn.num_heads
    if given.get("num_heads", heads) != heads:
        raise CheckpointError(
            f"config.json: num_heads {given['num_heads']}, not {heads}: this model would compute other features"
        )
    expected = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if not cfg.keys() >= expected.keys():
        return [f"{heads} attention heads and preprocessing by ImageNet's mean and deviation are taken for granted"]
    return [
        f"config.json: images are normalised by a {key} of {cfg[key]}, by this model by {list(value)}: features differ"
        " unless you normalise them as the checkpoint expects"
        for key, value in expected.items()
        if list(cfg[key]) != list(value)
    ]
