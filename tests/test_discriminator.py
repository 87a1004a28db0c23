"""The discriminators: oracles for their parts, and what the method asks of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceptual_mae_models.autoencoder import image_pyramid
from training.networks.discriminator import (
    EqualisedConv2d,
    Judgement,
    MultiScaleDiscriminator,
    SingleScaleDiscriminator,
    minibatch_stddev,
)

KINDS = ["single", "multi"]


def build(kind: str) -> tuple[nn.Module, int]:
    """A small discriminator for images of 32, biases off their neutral zero, and its number of scales."""
    torch.manual_seed(0)
    scales = {"single": 1, "multi": 3}[kind]
    network = {
        "single": lambda: SingleScaleDiscriminator((32, 32), 8),
        "multi": lambda: MultiScaleDiscriminator((32, 32), 3, 256),
    }[kind]()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network, scales


def pyramid(n: int, scales: int, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, ...]:
    return image_pyramid(torch.rand(n, 3, *size), scales)


def joined(*pyramids: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(images) for images in zip(*pyramids, strict=True))


def test_convolution_is_scaled_when_used() -> None:
    torch.manual_seed(0)
    conv = EqualisedConv2d(6, 200, 3, stride=2, padding=1)
    assert conv.weight.std().item() == pytest.approx(1, abs=0.03)
    assert not conv.bias.any()
    x = torch.randn(2, 6, 8, 8)
    expected = F.conv2d(x, conv.weight * math.sqrt(2 / (6 * 9)), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("kernel_size", [1, 4, (2, 5)])
def test_convolution_of_unit_input_has_the_deviation_asked_for(gain: float, kernel_size: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = EqualisedConv2d(32, 64, kernel_size, gain=gain)
    with torch.no_grad():
        assert conv(torch.randn(8, 32, 9, 9)).std().item() == pytest.approx(gain, rel=0.05)


def test_activations_neither_grow_nor_shrink_with_depth() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, 8, 8)
    for _ in range(8):
        x = F.leaky_relu(EqualisedConv2d(64, 64, 1)(x), 0.2)
    assert 0.5 < x.square().mean().sqrt().item() < 2


def test_stddev_is_that_of_neighbours() -> None:
    x = torch.randn(8, 3, 2, 2)
    found = minibatch_stddev(x, 4)
    assert torch.equal(found[:, :3], x)
    for group in (slice(0, 4), slice(4, 8)):
        expected = x[group].numpy().std(axis=0).mean()
        assert found[group, 3].flatten().tolist() == pytest.approx([expected] * 16, rel=1e-5)


def test_stddev_of_equal_images_has_a_finite_gradient() -> None:
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    minibatch_stddev(x, 4)[:, 2].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_single_scale_maps() -> None:
    network = SingleScaleDiscriminator((32, 48), 8)
    verdict = network(pyramid(4, 1, (32, 48)))
    shapes = [(4, 8, 16, 24), (4, 16, 8, 12), (4, 32, 4, 6), (4, 64, 2, 3)]
    assert [tuple(feature.shape) for feature in verdict.features] == shapes
    assert verdict.logits.shape == (4,)


@pytest.mark.parametrize(
    ("size", "scales", "shapes"),
    [
        # base 256, at most 24: 8 channels at sides 32 and 16, then 24 (of 32) from side 8 on
        ((32, 32), 3, [(4, 16, 16, 16), (4, 24, 8, 8)]),
        ((32, 32), 4, [(4, 16, 16, 16), (4, 24, 8, 8), (4, 24, 4, 4)]),
        ((32, 32), 6, [(4, 16, 16, 16), (4, 24, 8, 8), (4, 24, 4, 4), (4, 24, 2, 2), (4, 24, 1, 1)]),
        ((64, 64), 4, [(4, 8, 32, 32), (4, 16, 16, 16), (4, 24, 8, 8)]),
        ((28, 28), 2, [(4, 16, 14, 14)]),
        ((16, 32), 3, [(4, 16, 8, 16), (4, 24, 4, 8)]),
        ((32, 32), 1, []),
    ],
)
def test_multi_scale_maps(size: tuple[int, int], scales: int, shapes: list[tuple[int, ...]]) -> None:
    network = MultiScaleDiscriminator(size, scales, 256, max_channels=24)
    verdict = network(pyramid(4, scales, size))
    assert [tuple(feature.shape) for feature in verdict.features] == shapes
    assert verdict.logits.shape == (4,)


@pytest.mark.parametrize("size", [64, 224])
def test_number_of_maps_at_the_sizes_of_the_models(size: int) -> None:
    scales = {64: 4, 224: 5}[size]
    single, multi = SingleScaleDiscriminator((size, size), 2), MultiScaleDiscriminator((size, size), scales, 128)
    with torch.no_grad():
        for network, given, sides in (
            (single, 1, [size // 2**stage for stage in (1, 2, 3, 4)]),
            (multi, scales, [size // 2**scale for scale in range(1, scales)]),
        ):
            verdict = network(pyramid(2, given, (size, size)), parts=2)
            assert [feature.shape[-1] for feature in verdict.features] == sides
            assert verdict.logits.shape == (2,)


def test_channels_follow_the_base() -> None:
    with torch.device("meta"):
        network = MultiScaleDiscriminator((224, 224), 5, 8192)
    # 8192 / 224, 112, 56 = 36, 73, 146; at most 256 below
    assert [entry.weight.shape[0] for entry in network.from_rgb] == [32, 72, 144, 256, 256]


@pytest.mark.parametrize("kind", KINDS)
def test_middle_grey_is_zero_inside(kind: str) -> None:
    network, scales = build(kind)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    grey = tuple(torch.full_like(image, 0.5) for image in pyramid(4, scales))
    verdict = network(grey)
    assert not any(feature.any() for feature in verdict.features)
    white = network(tuple(torch.ones_like(image) for image in grey)).features[0]
    black = network(tuple(torch.zeros_like(image) for image in grey)).features[0]
    assert white.any()
    assert black.any()


def test_first_map_equals_a_plain_convolution() -> None:
    network = SingleScaleDiscriminator((32, 32), 8)
    images = torch.rand(4, 3, 32, 32)
    weight = network.stages[0].weight * math.sqrt(2 / (3 * 16))
    expected = F.leaky_relu(F.conv2d(2 * images - 1, weight, stride=2, padding=1), 0.2)
    torch.testing.assert_close(network((images,)).features[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_every_scale_counts(kind: str) -> None:
    network, scales = build(kind)
    images = tuple(image.requires_grad_() for image in pyramid(4, scales))
    network(images).logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(image.grad is not None and image.grad.any() for image in images)


@pytest.mark.parametrize("scales", [2, 6])
def test_every_parameter_counts_where_the_pyramid_ends_late(scales: int) -> None:
    """Six scales of 32 end at one pixel, below the side where blocks stop by themselves."""
    torch.manual_seed(0)
    network = MultiScaleDiscriminator((32, 32), scales, 256)
    network(pyramid(4, scales)).logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("n", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_joined_pass_equals_separate_ones(kind: str, n: int) -> None:
    network, scales = build(kind)
    real, fake = pyramid(n, scales), pyramid(n, scales)
    with torch.no_grad():
        both = network(joined(real, fake), parts=2)
        halves: list[Judgement] = [network(real), network(fake)]
    torch.testing.assert_close(both.logits, torch.cat([half.logits for half in halves]))
    for index, feature in enumerate(both.features):
        torch.testing.assert_close(feature, torch.cat([half.features[index] for half in halves]))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_do_not_meet_in_a_group(kind: str) -> None:
    """Two real and two rebuilt images would fill one group of four."""
    network, scales = build(kind)
    images = tuple(image.requires_grad_() for image in pyramid(4, scales))
    for parts, mixed in ((1, True), (2, False)):
        (gradient,) = torch.autograd.grad(network(images, parts).logits[:2].sum(), images[:1])
        assert gradient[:2].any()
        assert bool(gradient[2:].any()) == mixed


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_on_the_slope_has_the_gradient_of_finite_differences(kind: str) -> None:
    """R1's derivative along its own gradient is that gradient's squared norm.

    R1 jumps where an activation changes sign, so the difference is taken over a distance too small to meet one, in
    float64; and of one image, since the statistic of several is float32 whatever comes in.
    """
    network, scales = build(kind)
    network.double()
    images = tuple(image.double().requires_grad_() for image in pyramid(1, scales))

    def penalty() -> Tensor:
        slopes = torch.autograd.grad(network(images).logits.sum(), images, create_graph=True)
        return torch.stack([slope.square().sum() for slope in slopes]).sum()

    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    gradients = torch.autograd.grad(penalty(), weights)
    assert all(gradient.any() for gradient in gradients)
    squared = sum(gradient.square().sum().item() for gradient in gradients)
    distance = 1e-7 / math.sqrt(squared)
    values = []
    for steps in (1, -2):  # forth, then back through the start to the other side
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.data += steps * distance * gradient
        values.append(penalty().item())
    assert (values[0] - values[1]) / (2 * distance) == pytest.approx(squared, rel=1e-4)


def test_penalty_passes_through_the_statistic_of_a_group() -> None:
    """Of images at a and -a the statistic is a; its square has the slope (a, -a), and that the squared norm 2 a^2."""
    a = torch.tensor(3.0, requires_grad=True)
    images = torch.stack([a, -a]).view(2, 1, 1, 1)
    statistic = minibatch_stddev(images, 2)[0, 1, 0, 0]
    (slope,) = torch.autograd.grad(statistic.square(), images, create_graph=True)  # (a, -a)
    (gradient,) = torch.autograd.grad(slope.square().sum(), a)  # of 2 a^2
    torch.testing.assert_close(slope.flatten(), torch.tensor([3.0, -3.0]))
    assert gradient.item() == pytest.approx(12.0)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close_and_its_logits_are_float32(kind: str) -> None:
    network, scales = build(kind)
    images = pyramid(4, scales)
    exact = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(images)
    assert rough.features[0].dtype == torch.bfloat16
    torch.testing.assert_close(rough.logits, exact.logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind: str) -> None:
    network, scales = build(kind)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for size, parts in ((8, 2), (4, 1)):  # as in a step: real and rebuilt images together, then the latter alone
        images = pyramid(size, scales)
        torch.testing.assert_close(compiled(images, parts), network(images, parts))


@pytest.mark.parametrize(("kind", "giga"), [("single", 2.66), ("multi", 15.66)])
def test_cost_of_an_image_of_224(kind: str, giga: float) -> None:
    """Forward, counting a multiplication and an addition as two operations."""
    network, scales = {
        "single": (SingleScaleDiscriminator((224, 224), 64), 1),
        "multi": (MultiScaleDiscriminator((224, 224), 5, 8192), 5),
    }[kind]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image_pyramid(torch.rand(1, 3, 224, 224), scales))
    assert counter.get_total_flops() / 1e9 == pytest.approx(giga, abs=0.05)
