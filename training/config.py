"""The command line: the recipe decides the result; what is here does not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from training.cost import IMAGENET_IMAGES
from training.data.feed import Feed
from training.recipes import Recipe
from training.settings import at_least, refuse


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What changes the speed of a run and nothing else."""

    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    cache_images: bool = False
    """Keep decoded images in the memory of every loader process (4 bytes a pixel), for small data sets."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    micro_batches: int = 1
    """Passes a step is cut into on each process; the gradients add up. More passes need less memory."""
    grad_checkpointing: bool = False
    """Compute the autoencoder's blocks twice instead of keeping what is inside them: less memory, slower."""
    compile: bool = False
    """torch.compile the networks: faster steps after a slow first one; the result differs by float rounding only."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides metrics.jsonl; each needs its package."""

    def __post_init__(self) -> None:
        refuse(self, at_least(self, {"micro_batches": 1, "workers": 0}))


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a run reads and writes."""

    data: str | None = None
    """A folder of images (any nesting), a .tar of them, tar shards ('shards-{000..127}.tar'), a Hugging Face data set
    (hf:NAME) or a stream of one (hf-stream:NAME)."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    column: str | None = None
    """Its image column, where it has several."""
    epoch_images: int | None = None
    """Images that make an epoch of a stream that does not know its size."""
    out: Path | None = None
    """The run folder."""
    dry_run: bool = False
    """Print the resolved recipe and what it costs, and stop."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest checkpoint in --out, or start afresh. no: refuse a folder that holds a run."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; older ones are deleted."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    grid_every: int = 500
    """Steps between pictures of reconstructions; 0: none."""
    max_broken: float = 0.01
    """Stop when a larger share of the images seen did not decode."""

    def __post_init__(self) -> None:
        least = {"keep_checkpoints": 1, "checkpoint_every": 0, "log_every": 1, "grid_every": 0, "epoch_images": 1}
        refuse(self, {**at_least(self, least), "max_broken": (0 <= self.max_broken <= 1, "a share, between 0 and 1")})


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What a run measures of its features while they are learned; the weights do not change by it."""

    knn_data: str | None = None
    """Labelled images that --data does not hold, to measure k-NN accuracy on: a folder, .tar, idx file or hf: data set.
    Of more than 20,000, evenly spaced ones. The main process keeps them in memory."""
    knn_every: float = 5
    """Epochs between measurements; the last step is always measured."""
    knn_bank: str | None = None
    """Labelled images to be their neighbours; by default each is classified by all others of --knn-data."""
    knn_split: str = "validation"
    """Split of --knn-data, where that is an hf: data set."""
    knn_bank_split: str = "train"
    """Split of --knn-bank, where that is an hf: data set."""

    def __post_init__(self) -> None:
        refuse(self, {"knn_every": (self.knn_every > 0, "above 0")})
        if self.knn_bank is not None and self.knn_data is None:
            raise ValueError("--knn-bank holds neighbours of --knn-data: give that too")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What --dry-run assumes."""

    images: int = IMAGENET_IMAGES
    """Size of the data set where no --data is given; ImageNet-1K's by default."""
    devices: int | None = None
    """Processes, one a device. None: with --data those of the command itself, without it 8."""
    peak_tflops: float = 312.0
    """A device's matrix-product peak in bf16, 10^12 operations a second; an A100's by its data sheet."""
    fp32_peak_tflops: float = 19.5
    """The same in float32, in which penalties and Gram matrices run: TF32 is off in training."""
    assumed_utilisation: float = 0.4
    """Share of these peaks that the run reaches; metrics.jsonl and training/benchmark.py say what yours does."""

    def __post_init__(self) -> None:
        values = {name: value for name, value in vars(self).items() if value is not None}
        refuse(self, {name: (value > 0, "above 0") for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole command."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    runtime: tyro.conf.OmitArgPrefixes[Runtime]
    output: tyro.conf.OmitArgPrefixes[Output]
    estimate: tyro.conf.OmitArgPrefixes[Estimate]
    monitor: tyro.conf.OmitArgPrefixes[Monitor] = field(default_factory=Monitor)

    @property
    def places(self) -> tuple[Feed, Path]:
        """Where images come from and where the run goes.

        Raises:
            ValueError: If one of them was not given.
        """
        feed, out = self.feed, self.output.out
        if feed is None or out is None:
            raise ValueError("give --data (a folder or .tar of images) and --out (the run folder), or --dry-run")
        return feed, out

    @property
    def feed(self) -> Feed | None:
        """Where images come from, if that was given."""
        output = self.output
        if output.data is None:
            return None
        return Feed(output.data, output.split, output.column, output.epoch_images, self.runtime.cache_images)
