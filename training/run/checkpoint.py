"""Checkpoints: written whole or not at all, readable without running code.

A checkpoint is a folder `step_00001234/` with the weights as safetensors, the optimiser's state as a `weights_only`
loadable file and the place in the run as JSON. It is written under a hidden name and renamed when complete, so whatever
carries the final name is complete even if the process was killed at any moment.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn


class ResumeError(RuntimeError):
    """A checkpoint that cannot be used; the message names it and the way out."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps in `folder`, if there is one."""
    return max(folder.glob("step_*"), default=None, key=lambda path: path.name)


def save_checkpoint(
    folder: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    progress: dict[str, Any],
    *,
    keep: int,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint atomically, then delete the oldest beyond `keep`.

    Args:
        folder: Where the run's checkpoints lie.
        modules: Saved as `<name>.safetensors`.
        optimizers: Saved as `<name>.pt`.
        progress: JSON-able; what else the run has to remember, with `step`, the optimiser steps done.
        keep: Checkpoints to leave, at least 1.
        metadata: What the modules' files say of themselves.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{progress['step']:08d}"
    partial = folder / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        (partial / f"{name}.safetensors").write_bytes(save(module.state_dict(), {"format": "pt", **(metadata or {})}))
    for name, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), partial / f"{name}.pt")
    (partial / "progress.json").write_text(json.dumps(progress, indent=2))
    for path in partial.iterdir():
        _flush_to_disk(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    _flush_to_disk(folder)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    checkpoint: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore, strictly, what `save_checkpoint` wrote.

    Args:
        checkpoint: A `step_…` folder.
        modules: The same names as were saved.
        optimizers: The same names as were saved.

    Returns:
        The saved progress.

    Raises:
        ResumeError: If a file is missing, damaged, or of another network.
    """
    try:
        for name, module in modules.items():
            module.load_state_dict(load_file(checkpoint / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(torch.load(checkpoint / f"{name}.pt", map_location="cpu", weights_only=True))
        progress: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
    except Exception as error:
        raise ResumeError(
            f"cannot resume from {checkpoint}: {error}. Delete that folder to go on from the checkpoint before it."
        ) from error
    return progress


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
