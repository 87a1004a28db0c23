"""Recipes: everything that changes the result of a pretraining run, as data.

A recipe is a frozen dataclass; the function named after a method returns the recipe of that method for a model. What
must not change the result (workers, logging) is in `training/pretrain.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pretraining run, up to the images."""

    method: Literal["mae"]
    """What is optimised; set by the subcommand."""
    model: str = "vit_base_patch16_pmae"
    """Encoder to pretrain, an architecture name of `pmae list`."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder, in (0, 1)."""
    norm_pix_loss: bool = True
    """Compare patches brought to zero mean and unit variance (better features) instead of plain pixels."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Transformer blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""

    epochs: float = 300
    """Passes over the images. Ignored where --steps is given."""
    steps: int | None = None
    """Optimiser steps; instead of --epochs."""
    batch_size: int = 4096
    """Images a step, over all processes together."""
    blr: float = 1.5e-4
    """Base learning rate: that of 256 images a step; the peak rate is blr * batch_size / 256."""
    warmup: float = 40 / 300
    """Share of the run in which the learning rate rises from 0 to its peak; a half-cosine to 0 follows."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW momenta."""
    clip_grad: float | None = None
    """Largest gradient norm; larger gradients are scaled down to it. None: no limit."""
    ema_decay: float | None = None
    """Decay a step of an exponential moving average of the weights, which is then exported. None: no average."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, least and most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast with losses in float32. fp32: everything in float32, for processors without bf16 units."""
    seed: int = 0
    """Decides the initial weights, the order of the images, the crops and the masks."""

    def __post_init__(self) -> None:
        checks = {
            "mask_ratio": (0 < self.mask_ratio < 1, "between 0 and 1"),
            "epochs": (self.epochs > 0, "above 0"),
            "steps": (self.steps is None or self.steps > 0, "above 0"),
            "batch_size": (self.batch_size > 0, "above 0"),
            "blr": (self.blr > 0, "above 0"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and below 1"),
            "clip_grad": (self.clip_grad is None or self.clip_grad > 0, "above 0"),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            "crop_scale": (0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "two ascending numbers in (0, 1]"),
            "decoder_dim": (self.decoder_dim % (4 * self.decoder_heads) == 0, "a multiple of 4 and of --decoder-heads"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}: it must be {expected}")

    @property
    def lr(self) -> float:
        """The peak learning rate, by MAE's linear scaling rule."""
        return self.blr * self.batch_size / 256

    def num_steps(self, num_images: int) -> int:
        """Optimiser steps of the whole run over a data set of `num_images`."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * num_images / self.batch_size))


def mae(model: str) -> Recipe:
    """Masked autoencoder: squared error of the hidden patches.

    MAE's published recipe (appendix A.1) over the 300 epochs of Perceptual MAE; for `vit_pico` a light decoder and
    small batches, the recipe of the embedded weights, made on two CPU cores without bf16 units.
    """
    imagenet = Recipe(method="mae", model=model)
    if not model.startswith("vit_pico"):
        return imagenet
    return replace(
        imagenet,
        decoder_dim=128,
        decoder_depth=2,
        decoder_heads=4,
        epochs=100,
        batch_size=128,
        blr=2e-3,
        warmup=0.05,
        precision="fp32",
    )


METHODS = {"mae": mae}
