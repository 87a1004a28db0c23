"""What a run writes about itself: `metrics.jsonl`, the console, a progress bar."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from perceptual_mae_models.files import replace_text


class MetricsLog:
    """One JSON line per log interval, and a progress bar on a terminal.

    A resumed run first drops the lines past its checkpoint: the steps they speak of are done again.

    Args:
        path: The `metrics.jsonl`.
        start_step: Steps already done.
        total_steps: Steps of the whole run.
        enabled: False on every process but one.
    """

    def __init__(self, path: Path, *, start_step: int, total_steps: int, enabled: bool) -> None:
        self.path = path
        self.enabled = enabled
        self.start_step, self.total_steps, self.started = start_step, total_steps, time.monotonic()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None if enabled else True)
        if enabled and path.exists():
            kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= start_step]
            replace_text(path, "".join(kept))

    def write(self, metrics: dict[str, float]) -> None:
        """Append a line and show it."""
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        shown = "  ".join(f"{name} {value:.5g}" for name, value in metrics.items() if name != "step")
        if self.bar.disable:
            step = int(metrics["step"])
            done, left = max(1, step - self.start_step), self.total_steps - step
            time_left = tqdm.format_interval((time.monotonic() - self.started) / done * left)
            self.note(f"step {step}/{self.total_steps}  left {time_left}  {shown}")
        else:
            self.bar.set_postfix_str(shown, refresh=False)

    def advance(self) -> None:
        """Move the bar by one step."""
        self.bar.update()

    def note(self, message: str) -> None:
        """Say something without disturbing the bar."""
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar's line."""
        self.bar.close()


def _complete_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class RunningMeans:
    """Means of the steps' scalars since the last log line, summed on the device so that no step waits for it.

    A scalar that only some steps have is averaged over those.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self) -> tuple[list[str], Tensor]:
        """Names and means (one vector, on the device), starting afresh."""
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        self.sums, self.counts = {}, {}
        return names, means
