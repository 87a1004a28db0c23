"""Hugging Face transformers: its timm wrapper on a repository of ours, and its timm backbone on our names."""

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmBackboneConfig,
)

from perceptual_mae_models import FeatureExtractor

PICO = "vit_pico_patch8_pmae"
BLOCKS = (1, 4, 7)


def test_auto_model_computes_the_same_bits(hub_folder: Path, encoder: VisionTransformer, pixels: torch.Tensor):
    model = AutoModel.from_pretrained(hub_folder)
    with torch.inference_mode():
        output = model(pixels, output_hidden_states=list(BLOCKS))
        tokens = model(pixels).last_hidden_state
        expected = encoder.get_intermediate_layers(pixels, n=list(BLOCKS), reshape=True)
        assert torch.equal(tokens, encoder.forward_features(pixels))
        assert torch.equal(output.pooler_output, encoder(pixels))
    assert tokens.shape == (3, 65, 192)
    assert len(output.hidden_states) == len(BLOCKS)
    for ours, reference in zip(output.hidden_states, expected, strict=True):
        assert torch.equal(ours, reference)


def test_auto_model_computes_in_float32_without_being_told(hub_folder: Path):
    assert AutoModel.from_pretrained(hub_folder).dtype == torch.float32


@pytest.mark.parametrize(("mode", "size"), [("RGB", (96, 80)), ("RGB", (64, 64)), ("RGB", (500, 37)), ("L", (70, 90))])
def test_the_image_processor_gives_our_pixels(hub_folder: Path, photos: Path, mode: str, size: tuple[int, int]):
    image = Image.open(next(photos.rglob("*.png"))).resize(size).convert(mode).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(hub_folder)
    found = processor([image, image], return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, 64, 64)
    assert torch.equal(found[0], FeatureExtractor().transform(image))


def test_a_classifier_starts_from_our_encoder_and_comes_back(
    hub_folder: Path, encoder: VisionTransformer, pixels: torch.Tensor, tmp_path: Path
):
    model = AutoModelForImageClassification.from_pretrained(hub_folder, num_labels=5)
    state = model.timm_model.state_dict()
    assert set(state) - set(encoder.state_dict()) == {"head.weight", "head.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())

    output = model(pixels, labels=torch.tensor([0, 1, 4]))
    output.loss.backward()
    assert output.logits.shape == (3, 5)
    assert model.timm_model.patch_embed.proj.weight.grad.abs().sum() > 0

    with torch.no_grad():
        model.timm_model.norm.weight.add_(1)  # as if it had learned something
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
    file = {"file": str(tmp_path / "tuned" / "model.safetensors")}
    in_ours = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=file, num_classes=5).eval()
    with torch.inference_mode():
        expected = model.eval()(pixels).logits
        assert torch.equal(again.eval()(pixels).logits, expected)
        assert torch.equal(in_timm(pixels), expected)
        assert torch.equal(in_ours(pixels), expected)


@pytest.mark.parametrize("source", ["name", "folder"])
@pytest.mark.parametrize("made_by", ["from_config", "from_pretrained"])
def test_auto_backbone_gives_our_maps(
    source: str,
    made_by: str,
    hub_folder: Path,
    encoder: VisionTransformer,
    pixels: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
):
    name = PICO if source == "name" else f"local-dir:{hub_folder}"
    if made_by == "from_config":
        config = TimmBackboneConfig(backbone=name, out_indices=list(BLOCKS))
        backbone = AutoBackbone.from_config(config, pretrained=True)
    else:
        # It asks the Hub whether it has such a repository, and takes the name for timm's only if it has not.
        monkeypatch.setattr(HfApi, "repo_exists", lambda *_, **__: False)
        backbone = AutoBackbone.from_pretrained(name, use_timm_backbone=True, out_indices=list(BLOCKS))
    with torch.inference_mode():
        maps = backbone.eval()(pixels).feature_maps
        expected = encoder.get_intermediate_layers(pixels, n=list(BLOCKS), reshape=True)
    assert backbone.channels == [192, 192, 192]
    assert [tuple(found.shape) for found in maps] == [(3, 192, 8, 8)] * 3
    for ours, reference in zip(maps, expected, strict=True):
        assert torch.equal(ours, reference)
