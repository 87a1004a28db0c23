"""Weights that cannot be had or read: one message that says what was sought, where, and what to do."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors import SafetensorError
from timm.models import PretrainedCfg

from .hub import WEIGHTS, IntegrityError, find_repository
from .weights import CheckpointError

NOT_PUBLISHED = "weights not published yet"
"""Stands in the `notes` of a pretrained cfg whose weights exist neither on the Hub nor in the package."""

# The HTTP client's own base error (requests, httpx or httpx2, by the version of huggingface_hub): a proxy that fails or
# a connection that drops half-way reaches us as that, everything else from the Hub or the disk as an OSError.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


class WeightsUnavailableError(RuntimeError):
    """Pretrained weights could not be reached: no network, no such repository, no access, or no such file."""


@contextmanager
def explain_unreadable_weights(cfg: PretrainedCfg) -> Iterator[None]:
    """Turn the many errors of unreachable or broken weights into one that says what was sought and what to do.

    Args:
        cfg: The pretrained cfg whose weights are loaded inside the `with` block.

    Raises:
        WeightsUnavailableError: If the weights cannot be reached on the Hub or on the disk.
        CheckpointError: If the file was found but is not a checkpoint, or not the one that its manifest describes.
    """
    try:
        yield
    except (OSError, _TRANSPORT_ERROR) as error:
        raise WeightsUnavailableError(_describe_unavailable(cfg, error)) from error
    except IntegrityError as error:
        raise CheckpointError(f"The weights of {_model_name(cfg)} are not the published ones: {error}") from error
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(_describe_broken(cfg, error)) from error
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):  # timm's advice would be to run what is in the file
            raise CheckpointError(
                f"{_location(cfg)} is broken, or holds objects besides tensors, which reading would run as code:"
                " `pmae convert` says what it is"
            ) from error
        if isinstance(error, CheckpointError) or not _read_by(error, "torch.serialization", "timm.models._helpers"):
            raise
        raise CheckpointError(_describe_broken(cfg, error)) from error


def _read_by(error: BaseException, *modules: str) -> bool:
    """Whether an error comes from code of one of some modules, or from what that called."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") in modules for frame, _ in frames)


def check_head(file: Path) -> None:
    """Refuse files that cannot be a checkpoint by their first bytes, before anything tries to unpickle them.

    Raises:
        CheckpointError: If this is neither a safetensors file nor one of `torch.save`.
    """
    with file.open("rb") as opened:
        start = opened.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if start and not (start.startswith((b"PK", b"\x80")) or start[8:9] == b"{" or file.suffix == ".safetensors"):
        raise CheckpointError(f"{file} is no checkpoint: it begins with {start[:16]!r}; fetch it again")


def _describe_broken(cfg: PretrainedCfg, error: Exception) -> str:
    return (
        f"The weights of {_model_name(cfg)} were found at {_location(cfg)}, but the file is broken or no"
        f" checkpoint ({type(error).__name__}: {error})."
    )


def _describe_unavailable(cfg: PretrainedCfg, error: Exception) -> str:
    name, architecture = _model_name(cfg), cfg.architecture
    reason = " ".join(str(error).split()) or "no such file"
    where = f"could not be read from {_location(cfg)} ({type(error).__name__}: {reason})."
    lines = [f"The weights of {name} {where}"]
    if NOT_PUBLISHED in (cfg.notes or ()):
        available = _available_weights()
        available.sort(key=lambda other: not other.startswith(f"{architecture}."))
        lines = [
            f"The weights of {name} are not published yet. These can be had today: {', '.join(available)}.",
            f"(They {where})",
        ]
    lines.append("Ways out:")
    if isinstance(error, GatedRepoError):
        lines.append("- ask for access on the repository's page, then `hf auth login` or set HF_TOKEN;")
    lines.append(
        f"- load a local file: timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file=…));"
    )
    if cfg.hf_hub_id and find_repository(cfg).ours:
        method = str(cfg.tag).rpartition("_")[0]
        lines += [
            f"- train them: python training/pretrain.py {method} --data DIR --model {architecture} --out DIR;",
            "- set PMAE_HUB_ORG to an organisation that has them, or HF_ENDPOINT to a mirror of the Hub;",
        ]
    else:
        lines.append("- set HF_ENDPOINT to a mirror of the Hub;")
    lines += [
        "- set HF_HUB_CACHE to a Hub cache that holds them, and HF_HUB_OFFLINE=1 to use it without a network;",
        "- pass pretrained=False for an encoder that is random on purpose.",
    ]
    return "\n".join(lines)


def _available_weights() -> list[str]:
    from .vision_transformer_pmae import facts_of, list_encoders  # which needs this module to be imported

    return [name for name in list_encoders(tags=True) if NOT_PUBLISHED not in (facts_of(name).notes or ())]


def _model_name(cfg: PretrainedCfg) -> str:
    return f"{cfg.architecture}.{cfg.tag}" if cfg.tag else f"{cfg.architecture}"


def _location(cfg: PretrainedCfg) -> str:
    if cfg.source != "hf-hub" and cfg.file:
        return f"the file {cfg.file}"
    if cfg.hf_hub_id and (cfg.source == "hf-hub" or not cfg.url):
        return f"the Hugging Face Hub repository {find_repository(cfg)}, file {cfg.hf_hub_filename or WEIGHTS}"
    return f"{cfg.url}"
