"""The encoder of a `FeatureExtractor`: found by its name, built, and fit for images."""

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import perceptual_mae_models.vision_transformer_pmae  # noqa: F401  registers, however this module is reached


class UnknownModelError(ValueError):
    """No such model, or no such tag of it; the message names the nearest ones."""


def check_model_name(name: str) -> None:
    """Raises `UnknownModelError` unless timm has this model and tag; ids such as `hf-hub:…` are not looked at."""
    if ":" in name:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        advice = f"the nearest names are {', '.join(near)}" if near else "`pmae list` and timm.list_models() name them"
        raise UnknownModelError(f"unknown model {name!r}; {advice}")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        raise UnknownModelError(f"{architecture} has no tag {tag!r}; there are {', '.join(tagged)}")


def weights_file(path: Path) -> Path:
    """The encoder's weights where a path may be of the folder of a finished run, which holds them."""
    return path / "encoder.safetensors" if path.is_dir() else path


def build(model: str | nn.Module, checkpoint: str | Path | None, pretrained: bool) -> Any:
    """Builds what `FeatureExtractor` was asked for, or refuses it; see there."""
    if isinstance(model, nn.Module):
        if checkpoint is not None:
            raise ValueError("a checkpoint goes with a model's name; load it into the module that you pass")
        model = getattr(model, "_orig_mod", model)  # torch.compile's
        name = type(model).__name__
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(f"{name} has no pretrained_cfg to take a transform from; build it by timm")
        if not hasattr(model, "forward_features"):
            raise ValueError(f"{name} has no forward_features; build it without features_only")
        if (channels := _input_channels(model)) != 3:
            raise ValueError(
                f"{name} takes images of {channels} channels; images are RGB here, build it with in_chans=3"
            )
        return model
    check_model_name(model)
    overlay = None
    if checkpoint is not None:
        checkpoint = weights_file(Path(checkpoint))
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no such checkpoint: {checkpoint}")
        overlay = {"file": str(checkpoint), "source": ""}  # timm would rather read the place that an id names
    # Not num_classes=0: where that differs from the configuration timm loads unstrictly, and a checkpoint with foreign
    # keys would leave random weights without a word. The classifier, if there is one, is loaded and not used.
    built = timm.create_model(model, pretrained=pretrained or checkpoint is not None, pretrained_cfg_overlay=overlay)
    return _arrange(built)


def _input_channels(model: Any) -> int:
    """Channels of a module's images; those of RGB where it does not say."""
    first = model.pretrained_cfg.get("first_conv")
    layer = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    return layer.in_channels if isinstance(layer, nn.Conv2d) else 3


def _arrange(model: nn.Module) -> nn.Module:
    """Lays a convolutional network's weights out as processors like them; what it computes stays the same."""
    tokens = hasattr(model, "patch_embed")
    return model if tokens else model.to(memory_format=torch.channels_last)


def name_origin(model: str | nn.Module, checkpoint: str | Path | None, pretrained: bool) -> str:
    """Says where a model's weights come from, for `FeatureExtractor.metadata`."""
    if isinstance(model, nn.Module):
        return "module"
    if checkpoint is not None:
        return weights_file(Path(checkpoint)).name
    if not pretrained:
        return "random"
    if model.startswith("local-dir:"):
        return f"local-dir:{Path(model.removeprefix('local-dir:')).name}"
    return model if ":" in model else "pretrained"
