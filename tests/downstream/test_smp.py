"""segmentation-models-pytorch: our names as its `tu-` encoders. Of its decoders DPT is the one for plain ViTs."""

import pytest
import segmentation_models_pytorch as smp
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SMALL = {"decoder_intermediate_channels": (16, 16, 32, 32), "decoder_fusion_channels": 16}


def build(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return smp.create_model("dpt", encoder_name="tu-vit_pico_patch8_pmae", classes=3, **SMALL, **kwargs)


@pytest.mark.parametrize("weights", [True, "imagenet"])
def test_any_encoder_weights_mean_ours(weights: bool | str, encoder: VisionTransformer):
    inside = build(encoder_weights=weights).encoder.model.state_dict()
    assert set(inside) == set(encoder.state_dict())
    assert all(torch.equal(inside[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_tag_can_be_named(encoder: VisionTransformer):
    model = smp.DPT("tu-vit_pico_patch8_pmae.mae_imagenette", encoder_weights=True, **SMALL)
    assert torch.equal(model.encoder.model.blocks[7].mlp.fc2.weight, encoder.blocks[7].mlp.fc2.weight)


def test_no_encoder_weights_mean_random(encoder: VisionTransformer):
    inside = build(encoder_weights=None).encoder.model
    assert not torch.equal(inside.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)


def test_its_features_are_our_maps(encoder: VisionTransformer, pixels: torch.Tensor):
    model = build(encoder_weights=True).eval()
    with torch.inference_mode():
        maps, prefix_tokens = model.encoder(pixels)
        expected = encoder.get_intermediate_layers(pixels, n=[1, 3, 5, 7], reshape=True, return_prefix_tokens=True)
    for found, class_token, (reference, token) in zip(maps, prefix_tokens, expected, strict=True):
        assert torch.equal(found, reference)
        assert torch.equal(class_token, token)
    assert model.encoder.out_channels == [192] * 4
    assert model.encoder.output_strides == [8] * 4


@pytest.mark.parametrize(
    ("kwargs", "shape"),
    [
        ({}, (2, 3, 64, 64)),
        ({"dynamic_img_size": True}, (2, 3, 96, 64)),
        ({"img_size": (64, 128), "in_channels": 5}, (2, 5, 64, 128)),
    ],
)
def test_masks_of_the_images_size_are_learned(kwargs: dict[str, object], shape: tuple[int, ...]):
    model = build(encoder_weights=True, **kwargs).train()
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    masks = (images[:, 0] > 0).long() + (images[:, 1] > 1).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        logits = model(images)
        assert logits.shape == (shape[0], 3, *shape[2:])
        loss = nn.functional.cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # DPT reads the blocks, not what the final norm makes of them.
    idle = {name for name, weight in model.encoder.model.named_parameters() if weight.grad is None}
    assert idle == {"norm.weight", "norm.bias"}
