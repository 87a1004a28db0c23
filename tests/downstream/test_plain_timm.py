"""Our weights in timm alone: a Hub repository must work for people who never installed this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Hub, Repo
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.torch_version import TorchVersion

from perceptual_mae_models import FeatureExtractor

# timm's version is printed because `make test-timm` chooses it by PYTHONPATH, which must reach this process.
_WITHOUT_OUR_PACKAGE = """
import json, sys

sys.modules["perceptual_mae_models"] = None  # importing it raises ImportError
import timm, torch
from safetensors.torch import load_file, save_file

name, inputs, outputs, arguments = sys.argv[1:]
torch.set_num_threads(1)
model = timm.create_model(name, pretrained=True, **json.loads(arguments)).eval()
pixels = load_file(inputs)["pixels"]
with torch.inference_mode():
    result = model(pixels)
    found = dict(enumerate(result)) if isinstance(result, list) else {"pooled": result}
    if hasattr(model, "forward_features"):
        found["tokens"] = model.forward_features(pixels)
save_file({str(name): tensor.contiguous() for name, tensor in found.items()}, outputs)
config = timm.data.resolve_model_data_config(model)
known = [name for name in timm.list_models() if "pmae" in name]
print(json.dumps({"timm": timm.__version__, "config": config, "known": known}))
"""


def run_without_our_package(
    name: str, pixels: torch.Tensor, work: Path, hub: dict[str, str] | None = None, **arguments: object
) -> tuple[dict, dict]:
    save_file({"pixels": pixels}, work / "in.safetensors")
    command = [sys.executable, "-c", _WITHOUT_OUR_PACKAGE, name]
    command += [str(work / "in.safetensors"), str(work / "out.safetensors"), json.dumps(arguments)]
    environment = {**os.environ, **(hub or {"HF_HUB_OFFLINE": "1"})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["timm"] == timm.__version__
    assert said["known"] == []
    return load_file(work / "out.safetensors"), said["config"]


@pytest.fixture
def local_folder(hub_folder: Path, tmp_path: Path) -> Path:
    """The repository on disk; without the decoder where timm stumbles over a second file of weights."""
    if TorchVersion(timm.__version__) >= "1.0.29":
        return hub_folder
    (tmp_path / "encoder_alone").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hub_folder / name, tmp_path / "encoder_alone")
    return tmp_path / "encoder_alone"


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are rounded otherwise
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_plain_timm_computes_the_same_bits(
    local_folder: Path, encoder: VisionTransformer, pixels: torch.Tensor, tmp_path: Path
):
    found, config = run_without_our_package(f"local-dir:{local_folder}", pixels, tmp_path)
    with torch.inference_mode():
        assert torch.equal(found["tokens"], encoder.forward_features(pixels))
        assert torch.equal(found["pooled"], encoder(pixels))
    ours = timm.data.resolve_model_data_config(encoder)
    assert config == json.loads(json.dumps(ours))


@pytest.mark.usefixtures("_one_thread")
def test_plain_timm_pulls_the_same_bits_from_a_hub(
    hub_folder: Path, encoder: VisionTransformer, pixels: torch.Tensor, tmp_path: Path
):
    server = Hub()
    server.repos["acme/pico"] = Repo()
    server.repos["acme/pico"].commit({path.name: path.read_bytes() for path in hub_folder.iterdir()})
    hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    found, _ = run_without_our_package("hf-hub:acme/pico", pixels, tmp_path, hub)
    server.shutdown()
    with torch.inference_mode():
        assert torch.equal(found["tokens"], encoder.forward_features(pixels))
    assert "GET /acme/pico/resolve/main/model.safetensors" in server.requests


@pytest.mark.usefixtures("_one_thread")
def test_plain_timm_gives_the_same_maps(
    local_folder: Path, encoder: VisionTransformer, pixels: torch.Tensor, tmp_path: Path
):
    found, _ = run_without_our_package(
        f"local-dir:{local_folder}", pixels, tmp_path, features_only=True, out_indices=[1, 4, 7]
    )
    with torch.inference_mode():
        expected = encoder.get_intermediate_layers(pixels, n=[1, 4, 7], reshape=True)
    assert sorted(found) == ["0", "1", "2"]
    for number, reference in enumerate(expected):
        assert torch.equal(found[str(number)], reference)


def test_our_extractor_takes_the_folder_like_the_name(local_folder: Path, photos: Path):
    images = sorted(photos.rglob("*.png"))[:4]
    assert torch.equal(FeatureExtractor(f"local-dir:{local_folder}")(images), FeatureExtractor()(images))
