"""The processes and devices of a run, through accelerate."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from training.run.folder import RunError

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that measures or writes something alone."""
STUCK = timedelta(hours=2)
"""After which the processes of GPUs that exchange gradients give up on one that does not come."""


def count_processes() -> int:
    """Processes of the launcher that started this one; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_same_step(accelerator: Accelerator, step: int) -> None:
    """Make sure that every process goes on from the same checkpoint.

    Raises:
        RunError: If they do not: machines of a run have to share its folder.
    """
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device))
    if int(steps.min()) != int(steps.max()):
        raise RunError(f"processes found checkpoints of steps {steps.tolist()}: put the run's folder on a shared disk")


def create_accelerator(
    out: Path, *, device: str = "auto", track: tuple[str, ...] = (), sync_buffers: bool = True
) -> Accelerator:
    """The engine, without mixed precision of its own: it would hide the float32 islands.

    Args:
        out: The run folder, where trackers write.
        device: "auto" or "cuda": a GPU where there is one; "cpu": none.
        track: Where metrics go besides `metrics.jsonl`.
        sync_buffers: Send the first process's buffers to all before every pass; needless where they are constants.

    Raises:
        ValueError: If a GPU is asked for and there is none, or a tracker that is not installed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no NVIDIA GPU")
    # without cpu=True, accelerate takes the processes of a launcher on a machine without GPUs for single ones
    use_cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=use_cpu,
        log_with=list(track) or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE if use_cpu else STUCK),
            # gradients stay where they were exchanged, without a copy beside them
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=sync_buffers),
        ],
    )
    found = {str(tracker) for tracker in accelerator.log_with}  # accelerate leaves out what is not installed
    if missing := [name for name in track if name not in found]:
        raise ValueError(f'--track {" ".join(missing)}: not installed; pip install -e ".[train,track]" brings it')
    return accelerator
