"""Perceptual MAE image encoders as timm models: importing this package registers them in timm.

import perceptual_mae_models
import timm

model = timm.create_model("vit_pico_patch8_pmae", pretrained=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__
from .vision_transformer_pmae import (
    vit_base_patch16_pmae,
    vit_huge_patch14_pmae,
    vit_large_patch16_pmae,
    vit_pico_patch8_pmae,
    vit_small_patch16_pmae,
    vit_tiny_patch16_pmae,
)
from .weights import CheckpointError, WeightsUnavailableError

if TYPE_CHECKING:
    from .features import FeatureExtractor

__all__ = [
    "CheckpointError",
    "FeatureExtractor",
    "WeightsUnavailableError",
    "vit_base_patch16_pmae",
    "vit_huge_patch14_pmae",
    "vit_large_patch16_pmae",
    "vit_pico_patch8_pmae",
    "vit_small_patch16_pmae",
    "vit_tiny_patch16_pmae",
]


def __getattr__(name: str) -> Any:
    # Reading images needs modules that most users of the encoders never touch; they are imported on first use.
    if name == "FeatureExtractor":
        from .features import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
