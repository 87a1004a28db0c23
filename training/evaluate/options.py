"""The flags of `training/evaluate.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from perceptual_mae_models.features import Precision
from training.evaluate.detection import DetectionSettings
from training.evaluate.fidelity import ReconstructionSettings
from training.evaluate.finetune_recipe import FineTuneSettings
from training.evaluate.protocols import Settings
from training.evaluate.rows import Place
from training.evaluate.segmentation import SegmentationSettings
from training.evaluate.shift import ShiftSettings
from training.evaluate.trainer import Engine
from training.settings import at_least, refuse

Protocol = Literal["knn", "linear", "few_shot", "finetune", "shift", "reconstruction", "segmentation", "detection"]
LABELLED = frozenset(("knn", "linear", "few_shot", "finetune", "shift"))
"""Protocols that learn classes from labelled training images."""
DENSE = frozenset(("segmentation", "detection"))
"""Protocols that take a kind of data of their own."""


LEARNING = DENSE | {"finetune"}
"""Protocols in which weights learn."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate, and how."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """timm names, hf-hub: ids, NAME@FILE, NAME@random, pixels:16."""
    data: Path | None = None
    """A folder with train and test (else val) in it: folders or tars."""
    train: str | None = None
    """Instead of --data: labelled images to learn from; a folder, .tar, .tar.gz, idx file or hf: data set."""
    test: str | None = None
    """Instead of --data: labelled images to be judged by."""
    train_split: str = "train"
    """Split of --train, where that is an hf: data set."""
    test_split: str = "test"
    """Split of --test, where that is an hf: data set."""
    column: str | None = None
    """Image column of hf: data sets, where they have several."""
    label_column: str | None = None
    """Column of classes of hf: data sets, where they have several."""
    train_images: int | None = None
    """Learn from at most so many of the training images, evenly spaced over each class. None: all."""
    test_images: int | None = None
    """The same of the test images."""
    protocols: tuple[Protocol, ...] = ("knn", "linear", "few_shot")
    """What to run; reconstruction needs a decoder, segmentation and detection --segmentation.data, --detection.data."""
    out: Path = Path("evaluation")
    """Where results.json, report.html, features, runs and pictures go."""
    groups: str | None = None
    """Regular expression whose group names what an image belongs to (patient, film): never on both sides of a cut."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
    shift: ShiftSettings = field(default_factory=ShiftSettings)
    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    batch_size: int = 128
    """Images a forward pass where nothing is learned; changes the speed only."""
    workers: int = 0
    """Processes that decode images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    dtype: Precision = "float32"
    """Arithmetic of frozen encoders."""
    micro_batches: int = 1
    """Passes a training step is cut into; the gradients add up."""
    compile: bool = False
    """torch.compile what is trained."""
    checkpoint_every: int = 500
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        refuse(self, at_least(self, {"batch_size": 1, "workers": 0, "train_images": 1, "test_images": 1}))

    @property
    def place(self) -> Place:
        """Where and how fast to run."""
        engine = Engine(
            device=self.device,
            workers=self.workers,
            micro_batches=self.micro_batches,
            compile=self.compile,
            checkpoint_every=self.checkpoint_every,
        )
        return Place(out=self.out, batch_size=self.batch_size, dtype=self.dtype, engine=engine)
