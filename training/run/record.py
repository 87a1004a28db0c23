"""What happens between steps: metrics, pictures, checkpoints, and stopping a run that went wrong."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.run.checkpoint import save_checkpoint
from training.run.clock import StepClock
from training.run.folder import RunError
from training.run.log import MetricsLog, RunningMeans


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How often, in steps; 0 means never."""

    log: int
    checkpoint: int
    grid: int
    measure: int = 0


class RunRecord:
    """Keeps a run's folder up to date. One per process; only the main process writes.

    Args:
        out: The run folder.
        accelerator: The engine, for sums over processes.
        modules: Networks that a checkpoint holds.
        optimizers: Optimisers that a checkpoint holds.
        progress: `step`, `seconds` and `broken` so far.
        total_steps: Steps of the whole run.
        batch_size: Images a step over all processes.
        intervals: How often to log, checkpoint, draw and measure.
        keep: Checkpoints to keep.
        max_broken: Stop when a larger share of the images did not decode.
        advice: What to do when a loss is not finite.
        clock: Marked by the loop; its shares go into the metrics.
        draw: Writes a picture to the given path; None: there are no pictures.
        measure: Further metrics, asked for on the main process alone, at its interval and after the last step; what it
            does must leave the run as it is. None: there are none.
        utilisation: Share of the processors' matrix-product peak that one image a second uses in a given step, the
            first being 0; None: not known.
        metadata: What a checkpoint's weights say of themselves.
    """

    def __init__(
        self,
        out: Path,
        accelerator: Accelerator,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        progress: dict[str, Any],
        *,
        total_steps: int,
        batch_size: int,
        intervals: Intervals,
        keep: int,
        max_broken: float,
        advice: str,
        clock: StepClock,
        draw: Callable[[Path], None] | None = None,
        measure: Callable[[], dict[str, float]] | None = None,
        utilisation: Callable[[int], float] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.out, self.accelerator = out, accelerator
        self.modules, self.optimizers = modules, optimizers
        self.total_steps, self.batch_size = total_steps, batch_size
        self.intervals, self.keep, self.max_broken, self.draw = intervals, keep, max_broken, draw
        self.advice, self.metadata = advice, metadata
        self.clock, self.measure, self.utilisation = clock, measure, utilisation
        self.step: int = progress["step"]
        self.broken: float = progress["broken"]
        self.started = time.monotonic() - progress["seconds"]
        self.last_log = (time.monotonic(), self.step)
        self.newly_broken = 0
        self.lr = 0.0
        self.saved = self.step
        self.metrics: dict[str, float] = progress.get("metrics", {})
        self.means = RunningMeans()
        self.log = MetricsLog(
            out / "metrics.jsonl", start_step=self.step, total_steps=total_steps, enabled=accelerator.is_main_process
        )
        if self.step == 0 and intervals.grid:
            self._draw()

    @property
    def progress(self) -> dict[str, Any]:
        """What a resumed run has to know: place, seconds spent, broken images met, last metrics."""
        seconds = time.monotonic() - self.started
        return {"step": self.step, "seconds": seconds, "broken": self.broken, "metrics": self.metrics}

    def after_step(self, scalars: dict[str, Tensor], lr: float, broken: list[str]) -> None:
        """Note a finished step.

        Args:
            scalars: Detached scalars of this process, averaged into the next log line.
            lr: The step's learning rate.
            broken: Images that did not decode, each with the reason.

        Raises:
            RunError: If a loss or gradient is not finite, or too many images are broken.
        """
        self.step += 1
        self.means.add(scalars)
        self.newly_broken += len(broken)
        for image in broken:
            self.log.note(f"skipped an image that does not decode: {image}")
        self.log.advance()
        self.lr = lr
        last = self.step == self.total_steps
        checkpoint = last or _due(self.step, self.intervals.checkpoint)
        measure = self.measure is not None and (last or _due(self.step, self.intervals.measure))
        if checkpoint or measure or _due(self.step, self.intervals.log):
            self._report(measure=measure)  # before saving, so that no checkpoint holds a loss that is not finite
        if last or _due(self.step, self.intervals.grid):
            self._draw()
        if checkpoint:
            self._save()

    def checkpoint(self) -> None:
        """Write a checkpoint now, unless the last step already did."""
        if self.saved != self.step:
            if self.means.counts:
                self._report()
            self._save()

    def close(self) -> dict[str, Any]:
        """Finish the log; returns the progress."""
        self.log.close()
        return self.progress

    def _report(self, *, measure: bool = False) -> None:
        names, means = self.means.pop()
        means = self.accelerator.reduce(means, reduction="mean")
        broken = torch.tensor(float(self.newly_broken), device=self.accelerator.device)
        self.broken += self.accelerator.reduce(broken, reduction="sum").item()
        self.newly_broken = 0
        (then, step_then), now = self.last_log, time.monotonic()
        speed = (self.step - step_then) * self.batch_size / (now - then)
        self.metrics = {
            "step": self.step,
            **dict(zip(names, means.tolist(), strict=True)),
            "lr": self.lr,
            "images_per_second": speed,
            **({} if self.utilisation is None else {"utilisation": speed * self.utilisation(self.step - 1)}),
            **{f"share/{part}": share for part, share in self.clock.pop_shares().items()},
            "seconds": now - self.started,
            "broken": self.broken,
        }
        bad = [name for name in names if not math.isfinite(self.metrics[name])]
        if measure and not bad:
            self.metrics |= self._measure()
        self.last_log = (time.monotonic(), self.step)
        self.log.write(self.metrics)
        self.accelerator.log(self.metrics, step=self.step)
        if bad:
            raise RunError(
                f"{', '.join(bad)} became non-finite between steps {step_then} and {self.step}; the last checkpoint, if"
                f" there is one, is from before. {self.advice}"
            )
        if self.broken > self.max_broken * self.step * self.batch_size:
            raise RunError(
                f"{self.broken:.0f} of {self.step * self.batch_size} images did not decode, more than --max-broken "
                f"{self.max_broken:g}: mend the files named above, or raise --max-broken, and --resume auto goes on;"
                " without them it is another data set, for another --out"
            )

    def _measure(self) -> dict[str, float]:
        if self.measure is None or not self.accelerator.is_main_process:
            return {}
        self.clock.mark("record")
        measured = self.measure()
        self.clock.mark("")  # a part of no step, and in no figure of its speed
        return measured

    def _draw(self) -> None:
        if self.draw and self.accelerator.is_main_process and self.intervals.grid:
            self.draw(self.out / "grids" / f"step_{self.step:08d}.png")

    def _save(self) -> None:
        self.saved = self.step
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.out / "checkpoints",
                self.modules,
                self.optimizers,
                self.progress,
                keep=self.keep,
                metadata=self.metadata,
            )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
