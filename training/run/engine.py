"""The processes and devices of a run, through accelerate."""

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that measures something alone."""


def create_accelerator(out: Path, *, device: str = "auto", track: tuple[str, ...] = ()) -> Accelerator:
    """The engine, without mixed precision of its own: it would hide the float32 islands.

    Args:
        out: The run folder, where trackers write.
        device: "auto" or "cuda": a GPU where there is one; "cpu": none.
        track: Where metrics go besides `metrics.jsonl`.
    """
    # without cpu=True, accelerate takes the processes of a launcher on a machine without GPUs for single ones
    use_cpu = device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(
        mixed_precision="no",
        cpu=use_cpu,
        log_with=list(track) or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
