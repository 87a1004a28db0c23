"""PEFT: LoRA on the encoder, trained, saved, loaded and merged."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

CLASSES = 4


def classifier() -> VisionTransformer:
    torch.manual_seed(0)  # the head is no part of the weights
    return timm.create_model("vit_pico_patch8_pmae", pretrained=True, num_classes=CLASSES).eval()


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["qkv", "fc1", "fc2"], modules_to_save=["head"])


def is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


@pytest.fixture(scope="module")
def trained() -> tuple[PeftModel, list[float], torch.Tensor]:
    model = get_peft_model(classifier(), config()).train()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % CLASSES
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses, images


def test_nothing_changes_before_training(pixels: torch.Tensor):
    model = get_peft_model(classifier(), config()).eval()
    with torch.inference_mode():
        assert torch.equal(model(pixels), classifier()(pixels))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 3 * 8  # qkv, fc1 and fc2 of every block, and nothing of the patch embedding


def test_only_adapters_and_head_train(trained: tuple[PeftModel, list[float], torch.Tensor]):
    model, losses, _ = trained
    assert losses[-1] < 0.5 * losses[0]
    start = classifier().state_dict()
    frozen = 0
    for name, weight in model.named_parameters():
        assert weight.requires_grad == is_adapter(name)
        if not is_adapter(name):
            plain = name.removeprefix("base_model.model.")
            for inserted in (".base_layer", ".original_module"):
                plain = plain.replace(inserted, "")
            assert torch.equal(weight, start[plain])
            frozen += 1
    assert frozen == len(start)
    learned, total = model.get_nb_trainable_parameters()
    assert learned < 0.05 * total


def test_adapters_come_back_from_disk(trained: tuple[PeftModel, list[float], torch.Tensor], tmp_path: Path):
    model, _, images = trained
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 600_000  # the encoder has 14.6 MB
    again = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_merged_weights_are_a_plain_encoder_again(trained: tuple[PeftModel, list[float], torch.Tensor]):
    model, _, images = trained
    with torch.inference_mode():
        expected = model(images)
        before = classifier()(images)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is VisionTransformer
    assert set(merged.state_dict()) == set(classifier().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1
