"""Other people's checkpoints made ours: found, checked by `checkpoint_filter_fn`, accounted for to the last tensor.

    conversion = convert_encoder(read_source(Path("mae_pretrain_vit_base.pth")))
    save_weights(Path("base.safetensors"), conversion.encoder, conversion.metadata)

A checkpoint does not say how many attention heads it was trained with, nor the epsilon of its norms: those are the
architecture's here, and where a config.json beside the file says otherwise, the conversion stops or says so.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from perceptual_mae_models.convert_facts import compare_facts
from perceptual_mae_models.convert_sources import Source, describe_source
from perceptual_mae_models.files import replace_file
from perceptual_mae_models.vision_transformer_pmae import list_encoders
from perceptual_mae_models.weights import (
    ENCODER_PARTS,
    HEAD_PARTS,
    PATCH_WEIGHT,
    CheckpointError,
    advise_pooling,
    checkpoint_filter_fn,
    describe_size,
    shorten,
    split_wrappers,
    trained_size,
)

Precision = Literal["float32", "float16"]

_HEADLESS_PARTS = ENCODER_PARTS - HEAD_PARTS
_CLASS_PARTS = HEAD_PARTS | {"classifier", "pooler"}
_TRAINING_PARTS = {
    "optimizer", "optimizers", "optimizer_states", "scheduler", "lr_scheduler", "lr_schedulers", "scaler", "callbacks",
    "loops", "n_averaged",
}  # fmt: skip
_LOSS_PARTS = {"loss", "loss_fn", "loss_fnc", "criterion", "perceptual_loss", "lpips"}


@dataclass(frozen=True)
class Dropped:
    """Tensors of a checkpoint that the encoder does not need."""

    prefix: str
    count: int
    reason: str


class EncoderShape(NamedTuple):
    """What tells encoders apart."""

    dim: int
    depth: int
    patch_size: int
    tokens: int

    def __str__(self) -> str:
        return f"width {self.dim}, {self.depth} blocks, patches of {self.patch_size}, {self.tokens} tokens"


@dataclass(frozen=True)
class Conversion:
    """An encoder out of somebody's checkpoint.

    Attributes:
        architecture: Name of the model that it is for.
        encoder: Contiguous tensors by timm's names, all that the model has and nothing else.
        metadata: Facts for the weight file.
        place: What stood before the encoder's names, with a dot at its end; empty at the top level.
        mapped: Tensors of the file that the encoder was made of.
        dropped: All others.
        notes: What a user should know, a sentence each.
    """

    architecture: str
    encoder: dict[str, Tensor]
    metadata: dict[str, str]
    place: str
    mapped: int
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]


def convert_encoder(
    source: Source, model: str | None = None, dtype: Precision = "float32", drop: Sequence[str] = ()
) -> Conversion:
    """Make an encoder of this package out of a checkpoint, every tensor placed, or left out for a known reason.

    Args:
        source: What `convert_sources.read_source` gives.
        model: Name of the architecture; by default the one whose shapes are the checkpoint's. Where it is given,
            positions and patches of other sizes are resampled.
        dtype: Precision of the result.
        drop: Beginnings of names in the file that are to be left out.

    Raises:
        CheckpointError: If the encoder is incomplete, of another model, ambiguous, not finite in this precision, or a
            tensor has neither place nor reason.
        ValueError: If no model of this package, or more than one, has these shapes or this name.
    """
    tensors = {
        name: tensor for name, tensor in source.tensors.items() if not source.origins[name][0].startswith(tuple(drop))
    }
    shapes = _encoder_shapes(source, tensors)
    _check_kind(source, tensors)
    size = trained_size(source.file)
    registered = registered_shapes(size)
    architecture = _check_architecture(model) if model else _infer_architecture(set(shapes.values()), registered)
    encoder = _build_on_meta(architecture, size)
    fitted = checkpoint_filter_fn(tensors, encoder, size)
    # The filter may choose between averaged and plain weights; it hands most tensors on as they are.
    place = next(
        place
        for place in shapes
        if all(f"{place}{name}" in tensors for name in fitted)
        and tensors[f"{place}norm.weight"] is fitted["norm.weight"]
    )
    taken = {f"{place}{name}" for name in fitted}
    notes = compare_facts(source, encoder)
    if shapes[place] != registered[architecture]:
        notes.append(f"resampled from {shapes[place]} to {registered[architecture]}")
    if len(shapes) > 1:
        others = ", ".join(sorted(_name_place(other) for other in shapes if other != place))
        notes.append(f"the encoder at {_name_place(place)} was taken, not the one at {others}")
    return Conversion(
        architecture,
        cast_tensors(fitted, dtype),
        {**describe_source(source, architecture), **(describe_size(encoder) if size else {})},
        place,
        sum(len(source.origins[name]) for name in taken),
        _account(source, tensors, taken, place, architecture),
        tuple(notes),
    )


@cache
def registered_shapes(size: tuple[int, int] | None = None) -> dict[str, EncoderShape]:
    """The shapes of this package's models, by their names; `size`: for images of another height and width."""
    shapes = {}
    for name in list_encoders():
        encoder = _build_on_meta(name, size)
        tokens = encoder.patch_embed.num_patches + encoder.num_prefix_tokens
        shapes[name] = EncoderShape(encoder.embed_dim, len(encoder.blocks), encoder.patch_embed.patch_size[0], tokens)
    return shapes


def cast_tensors(tensors: Mapping[str, Tensor], dtype: Precision) -> dict[str, Tensor]:
    """Bring tensors to a precision, each in memory of its own.

    Raises:
        CheckpointError: If one is not of floating point, or holds values that are not finite in this precision.
    """
    result = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} is of {tensor.dtype}: a quantised checkpoint, take the original one")
        result[name] = tensor.detach().to(getattr(torch, dtype), copy=True).contiguous()
        if not result[name].isfinite().all():
            overflows = bool(tensor.isfinite().all())
            reason = f"does not fit {dtype}: use float32" if overflows else "holds values that are not finite"
            raise CheckpointError(f"{name} {reason}")
    return result


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    replace_file(path, lambda partial: save_file(dict(tensors), partial, {"format": "pt", **metadata}))


@cache
def _build_on_meta(architecture: str, size: tuple[int, int] | None = None) -> Any:
    """Only shapes and facts of a model are needed, and to draw the weights of a large one takes seconds."""
    with torch.device("meta"):
        return timm.create_model(architecture, pretrained=False, img_size=size)


def _encoder_shapes(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, EncoderShape]:
    """Find where encoders stand, by what `checkpoint_filter_fn` takes for one, and their shapes."""
    shapes, elsewhere = {}, []
    for name, weight in tensors.items():
        if not name.endswith(PATCH_WEIGHT):
            continue
        place = name.removesuffix(PATCH_WEIGHT)
        if split_wrappers(name)[1] != PATCH_WEIGHT:
            elsewhere.append(place)
            continue
        blocks = {
            other.removeprefix(f"{place}blocks.").split(".")[0]
            for other in tensors
            if other.startswith(f"{place}blocks.")
        }
        positions = tensors.get(f"{place}pos_embed")
        # The release keeps copies of the patch embedding alone beside the encoder.
        if blocks and weight.ndim == 4 and positions is not None and positions.ndim == 3:
            shapes[place] = EncoderShape(weight.shape[0], len(blocks), weight.shape[-1], positions.shape[1])
    if shapes:
        return shapes
    message = f"{source.file} holds no encoder in a layout that is known here"
    if elsewhere:
        message += (
            f"; names under {elsewhere[0]!r} look like one: save those alone, without that beginning,"
            f" {{k.removeprefix({elsewhere[0]!r}): v for k, v in state.items() if k.startswith({elsewhere[0]!r})}}"
        )
    raise CheckpointError(f"{message}. Found {len(tensors)} tensors ({shorten(tensors)}).")


def _check_kind(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Refuse, with the way out, encoders that are like ours and compute something else."""
    parts = {split_wrappers(name)[1] for name in tensors}
    if "reg_token" in parts:
        raise CheckpointError(
            f"{source.file} holds an encoder with register tokens, which no model of this package has"
        )
    if "fc_norm.weight" in parts and "norm.weight" not in parts:
        raise CheckpointError(
            f"{source.file} holds no encoder to convert, because an encoder ends with a norm."
            f" {advise_pooling(str(source.file))}"
        )


def _check_architecture(model: str) -> str:
    architecture = model.partition(".")[0]
    if architecture not in registered_shapes():
        raise ValueError(f"{model!r} is no model of this package; there are {', '.join(registered_shapes())}")
    return architecture


def _infer_architecture(shapes: set[EncoderShape], registered: Mapping[str, EncoderShape]) -> str:
    """Choose the one registered model that has these shapes."""
    if len(shapes) > 1:
        found = "; ".join(sorted(map(str, shapes)))
        raise ValueError(f"the checkpoint holds encoders of different shapes ({found}): say --model NAME")
    (shape,) = shapes
    matches = [name for name, known in registered.items() if known == shape]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{' and '.join(matches)} have the checkpoint's shapes ({shape}): say --model NAME")
    near = [name for name, known in registered.items() if known[:2] == shape[:2]]
    if near:
        raise ValueError(
            f"no model has the checkpoint's shapes ({shape}); --model {near[0]} resamples its positions and patches to"
            f" {registered[near[0]]}"
        )
    models = "; ".join(f"{name}: {known}" for name, known in registered.items())
    raise ValueError(f"no model has the checkpoint's shapes ({shape}). There are {models}")


def _account(
    source: Source, tensors: Mapping[str, Tensor], taken: set[str], place: str, architecture: str
) -> tuple[Dropped, ...]:
    """Group what was left out; refuse what could be the encoder's and has no place in it."""
    counts: Counter[tuple[str, str]] = Counter()
    unplaced: list[str] = []
    for name, origins in source.origins.items():
        if name in taken:
            continue
        reason = _why_dropped(name, place) if name in tensors else "left out on request"
        if reason is None:
            unplaced += origins
            continue
        counts[_group(source, origins[0]), reason] += len(origins)
    if unplaced:
        raise CheckpointError(
            f"{source.file}: there is no place in {architecture} for {shorten(unplaced)} ({len(unplaced)} in all). If"
            " the encoder computes the same without them, leave them out with --drop PREFIX"
        )
    return tuple(Dropped(prefix, count, reason) for (prefix, reason), count in sorted(counts.items()))


def _why_dropped(name: str, place: str) -> str | None:
    """Say what a tensor outside the encoder belongs to; None where that is not clear."""
    wrappers, local = split_wrappers(name)
    first, parts = local.split(".")[0], name.split(".")
    if first in _HEADLESS_PARTS:
        return None if name == f"{place}{local}" else "a copy outside the encoder that was taken"
    if not _LOSS_PARTS.isdisjoint(parts):
        return "loss"
    if not _TRAINING_PARTS.isdisjoint(parts):
        return "training state"
    if any(part.startswith("disc") for part in (*wrappers, first)):
        return "discriminator"
    if first == "mask_token" or first.startswith("decoder"):
        return "decoder"
    return "class head" if not _CLASS_PARTS.isdisjoint(parts) else None


def _group(source: Source, origin: str) -> str:
    """The part of a name that a report shows: containers, and the first name inside them."""
    if source.prefix and origin.startswith(source.prefix):
        return source.prefix + origin.removeprefix(source.prefix).split(".")[0]
    wrappers, local = split_wrappers(origin)
    return ".".join((*wrappers, local.split(".")[0]))


def _name_place(place: str) -> str:
    return place.rstrip(".") or "the top level"
