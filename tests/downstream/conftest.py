"""What the tests with other people's libraries share. `make test-downstream` runs them; `make test` does not."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import perceptual_mae_models  # noqa: F401  registers the encoders
from perceptual_mae_models.vision_transformer_pmae import facts_of
from training.hub.repository import open_embedded_weights, write_repository

PICO = "vit_pico_patch8_pmae"


@pytest.fixture
def encoder() -> VisionTransformer:
    """The embedded weights through our own entry point; a new one a test, which may change it."""
    return timm.create_model(PICO, pretrained=True).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub repository of the embedded weights, as `training/export.py` writes it."""
    name = f"{PICO}.mae_imagenette"
    folder = tmp_path_factory.mktemp("hub") / name
    weights = open_embedded_weights(name)
    assert weights is not None
    write_repository(facts_of(name), weights, folder)
    return folder
