"""Losses against known answers, closed forms and torchmetrics."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import image as torchmetrics

from training.losses.adversarial import ADVERSARIAL_LOSSES
from training.losses.perceptual import feature_matching, gram, style_matching
from training.losses.pixel import patch_error
from training.losses.structural import MS_SSIM_WEIGHTS, ms_ssim, ms_ssim_loss, ssim_l1, ssim_map

Loss = Callable[[Tensor, Tensor], Tensor]
STRUCTURAL: list[Loss] = [ssim_l1, ms_ssim, ms_ssim_loss]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def photograph_like(side: int | tuple[int, int], seed: int = 0) -> Tensor:
    """Something at every scale, (2, 3, H, W) in [0, 1]."""
    size = (side, side) if isinstance(side, int) else side
    layers = [F.interpolate(random(2, 3, n, n, seed=seed + n), size=size, mode="bilinear") for n in (2, 5, 13, 40)]
    return torch.stack([*layers, random(2, 3, *size, seed=seed)]).mean(dim=0)


# pixels


@pytest.mark.parametrize(
    ("hidden_only", "power", "expected"),
    [(True, 1, (2 + 4) / 2), (True, 2, (5 + 16) / 2), (False, 1, (2 + 0 + 4) / 3), (False, 2, (5 + 0 + 16) / 3)],
)
def test_patch_error_has_known_values(hidden_only: bool, power: int, expected: float) -> None:
    target = torch.ones(1, 3, 2)
    pred = torch.tensor([[[2.0, 4.0], [1.0, 1.0], [-3.0, 5.0]]])  # off by (1, 3), (0, 0), (-4, 4)
    mask = torch.tensor([[1.0, 0.0, 1.0]]) if hidden_only else None
    assert patch_error(pred, target, mask, power).item() == pytest.approx(expected)


def test_visible_patches_get_a_gradient_from_the_whole_image_only() -> None:
    pred, target, mask = random(1, 4, 6), random(1, 4, 6, seed=1), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    for given, learning in ((mask, [False, True, True, False]), (None, [True] * 4)):
        leaf = pred.clone().requires_grad_()
        patch_error(leaf, target, given, 1).backward()
        assert leaf.grad is not None
        assert leaf.grad.any(dim=2).tolist() == [learning]


# structure


def test_ssim_l1_of_flat_images_is_the_closed_form() -> None:
    """Without contrast the structure term is 1 and every scale says the same."""
    a, b = 0.3, 0.8
    luminance = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    expected = 4 * (0.85 * (1 - luminance) / 2 + 0.15 * abs(a - b))
    loss = ssim_l1(torch.full((2, 3, 32, 32), a), torch.full((2, 3, 32, 32), b))
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_ssim_l1_equals_statistics_of_single_boxes() -> None:
    """Mean, variance and covariance of every 3 x 3 box, taken as such, in float64."""
    pred, target = random(2, 3, 32, 40).double(), photograph_like((32, 40)).double()
    expected = torch.zeros((), dtype=torch.float64)
    a, b = pred, target
    for _ in range(4):
        box_a, box_b = (x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2) for x in (a, b))  # (N, 3, H-2, W-2, 9)
        mean_a, mean_b = box_a.mean(-1), box_b.mean(-1)
        covariance = ((box_a - mean_a[..., None]) * (box_b - mean_b[..., None])).mean(-1)
        variances = box_a.var(-1, unbiased=False) + box_b.var(-1, unbiased=False)
        ssim = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
        ssim = ssim / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))
        expected += 0.85 * ((1 - ssim) / 2).mean() + 0.15 * (a - b).abs().mean()
        a, b = (x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-2, -1)) for x in (a, b))
    assert ssim_l1(pred, target).item() == pytest.approx(expected.item(), abs=1e-5)


def test_ssim_map_equals_torchmetrics() -> None:
    target = photograph_like((40, 31))
    pred = target + 0.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    _, theirs = torchmetrics.structural_similarity_index_measure(
        pred.double(), target.double(), data_range=1.0, return_full_image=True
    )
    ours = ssim_map(pred, target)
    assert ours.shape == (2, 3, 30, 21)
    torch.testing.assert_close(ours.double(), theirs[..., 5:-5, 5:-5], atol=1e-5, rtol=0)


def ms_ssim_from_torchmetrics(pred: Tensor, target: Tensor, weights: list[float]) -> Tensor:
    """From torchmetrics' terms in float64, over windows inside the image.

    Its own MS-SSIM takes the last scale's luminance over a border that it pads by reflection (1e-4 off at 224).
    """
    pred, target, result = pred.double(), target.double(), torch.ones(len(pred), dtype=torch.float64)
    for weight in weights[:-1]:
        _, contrast = torchmetrics.structural_similarity_index_measure(
            pred, target, data_range=1.0, reduction="none", return_contrast_sensitivity=True
        )
        result = result * contrast.relu() ** weight
        pred, target = F.avg_pool2d(pred, 2), F.avg_pool2d(target, 2)
    _, full = torchmetrics.structural_similarity_index_measure(pred, target, data_range=1.0, return_full_image=True)
    return (result * full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)).relu() ** weights[-1]).mean()


@pytest.mark.parametrize(
    ("side", "num_scales", "noise"),
    [(176, 5, 0.5), (175, 4, 0.05), ((48, 90), 3, 0.05), ((48, 90), 3, 0.5), (22, 2, 0.05), (21, 1, 0.05)],
)
def test_ms_ssim_equals_torchmetrics(side: int | tuple[int, int], num_scales: int, noise: float) -> None:
    target = photograph_like(side)
    pred = target + noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    kept = MS_SSIM_WEIGHTS[:num_scales]
    expected = ms_ssim_from_torchmetrics(pred, target, [weight / sum(kept) for weight in kept])
    assert ms_ssim(pred, target).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("side", "num_scales"), [(176, 5), (64, 3)])
def test_ms_ssim_is_torchmetrics_own_up_to_the_padded_border(side: int, num_scales: int) -> None:
    target = photograph_like(side)
    pred = target + 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    kept = MS_SSIM_WEIGHTS[:num_scales]
    theirs = torchmetrics.multiscale_structural_similarity_index_measure(
        pred, target, data_range=1.0, betas=tuple(weight / sum(kept) for weight in kept)
    )
    assert ms_ssim(pred, target).item() == pytest.approx(theirs.item(), abs=2e-4)


def test_ms_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        ms_ssim(random(1, 3, 10, 64), random(1, 3, 10, 64))


@pytest.mark.parametrize("image", [photograph_like(48), torch.ones(1, 3, 48, 48), torch.zeros(1, 3, 48, 48)])
def test_equal_images_are_perfect(image: Tensor) -> None:
    assert ms_ssim(image, image).item() == pytest.approx(1, abs=1e-6)
    assert ms_ssim_loss(image, image).item() == pytest.approx(0, abs=1e-6)
    assert ssim_l1(image, image).item() == pytest.approx(0, abs=1e-6)


def test_one_inverted_scale_makes_ms_ssim_zero_and_leaves_its_loss_a_gradient() -> None:
    detail = 0.2 * torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    detail = detail - F.interpolate(F.avg_pool2d(detail, 2), scale_factor=2)  # none of it is left at half size
    coarse, wrong = (F.interpolate(random(2, 3, n, n), scale_factor=48 // n) for n in (6, 12))
    target, pred = coarse + detail, (coarse + 0.1 * wrong - detail).requires_grad_()
    assert ms_ssim(pred, target).item() == 0
    loss = ms_ssim_loss(pred, target)
    loss.backward()
    assert 0 < loss.item() < 1
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    assert pred.grad.abs().sum() > 1e-3


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_ms_ssim_loss_is_one_minus_ms_ssim_where_nothing_is_inverted(noise: float) -> None:
    target = photograph_like(48)
    pred = target + noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    assert ms_ssim_loss(pred, target).item() == pytest.approx(1 - ms_ssim(pred, target).item(), abs=1e-6)


@pytest.mark.parametrize("loss", [ssim_l1, ms_ssim_loss])
def test_structural_losses_fall_on_the_way_to_the_target(loss: Loss) -> None:
    target, start = photograph_like(48), random(2, 3, 48, 48, seed=9)
    values = [loss(start.lerp(target, share), target).item() for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(before - after > 0.05 for before, after in pairwise(values))
    assert values[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", STRUCTURAL)
def test_a_negative_of_the_image_is_far_away_and_gives_finite_gradients(loss: Loss) -> None:
    target = photograph_like(48)
    pred = (1 - target).requires_grad_()
    value = loss(pred, target)
    (gradient,) = torch.autograd.grad(value, pred)
    assert gradient.isfinite().all()
    assert value == 0 if loss is ms_ssim else value > 0.99


@pytest.mark.parametrize("loss", STRUCTURAL)
@pytest.mark.parametrize("offset", [-1e4, -300.0, -1.0, 0.0, 1.0, 100.0, 300.0, 1e3, 1e4])
def test_predictions_outside_the_range_give_finite_gradients(loss: Loss, offset: float) -> None:
    target = photograph_like(32)
    target[0] = 1.0  # a flat image has the least to divide by
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    for texture in (0.0, 0.01, 5.0):
        pred = (offset + texture * noise).requires_grad_()
        value = loss(pred, target)
        value.backward()
        assert value >= 0
        assert loss is ssim_l1 or value <= 1
        assert pred.grad is not None
        assert pred.grad.isfinite().all()


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_rounding_of_large_predictions_does_not_pass_for_structure(offset: float) -> None:
    """The structure term is a correlation, at most 1; the luminance term of means m and t <= 1 is at most 2 t / m."""
    target = random(2, 3, 64, 64)
    pred = offset + 1e-3 * random(2, 3, 64, 64, seed=1)
    assert ssim_map(pred, target).abs().max() <= 2 / offset


@pytest.mark.parametrize("loss", STRUCTURAL)
def test_structure_is_float32_whatever_comes_in(loss: Loss) -> None:
    target = photograph_like(32).bfloat16()
    pred = (target + 0.1 * random(2, 3, 32, 32).bfloat16()).bfloat16()
    expected = loss(pred.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(pred, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


# perception


def test_gram_has_known_values() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # (1, 2, 1, 2)
    expected = torch.tensor([[[5.0, 1.0], [1.0, 10.0]]]) / (2 * 1 * 2)
    torch.testing.assert_close(gram(features), expected)


def test_gram_does_not_depend_on_the_size_of_the_map() -> None:
    features = random(2, 5, 4, 6)
    torch.testing.assert_close(gram(features.repeat(1, 1, 3, 2)), gram(features))
    torch.testing.assert_close(gram(F.interpolate(features, scale_factor=2)), gram(features))


def test_gram_is_float32_under_autocast() -> None:
    features = 300 * torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    flat = features.double().flatten(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix = gram(features)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), flat @ flat.mT / (8 * 16 * 16), atol=1e-2, rtol=1e-5)


def test_feature_matching_sums_the_means_of_the_maps() -> None:
    fake = [torch.zeros(2, 1, 2, 2), torch.zeros(2, 3, 1, 1)]
    real = [torch.full((2, 1, 2, 2), -2.0), torch.tensor([0.0, 0.0, 3.0]).view(1, 3, 1, 1).expand(2, -1, -1, -1)]
    assert feature_matching(fake, real).item() == pytest.approx(2 + 1)


def test_style_matching_sums_the_means_of_the_matrices() -> None:
    fake, real = torch.ones(1, 2, 1, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    # grams (1/2) [[1, 1], [1, 1]] and (1/2) [[1, -1], [-1, 1]]: two of four elements are 1 apart
    assert style_matching([fake, fake], [real, fake]).item() == pytest.approx(0.5)
    assert style_matching([fake, fake], [real, real]).item() == pytest.approx(1.0)


def test_style_ignores_places_and_features_do_not() -> None:
    features = random(2, 4, 5, 5)
    moved = features.flatten(2)[:, :, torch.randperm(25)].view_as(features)
    assert style_matching([moved], [features]).item() == pytest.approx(0, abs=1e-6)
    assert feature_matching([moved], [features]) > 0.1


@pytest.mark.parametrize("matching", [feature_matching, style_matching])
@pytest.mark.parametrize("autocast", [False, True])
def test_matching_teaches_the_fake_side_only(
    matching: Callable[[list[Tensor], list[Tensor]], Tensor], autocast: bool
) -> None:
    fake = [random(2, 3, 4, 4).requires_grad_(), random(2, 5, 2, 2).requires_grad_()]
    real = [random(2, 3, 4, 4, seed=1).requires_grad_(), random(2, 5, 2, 2, seed=1).requires_grad_()]
    expected = matching(fake, real)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = matching(fake, real)
        assert matching(fake, [feature.clone() for feature in fake]).item() == 0
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(feature.grad is not None and feature.grad.any() for feature in fake)
    assert all(feature.grad is None for feature in real)


# the game

REAL, FAKE = torch.tensor([0.0, 2.0]), torch.tensor([-3.0, 0.5])


def softplus(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp().log1p())


@pytest.mark.parametrize(
    ("name", "d_loss", "g_loss"),
    [
        ("least_squares", 0.5 * (1 + 1) / 2 + 0.5 * (9 + 0.25) / 2, 0.5 * (16 + 0.25) / 2),
        (
            "logistic",
            (softplus(0.0) + softplus(-2.0)) / 2 + (softplus(-3.0) + softplus(0.5)) / 2,
            (softplus(3.0) + softplus(-0.5)) / 2,
        ),
        ("hinge", (1 + 0) / 2 + (0 + 1.5) / 2, 1.25),
        ("wgan_gp", -1.25 - 1.0, 1.25),
    ],
)
def test_adversarial_losses_have_known_values(name: str, d_loss: float, g_loss: float) -> None:
    loss = ADVERSARIAL_LOSSES[name]
    assert loss.d_loss(REAL, FAKE).item() == pytest.approx(d_loss, rel=1e-6)
    assert loss.g_loss(FAKE).item() == pytest.approx(g_loss, rel=1e-6)


def test_least_squares_are_taken_per_sample() -> None:
    """Logits 0 and 2 average to the target 1: the square of the mean would be 0."""
    assert ADVERSARIAL_LOSSES["least_squares"].d_loss(REAL, torch.zeros(2)).item() == 0.5


def test_logistic_is_cross_entropy_and_finite_far_out() -> None:
    loss, far = ADVERSARIAL_LOSSES["logistic"], torch.tensor([-1e4, 1e4], requires_grad=True)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss.d_loss(REAL, FAKE), entropy(REAL, torch.ones(2)) + entropy(FAKE, torch.zeros(2)))
    torch.testing.assert_close(loss.g_loss(FAKE), entropy(FAKE, torch.ones(2)))
    (gradient,) = torch.autograd.grad(loss.d_loss(far, far) + loss.g_loss(far), far)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.5]))  # halves: of real, of fake, of the fooled


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_players_pull_in_opposite_directions(name: str) -> None:
    loss = ADVERSARIAL_LOSSES[name]
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    d_real, d_fake = torch.autograd.grad(loss.d_loss(real, fake + 0.1), (real, fake))
    (g_fake,) = torch.autograd.grad(loss.g_loss(fake), fake)
    assert (d_real < 0).all(), "real logits rise"
    assert (d_fake > 0).all(), "fake logits fall"
    assert (g_fake < 0).all(), "unless the autoencoder lifts them"


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_neutral_is_where_a_clueless_discriminator_rests(name: str) -> None:
    loss = ADVERSARIAL_LOSSES[name]
    logit = torch.tensor([loss.neutral], requires_grad=True)
    (slope,) = torch.autograd.grad(loss.d_loss(logit, logit), logit)
    assert slope.item() == pytest.approx(0, abs=1e-7)
    above, below = (torch.tensor([loss.neutral + by]) for by in (1.5, -1.5))  # beyond the flat part of the hinge
    assert loss.d_loss(above, above).item() == pytest.approx(loss.d_loss(below, below).item())


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_adversarial_losses_are_float32_whatever_comes_in(name: str) -> None:
    loss, real, fake = ADVERSARIAL_LOSSES[name], (5 * random(7)).bfloat16(), (-5 * random(7)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d_loss, g_loss = loss.d_loss(real, fake), loss.g_loss(fake)
    assert d_loss.dtype == g_loss.dtype == torch.float32
    assert torch.equal(d_loss, loss.d_loss(real.float(), fake.float()))
    assert torch.equal(g_loss, loss.g_loss(fake.float()))
