"""The encoders as timm models: architectures, pretrained tags, and every fact that timm needs about them.

Each encoder is timm's plain `VisionTransformer` (no subclass, so that keys, pickles and exports stay native) whose
position embedding starts as MAE's sine-cosine code (timm's own `model.init_weights()`, called later, would make it
random). `timm.create_model` takes all its usual arguments.

A tag is `<method>_<data>`. The first tag of an architecture is its default: the method expected to be the best one.
`vit_pico_patch8_pmae` is the exception: its default is one whose weights come inside the package, because
a default that cannot be loaded would serve nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_models,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import VisionTransformer

from .hub import HUB_ORGANISATION, WEIGHTS, fetch_weights
from .pos_embed import build_2d_sincos_pos_embed
from .unreadable import NOT_PUBLISHED, check_head, explain_unreadable_weights
from .weights import checkpoint_filter_fn, trained_size

__all__: list[str] = []  # a list because timm's `register_model` appends to it

EMBEDDED = Path(__file__).parent / "pretrained"
"""Where weights lie that come with the package, each with what is known of it: NAME.safetensors, NAME.json."""

_PERCEPTUAL_MAE_PAPER = {
    "paper_name": "Improving Visual Representation Learning through Perceptual Understanding",
    "paper_ids": "arXiv:2212.14504",
}
_MAE_PAPER = {
    "paper_name": "Masked Autoencoders Are Scalable Vision Learners",
    "paper_ids": "arXiv:2111.06377",
}
# Best method first: timm makes the first tag of an architecture its default.
_PAPER_OF_METHOD = {
    "stylegan2_ada_p": _PERCEPTUAL_MAE_PAPER,
    "msg_gan_p": _PERCEPTUAL_MAE_PAPER,
    "ls_gan_p": _PERCEPTUAL_MAE_PAPER,
    "ms_ssim": _PERCEPTUAL_MAE_PAPER,
    "mae": _MAE_PAPER,
}
# The first is the default: what `training/miniature` chose, once all five have been judged.
_EMBEDDED_METHODS = ("mae", "ls_gan_p")
_COMMON_FACTS = {
    "num_classes": 0,
    "pool_size": None,
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "hf_hub_filename": WEIGHTS,
}


def _method_cfgs(architecture: str, data: str, image_size: int) -> dict[str, dict[str, Any]]:
    """Give the facts of the five methods' weights for one architecture, best method first."""
    return {
        f"{architecture}.{method}_{data}": {
            **_COMMON_FACTS,
            **paper,
            "input_size": (3, image_size, image_size),
            "hf_hub_id": f"{HUB_ORGANISATION}/{architecture}.{method}_{data}",
            "license": "apache-2.0",
            "notes": (NOT_PUBLISHED,),
        }
        for method, paper in _PAPER_OF_METHOD.items()
    }


def _facebook_mae_cfg(timm_name: str) -> dict[str, Any]:
    """Give the facts of the MAE authors' own weights, which timm hosts with native keys."""
    return {
        **_COMMON_FACTS,
        **_MAE_PAPER,
        "input_size": (3, 224, 224),
        "hf_hub_id": f"timm/{timm_name}",
        "license": "cc-by-nc-4.0",
        "origin_url": "https://github.com/facebookresearch/mae",
    }


def _pico_cfgs() -> dict[str, dict[str, Any]]:
    """Give the facts of the weights for pico, of which some lie in the package: these first."""
    found = _method_cfgs("vit_pico_patch8_pmae", "imagenette", 64)
    embedded = {
        name: {**found[name], "file": str(EMBEDDED / f"{name}.safetensors"), "notes": None}
        for name in (f"vit_pico_patch8_pmae.{method}_imagenette" for method in _EMBEDDED_METHODS)
    }
    return {**embedded, **{name: cfg for name, cfg in found.items() if name not in embedded}}


# `register_model` looks this name up when it decorates, so it has to stand above the entry points.
default_cfgs = generate_default_cfgs(
    {
        **_pico_cfgs(),
        **_method_cfgs("vit_tiny_patch16_pmae", "in1k", 224),
        **_method_cfgs("vit_small_patch16_pmae", "in1k", 224),
        **_method_cfgs("vit_base_patch16_pmae", "in1k", 224),
        "vit_base_patch16_pmae.fb_mae_in1k": _facebook_mae_cfg("vit_base_patch16_224.mae"),
        **_method_cfgs("vit_large_patch16_pmae", "in1k", 224),
        "vit_large_patch16_pmae.fb_mae_in1k": _facebook_mae_cfg("vit_large_patch16_224.mae"),
        **_method_cfgs("vit_huge_patch14_pmae", "in1k", 224),
        "vit_huge_patch14_pmae.fb_mae_in1k": _facebook_mae_cfg("vit_huge_patch14_224.mae"),
    }
)


def list_encoders(pattern: str = "", *, tags: bool = False) -> list[str]:
    """Names of our encoders, of those that match a pattern; `tags`: of their weights, `<architecture>.<tag>`."""
    return list_models(pattern, module="vision_transformer_pmae", include_tags=tags)


def facts_of(name: str) -> PretrainedCfg:
    """The facts of a tag of ours, or of an architecture's default one.

    Raises:
        ValueError: If we have none of this name.
    """
    if name not in (*list_encoders(), *list_encoders(tags=True)):
        raise ValueError(f"{name} is no model of ours; `pmae list` names all")
    cfg = get_pretrained_cfg(name)
    assert cfg is not None, f"timm lists {name} without a configuration"
    return cfg


def decoder_beside(encoder: Path) -> Path:
    """Where the decoder of an encoder's file lies in the package: NAME.decoder.safetensors beside NAME.safetensors."""
    return encoder.with_suffix(".decoder.safetensors")


def _vision_transformer(**kwargs: Any) -> VisionTransformer:
    """Build timm's `VisionTransformer` with MAE's position embedding in place of timm's random one."""
    model = VisionTransformer(**kwargs)
    if model.pos_embed is not None:
        patch_codes = build_2d_sincos_pos_embed(model.embed_dim, model.patch_embed.grid_size)
        num_prefix_rows = model.pos_embed.shape[1] - patch_codes.shape[1]
        with torch.no_grad():
            model.pos_embed[:, :num_prefix_rows].zero_()
            model.pos_embed[:, num_prefix_rows:].copy_(patch_codes)
    return model


def _create_encoder(variant: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
    if kwargs.pop("use_naflex", None):
        raise ValueError(f"{variant}: use_naflex=True is timm's own ViTs' alone; dynamic_img_size=True takes any size")
    if any(overlay.get(key) for key in ("url", "hf_hub_id")) and "file" not in overlay:
        # What is given by hand stands before the file in the package, which timm would read.
        cfg = replace(cfg, file=None)
        _exchange_cfg(kwargs, cfg)
    if kwargs.get("features_only"):
        # timm cuts the head off a feature extractor, but would first demand its tensors from the checkpoint.
        kwargs["num_classes"] = 0
    pools_patches = kwargs.get("global_pool") in ("avg", "avgmax", "max")
    if pools_patches and kwargs.get("num_classes", cfg.num_classes) == 0:
        # timm would replace the pretrained final norm by a new one after the pooling, which belongs to a head.
        kwargs.setdefault("fc_norm", False)
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    with explain_unreadable_weights(cfg):
        from_hub = pretrained and _reads_the_hub(cfg)
        file = None
        if from_hub:
            # We fetch the file, because timm would load whatever comes.
            file = fetch_weights(cfg, kwargs.get("cache_dir"))
        elif pretrained and cfg.file and Path(cfg.file).is_file():
            file = Path(cfg.file)
        elif pretrained and cfg.url:
            # timm would pass over an address given by hand, for the repository of the tag.
            _exchange_cfg(kwargs, replace(cfg, hf_hub_id=None))
        size, sized = None, cfg
        if file:
            check_head(file)
            size = trained_size(file)
            sized = _sized(cfg, size, overlay)
            _exchange_cfg(kwargs, replace(sized, file=str(file), source="file") if from_hub else sized)
        # timm does this only for a fixed input size, which a saved dynamic_img_size model no longer declares.
        kwargs.setdefault("img_size", sized.input_size[-2:])
        model: VisionTransformer = build_model_with_cfg(
            _vision_transformer,
            variant,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, trained_for=size),
            feature_cfg=feature_cfg,
            **kwargs,
        )
    facts: Any = model.pretrained_cfg
    if from_hub:
        facts.update(file=cfg.file, source=cfg.source)  # the place in the cache is nobody's business
    elif pretrained and cfg.url:
        facts.update(hf_hub_id=cfg.hf_hub_id)
    return model


def _exchange_cfg(kwargs: dict[str, Any], cfg: PretrainedCfg) -> None:
    kwargs.pop("pretrained_cfg_overlay", None)
    kwargs["pretrained_cfg"] = cfg


def _sized(cfg: PretrainedCfg, size: tuple[int, int] | None, overlay: Mapping[str, Any]) -> PretrainedCfg:
    """A configuration with the size of images that a weight file says, where the call says none."""
    registered: Any = get_pretrained_cfg(str(cfg.architecture))
    said = "input_size" in overlay or cfg.input_size[-2:] != registered.input_size[-2:]
    return cfg if said or size is None else replace(cfg, input_size=(cfg.input_size[0], *size))


def _reads_the_hub(cfg: PretrainedCfg) -> bool:
    """Tell whether the weights come from the Hub: what is given by hand stands before it, unless the source says so."""
    by_hand = cfg.file or cfg.state_dict or cfg.url or cfg.source == "local-dir"
    return bool(cfg.hf_hub_id) and (cfg.source == "hf-hub" or not by_hand)


@register_model
def vit_pico_patch8_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Pico encoder for 64 x 64 images, 3.6 M parameters: small enough to train and to ship in the package."""
    model_args = {"patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3}
    return _create_encoder("vit_pico_patch8_pmae", pretrained, **{**model_args, **kwargs})


@register_model
def vit_tiny_patch16_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti/16 encoder for 224 x 224 images, 5.5 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_encoder("vit_tiny_patch16_pmae", pretrained, **{**model_args, **kwargs})


@register_model
def vit_small_patch16_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16 encoder for 224 x 224 images, 22 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_encoder("vit_small_patch16_pmae", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch16_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 encoder for 224 x 224 images, 86 M parameters: the paper's main model."""
    model_args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_encoder("vit_base_patch16_pmae", pretrained, **{**model_args, **kwargs})


@register_model
def vit_large_patch16_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-L/16 encoder for 224 x 224 images, 303 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create_encoder("vit_large_patch16_pmae", pretrained, **{**model_args, **kwargs})


@register_model
def vit_huge_patch14_pmae(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-H/14 encoder for 224 x 224 images, 631 M parameters."""
    model_args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _create_encoder("vit_huge_patch14_pmae", pretrained, **{**model_args, **kwargs})
