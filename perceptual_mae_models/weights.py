"""Where encoder tensors come from: checkpoints of any wrapping are read strictly.

timm loads with `strict=False` as soon as the number of classes differs from the checkpoint's, so that a checkpoint with
unexpected key names leaves a random encoder without a word. `checkpoint_filter_fn` closes that hole: an encoder is
loaded whole or not at all.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

_logger = logging.getLogger(__name__)

# What may stand before an encoder's own names, in any order and number: containers of training scripts, wrappers of
# torch (DDP, AveragedModel, compile), and the places of the encoder in our own training networks.
_WRAPPERS = frozenset(
    {"state_dict", "state_dict_ema", "model", "model_ema", "ema", "module", "_orig_mod", "generator", "encoder"}
)
_EMA_WRAPPERS = frozenset({"state_dict_ema", "model_ema", "ema"})
# The first part of every name a timm VisionTransformer can have; other names are decoders, discriminators, optimisers.
HEAD_PARTS = frozenset({"head", "fc_norm", "attn_pool"})
_TOKEN_PARTS = frozenset({"cls_token", "reg_token", "pos_embed"})
_BODY_PARTS = frozenset({"patch_embed", "norm_pre", "blocks"})
ENCODER_PARTS = _BODY_PARTS | _TOKEN_PARTS | HEAD_PARTS | {"norm"}

PATCH_WEIGHT = "patch_embed.proj.weight"
_IMAGE_SIZE = "image_size"
# Older timm adapts the first convolution from three channels only, and leaves it random otherwise.
_TIMM_ADAPTS_ANY_CHANNELS = "base_chans" in inspect.signature(adapt_input_conv).parameters


class CheckpointError(RuntimeError):
    """A checkpoint was read, but it does not hold the encoder that it should."""


def describe_size(encoder: Any) -> dict[str, str]:
    """The entry of a weight file's metadata that says which images an encoder is built for; `trained_size` reads it."""
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    return {_IMAGE_SIZE: "x".join(map(str, size))} if size else {}


def trained_size(file: Path) -> tuple[int, int] | None:
    """Height and width in pixels that `describe_size` wrote into a weight file; None where it is of another origin.

    Raises:
        OSError: If the file cannot be read.
        SafetensorError: If it is broken.
    """
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as opened:
        said = re.fullmatch(r"(\d+)x(\d+)", (opened.metadata() or {}).get(_IMAGE_SIZE, ""))
    return (int(said[1]), int(said[2])) if said else None


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: VisionTransformer, trained_for: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Find the encoder in a checkpoint and fit it to the model, all of it or with an error.

    Containers and prefixes (`state_dict`, `model`, `model_ema`, `module.`, `_orig_mod.`, `generator.`, `encoder.`, …,
    in any nesting) are taken off, and decoder, discriminator and optimiser tensors are left out. Averaged (EMA)
    weights are preferred where a checkpoint holds both, as timm does. The position embedding and the patch embedding
    are resampled to the model's grid and patch size. Parts that the model was built without (class token, final norm,
    position embedding) are left out; register tokens that the checkpoint lacks keep their initial value, with a
    warning. A class head is loaded when its shape fits the model, even where timm would discard it because the
    pretrained cfg declares another number of classes; any other head keeps its initial value.

    Args:
        state_dict: A checkpoint: tensors by name, wrapped or not.
        model: The model to load into. Only its head is written to.
        trained_for: Height and width in pixels of the images that the checkpoint learned from, where it says so; by
            default the pretrained cfg's, if they fit the number of its positions.

    Returns:
        Tensors by the model's own names, ready for `model.load_state_dict`; only the input channels of the patch
        embedding may still differ, which timm adapts afterwards.

    Raises:
        CheckpointError: If an encoder tensor is missing, belongs to a different encoder or cannot be fitted.
    """
    wanted = model.state_dict()
    tensors = _find_encoder(state_dict, model, wanted)
    _check_shapes(tensors, model, wanted)
    encoder = {name: tensor for name, tensor in tensors.items() if name in wanted}
    if model.pos_embed is not None:
        encoder.update(_fit_position_embedding(tensors, model, trained_for))
    if model.reg_token is not None and "reg_token" not in tensors:
        _logger.warning("The checkpoint has no register tokens: they keep their initial value.")
        encoder.setdefault("reg_token", model.reg_token.detach())
    kernel_size = wanted[PATCH_WEIGHT].shape[-2:]
    if encoder[PATCH_WEIGHT].shape[-2:] != kernel_size:
        encoder[PATCH_WEIGHT] = resample_patch_embed(encoder[PATCH_WEIGHT].float(), list(kernel_size))
    _load_fitting_head(encoder, model, wanted)
    return encoder


def _find_encoder(
    state_dict: Mapping[str, Any], model: VisionTransformer, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Choose the one complete set of encoder tensors among everything the checkpoint holds."""
    checkpoint = dict(flatten(state_dict))
    candidates: defaultdict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)
    for full_name, tensor in checkpoint.items():
        wrappers, name = split_wrappers(full_name)
        if name.split(".")[0] in ENCODER_PARTS:
            candidates[wrappers][name] = tensor

    optional = HEAD_PARTS | {"reg_token"}
    required = [name for name in wanted if name.split(".")[0] not in optional]
    complete = {path: group for path, group in candidates.items() if group.keys() >= set(required)}
    averaged = {path: group for path, group in complete.items() if not _EMA_WRAPPERS.isdisjoint(path)}
    chosen = averaged or complete
    title = f"encoder of {getattr(model, 'pretrained_cfg', {}).get('architecture', 'this model')}"
    if not chosen:
        closest = max(candidates.values(), key=lambda group: len(group.keys() & set(required)), default={})
        missing = [name for name in required if name not in closest]
        raise CheckpointError(
            f"The checkpoint does not hold a complete {title}: {len(missing)} of its {len(required)} tensors are"
            f" missing ({shorten(missing)}). Found {len(checkpoint)} tensors ({shorten(checkpoint)})."
            + (f" {advise_pooling()}." if "fc_norm.weight" in closest and "norm.weight" in missing else "")
        )
    if len(chosen) > 1:
        places = [".".join(path) or "the top level" for path in chosen]
        raise CheckpointError(f"The checkpoint holds more than one {title}, at {shorten(places)}: keep only one.")

    (tensors,) = chosen.values()
    surplus = [name for name in tensors if name.split(".")[0] in _BODY_PARTS and name not in wanted]
    if surplus:
        raise CheckpointError(
            f"The checkpoint is of another model than the {title}: it also holds {len(surplus)} encoder tensors that"
            f" this model has no place for ({shorten(surplus)})."
        )
    return tensors


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk nested containers; names are joined by dots, so that containers and prefixes become the same thing."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")


def split_wrappers(full_name: str) -> tuple[tuple[str, ...], str]:
    """Take containers and prefixes off the front of a tensor's name; both are returned."""
    parts = full_name.split(".")
    depth = 0
    while depth < len(parts) - 1 and parts[depth] in _WRAPPERS:
        depth += 1
    return tuple(parts[:depth]), ".".join(parts[depth:])


def _check_shapes(tensors: Mapping[str, Tensor], model: VisionTransformer, wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that neither we nor timm can bring to the model's shape."""
    problems = []
    for name, target in wanted.items():
        if name not in tensors or name.split(".")[0] in HEAD_PARTS:
            continue
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{name} is of {tensors[name].dtype}: a quantised checkpoint, take the original one")
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite: the checkpoint is damaged")
        found = tensors[name].shape
        if name == PATCH_WEIGHT:  # kernel and channels can be adapted
            fits = len(found) == 4 and found[0] == target.shape[0]
        elif name == "pos_embed":  # the number of tokens can be adapted
            fits = len(found) == 3 and found[0] == 1 and found[2] == target.shape[2]
        else:
            fits = found == target.shape
        if not fits:
            problems.append(f"{name} is {tuple(found)}, the model needs {tuple(target.shape)}")
    if problems:
        raise CheckpointError(f"The checkpoint is of another model, its shapes differ: {shorten(problems, '; ')}.")

    channels, model_channels = tensors[PATCH_WEIGHT].shape[1], wanted[PATCH_WEIGHT].shape[1]
    declared = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]
    if channels not in (declared, model_channels) or (channels != 3 and not _TIMM_ADAPTS_ANY_CHANNELS):
        raise CheckpointError(
            f"{PATCH_WEIGHT} takes {channels} channels, the pretrained cfg declares {declared} and the model"
            f" takes {model_channels}. Declare the checkpoint's own with pretrained_cfg_overlay=dict(file=…,"
            f" input_size=({channels}, height, width)) on a recent timm, or load an unwrapped checkpoint that needs no"
            " adapting with checkpoint_path=…"
        )


def _fit_position_embedding(
    tensors: Mapping[str, Tensor], model: VisionTransformer, trained_for: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Bring the position embedding to the model's grid and prefix tokens.

    Returns:
        `pos_embed`, and for a model whose prefix tokens have no position (`no_embed_class`) the tokens themselves with
        the checkpoint's rows added to them, which computes the same.
    """
    source = tensors["pos_embed"]
    num_prefix, grid = _position_layout(tensors, model, trained_for)
    rows, patches = source[:, :num_prefix], source[:, num_prefix:]
    new_grid = tuple(model.patch_embed.grid_size)
    if grid != new_grid:
        patches = resample_abs_pos_embed(patches, list(new_grid), list(grid), num_prefix_tokens=0)

    class_row = rows[:, :1] if num_prefix and "cls_token" in tensors else source.new_zeros(1, 1, source.shape[2])
    register_rows = rows[:, 1:] if "cls_token" in tensors else rows
    if register_rows.shape[1] != model.num_reg_tokens:
        register_rows = source.new_zeros(1, model.num_reg_tokens, source.shape[2])
    prefix_rows = {}
    if model.cls_token is not None:
        prefix_rows["cls_token"] = class_row
    if model.reg_token is not None:
        prefix_rows["reg_token"] = register_rows
    if not model.no_embed_class:
        return {"pos_embed": torch.cat([*prefix_rows.values(), patches], dim=1)}
    tokens = {name: tensors[name] + row for name, row in prefix_rows.items() if name in tensors}
    return {"pos_embed": patches, **tokens}


def _position_layout(
    tensors: Mapping[str, Tensor], model: VisionTransformer, trained_for: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """Tell how many rows of the checkpoint's position embedding are prefix tokens, and the grid of the others.

    Few checkpoints say so. Of others the grid of the pretrained cfg is tried first, then the model's own, then a
    square; prefix rows are either all there or (`no_embed_class`) none.
    """
    length = tensors["pos_embed"].shape[1]
    num_tokens = sum(tensors[name].shape[1] for name in ("cls_token", "reg_token") if name in tensors)
    height, width = trained_for or getattr(model, "pretrained_cfg", {}).get("input_size", (3, 0, 0))[-2:]
    patch_height, patch_width = tensors[PATCH_WEIGHT].shape[-2:]
    declared, own = (height // patch_height, width // patch_width), tuple(model.patch_embed.grid_size)
    for rows, columns in (declared, own):
        for num_prefix in (num_tokens, 0):
            if rows * columns == length - num_prefix:
                if trained_for is None and declared != own and math.prod(own) == math.prod(declared):
                    warnings.warn(
                        f"positions of {rows * columns} patches are taken for {rows} x {columns} of them, as the"
                        f" pretrained cfg declares, not for {own[0]} x {own[1]}: if they are the latter, say so with"
                        " pretrained_cfg_overlay=dict(file=…, input_size=(3, height, width))",
                        stacklevel=2,
                    )
                return num_prefix, (rows, columns)
    for num_prefix in (num_tokens, 0):
        side = math.isqrt(max(length - num_prefix, 0))
        if side and side * side == length - num_prefix:
            return num_prefix, (side, side)
    raise CheckpointError(
        f"pos_embed has {length} tokens: no square grid, with or without {num_tokens} prefix tokens, and not the grid"
        " of the pretrained cfg. Declare the checkpoint's image size with pretrained_cfg_overlay=dict(file=…,"
        " input_size=(3, height, width))."
    )


def _load_fitting_head(encoder: Mapping[str, Tensor], model: VisionTransformer, wanted: Mapping[str, Tensor]) -> None:
    """Load the class head here, because timm drops it when the pretrained cfg declares no classes."""
    head = {name: tensor for name, tensor in encoder.items() if name.startswith("head.")}
    if head and all(tensor.shape == wanted[name].shape for name, tensor in head.items()):
        pooling = [name for name in wanted if name.split(".")[0] in HEAD_PARTS - {"head"} and name not in encoder]
        if pooling:
            raise CheckpointError(
                f"The checkpoint's class head was trained on another pooling: the model's {shorten(pooling)} would stay"
                " untrained. Build the model as it was trained, with global_pool='token' for one."
            )
        model.load_state_dict(head, strict=False)


def advise_pooling(file: str = "…") -> str:
    """What to do with a fine-tuned classifier whose norm stands behind the pooling (fc_norm), for a message."""
    return (
        "It is a fine-tuned classifier whose norm stands behind the pooling (fc_norm). It loads as it is, with its"
        " number of classes N and the model's NAME:"
        f" timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file={file!r}, num_classes=N),"
        " global_pool='avg'); FeatureExtractor takes that model"
    )


def shorten(names: Mapping[str, Any] | list[str], separator: str = ", ") -> str:
    """The first five of many names, for a message."""
    shown = list(names)[:5]
    return separator.join(shown) + (f"{separator}…" if len(names) > len(shown) else "") if shown else "none"
