"""What segmentation and detection share: a decoder learns on an encoder, which stays frozen or learns too.

Recipes are fixed: nothing is chosen, so no image is held back. The whole training split is learned from, and `test`
(where there is none, `val`) is judged once. `NAME@random` fine-tuned is the floor: what these images alone teach the
same network.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from tyro.conf import Suppress

from training.evaluate.duplicates import Duplicates
from training.evaluate.encoders import encoder_groups, is_random
from training.evaluate.rows import Place
from training.evaluate.trainer import Schedule, Task, fit, run_name
from training.settings import Checks, at_least, refuse

Mode = Literal["frozen", "fine_tuned"]
Source = TypeVar("Source")


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """How a network with a decoder learns."""

    protocol: ClassVar[str]
    """Its name, which its flags begin with."""
    not_in_recipe: ClassVar[tuple[str, ...]] = ("data", "encoder", "resamples")
    """Settings that do not decide what is learned."""

    data: Path | None = None
    """Where images and their annotations are."""
    encoder: tuple[Mode, ...] = ("frozen", "fine_tuned")
    """Each is a run of its own. `NAME@random` fine-tuned is learning from these images alone."""
    epochs: float = 100
    """Passes over the training images."""
    batch_size: int = 16
    """Images a step, over all processes and micro-batches together."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each of the encoder's layers to the one below; 1 for random weights always."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    clip_grad: float | None = 1.0
    """Largest gradient norm."""
    resamples: int = 1000
    """Draws of test images for the intervals."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16: autocast in training."""
    seed: Annotated[int, Suppress] = 0
    """Decides decoders, random encoders, order and every draw."""

    def __post_init__(self) -> None:
        refuse(self, self.checks(), f"{self.protocol}.")

    def checks(self) -> Checks:
        """For each field that can be wrong: whether it is right, and what it must be."""
        return {
            "encoder": (bool(self.encoder), "frozen, fine_tuned or both"),
            "epochs": (self.epochs > 0, "above 0"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and below 1"),
            **at_least(self, {"batch_size": 1}),
        }

    def find_data(self) -> Path:
        """Where images and annotations are.

        Raises:
            ValueError: If that is not said.
            FileNotFoundError: If nothing is there.
        """
        if self.data is None:
            raise ValueError(f"--protocols {self.protocol}: say on which images, by --{self.protocol}.data")
        if not self.data.exists():
            raise FileNotFoundError(f"--{self.protocol}.data {self.data}: no such folder or tar")
        return self.data


@dataclass(frozen=True, kw_only=True)
class DenseData(Generic[Source]):
    """Images with their annotations, opened and checked."""

    train: Source
    test: Source
    learned: dict[str, str]
    """Fingerprints of the training images and their annotations."""
    facts: dict[str, Any]
    """Name, number of test images and fingerprint of everything, as results.json says them."""
    duplicates: Duplicates
    """Between the two."""


def create_optimizer(
    name: str, encoder: nn.Module, decoding: nn.Module, settings: DenseSettings, mode: Mode
) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """The optimiser of a decoder, and of the encoder where it learns; and the recipe, as far as settings decide it.

    Args:
        name: Of the encoder, see `training/evaluate/models.py`.
        encoder: The timm module.
        decoding: All that is not the encoder.
        settings: How.
        mode: What learns.
    """
    layer_decay = 1.0 if is_random(name) else settings.layer_decay  # it protects what was learned before
    groups = param_groups_weight_decay(decoding, settings.weight_decay)
    if mode == "fine_tuned":
        groups += encoder_groups(encoder, weight_decay=settings.weight_decay, layer_decay=layer_decay)
    facts = dataclasses.asdict(settings) | {"layer_decay": layer_decay, "model": name, "mode": mode}
    recipe = {key: value for key, value in facts.items() if key not in settings.not_in_recipe}
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True), recipe


def learn(
    task: Task, recipe: dict[str, Any], data: dict[str, str], settings: DenseSettings, place: Place
) -> tuple[nn.Module, dict[str, object], float]:
    """A trained network, what there is to say about it, and the seconds of its training.

    Args:
        task: What is learned.
        recipe: JSON-able; with `data` it decides the result.
        data: Fingerprints of the training images and their annotations.
        settings: How long and how fast.
        place: Where the run folder goes.
    """
    steps = max(1, math.ceil(settings.epochs * len(task.dataset) / settings.batch_size))  # type: ignore[arg-type]
    schedule = Schedule(
        steps=steps,
        warmup_steps=round(settings.warmup * steps),
        batch_size=settings.batch_size,
        clip_grad=settings.clip_grad,
        precision=settings.precision,
        seed=settings.seed,
    )
    description = {"recipe": recipe, "data": data}
    out = place.out / "runs" / run_name(settings.protocol, description)
    network, seconds = fit(task, schedule, description, out, place.engine)
    return network, {"recipe": recipe, "steps": steps, "run": str(out.relative_to(place.out))}, seconds
