"""The plain decoder of somebody's masked autoencoder, made ours: `perceptual_mae_models.decoder.Decoder`."""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from perceptual_mae_models.convert import Conversion, Precision, cast_tensors, registered_shapes
from perceptual_mae_models.convert_sources import Source, describe_source
from perceptual_mae_models.decoder import Decoder
from perceptual_mae_models.weights import CheckpointError, shorten, trained_size

_OUR_NAMES = {
    "mask_token": "mask_token",
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
}
_POSITIONS = "decoder_pos_embed"
_EMBED = "decoder_embed.weight"
# Every decoder of the MAE paper's models: the heads of one this wide are known, others a checkpoint does not tell.
_MAE_DIM, _MAE_HEADS, _MAE_MASK_RATIO = 512, 16, 0.75


def convert_decoder(
    source: Source,
    conversion: Conversion,
    dtype: Precision = "float32",
    *,
    heads: int | None = None,
    norm_pix_loss: bool | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make a decoder file's tensors and metadata, such that `reconstruction.load_autoencoder` reads them.

    The `recipe` in the metadata holds what is known of the training, and no more: who reads it fills the other fields
    with their defaults, which say nothing of this checkpoint.

    Args:
        source: The checkpoint.
        conversion: The encoder that was made of it.
        dtype: Precision of the result.
        heads: Attention heads; by default what the checkpoint's configuration says, or MAE's 16 for MAE's width of 512.
        norm_pix_loss: Whether it predicts standardised patches; by default what the checkpoint's configuration says.

    Returns:
        Tensors by the names of `Decoder`, and metadata.

    Raises:
        CheckpointError: If there is no complete plain decoder beside the encoder, its positions are not MAE's, or it
            is of another grid or patch size than the architecture.
        ValueError: If the number of heads, or what it predicts, is neither known nor given, or the heads do not fit.
    """
    place = _find_decoder(source.tensors, conversion.place)
    tensors = _rename(source, place)
    shape = registered_shapes(trained_size(source.file))[conversion.architecture]
    side = math.isqrt(shape.tokens - 1)  # one class token and a square grid, as all models of this package have
    dim = tensors["embed.weight"].shape[0]
    heads = heads or source.facts.get("decoder_num_attention_heads") or (_MAE_HEADS if dim == _MAE_DIM else None)
    if heads is None:
        raise ValueError(f"a decoder {dim} wide may have any number of attention heads: say --decoder-heads N")
    if dim % 4 or dim % heads:
        raise ValueError(f"a decoder {dim} wide cannot have {heads} attention heads: say --decoder-heads N")
    if norm_pix_loss is None:
        norm_pix_loss = source.facts.get("norm_pix_loss")
    if norm_pix_loss is None:
        raise ValueError(
            "the checkpoint does not say whether its decoder predicts standardised patches (norm_pix_loss) or plain"
            " pixels: say --norm-pix-loss or --no-norm-pix-loss"
        )
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    decoder = Decoder(shape.dim, (side, side), shape.patch_size, dim=dim, depth=depth, num_heads=heads)
    _check_shapes(tensors, decoder, conversion.architecture)
    _check_positions(source.tensors.get(f"{place}{_POSITIONS}"), decoder.pos_embed)
    recipe = {
        "method": "mae",
        "model": conversion.architecture,
        "mask_ratio": source.facts.get("mask_ratio", _MAE_MASK_RATIO),
        "norm_pix_loss": norm_pix_loss,
        "decoder_dim": dim,
        "decoder_depth": depth,
        "decoder_heads": heads,
    }
    metadata = {**describe_source(source, conversion.architecture), "recipe": json.dumps(recipe)}
    return cast_tensors(tensors, dtype), metadata


def _find_decoder(tensors: Mapping[str, Tensor], place: str) -> str:
    """Find the decoder that was trained with the encoder at a place: beside its names, or beside `encoder`."""
    for candidate in (place, f"{place.removesuffix('encoder.')}decoder."):
        if f"{candidate}{_EMBED}" in tensors:
            return candidate
    raise CheckpointError(
        f"there is no plain MAE decoder beside the encoder at {place.rstrip('.') or 'the top level'}"
        f" ({place}{_EMBED} is missing): leave --decoder away"
    )


def _rename(source: Source, place: str) -> dict[str, Tensor]:
    """Give the decoder's tensors our names; refuse a decoder that has others."""
    renamed, foreign = {}, []
    own_container = place.endswith("decoder.")
    for name, tensor in source.tensors.items():
        if not name.startswith(place):
            continue
        first, _, rest = name.removeprefix(place).partition(".")
        if first in _OUR_NAMES:
            renamed[".".join(filter(None, (_OUR_NAMES[first], rest)))] = tensor
        # The release's decoder keeps a copy of the encoder's patch embedding, and does not use it.
        elif first not in (_POSITIONS, "patch_embed") and (own_container or first.startswith("decoder")):
            foreign.append(name)
    if foreign:
        raise CheckpointError(
            f"the decoder is no plain MAE one: it also holds {shorten(foreign)}. Leave --decoder away"
        )
    return renamed


def _check_shapes(tensors: Mapping[str, Tensor], decoder: Decoder, architecture: str) -> None:
    expected = decoder.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"the decoder does not go behind {architecture}: {shorten(problems, '; ')}")


def _check_positions(found: Tensor | None, expected: Tensor) -> None:
    """Refuse positions that `Decoder`, whose own are fixed, would not compute with."""
    if found is None:
        return
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-2  # half precision rounds a sine by up to 4e-3
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=0, atol=tolerance):
        raise CheckpointError(
            f"{_POSITIONS} is not MAE's fixed sine-cosine code of a {expected.shape[1] - 1}-patch square grid, which is"
            " all that our decoder has: leave --decoder away"
        )
