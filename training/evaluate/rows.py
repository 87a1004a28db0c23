"""What every protocol is given and gives."""

from dataclasses import dataclass, field
from pathlib import Path

from perceptual_mae_models.features import Precision, default_device
from training.evaluate.intervals import Interval
from training.evaluate.trainer import Engine


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a protocol runs; figures change by rounding alone, see `Engine` for the exception."""

    out: Path
    """Folder of the evaluation: caches, runs and pictures go below it."""
    batch_size: int = 128
    """Images a forward pass where nothing is learned."""
    dtype: Precision = "float32"
    """Arithmetic of frozen encoders."""
    engine: Engine = field(default_factory=Engine)
    """For what is learned by gradient descent; its device and workers serve everything else too."""

    @property
    def device(self) -> str:
        """Where frozen networks run."""
        return default_device() if self.engine.device == "auto" else self.engine.device


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure."""

    protocol: str
    setting: str
    metric: str
    """accuracy and other shares in [0, 1]; of reconstructions l1, psnr (decibel), ssim, ms_ssim, and of sets of them
    fid, kid and inception_score, or by another network than Inception fd, kd and score."""
    value: Interval
    """With its 95 % interval: over the test images, or over the draws."""
    seconds: float
    """What the protocol took, features not counted; rows of one call share it."""
    detail: dict[str, object]
