"""Adaptive augmentation against the paper's formulas in numpy and scipy, known answers and counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from training.ada import COLOUR, GATES, GEOMETRY, NORMAL, UNIFORM, AdaController, AdaNoise, augment, draw_ada_noise

HALF = torch.tensor(0.5)
STRONG = {  # a visible value for every transform: which numbers it reads
    "x_flip": {"x_flip": 0.7},
    "quarter_turn": {"quarter_turn": 0.3},
    "pixel_shift": {"pixel_shift_x": 0.99, "pixel_shift_y": 0.01},
    "scale": {"scale": 1.5},
    "rotation_before": {"rotation_before": 0.6},
    "stretch": {"stretch": -1.5},
    "rotation_after": {"rotation_after": 0.35},
    "shift": {"shift_x": 0.8, "shift_y": -1.1},
    "brightness": {"brightness": 1.0},
    "contrast": {"contrast": 1.0},
    "luma_flip": {"luma_flip": 0.6},
    "hue": {"hue": 0.7},
    "saturation": {"saturation": -2.0},
}


def forced(*transforms: str, num: int = 1, **values: float) -> AdaNoise:
    """Noise with which, at p = 0.5, exactly the named transforms happen, with these numbers."""
    gates = torch.full((num, len(GATES)), 0.99)
    gates[:, [GATES.index(name) for name in transforms]] = 0.0
    noise = AdaNoise(gates, torch.zeros(num, len(UNIFORM)), torch.zeros(num, len(NORMAL)))
    for name, value in values.items():
        column = noise.uniform[:, UNIFORM.index(name)] if name in UNIFORM else noise.normal[:, NORMAL.index(name)]
        column.fill_(value)
    return noise


def strong(*transforms: str, num: int = 1) -> AdaNoise:
    return forced(*transforms, num=num, **{k: v for name in transforms for k, v in STRONG[name].items()})


def images_of(num: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def drawn(num: int, seed: int = 0) -> AdaNoise:
    return draw_ada_noise(num, torch.Generator().manual_seed(seed))


def smooth(height: int, width: int) -> Tensor:
    coarse = F.interpolate(images_of(8, 3, 3), size=(height, width), mode="bicubic", align_corners=False)
    return F.avg_pool2d(F.pad(coarse, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def test_nothing_happens_at_p_0() -> None:
    pyramid = (images_of(8, 12, 10), images_of(8, 6, 5))
    out = augment(pyramid, drawn(8), torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(out, pyramid, strict=True))


def test_geometry_alone_and_colour_alone_leave_the_other_samples_bit_for_bit() -> None:
    images, noise = images_of(3, 9, 7), strong(*GATES, num=3)
    noise.gates[0, :] = 0.99
    noise.gates[1, len(GEOMETRY) :] = 0.99
    noise.gates[2, : len(GEOMETRY)] = 0.99
    (out,) = augment([images], noise, HALF)
    assert torch.equal(out[0], images[0])
    assert out[1].min() >= images[1].min(), "a warp alone interpolates between the colours that are there"
    assert out[1].max() <= images[1].max()
    single = strong(*COLOUR)
    torch.testing.assert_close(out[2, :, 4:5, 2:3], augment([images[2:, :, 4:5, 2:3]], single, HALF)[0][0])


@pytest.mark.parametrize(("height", "width"), [(224, 224), (7, 10), (64, 48)])
def test_flip_equals_torch(height: int, width: int) -> None:
    """As closely as float32 tells positions apart: 1e-7 of the width, where neighbours differ by up to 1."""
    images = images_of(1, height, width)
    for uniform, expected in ((0.5, images.flip(3)), (0.49, images)):
        (out,) = augment([images], forced("x_flip", x_flip=uniform), HALF)
        torch.testing.assert_close(out, expected, atol=1e-7 * width, rtol=0)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_equal_torch(turns: int) -> None:
    images = images_of(1, 12, 12)
    (out,) = augment([images], forced("quarter_turn", quarter_turn=turns / 4 + 0.1), HALF)
    torch.testing.assert_close(out, images.rot90(turns, (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rotation_before", "rotation_after"])
def test_rotation_by_90_degrees_keeps_the_proportions(name: str) -> None:
    """Of an 8 x 14 image, turned to the left, the square in the middle is whole."""
    images = images_of(1, 8, 14)
    (out,) = augment([images], forced(name, **{name: 0.75}), torch.tensor(0.9))
    square = images[..., 3:11]
    torch.testing.assert_close(out[..., 3:11], square.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_pixel_shift_moves_by_whole_pixels_and_mirrors_at_the_edge() -> None:
    images = images_of(1, 16, 24)
    noise = forced("pixel_shift", pixel_shift_x=0.9, pixel_shift_y=0.0)  # 0.1 of 24 -> 2 right; 0.125 of 16 -> 2 up
    (out,) = augment([images], noise, HALF)
    torch.testing.assert_close(out[..., :-2, 2:], images[..., 2:, :-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[..., :2], out[..., 2:4].flip(3), atol=1e-5, rtol=0)


def paper_geometry(image: np.ndarray, u: dict[str, float], z: dict[str, float]) -> np.ndarray:
    """Appendix B with every transform on, one pixel a unit; (3, H, W)."""
    _, height, width = image.shape

    def scale(x: float, y: float) -> np.ndarray:
        return np.diag([x, y, 1.0])

    def move(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    def rotate(a: float) -> np.ndarray:  # y points down
        return np.array([[math.cos(a), math.sin(a), 0], [-math.sin(a), math.cos(a), 0], [0, 0, 1]])

    g = scale(1 - 2 * math.floor(2 * u["x_flip"]), 1)
    g = rotate(math.pi / 2 * math.floor(4 * u["quarter_turn"])) @ g
    g = move(*(round((2 * u[f"pixel_shift_{k}"] - 1) * 0.125 * n) for k, n in (("x", width), ("y", height)))) @ g
    g = scale(2 ** (0.2 * z["scale"]), 2 ** (0.2 * z["scale"])) @ g
    g = rotate(math.pi * (2 * u["rotation_before"] - 1)) @ g
    g = scale(2 ** (0.2 * z["stretch"]), 2 ** (-0.2 * z["stretch"])) @ g
    g = rotate(math.pi * (2 * u["rotation_after"] - 1)) @ g
    g = move(0.125 * z["shift_x"] * width, 0.125 * z["shift_y"] * height) @ g
    y, x = np.mgrid[:height, :width]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    points = np.stack([x.ravel() - centre[0], y.ravel() - centre[1], np.ones(x.size)])
    source = (np.linalg.inv(g) @ points)[:2] + centre[:, None]
    sampled = [map_coordinates(channel, source[::-1], order=1, mode="reflect") for channel in image]
    return np.stack(sampled).reshape(image.shape)


def paper_colour(image: np.ndarray, u: dict[str, float], z: dict[str, float]) -> np.ndarray:
    """Appendix B step by step on the colours in [-1, 1]."""
    luma = np.ones(3) / math.sqrt(3)
    x = image.reshape(3, -1) * 2 - 1
    x = x + 0.2 * z["brightness"]
    x = x * 2 ** (0.5 * z["contrast"])
    x = x - 2 * np.outer(luma, luma) @ x * math.floor(2 * u["luma_flip"])
    x = Rotation.from_rotvec(luma * math.pi * (2 * u["hue"] - 1)).as_matrix() @ x
    grey = np.outer(luma, luma) @ x
    x = grey + (x - grey) * 2 ** z["saturation"]
    return (x.reshape(image.shape) + 1) / 2


@pytest.mark.parametrize(("height", "width"), [(16, 16), (11, 20)])
def test_everything_at_once_equals_the_paper_in_numpy(height: int, width: int) -> None:
    images, noise = images_of(6, height, width, torch.float64), drawn(6, seed=3)
    (out,) = augment([images], noise, torch.ones(()))  # p = 1: every transform happens
    for i in range(6):
        u = dict(zip(UNIFORM, noise.uniform[i].double().tolist(), strict=True))
        z = dict(zip(NORMAL, noise.normal[i].double().tolist(), strict=True))
        expected = paper_colour(paper_geometry(images[i].numpy(), u, z), u, z)
        np.testing.assert_allclose(out[i].numpy(), expected, atol=1e-6)
    (out32,) = augment([images.float()], noise, torch.ones(()))
    torch.testing.assert_close(out32.double(), out, atol=5e-5, rtol=0)


def test_brightness_and_contrast() -> None:
    images = images_of(1, 4, 5)
    (out,) = augment([images], forced("brightness", brightness=1.0), HALF)
    torch.testing.assert_close(out, images + 0.1)  # 0.2 in [-1, 1]
    (out,) = augment([images], forced("contrast", contrast=2.0), HALF)
    torch.testing.assert_close(out, 2 * (images - 0.5) + 0.5)


def test_luma_flip_inverts_the_lightness_and_keeps_the_chroma() -> None:
    images = images_of(1, 4, 5)
    (out,) = augment([images], forced("luma_flip", luma_flip=0.5), HALF)
    light, flipped = images.mean(1, keepdim=True), out.mean(1, keepdim=True)
    torch.testing.assert_close(flipped, 1 - light)
    torch.testing.assert_close(out - flipped, images - light)


def test_hue_by_a_third_of_a_turn_permutes_the_channels_and_no_saturation_is_grey() -> None:
    images = images_of(1, 4, 5)
    (out,) = augment([images], forced("hue", hue=0.5 + 1 / 3), HALF)
    torch.testing.assert_close(out, images.roll(1, dims=1))
    (out,) = augment([images], forced("saturation", saturation=-100.0), HALF)
    torch.testing.assert_close(out, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_one_draw_serves_all_scales() -> None:
    fine = smooth(64, 96)
    pyramid = (fine, F.avg_pool2d(fine, 2), F.avg_pool2d(fine, 4))
    out = augment(pyramid, drawn(8, seed=5), torch.ones(()))
    for level, factor in ((1, 2), (2, 4)):
        error = (F.avg_pool2d(out[0], factor) - out[level]).abs().mean()
        assert error < 0.02 * out[0].std()
    (other,) = augment(pyramid[1:2], drawn(8, seed=6), torch.ones(()))
    assert (F.avg_pool2d(out[0], 2) - other).abs().mean() > 0.2 * out[0].std(), "another draw is far away"


def test_a_coarse_scale_shifts_by_the_same_share() -> None:
    """3 of 32 pixels are 1.5 of 16: halfway between neighbours."""
    images = images_of(1, 16, 16)
    noise = forced("pixel_shift", pixel_shift_x=0.9, pixel_shift_y=0.5)
    _, out = augment([images_of(1, 32, 32), images], noise, HALF)
    expected = (images[..., :-2] + images[..., 1:-1]) / 2
    torch.testing.assert_close(out[..., 2:], expected, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_the_others_and_shares_make_the_whole() -> None:
    images, noise = images_of(6, 9, 11), drawn(6)
    p = torch.tensor(0.7)
    (whole,) = augment([images], noise, p)
    parts = [augment([images[part]], noise.share(part), p)[0] for part in (slice(0, 2), slice(2, 3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GATES)
def test_probability_of_each_transform(name: str) -> None:
    """p for each, and for the rotations 1 - sqrt(1 - p), here 0.2."""
    noise = strong(name, num=100)
    noise.gates[:, GATES.index(name)] = (torch.arange(100) + 0.5) / 100
    images = images_of(100, 8, 8)
    (out,) = augment([images], noise, torch.tensor(0.36))
    altered = (out - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    expected = 20 if name.startswith("rotation") else 36
    assert altered.tolist() == [True] * expected + [False] * (100 - expected)


@pytest.mark.parametrize("p", [0.05, 0.2])
def test_share_of_altered_samples_over_many_draws(p: float) -> None:
    """A flip does nothing half of the times, a turn a quarter, a shift of less than half a pixel rounds to nothing."""
    num = 8000
    images = images_of(1, 8, 8).expand(num, -1, -1, -1)
    (out,) = augment([images], drawn(num), torch.tensor(p))
    unaltered = ((out - images).abs().amax(dim=(1, 2, 3)) < 1e-5).float().mean().item()
    # eight pixels: shifts are round(U(-1, 1)), 0 in both directions a quarter of the times
    expected = (1 - p / 2) ** 2 * (1 - 3 * p / 4) * (1 - 3 * p / 4) * (1 - p) ** 7 * (1 - p)
    assert unaltered == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / num))


def test_draws_repeat_and_have_their_distributions() -> None:
    noise = drawn(20000)
    assert all(torch.equal(a, b) for a, b in zip(noise, drawn(20000), strict=True))
    for uniform in (noise.gates, noise.uniform):
        assert uniform.min() >= 0
        assert uniform.max() < 1
        torch.testing.assert_close(uniform.mean(0), torch.full((uniform.shape[1],), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.normal.std(0), torch.ones(len(NORMAL)), atol=0.02, rtol=0)


def test_autocast_and_half_precision_do_not_reach_the_arithmetic() -> None:
    images, noise, p = images_of(4, 8, 8).bfloat16(), drawn(4), torch.tensor(0.8)
    (plain,) = augment([images.float()], noise, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = augment([images.float()], noise, p)
        (half,) = augment([images], noise, p)
    assert torch.equal(inside, plain)
    assert half.dtype == torch.float32
    assert torch.equal(half, plain)


def test_gradient_passes() -> None:
    images = images_of(4, 8, 8).requires_grad_()
    (out,) = augment([images], drawn(4), torch.zeros(()))
    assert torch.equal(torch.autograd.grad(out.sum(), images)[0], torch.ones_like(images))
    (out,) = augment([images], forced("brightness", "x_flip", num=4, x_flip=0.9, brightness=1.0), HALF)
    weight = torch.rand(4, 3, 8, 8)
    (gradient,) = torch.autograd.grad((out * weight).sum(), images)
    torch.testing.assert_close(gradient, weight.flip(3), atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="grid_sample is twice differentiable from torch 2.12 on")
def test_first_and_second_derivative() -> None:
    noise, p = drawn(2, seed=2), torch.tensor(0.9)

    def cubed(fine: Tensor, coarse: Tensor) -> tuple[Tensor, ...]:
        return tuple(image**3 for image in augment([fine, coarse], noise, p))

    pyramid = [images_of(2, h, w, torch.float64).requires_grad_() for h, w in ((4, 6), (2, 3))]
    assert torch.autograd.gradcheck(cubed, pyramid)
    assert torch.autograd.gradgradcheck(cubed, pyramid)


def test_nothing_reads_a_tensor_on_the_host() -> None:
    """Tensors without content make any host read fail."""
    with FakeTensorMode():
        controller = AdaController()
        controller.observe(torch.zeros(4), alone)
        controller.update(images=4)
        noise = draw_ada_noise(4, torch.Generator())
        fine, coarse = augment([torch.zeros(4, 3, 8, 6), torch.zeros(4, 3, 4, 3)], noise, controller.p)
    assert (fine.shape, coarse.shape) == ((4, 3, 8, 6), (4, 3, 4, 3))


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (4, 1, 8, 8), (3, 8, 8)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="noise for 4 samples"):
        augment([torch.zeros(shape)], drawn(4), HALF)


def alone(sums: Tensor) -> Tensor:
    return sums


def test_p_rises_and_falls_by_the_images_seen() -> None:
    controller = AdaController(target=0.6, ramp_images=1000)
    controller.observe(torch.tensor([1.0, 2.0, 3.0, 0.1]), alone)
    controller.observe(torch.tensor([[5.0], [7.0], [0.2], [-9.0]]), alone)
    assert controller.update(images=100).item() == pytest.approx(6 / 8)
    assert controller.p.item() == pytest.approx(0.1)
    controller.observe(torch.tensor([1.0, 2.0, 3.0, -0.1]), alone)
    assert controller.update(images=30).item() == pytest.approx(2 / 4), "counting began anew"
    assert controller.p.item() == pytest.approx(0.07)


def test_p_stays_between_0_and_1() -> None:
    controller = AdaController(ramp_images=100)
    for logit, expected in ((-1.0, 0.0), (1.0, 0.8), (1.0, 1.0), (1.0, 1.0), (-1.0, 0.2)):
        controller.observe(torch.tensor([logit]), alone)
        controller.update(images=80)
        assert controller.p.item() == pytest.approx(expected)


def test_signs_are_counted_from_the_neutral_logit() -> None:
    controller = AdaController(neutral=0.5)
    controller.observe(torch.tensor([0.4, 0.3, 0.6, 0.5], dtype=torch.bfloat16), alone)
    assert controller.update(images=1).item() == pytest.approx(-1 / 4)


def test_two_processes_are_as_one() -> None:
    """Of unequal shares: a mean of means would fall below the target."""
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    one, *processes = (AdaController(ramp_images=1000) for _ in range(3))
    one.observe(logits, alone)
    parts = (logits[:6], logits[6:])
    sums = [torch.stack([part.sign().sum(), torch.tensor(float(part.numel()))]) for part in parts]
    for process, part, others in zip(processes, parts, reversed(sums), strict=True):
        process.observe(part, lambda mine, others=others: mine + others)
        assert torch.equal(process.sign_sum, one.sign_sum), "any process may write the checkpoint"
    expected = one.update(images=50)
    for process in processes:
        assert torch.equal(process.update(images=50), expected)
        assert process.p.item() == one.p.item() == pytest.approx(0.05)


def test_the_controller_survives_a_restart_between_two_updates() -> None:
    controller, restarted = AdaController(ramp_images=100), AdaController(ramp_images=100)
    controller.observe(torch.ones(3), alone)
    controller.update(images=20)
    controller.observe(torch.tensor([1.0, -1.0, -1.0]), alone)
    restarted.load_state_dict(controller.state_dict())
    for each in (controller, restarted):
        each.observe(torch.ones(1), alone)
        assert each.update(images=5).item() == 0
        assert each.p.item() == pytest.approx(0.15)


def test_p_stays_where_nothing_was_observed() -> None:
    controller = AdaController(ramp_images=100)
    controller.p.fill_(0.3)
    assert controller.update(images=10).isnan()
    assert controller.p.item() == pytest.approx(0.3)
