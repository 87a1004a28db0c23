"""Small images that tests make themselves, and the real ones that `PMAE_DATA` points to."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before huggingface_hub is imported, which reads them then: what a user has set changes no test, and nothing that tests
# leave in caches is the user's.
for _name in ("HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "PMAE_HUB_ORG"):
    os.environ.pop(_name, None)
_home = tempfile.TemporaryDirectory(prefix="hf_home")
os.environ["HF_HOME"] = _home.name

LONG_FILES = ("test_methods", "test_step", "test_pretrain", "test_cost", "test_finetune", "test_miniature")
"""Begun first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 smooth colour images, three classes of eight."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real image archives; the test skips, saying so, where there is none."""
    root = os.environ.get("PMAE_DATA")
    if not root:
        pytest.skip("PMAE_DATA is not set: point it to a folder with imagenette-128-train.tar and -val.tar")
    return Path(root)
