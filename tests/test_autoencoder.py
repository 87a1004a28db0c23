"""The masked autoencoder against independent implementations and closed forms."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from perceptual_mae_models.autoencoder import (
    MaskedAutoencoder,
    build_autoencoder,
    given_masking,
    image_pyramid,
    init_mae_weights,
    normalise_patches,
    patchify,
    random_masking,
    unpatchify,
)
from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.reconstruction import rebuild
from training.losses.pixel import patch_error
from training.recipes import Recipe
from training.step import reconstruction_loss

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def small_autoencoder(mask_ratio: float = 0.75, *, multi_scale: bool = False, **overrides: object) -> MaskedAutoencoder:
    encoder = timm.create_model("vit_pico_patch8_pmae", pretrained=False, **{**SMALL, **overrides})
    network = build_autoencoder(
        encoder, decoder_dim=16, decoder_depth=2, decoder_heads=2, mask_ratio=mask_ratio, multi_scale=multi_scale
    )
    init_mae_weights(network)
    return network


def test_patchify_is_row_major_with_channels_last() -> None:
    image = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 12)
    # second patch of the first row of patches: pixels (0,2) (0,3) (1,2) (1,3), all channels of each
    expected = [image[0, c, y, x].item() for y in (0, 1) for x in (2, 3) for c in range(3)]
    assert patches[0, 1].tolist() == expected
    assert torch.equal(unpatchify(patches, 2, (2, 3)), image)


def test_pyramid_halves_by_the_mean_of_four_pixels() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    fine, middle, coarse = image_pyramid(image, 3)
    assert fine is image
    assert middle.flatten().tolist() == [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4, (8 + 9 + 12 + 13) / 4, 12.5]
    assert coarse.flatten().tolist() == [7.5]


def test_predictions_are_images_again_and_not_clipped() -> None:
    network = small_autoencoder(multi_scale=True)
    originals = image_pyramid(torch.rand(2, 3, 32, 32) * 4 - 2, network.num_scales)
    preds = tuple(
        patchify(network.standardise(image), factor).double()
        for image, factor in zip(originals, (8, 4, 2, 1), strict=True)
    )
    for image, original in zip(network.images(preds), originals, strict=True):
        torch.testing.assert_close(image, original, atol=1e-5, rtol=0)  # float32 again, which this compares too


def test_the_decoder_leaves_the_encoder_as_it_is() -> None:
    plain, multi_scale = small_autoencoder(), small_autoencoder(multi_scale=True)
    untouched = timm.create_model("vit_pico_patch8_pmae", pretrained=False, **SMALL).state_dict()
    for network in (plain, multi_scale):
        shapes = {name: tensor.shape for name, tensor in network.encoder.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in untouched.items()}
    assert set(plain.decoder.state_dict()) < set(multi_scale.decoder.state_dict())


@pytest.mark.parametrize(("length", "mask_ratio", "visible"), [(64, 0.75, 16), (196, 0.75, 49), (10, 0.5, 5)])
def test_masking_hides_the_share_and_restores_the_order(length: int, mask_ratio: float, visible: int) -> None:
    noise = torch.rand(5, length)
    ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
    assert ids_keep.shape == (5, visible)
    assert mask.sum(dim=1).tolist() == [length - visible] * 5
    assert not mask.gather(1, ids_keep).any(), "kept patches are not hidden"
    largest_kept = noise.gather(1, ids_keep).max(dim=1).values
    smallest_hidden = noise.masked_fill(mask == 0, 2).min(dim=1).values
    assert (largest_kept < smallest_hidden).all()
    # restoring [visible, hidden] puts every place back
    places = torch.cat([ids_keep, (mask == 1).nonzero()[:, 1].reshape(5, -1)], dim=1)
    assert torch.equal(places.gather(1, ids_restore)[mask == 0], torch.arange(length).expand(5, -1)[mask == 0])


def test_patch_normalisation_is_undone_by_its_statistics() -> None:
    patches = torch.rand(2, 3, 192) * 5 - 1
    normalised, mean, std = normalise_patches(patches)
    assert torch.allclose(normalised.mean(-1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(normalised.var(-1), torch.ones(2, 3), atol=1e-4)
    assert torch.allclose(normalised * std + mean, patches, atol=1e-5)


def test_loss_counts_hidden_patches_only_and_has_a_known_value() -> None:
    target = torch.zeros(1, 4, 2)
    pred = torch.tensor([[[1.0, 3.0], [100.0, 100.0], [2.0, 0.0], [7.0, 7.0]]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert patch_error(pred, target, mask, 2).item() == pytest.approx(((1 + 9) / 2 + (4 + 0) / 2) / 2)


def test_visible_everything_equals_timm_itself() -> None:
    """With nothing hidden the encoder's part is the plain timm forward pass, up to the order of the patches."""
    network = small_autoencoder(mask_ratio=0.0).eval()
    images = torch.rand(2, 3, 32, 32)
    ids_keep, _, mask = random_masking(torch.rand(2, 16), 0.0)
    assert not mask.any()
    latent, _ = network.encode(images, ids_keep)
    plain = network.encoder.forward_features(network.standardise(images))
    shuffled = plain[:, 1:].gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, 24))
    torch.testing.assert_close(latent, torch.cat([plain[:, :1], shuffled], dim=1), atol=1e-5, rtol=1e-5)


def to_transformers(network: MaskedAutoencoder, norm_pix_loss: bool) -> ViTMAEForPreTraining:
    """The same weights in Hugging Face's independent implementation."""
    config = ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
        norm_pix_loss=norm_pix_loss,
        attn_implementation="eager",
    )
    theirs = ViTMAEForPreTraining(config).eval()
    ours = network.state_dict()
    state: dict[str, Tensor] = {
        "vit.embeddings.cls_token": ours["encoder.cls_token"],
        "vit.embeddings.position_embeddings": ours["encoder.pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": ours["encoder.patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": ours["encoder.patch_embed.proj.bias"],
        "vit.layernorm.weight": ours["encoder.norm.weight"],
        "vit.layernorm.bias": ours["encoder.norm.bias"],
        "decoder.decoder_embed.weight": ours["decoder.embed.weight"],
        "decoder.decoder_embed.bias": ours["decoder.embed.bias"],
        "decoder.mask_token": ours["decoder.mask_token"],
        "decoder.decoder_pos_embed": network.decoder.pos_embed,
        "decoder.decoder_norm.weight": ours["decoder.norm.weight"],
        "decoder.decoder_norm.bias": ours["decoder.norm.bias"],
        "decoder.decoder_pred.weight": ours["decoder.pred.weight"],
        "decoder.decoder_pred.bias": ours["decoder.pred.bias"],
    }
    blocks = (("encoder.blocks", "vit.layers", 24), ("decoder.blocks", "decoder.decoder_layers", 16))
    for our_prefix, their_prefix, dim in blocks:
        for i in range(2):
            for kind in ("weight", "bias"):
                qkv = ours[f"{our_prefix}.{i}.attn.qkv.{kind}"].split(dim)
                block = {
                    "attention.q_proj": qkv[0],
                    "attention.k_proj": qkv[1],
                    "attention.v_proj": qkv[2],
                    "attention.o_proj": ours[f"{our_prefix}.{i}.attn.proj.{kind}"],
                    "mlp.fc1": ours[f"{our_prefix}.{i}.mlp.fc1.{kind}"],
                    "mlp.fc2": ours[f"{our_prefix}.{i}.mlp.fc2.{kind}"],
                    "layernorm_before": ours[f"{our_prefix}.{i}.norm1.{kind}"],
                    "layernorm_after": ours[f"{our_prefix}.{i}.norm2.{kind}"],
                }
                state |= {f"{their_prefix}.{i}.{name}.{kind}": tensor for name, tensor in block.items()}
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_equals_transformers(norm_pix_loss: bool) -> None:
    torch.manual_seed(0)
    network = small_autoencoder().eval()
    for parameter in network.parameters():  # biases and norms off their neutral values
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = to_transformers(network, norm_pix_loss)
    images, noise = torch.rand(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        output = network(images, noise)
        loss = reconstruction_loss(output, images, network, Recipe(method="mae", norm_pix_loss=norm_pix_loss))
        expected = theirs(network.standardise(images), noise=noise)
        latent = theirs.vit(network.standardise(images), noise=noise).last_hidden_state
    torch.testing.assert_close(output.latent, latent, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pred, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.mask, expected.mask)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)


def test_every_parameter_learns_but_the_fixed_positions() -> None:
    network = small_autoencoder()
    images = torch.rand(2, 3, 32, 32)
    output = network(images, torch.rand(2, 16))
    reconstruction_loss(output, images, network, Recipe(method="mae")).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["encoder.pos_embed"]


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    network = small_autoencoder().eval()
    images, noise = torch.rand(1, 3, 32, 32), torch.rand(1, 16)
    mask = random_masking(noise, 0.75).mask
    hidden = unpatchify(mask.unsqueeze(-1).expand(-1, -1, 192).contiguous(), 8, (4, 4)).bool()
    changed = torch.where(hidden, torch.rand_like(images), images)
    torch.testing.assert_close(network(images, noise).pred, network(changed, noise).pred)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_pictures_show_what_they_say(norm_pix_loss: bool) -> None:
    network = small_autoencoder().eval()
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    views = rebuild(network, images, random_masking(noise, 0.75), norm_pix_loss=norm_pix_loss)
    hidden = random_masking(noise, 0.75).mask.unsqueeze(-1).expand(-1, -1, 192).contiguous()
    hidden_pixels = unpatchify(hidden, 8, (4, 4)).bool()
    assert torch.equal(views.hidden.expand_as(images), hidden_pixels)
    for picture in (views.masked, views.pasted):
        torch.testing.assert_close(picture[~hidden_pixels], images[~hidden_pixels], atol=1e-5, rtol=0)
    torch.testing.assert_close(views.pasted[hidden_pixels], views.rebuilt[hidden_pixels])
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(views.masked[hidden_pixels], grey[hidden_pixels])


def test_pretraining_normalises_as_the_published_transform() -> None:
    """The network's own standardisation and the transform that users get are the same function."""
    network = small_autoencoder()
    extractor = FeatureExtractor(network.encoder)
    normalise = extractor.transform.transforms[-1]
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network.standardise(images), normalise(images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {}),
        ("vit_pico_patch8_pmae", {"no_embed_class": True}),
        ("vit_pico_patch8_pmae", {"pre_norm": True}),
        ("vit_pico_patch8_pmae", {"in_chans": 1}),
        ("vit_pico_patch8_pmae", {"reg_tokens": 1}),
        ("vit_pico_patch8_pmae", {"class_token": False, "reg_tokens": 1, "global_pool": "avg"}),
        ("vit_pico_patch8_pmae", {"pos_embed": "none"}),
    ],
)
def test_encoder_that_is_no_plain_vit_is_refused(name: str, arguments: dict[str, Any]) -> None:
    encoder = timm.create_model(name, **arguments)
    with pytest.raises(ValueError, match="class token"):
        build_autoencoder(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.75)


@pytest.mark.parametrize("shape", [(1, 3, 128, 128), (1, 1, 64, 64), (1, 3, 64, 72), (1, 3, 32, 128)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    network = build_autoencoder(
        timm.create_model("vit_pico_patch8_pmae", depth=1),
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
        mask_ratio=0.75,
    )
    with pytest.raises(ValueError, match=r"takes \(N, 3, 64, 64\)"):
        network(torch.rand(shape), torch.rand(1, 64))


def test_noise_masks_and_bytes_that_mean_nothing_are_refused_by_name() -> None:
    network, images = small_autoencoder().eval(), torch.rand(2, 3, 32, 32)
    for mask_ratio in (1.5, -0.5):
        with pytest.raises(ValueError, match=f"mask_ratio is {mask_ratio}"):
            random_masking(torch.rand(2, 16), mask_ratio)
    with pytest.raises(ValueError, match=r"not \(2, 4, 4\): flatten the grid"):
        given_masking(torch.ones(2, 4, 4))
    for shape in ((2, 17), (1, 16)):
        with pytest.raises(ValueError, match=r"a row an image, of 16 patches"):
            network(images, torch.rand(shape))
    with pytest.raises(ValueError, match=r"torch\.uint8.*divide bytes by 255"):
        network((images * 255).byte())


def test_without_noise_torchs_generator_decides_the_mask() -> None:
    network, images = small_autoencoder().eval(), torch.rand(2, 3, 32, 32)
    torch.manual_seed(3)
    drawn = network(images)
    torch.manual_seed(3)
    given = network(images, torch.rand(2, 16))
    assert torch.equal(drawn.mask, given.mask)
    assert torch.equal(drawn.pred, given.pred)
    assert not torch.equal(network(images).mask, drawn.mask)
