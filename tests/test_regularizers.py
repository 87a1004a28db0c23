"""Penalties and weights that are made of derivatives, against closed forms and finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.losses.adversarial import adaptive_weight
from training.losses.regularizers import (
    gradient_penalty,
    lazy_optimizer_settings,
    path_length_penalty,
    path_lengths,
    r1_penalty,
    update_mean_length,
)
from training.penalties import penalties
from training.recipes import AdversarialRecipe

Pyramid = tuple[Tensor, ...]
SIZES = (4, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pyramid(n: int, seed: int) -> Pyramid:
    return tuple(normal(n, 3, side, side, seed=seed + side) for side in SIZES)


def linear_judge(weights: Pyramid) -> Callable[[Pyramid], Tensor]:
    return lambda images: torch.stack(
        [(image * weight).sum(dim=(1, 2, 3)) for image, weight in zip(images, weights, strict=True)]
    ).sum(dim=0)


def half_square_judge(scale: Tensor) -> Callable[[Pyramid], Tensor]:
    """Its gradient at an image is scale times the image."""
    return lambda images: scale / 2 * torch.stack([x.square().sum(dim=(1, 2, 3)) for x in images]).sum(dim=0)


def squared_norms(images: Pyramid) -> Tensor:
    return torch.stack([image.square().sum(dim=(1, 2, 3)) for image in images]).sum(dim=0)


# R1


def test_r1_of_a_linear_discriminator_is_its_squared_norm() -> None:
    weights = tuple(weight[0].requires_grad_() for weight in pyramid(1, seed=5))
    penalty = r1_penalty(linear_judge(weights), pyramid(3, seed=0), gamma=10.0)
    torch.testing.assert_close(penalty, 5 * torch.stack([weight.square().sum() for weight in weights]).sum())
    penalty.backward()
    for weight in weights:
        torch.testing.assert_close(weight.grad, 10 * weight.detach())


def test_r1_is_the_mean_over_images_of_squared_norms() -> None:
    scale, real = torch.tensor(3.0, requires_grad=True), pyramid(4, seed=0)
    penalty = r1_penalty(half_square_judge(scale), real, gamma=0.5)
    torch.testing.assert_close(penalty, 0.25 * (9 * squared_norms(real)).mean())


def test_r1_and_its_gradient_equal_finite_differences() -> None:
    weight, images, gamma, h = 0.5 * normal(5, 12).double(), normal(2, 3, 2, 2, seed=1).double(), 10.0, 1e-4

    def judge(weight: Tensor, images: Tensor) -> Tensor:
        return (images.flatten(1) @ weight.T).tanh().sin().sum(dim=1)

    def by_differences(weight: Tensor) -> Tensor:
        steps = h * torch.eye(12, dtype=torch.float64).view(12, 1, 3, 2, 2)
        ahead, behind = (judge(weight, (images + sign * steps).flatten(0, 1)).view(12, 2) for sign in (1, -1))
        return gamma / 2 * ((ahead - behind) / (2 * h)).square().sum(dim=0).mean()

    leaf = weight.float().requires_grad_()
    penalty = r1_penalty(lambda seen: judge(leaf, seen[0]), (images.float(),), gamma)
    assert penalty.item() == pytest.approx(by_differences(weight).item(), rel=1e-4)
    penalty.backward()
    assert leaf.grad is not None
    for seed in range(3):
        direction = normal(5, 12, seed=10 + seed).double()
        slope = (by_differences(weight + h * direction) - by_differences(weight - h * direction)) / (2 * h)
        assert (leaf.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-3)


# WGAN-GP


def test_gradient_penalty_of_a_linear_discriminator_takes_one_norm_over_all_scales() -> None:
    weights = tuple(weight[0].requires_grad_() for weight in pyramid(1, seed=5))
    norm = torch.stack([weight.square().sum() for weight in weights]).sum().sqrt()
    penalty = gradient_penalty(linear_judge(weights), pyramid(3, seed=0), pyramid(3, seed=1), torch.rand(3))
    torch.testing.assert_close(penalty, 10 * (norm - 1).square())


def test_gradient_penalty_mixes_every_scale_with_the_same_epsilon() -> None:
    """The gradient of half the squared norm is the mixed image itself."""
    real, fake, epsilon = pyramid(3, seed=0), pyramid(3, seed=20), torch.tensor([0.0, 0.25, 1.0])
    scale = torch.tensor(1.0, requires_grad=True)
    norms = torch.stack(
        [
            squared_norms(tuple(e * r[i : i + 1] + (1 - e) * f[i : i + 1] for r, f in zip(real, fake, strict=True)))[0]
            for i, e in enumerate(epsilon)
        ]
    ).sqrt()
    penalty = gradient_penalty(half_square_judge(scale), real, fake, epsilon, weight=2.0)
    torch.testing.assert_close(penalty, 2 * (norms - 1).square().mean())


def test_gradient_penalty_is_finite_where_the_discriminator_is_flat() -> None:
    weights = tuple(torch.zeros(3, side, side, requires_grad=True) for side in SIZES)
    penalty = gradient_penalty(linear_judge(weights), pyramid(2, seed=0), pyramid(2, seed=1), torch.rand(2))
    penalty.backward()
    assert penalty.item() == pytest.approx(10, rel=1e-4)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)


def test_discriminator_penalties_teach_the_discriminator_only() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    real, fake = (tuple(image.requires_grad_() for image in pyramid(2, seed=seed)) for seed in (0, 1))
    for penalty in (
        r1_penalty(half_square_judge(scale), real, 1.0),
        gradient_penalty(half_square_judge(scale), real, fake, torch.tensor([0.3, 0.6])),
    ):
        scale.grad = None
        penalty.backward()
        assert scale.grad is not None
        assert scale.grad != 0
        assert all(image.grad is None for image in (*real, *fake))


# path length


def linear_decoder(weight: Tensor, side: int) -> Callable[[Tensor], Tensor]:
    """(N, T, D) -> (N, 3, side, side) by a weight (T, D, 3 * side * side)."""
    return lambda latent: torch.einsum("ntd,tdp->np", latent, weight).view(-1, 3, side, side)


def test_path_lengths_of_a_linear_decoder_are_the_closed_form() -> None:
    side, weight = 4, normal(5, 6, 48).requires_grad_()
    latent, noise = normal(3, 5, 6, seed=1).requires_grad_(), normal(3, 3, side, side, seed=2)
    jacobian = torch.einsum("tdp,np->ntd", weight, noise.flatten(1)) / side
    expected = jacobian.square().sum(dim=2).mean(dim=1).sqrt()
    lengths = path_lengths(linear_decoder(weight, side), latent, noise)
    torch.testing.assert_close(lengths, expected)

    mean_length = torch.tensor(1.5)
    penalty = path_length_penalty(lengths, mean_length)
    torch.testing.assert_close(penalty, ((expected - 1.5) ** 2).mean())
    gradients = [torch.autograd.grad(value, weight)[0] for value in (penalty, ((expected - 1.5) ** 2).mean())]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [2, 8])
def test_path_length_does_not_depend_on_the_resolution(side: int) -> None:
    """A latent number that is painted on every pixel: the noise on each of three channels sums to a variance of 1."""
    weight, latent = torch.ones(1, 1, 3 * side * side).requires_grad_(), torch.zeros(4000, 1, 1).requires_grad_()
    lengths = path_lengths(linear_decoder(weight, side), latent, normal(4000, 3, side, side))
    assert lengths.square().mean().item() == pytest.approx(3, rel=0.1)


def test_path_length_reaches_the_encoder_through_an_attached_latent_only() -> None:
    encoder, weight = normal(6, 6).requires_grad_(), normal(5, 6, 48, seed=1).requires_grad_()
    latent = normal(2, 5, 6, seed=2) @ encoder
    for attached in (True, False):
        encoder.grad = weight.grad = None
        given = latent if attached else latent.detach().requires_grad_()
        lengths = path_lengths(lambda w: linear_decoder(weight, 4)(w).tanh(), given, normal(2, 3, 4, 4, seed=3))
        path_length_penalty(lengths, torch.zeros(())).backward()
        assert weight.grad is not None
        assert weight.grad.any()
        assert (encoder.grad is not None) == attached


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_mean_length_moves_by_a_hundredth_towards_the_mean_of_all_processes(start: float) -> None:
    lengths = torch.tensor([1.0, 3.0], requires_grad=True)
    moved = update_mean_length(torch.tensor(start), lengths, lambda mean: (mean + 6.0) / 2)  # the other process saw 6
    assert moved.item() == pytest.approx(0.99 * start + 0.01 * 4)
    assert not moved.requires_grad


# taming's weight


def test_adaptive_weight_is_the_ratio_of_norms_and_keeps_the_graph() -> None:
    layer = torch.zeros(2, requires_grad=True)
    reconstruction, adversarial = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(reconstruction, adversarial, layer, lambda gradient: gradient)
    assert weight.item() == pytest.approx(5 / (2 + 1e-4))
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()
    assert layer.grad is not None
    assert layer.grad.tolist() == pytest.approx([3.0, 4 + 2 * 5 / 2.0001])


def test_adaptive_weight_is_bounded() -> None:
    layer = torch.zeros(2, requires_grad=True)
    large, none = (layer * 5).sum(), (layer * 0).sum()
    assert adaptive_weight(large, none, layer, lambda gradient: gradient).item() == 1e4
    assert adaptive_weight(none, large, layer, lambda gradient: gradient).item() == 0


def test_adaptive_weight_of_two_processes_is_that_of_the_joined_batch() -> None:
    layer, inputs, target = normal(3, 4).requires_grad_(), normal(8, 3, seed=1), normal(8, 4, seed=2)

    def weight(part: slice, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
        out = inputs[part] @ layer
        return adaptive_weight((out - target[part]).abs().mean(), out.tanh().square().mean(), layer, reduce_mean)

    gradients: list[Tensor] = []

    def note(gradient: Tensor) -> Tensor:
        gradients.append(gradient)
        return gradient

    local = [weight(slice(4), note), weight(slice(4, 8), note)]
    means = iter([(gradients[0] + gradients[2]) / 2, (gradients[1] + gradients[3]) / 2])
    joined = weight(slice(8), lambda gradient: gradient)
    torch.testing.assert_close(weight(slice(4), lambda _: next(means)), joined)
    assert all(abs(one - joined) > 1e-3 for one in local), "no test: the processes agree without reduction"


# all of them


def test_attention_has_its_second_derivative() -> None:
    """Equal to the same block with attention written out; the fused kernels of processors fail here."""
    torch.manual_seed(0)
    fused, plain = Block(12, 2), Block(12, 2)
    plain.load_state_dict(fused.state_dict())
    fused.attn.fused_attn, plain.attn.fused_attn = True, False
    latent, noise = normal(2, 16, 12).requires_grad_(), normal(2, 3, 8, 8, seed=1)

    def as_images(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda tokens: block(tokens).reshape(-1, 3, 8, 8)

    for block in (fused, plain):
        path_length_penalty(path_lengths(as_images(block), latent, noise), torch.zeros(())).backward()
        r1_penalty(
            lambda seen, block=block: block(seen[0].reshape(-1, 16, 12)).sum(dim=(1, 2)).tanh(), (noise,), 10.0
        ).backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    assert fused.attn.qkv.weight.grad is not None
    assert fused.attn.qkv.weight.grad.abs().sum() > 1e-3


def test_penalties_are_float32_under_autocast_and_run_under_no_grad() -> None:
    torch.manual_seed(0)
    judge_layer, decoder = nn.Conv2d(3, 4, 2), nn.Linear(6, 12)
    real, fake, epsilon = (normal(2, 3, 4, 4),), (normal(2, 3, 4, 4, seed=1),), torch.tensor([0.2, 0.7])
    latent, noise = normal(2, 4, 6).requires_grad_(), normal(2, 3, 4, 4, seed=2)

    def judge(images: Pyramid) -> Tensor:
        return judge_layer(images[0]).tanh().sum(dim=(1, 2, 3))

    def penalties() -> Tensor:
        lengths = path_lengths(lambda w: decoder(w).reshape(-1, 3, 4, 4).tanh(), latent, noise)
        return torch.stack(
            [
                r1_penalty(judge, real, 1.0),
                gradient_penalty(judge, real, fake, epsilon),
                path_length_penalty(lengths, torch.zeros(())),
            ]
        )

    expected = penalties()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert judge_layer(real[0]).dtype == torch.bfloat16, "autocast does nothing here"
        assert torch.equal(penalties(), expected)
    with torch.no_grad():
        assert torch.equal(penalties(), expected)


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({}, {}),
        ({"r1_gamma": 1.0, "r1_every": 8}, {"r1": 8}),
        ({"path_weight": 2.0, "path_every": 3}, {"path_length": 3}),
        ({"adversarial_loss": "wgan_gp"}, {"gradient_penalty": 1}),
        (
            {"adversarial_loss": "wgan_gp", "r1_gamma": 1.0, "path_weight": 2.0},
            {"path_length": 4, "r1": 16, "gradient_penalty": 1},
        ),
    ],
)
def test_a_recipe_uses_the_penalties_it_weighs(changes: dict[str, Any], due: dict[str, int]) -> None:
    table = penalties(AdversarialRecipe(method="test", norm_pix_loss=False, **changes))
    assert {penalty.name: penalty.every for penalty in table if penalty.every} == due
    assert {penalty.name for penalty in table if penalty.of == "autoencoder"} == {"path_length"}


def test_lazy_settings_are_stylegan2s() -> None:
    lr, betas = lazy_optimizer_settings(2e-3, (0.0, 0.99), 16)
    assert lr == pytest.approx(2e-3 * 16 / 17)
    assert betas == pytest.approx((0.0, 0.99 ** (16 / 17)))
    for interval in (None, 0):
        assert lazy_optimizer_settings(2e-3, (0.5, 0.99), interval) == (2e-3, (0.5, 0.99))
