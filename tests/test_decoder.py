"""The decoders: known plans, closed forms, and the plain decoder as an oracle for the multi-scale one."""

from importlib import resources

import pytest
import timm
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceptual_mae_models.autoencoder import MaskedAutoencoder, build_autoencoder, init_mae_weights
from perceptual_mae_models.decoder import Decoder, MultiScaleDecoder, fill_in, pyramid_factors, skip_indices

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
IDS_RESTORE = torch.tensor([[2, 0, 1, 3], [1, 3, 0, 2]])


def autoencoder(*, multi_scale: bool = True, decoder_depth: int = 3, **overrides: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = timm.create_model("vit_pico_patch8_pmae", pretrained=False, **{**SMALL, **overrides})
    network = build_autoencoder(
        encoder,
        decoder_dim=16,
        decoder_depth=decoder_depth,
        decoder_heads=2,
        mask_ratio=0.75,
        multi_scale=multi_scale,
    )
    init_mae_weights(network)
    return network


def multi_scale_decoder(depth: int) -> MultiScaleDecoder:
    torch.manual_seed(0)
    return MultiScaleDecoder(12, 6, (2, 2), 4, dim=8, depth=depth, num_heads=2)


def inputs(count: int) -> tuple[Tensor, list[Tensor]]:
    """A latent of two visible patches, and skips like it."""
    return torch.randn(2, 3, 12), [torch.randn(2, 3, 12) for _ in range(count)]


@pytest.mark.parametrize(
    ("patch_size", "factors"), [(16, (16, 8, 4, 2, 1)), (8, (8, 4, 2, 1)), (14, (14, 7)), (4, (4, 2, 1)), (1, (1,))]
)
def test_a_token_makes_half_as_many_pixels_at_each_scale(patch_size: int, factors: tuple[int, ...]) -> None:
    assert pyramid_factors(patch_size) == factors


@pytest.mark.parametrize(
    ("encoder_depth", "decoder_depth", "indices"),
    [
        (12, 8, (10, 9, 8, 7, 6, 5, 4)),
        (12, 4, (10, 7, 4)),
        (12, 2, (10,)),
        (12, 1, ()),
        (24, 8, (22, 20, 17, 15, 13, 10, 8)),  # 14 / 6 apart
        (8, 2, (6,)),
    ],
)
def test_skips_run_down_to_a_third_of_the_encoder(
    encoder_depth: int, decoder_depth: int, indices: tuple[int, ...]
) -> None:
    assert skip_indices(encoder_depth, decoder_depth) == indices


def test_skips_exist_at_every_depth() -> None:
    for encoder_depth in range(1, 33):
        for decoder_depth in range(1, 13):
            found = skip_indices(encoder_depth, decoder_depth)
            assert list(found) == sorted(found, reverse=True)
            assert all(0 <= index < encoder_depth for index in found)


def test_hidden_places_hold_the_mask_token_and_visible_ones_their_own() -> None:
    visible = torch.tensor([[[9.0], [1.0], [2.0]], [[8.0], [3.0], [4.0]]])  # class token, two patches
    filled = fill_in(visible, torch.tensor([[[-5.0]]]), IDS_RESTORE)
    assert filled.squeeze(-1).tolist() == [[9, -5, 1, 2, -5], [8, 4, -5, 3, -5]]


def test_weights_of_the_plain_decoder_keep_their_names() -> None:
    """Embedded weights are loaded by these."""
    names = {name.split(".")[0] for name in Decoder(12, (2, 2), 4, dim=8, depth=1, num_heads=2).state_dict()}
    assert names == {"embed", "mask_token", "blocks", "norm", "pred"}


def test_the_embedded_decoder_fits() -> None:
    file = "pretrained/vit_pico_patch8_pmae.mae_imagenette.decoder.safetensors"
    embedded = load((resources.files("perceptual_mae_models") / file).read_bytes())
    decoder = Decoder(192, (8, 8), 8, dim=128, depth=2, num_heads=4)
    ours = decoder.state_dict()
    assert {name: tensor.shape for name, tensor in embedded.items()} == {n: t.shape for n, t in ours.items()}


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_joins_that_pass_the_state_on_make_the_plain_decoder(depth: int) -> None:
    """Taking [state, skip] to the state leaves nothing of the skips: the fine scale is then the plain decoder's."""
    ours = multi_scale_decoder(depth)
    plain = Decoder(12, (2, 2), 4, dim=8, depth=depth, num_heads=2)
    plain.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name in plain.state_dict()})
    for join in ours.skip_joins:
        join.weight.data = torch.cat([torch.eye(8), torch.zeros(8, 8)], dim=1)
        join.bias.data.zero_()
    latent, skips = inputs(depth - 1)
    torch.testing.assert_close(ours(latent, skips, IDS_RESTORE)[0], plain(latent, (), IDS_RESTORE)[0])


def test_the_last_skip_feeds_the_last_block() -> None:
    """Taking [state, skip] to the skip leaves only the last one, in its places among mask tokens."""
    ours = multi_scale_decoder(3)
    ours.mask_token.data.normal_()
    ours.skip_joins[-1].weight.data = torch.cat([torch.zeros(8, 8), torch.eye(8)], dim=1)
    ours.skip_joins[-1].bias.data.zero_()
    latent, skips = inputs(2)
    embedded = ours.skip_embeds[-1](skips[-1])
    tokens = torch.empty(2, 5, 8)
    for n in range(2):
        sequence = [*embedded[n, 1:], ours.mask_token[0, 0], ours.mask_token[0, 0]]
        tokens[n] = torch.stack([embedded[n, 0], *(sequence[place] for place in IDS_RESTORE[n].tolist())])
    expected = ours.pred(ours.norm(ours.blocks[-1](tokens)))[:, 1:]
    torch.testing.assert_close(ours(latent, skips, IDS_RESTORE)[0], expected)


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_a_skip_counts_from_the_block_that_it_joins(changed: int) -> None:
    decoder = multi_scale_decoder(5)
    assert decoder.taps == (4, 3, 1)
    latent, skips = inputs(4)
    before = decoder(latent, skips, IDS_RESTORE)
    skips[changed] = torch.randn(2, 3, 12)
    after = decoder(latent, skips, IDS_RESTORE)
    moved = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert moved == [tap >= changed + 1 for tap in decoder.taps]


def test_skips_are_the_blocks_that_the_decoder_names() -> None:
    network = autoencoder(depth=6, decoder_depth=4)
    assert network.decoder.skip_indices == (4, 3, 2)
    seen: list[Tensor] = []
    for block in network.encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    _, skips = network.encode(torch.rand(2, 3, 32, 32), torch.tensor([[3, 7], [0, 15]]))
    assert [next(i for i, output in enumerate(seen) if torch.equal(output, skip)) for skip in skips] == [4, 3, 2]


def test_scales_are_emitted_by_evenly_spaced_blocks() -> None:
    # 16 -> five scales over eight blocks, coarse to fine after ceil(1.6), ceil(3.2), ... of them
    release = MultiScaleDecoder(12, 12, (1, 1), 16, dim=4, depth=8, num_heads=1)
    assert release.taps == (7, 6, 4, 3, 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_scale_learns_through_the_blocks_up_to_its_own(depth: int) -> None:
    decoder = multi_scale_decoder(depth)
    latent, skips = inputs(depth - 1)
    for tap, pred in zip(decoder.taps, decoder(latent, skips, IDS_RESTORE), strict=True):
        weights = [block.mlp.fc2.weight for block in decoder.blocks]
        gradients = torch.autograd.grad(pred.square().sum(), weights, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [index <= tap for index in range(depth)]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "sizes"),
    [
        ((32, 32), 4, [(32, 32), (16, 16), (8, 8)]),
        ((64, 64), 8, [(64, 64), (32, 32), (16, 16), (8, 8)]),
        ((224, 224), 16, [(224, 224), (112, 112), (56, 56), (28, 28), (14, 14)]),
        ((28, 28), 14, [(28, 28), (14, 14)]),
        ((16, 32), 8, [(16, 32), (8, 16), (4, 8), (2, 4)]),
    ],
)
def test_scales_have_the_sizes_of_the_grid_times_a_factor(
    image_size: tuple[int, int], patch_size: int, sizes: list[tuple[int, int]]
) -> None:
    network = autoencoder(img_size=image_size, patch_size=patch_size)
    output = network(torch.rand(2, 3, *image_size), torch.rand(2, network.num_patches))
    sides = [patch_size // 2**scale for scale in range(len(sizes))]
    assert [tuple(pred.shape) for pred in output.preds] == [(2, network.num_patches, 3 * k * k) for k in sides]
    assert [tuple(image.shape) for image in network.images(output.preds)] == [(2, 3, *size) for size in sizes]
    assert network.num_scales == len(sizes)
    assert output.pred is output.preds[0]


def test_every_parameter_learns_from_all_scales() -> None:
    network = autoencoder()
    output = network(torch.rand(2, 3, 32, 32), torch.rand(2, 16))
    torch.stack([pred.square().mean() for pred in output.preds]).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["encoder.pos_embed"]


@pytest.mark.parametrize("multi_scale", [False, True])
def test_initialisation_leaves_nothing_out(multi_scale: bool) -> None:
    network = autoencoder(multi_scale=multi_scale)
    for name, parameter in network.named_parameters():
        if name != "encoder.pos_embed":
            parameter.data.fill_(torch.nan)
    init_mae_weights(network)
    assert [name for name, p in network.named_parameters() if not p.isfinite().all()] == []


@pytest.mark.parametrize("multi_scale", [False, True])
def test_the_last_layer_makes_the_pixels_at_full_size(multi_scale: bool) -> None:
    network = autoencoder(multi_scale=multi_scale)
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    before = network(images, noise).preds
    network.decoder.last_layer.data.zero_()
    after = network(images, noise).preds
    assert before[0].any()
    assert not after[0].any(), "the bias starts at zero"
    assert all(torch.equal(*pair) for pair in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("multi_scale", [False, True])
def test_checkpointing_gives_the_same_second_derivative(multi_scale: bool) -> None:
    """Path length differentiates through blocks that run again; the first derivative is in test_step."""
    network = autoencoder(multi_scale=multi_scale)
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    found = []
    for network.grad_checkpointing in (False, True):
        network.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            output = network(images, noise)
            (slope,) = torch.autograd.grad(output.pred.square().sum(), output.latent, create_graph=True)
            slope.square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert any(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("multi_scale", [False, True])
def test_checkpointed_blocks_run_again_and_give_the_same(multi_scale: bool) -> None:
    network = autoencoder(multi_scale=multi_scale)
    blocks = [*network.encoder.blocks, *network.decoder.blocks]
    runs: list[nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _inputs: runs.append(module))
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    found = []
    for network.grad_checkpointing, times in ((False, 1), (True, 2)):
        runs.clear()
        output = network(images, noise)
        torch.stack([pred.square().mean() for pred in output.preds]).sum().backward()
        assert [runs.count(block) for block in blocks] == [times] * len(blocks)
        found.append(output)
    for plain, again in zip(found[0].preds, found[1].preds, strict=True):
        assert torch.equal(plain, again)


def test_half_precision_is_close_and_gives_images_in_float32() -> None:
    network = autoencoder()
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    exact = network.images(network(images, noise).preds)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.images(network(images, noise).preds)
    for image, expected in zip(rough, exact, strict=True):
        torch.testing.assert_close(image, expected, atol=0.05, rtol=0)  # assert_close compares the type too


def test_compiles_in_one_graph() -> None:
    network = autoencoder(depth=1, decoder_depth=2)
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, noise).preds, network(images, noise).preds)
