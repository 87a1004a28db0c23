"""Other people's checkpoint files, read without running their code, with their tensors under MAE's names.

MAE's names (facebookresearch/mae) are timm's for the encoder, and `decoder_embed`, `mask_token`, `decoder_pos_embed`,
`decoder_blocks`, `decoder_norm` and `decoder_pred` for the decoder. Hugging Face has names of its own, and two of them
for most tensors: those on the disk, and those that transformers >= 5 has in memory.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perceptual_mae_models.hub import sha256_of
from perceptual_mae_models.unreadable import check_head
from perceptual_mae_models.version import __version__
from perceptual_mae_models.weights import CheckpointError, flatten

Format = Literal["mae", "huggingface", "perceptual-mae-release", "lightning", "timm"]

FORMATS: dict[Format, str] = {
    "mae": "facebookresearch/mae",
    "huggingface": "Hugging Face ViT or ViTMAE",
    "perceptual-mae-release": "the Perceptual MAE release (PyTorch Lightning)",
    "lightning": "PyTorch Lightning",
    "timm": "timm",
}
"""What each format is called in a report."""

LICENCE_NOTES: dict[Format, str] = {
    "mae": "weights that facebookresearch/mae publishes are under CC BY-NC 4.0",
    "perceptual-mae-release": "the Perceptual MAE release is under CC BY-NC-SA 4.0",
}
"""Licences that a format suggests. The file itself does not say who trained it."""

_HF_PATCH_WEIGHT = "embeddings.patch_embeddings.projection.weight"
_HF_ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_HF_LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias)")
# transformers 5.24 writes a decoder's layers as `decoder_encoder.layer`, older ones as `decoder_layers`.
_HF_DECODER_LAYER = re.compile(r"decoder_(?:layers|encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)")
_HF_DECODER_PARTS = {"mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred"}
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_QKV = {
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
}
_QKV_LABELS = {"q": "query", "k": "key", "v": "value"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


@dataclass(frozen=True)
class Source:
    """A checkpoint file that was read and recognised.

    Attributes:
        file: Where it was.
        sha256: Of the whole file.
        format: See `FORMATS`.
        tensors: By name, containers joined by dots; Hugging Face's encoder and decoder under MAE's names.
        origins: The file's own names that each tensor was made of.
        prefix: What stands before the encoder's names in a Hugging Face file, such as `vit.`.
        facts: What the file (`args` of facebookresearch/mae) or the config.json beside it says, by its own names.
    """

    file: Path
    sha256: str
    format: Format
    tensors: Mapping[str, Tensor]
    origins: Mapping[str, tuple[str, ...]]
    prefix: str
    facts: Mapping[str, Any]


def read_source(file: Path) -> Source:
    """Read a checkpoint and recognise whose it is.

    Args:
        file: A safetensors file, or one of `torch.save`, which is never unpickled beyond tensors, plain containers and
            `argparse.Namespace`. A config.json of Hugging Face or timm beside it is read too.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, is broken, needs code to be read or holds a Hugging Face encoder whose
            parts do not fit together.
    """
    _check_file(file)
    tree = _read_tree(file)
    flat = dict(flatten(_lists_as_mappings(tree)))
    if not flat:
        raise CheckpointError(f"{file} holds no tensors")
    prefix, config = _find_huggingface(flat), file.with_name("config.json")
    if prefix is None:
        untouched = {name: (name,) for name in flat}
        kind = _recognise(tree, flat)
        facts = _read_config(config) if kind == "timm" else _arguments(tree)
        return Source(file, sha256_of(file), kind, flat, untouched, "", facts)
    tensors, origins = _translate_huggingface(flat, prefix)
    return Source(file, sha256_of(file), "huggingface", tensors, origins, prefix, _read_config(config))


def describe_source(source: Source, architecture: str) -> dict[str, str]:
    """What a converted file says of its origin."""
    metadata = {
        "architecture": architecture,
        "source_format": FORMATS[source.format],
        "source_file": source.file.name,
        "source_sha256": source.sha256,
        "converted_by": f"perceptual_mae_models {__version__}",
    }
    if source.format in LICENCE_NOTES:
        metadata["licence_note"] = LICENCE_NOTES[source.format]
    return metadata


def _check_file(file: Path) -> None:
    """Refuse, with the way out, what people give by mistake."""
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder: give the file in it, such as model.safetensors or *.pth")
    if not file.is_file():
        raise FileNotFoundError(f"no such checkpoint: {file}")
    if file.suffix == ".json" or _SHARD.search(file.name):
        raise CheckpointError(
            f"{file} is a part of a checkpoint in several files: put them together with transformers,"
            " AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, max_shard_size='50GB')"
        )
    check_head(file)


def _read_tree(file: Path) -> Mapping[Any, Any]:
    """Read whatever the file holds, by its content, because names say little (.bin, .pth, .ckpt)."""
    with file.open("rb") as opened:
        head = opened.read(9)
    if head[8:9] == b"{" or file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is broken or no safetensors file ({error}): fetch it again") from error
    try:
        # Training scripts save their command line; a Namespace is a bag of values, and nothing of it is run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(file, map_location="cpu", weights_only=True)
    # The restricted unpickler raises KeyError, IndexError, EOFError, ... on bytes that are no pickle.
    except Exception as error:
        raise CheckpointError(_explain_unreadable(file, error)) from error
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{file} holds a {type(tree).__name__}, not tensors by name: save a state_dict()")
    return tree


def _explain_unreadable(file: Path, error: Exception) -> str:
    foreign = re.search(r"Unsupported (?:global|class|type)\S* (?:GLOBAL )?([\w.]+)", str(error))
    if foreign is None:
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        return f"{file} is broken, cut short or no checkpoint ({type(error).__name__}: {reason}): fetch it again"
    return (
        f"{file} holds objects besides tensors ({foreign[1]}), and reading those would run code that comes with the"
        " file. If you trust its source, keep only the tensors:\n"
        f"    python -c \"import torch; c = torch.load({str(file)!r}, map_location='cpu', weights_only=False);"
        " torch.save({'state_dict': c.get('state_dict') or c['model']}, 'tensors.pth')\"\n"
        "(with the library that wrote the file installed) and convert tensors.pth"
    )


def _lists_as_mappings(tree: Any) -> Any:
    """Number the items of lists, so that an optimiser's tensors inside them are seen and counted."""
    if isinstance(tree, Mapping):
        return {key: _lists_as_mappings(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return {index: _lists_as_mappings(value) for index, value in enumerate(tree)}
    return tree


def _recognise(tree: Mapping[Any, Any], flat: Mapping[str, Tensor]) -> Format:
    """Tell formats apart that need no translation: only a report and a licence note depend on it."""
    parts = {part for name in flat for part in name.split(".")[:3]}
    lightning = "pytorch-lightning_version" in tree
    if "loss_fnc" in parts or (lightning and "generator" in parts):
        return "perceptual-mae-release"
    if lightning:
        return "lightning"
    only_model = set(tree) == {"model"} and isinstance(tree["model"], Mapping)
    return "mae" if "decoder_embed" in parts or only_model else "timm"


def _arguments(tree: Mapping[Any, Any]) -> Mapping[str, Any]:
    arguments = tree.get("args")
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}, which describes the checkpoint, is broken: {error}") from error
    return config if isinstance(config, dict) else {}


def _find_huggingface(flat: Mapping[str, Tensor]) -> str | None:
    """Find what stands before a Hugging Face encoder's own names; None where there is no such encoder."""
    prefixes = [
        name.removesuffix(_HF_PATCH_WEIGHT)
        for name in flat
        if name == _HF_PATCH_WEIGHT or name.endswith(f".{_HF_PATCH_WEIGHT}")
    ]
    if len(prefixes) > 1:
        places = ", ".join(prefix.rstrip(".") or "the top level" for prefix in prefixes)
        raise CheckpointError(f"the checkpoint holds more than one Hugging Face encoder, at {places}: keep only one")
    return prefixes[0] if prefixes else None


def _translate_huggingface(
    flat: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Give Hugging Face's tensors MAE's names, query, key and value joined; others keep their own.

    Returns:
        Tensors, and the names that each was made of.
    """
    decoder_prefix = f"{prefix.removesuffix('vit.')}decoder."
    found: dict[str, dict[str, str]] = {}
    for origin in flat:
        name, part = _translate_name(origin, prefix, decoder_prefix)
        parts = found.setdefault(name, {})
        if part in parts:
            raise CheckpointError(f"{origin} and {parts[part]} are two names of the same tensor: keep only one")
        parts[part] = origin
    tensors: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, ...]] = {}
    for name, parts in found.items():
        if "" in parts:
            tensors[name], origins[name] = flat[parts[""]], (parts[""],)
            continue
        missing = [label for part, label in _QKV_LABELS.items() if part not in parts]
        if missing:
            raise CheckpointError(f"{next(iter(parts.values()))} is there without its {' and '.join(missing)}")
        origins[name] = tuple(parts[part] for part in _QKV_LABELS)
        tensors[name] = torch.cat([flat[origin] for origin in origins[name]])  # 3 x (D, D) or (D,) -> (3D, D), (3D,)
    return tensors, origins


def _translate_name(origin: str, prefix: str, decoder_prefix: str) -> tuple[str, str]:
    """Give MAE's name, and q, k or v where the tensor is only that part of it."""
    if origin.startswith(decoder_prefix):
        local, blocks = origin.removeprefix(decoder_prefix), "decoder_blocks"
        if local.split(".")[0] in _HF_DECODER_PARTS:
            return local, ""
        match = _HF_DECODER_LAYER.fullmatch(local)
    elif origin.startswith(prefix):
        local, blocks = origin.removeprefix(prefix), "blocks"
        if local in _HF_ENCODER:
            return _HF_ENCODER[local], ""
        match = _HF_LAYER.fullmatch(local)
    else:
        return origin, ""
    if match and match[2] in _HF_BLOCK:
        return f"{blocks}.{match[1]}.{_HF_BLOCK[match[2]]}.{match[3]}", ""
    if match and match[2] in _HF_QKV:
        return f"{blocks}.{match[1]}.attn.qkv.{match[3]}", _HF_QKV[match[2]]
    return origin, ""
