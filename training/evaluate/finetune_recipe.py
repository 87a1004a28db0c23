"""What decides the result of fine-tuning, as data: MAE's published values (He et al. 2022, and its repository)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from training.evaluate.encoders import is_random
from training.settings import at_least, refuse


@dataclass(frozen=True, kw_only=True)
class FineTuneRecipe:
    """What decides the result of fine-tuning; the values are MAE's for ViT-B."""

    epochs: float = 100
    """Passes over the training images."""
    batch_size: int = 1024
    """Images a step, over all processes and micro-batches together."""
    blr: float = 5e-4
    """Base learning rate: that of 256 images a step."""
    warmup_epochs: float = 5
    """Epochs in which the learning rate rises, at most half of all; a half-cosine to 0 follows."""
    layer_decay: float = 0.65
    """A block learns at this factor of the rate of the block above it."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    drop_path: float = 0.1
    """Probability of leaving out the last block's branches; falls linearly to 0 at the first."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an augmentation policy; empty: none."""
    random_erase: float = 0.25
    """Probability of erasing a rectangle."""
    mixup: float = 0.8
    """Parameter of mixup's Beta distribution; 0: none."""
    cutmix: float = 1.0
    """The same for CutMix."""
    smoothing: float = 0.1
    """Label smoothing."""
    ema_decay: float | None = None
    """Decay a step of a moving average of the weights, which is then tested."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast with the loss in float32."""
    seed: int = 0
    """Decides the head's first weights, the order and every draw."""

    def __post_init__(self) -> None:
        shares = ("drop_path", "random_erase", "smoothing")
        checks = {
            **{name: (getattr(self, name) > 0, "above 0") for name in ("epochs", "batch_size", "blr")},
            **at_least(self, {"warmup_epochs": 0, "mixup": 0, "cutmix": 0}),
            **{name: (0 <= getattr(self, name) < 1, "at least 0 and below 1") for name in shares},
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            "clip_grad": (self.clip_grad is None or self.clip_grad > 0, "above 0"),
        }
        refuse(self, checks, "finetune.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """Fine-tuning: what is left out has the value of MAE's recipe for the model."""

    epochs: float | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images a step, over all processes and micro-batches together."""
    blr: float | None = None
    """Base learning rate: that of 256 images a step."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises, at most half of all."""
    layer_decay: float | None = None
    """A block learns at this factor of the rate of the block above it."""
    weight_decay: float | None = None
    """AdamW weight decay, on matrices only."""
    drop_path: float | None = None
    """Probability of leaving out the last block's branches."""
    augment: str | None = None
    """timm's name of an augmentation policy, such as rand-m9-mstd0.5-inc1; empty: none."""
    random_erase: float | None = None
    """Probability of erasing a rectangle."""
    mixup: float | None = None
    """Parameter of mixup's Beta distribution; 0: none."""
    cutmix: float | None = None
    """The same for CutMix."""
    smoothing: float | None = None
    """Label smoothing."""
    ema_decay: float | None = None
    """Decay a step of a moving average of the weights, which is then tested."""
    clip_grad: float | None = None
    """Largest gradient norm."""
    precision: Literal["bf16", "fp32"] | None = None
    """Arithmetic."""


RECIPES = {
    "vit_base": FineTuneRecipe(),
    "vit_large": FineTuneRecipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    "vit_huge": FineTuneRecipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3),
    # ours: MAE has no encoder as small
    "vit_pico": FineTuneRecipe(
        epochs=30,
        batch_size=128,
        blr=2e-3,
        warmup_epochs=2,
        layer_decay=0.75,
        drop_path=0.0,
        mixup=0.2,
        precision="fp32",
    ),
}
"""By a part of the architecture's name; the first where none fits. MAE's rate ends at 1e-6 instead of 0."""


def resolve_recipe(name: str, settings: FineTuneSettings, seed: int) -> FineTuneRecipe:
    """The recipe of a model, with what the user set.

    Random encoders learn at one rate: a decay over layers protects what was learned before.
    """
    kinds = (recipe for kind, recipe in RECIPES.items() if kind in name.partition("@")[0])
    recipe = dataclasses.replace(next(kinds, RECIPES["vit_base"]), seed=seed)
    if is_random(name):
        recipe = dataclasses.replace(recipe, layer_decay=1.0)
    given = {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}
    return dataclasses.replace(recipe, **given)


def check_batch(recipe: FineTuneRecipe, images: int) -> None:
    """Refuse a batch that is larger than the training set.

    Raises:
        ValueError: If it is.
    """
    if recipe.batch_size > images:
        raise ValueError(
            f"--finetune.batch-size {recipe.batch_size} is more than the {images} training images: give fewer"
        )
