"""Adaptive discriminator augmentation: what the discriminator sees is changed at random, as often as it overfits.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B: the pixel blitting,
geometry and colour transforms ("bgc"), each of them with probability p for each sample, and the controller of p.

Two departures. Images are sampled bilinearly, once, without the paper's wavelet low-pass filter, so a strong shrinking
aliases. Beyond its edges an image is mirrored endlessly, where the paper mirrors it once in a finite margin.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GEOMETRY = ("x_flip", "quarter_turn", "pixel_shift", "scale", "rotation_before", "stretch", "rotation_after", "shift")
COLOUR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
GATES = GEOMETRY + COLOUR
"""The transforms in the order in which they happen: the columns of `AdaNoise.gates`."""
_ROTATIONS = ("rotation_before", "rotation_after")
UNIFORM = ("x_flip", "quarter_turn", "pixel_shift_x", "pixel_shift_y", *_ROTATIONS, "luma_flip", "hue")
"""The columns of `AdaNoise.uniform`."""
NORMAL = ("scale", "stretch", "shift_x", "shift_y", "brightness", "contrast", "saturation")
"""The columns of `AdaNoise.normal`."""

_SHIFT = 0.125  # of the image's width or height
_LOG2_SCALE, _BRIGHTNESS, _LOG2_CONTRAST, _LOG2_SATURATION = 0.2, 0.2, 0.5, 1.0  # standard deviations


class AdaNoise(NamedTuple):
    """The random numbers that decide the augmentation of N samples, whatever p is."""

    gates: Tensor
    """(N, 13) uniform in [0, 1): a transform happens where its number is below its probability."""
    uniform: Tensor
    """(N, 8) uniform in [0, 1)."""
    normal: Tensor
    """(N, 7) standard normal."""

    def share(self, part: slice) -> "AdaNoise":
        """The numbers of some of the samples."""
        return AdaNoise(*(numbers[part] for numbers in self))


def draw_ada_noise(num: int, generator: torch.Generator) -> AdaNoise:
    """Draw for `num` samples, float32 on the CPU."""
    return AdaNoise(
        torch.rand(num, len(GATES), generator=generator),
        torch.rand(num, len(UNIFORM), generator=generator),
        torch.randn(num, len(NORMAL), generator=generator),
    )


def augment(pyramid: Sequence[Tensor], noise: AdaNoise, p: Tensor) -> tuple[Tensor, ...]:
    """Change images at random, twice differentiably (torch >= 2.12) and without a host synchronisation.

    All scales undergo the same change, given in shares of the image's size: a shift by whole pixels of the finest scale
    is the same share of a coarser one, so not of whole pixels there. What no transform touches is returned bit for bit.

    Args:
        pyramid: (N, 3, h, w) images in [0, 1], fine to coarse, on one device.
        noise: For N samples, on that device.
        p: () float32 in [0, 1] on that device, the probability of each transform; each of the two rotations has
            1 - sqrt(1 - p), so that p is that of at least one.

    Returns:
        The pyramid in float32 (float64 stays), whatever autocast says; values may leave [0, 1].

    Raises:
        ValueError: If a scale has another shape than (N, 3, h, w).
    """
    num = noise.gates.shape[0]
    for images in pyramid:
        if images.ndim != 4 or images.shape[:2] != (num, 3):
            raise ValueError(f"noise for {num} samples wants images of shape ({num}, 3, h, w), not {(*images.shape,)}")
    height, width = pyramid[0].shape[-2:]
    dtype = torch.promote_types(pyramid[0].dtype, torch.float32)
    with torch.autocast(pyramid[0].device.type, enabled=False):
        is_open = _open_gates(noise.gates, p)
        gate = {name: column.to(dtype) for name, column in is_open.items()}
        uniform = dict(zip(UNIFORM, noise.uniform.to(dtype).unbind(1), strict=True))
        normal = dict(zip(NORMAL, noise.normal.to(dtype).unbind(1), strict=True))
        sources = _sources(gate, uniform, normal, height, width)
        colours = _colours(gate, uniform, normal)
        moved = functools.reduce(torch.logical_or, (is_open[name] for name in GEOMETRY))[:, None, None, None]
        dyed = functools.reduce(torch.logical_or, (is_open[name] for name in COLOUR))[:, None, None, None]

        def change(images: Tensor) -> Tensor:
            images = images.to(dtype)
            images = torch.where(moved, _warp(images, sources, width / height), images)
            return torch.where(dyed, _dye(images, colours), images)

        return tuple(change(images) for images in pyramid)


def _open_gates(gates: Tensor, p: Tensor) -> dict[str, Tensor]:
    """For each transform, (N,) true where it happens."""
    p_rotation = 1 - torch.sqrt(1 - p)
    return {
        name: column < (p_rotation if name in _ROTATIONS else p)
        for name, column in zip(GATES, gates.unbind(1), strict=True)
    }


# Every transform below is the identity where its parameter is 0, which is how a closed gate (0) shuts it out.
Columns = Mapping[str, Tensor]


def _sources(gate: Columns, uniform: Columns, normal: Columns, height: int, width: int) -> Tensor:
    """(N, 3, 3): from where a point of the result comes.

    Points are (x, y, 1) from the image's centre, y downwards, in half heights of the image: rotations are true in
    images of any aspect. An image is moved by F1, then F2, ..., so a point comes from inv(F1) inv(F2) ... of it.
    """
    full_turn, one = 2 * math.pi, torch.ones_like(gate["x_flip"])
    extent = (2 * width / height, 2.0)

    def unmove(x: Tensor, y: Tensor) -> Tensor:
        return _matrix([[one, 0, -x * extent[0]], [0, one, -y * extent[1]], [0, 0, 1]])

    def unrotate(angle: Tensor) -> Tensor:  # rotations are counter-clockwise to the eye
        cos, sin = torch.cos(angle), torch.sin(angle)
        return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def unscale(x: Tensor, y: Tensor) -> Tensor:
        return _matrix([[1 / x, 0, 0], [0, 1 / y, 0], [0, 0, 1]])

    def whole_pixels(name: str, size: int) -> Tensor:
        share = (2 * uniform[name] - 1) * _SHIFT * gate["pixel_shift"]
        return torch.round(share * size) / size

    scale, stretch = (torch.exp2(normal[name] * _LOG2_SCALE * gate[name]) for name in ("scale", "stretch"))
    steps = (
        unscale(1 - 2 * torch.floor(2 * uniform["x_flip"]) * gate["x_flip"], one),
        unrotate(torch.floor(4 * uniform["quarter_turn"]) / 4 * full_turn * gate["quarter_turn"]),
        unmove(whole_pixels("pixel_shift_x", width), whole_pixels("pixel_shift_y", height)),
        unscale(scale, scale),
        unrotate((uniform["rotation_before"] - 0.5) * full_turn * gate["rotation_before"]),
        unscale(stretch, 1 / stretch),
        unrotate((uniform["rotation_after"] - 0.5) * full_turn * gate["rotation_after"]),
        unmove(normal["shift_x"] * _SHIFT * gate["shift"], normal["shift_y"] * _SHIFT * gate["shift"]),
    )
    return functools.reduce(_compose, steps)


def _colours(gate: Columns, uniform: Columns, normal: Columns) -> Tensor:
    """(N, 4, 4): how a colour (r, g, b, 1) in [-1, 1] changes; the luma axis is r = g = b."""
    b = normal["brightness"] * _BRIGHTNESS * gate["brightness"]
    c = torch.exp2(normal["contrast"] * _LOG2_CONTRAST * gate["contrast"])
    flip = torch.floor(2 * uniform["luma_flip"]) * gate["luma_flip"]
    hue = (uniform["hue"] - 0.5) * (2 * math.pi) * gate["hue"]
    saturation = torch.exp2(normal["saturation"] * _LOG2_SATURATION * gate["saturation"])
    zero, one = torch.zeros_like(flip), torch.ones_like(flip)

    def around_luma(along: Tensor, across: Tensor, quarter: Tensor) -> Tensor:
        """`along` v v' + `across` (1 - v v') + `quarter` [v]x, with v the luma axis and [v]x its cross product."""
        d, (e, f) = (along + 2 * across) / 3, ((along - across) / 3 + s * quarter / math.sqrt(3) for s in (-1, 1))
        return _matrix([[d, e, f, 0], [f, d, e, 0], [e, f, d, 0], [0, 0, 0, 1]])

    steps = (
        _matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]]),
        _matrix([[c, 0, 0, 0], [0, c, 0, 0], [0, 0, c, 0], [0, 0, 0, 1]]),
        around_luma(1 - 2 * flip, one, zero),
        around_luma(one, torch.cos(hue), torch.sin(hue)),
        around_luma(one, saturation, zero),
    )
    return functools.reduce(lambda done, step: _compose(step, done), steps)


def _warp(images: Tensor, sources: Tensor, aspect: float) -> Tensor:
    """Sample (N, 3, h, w) images bilinearly at the source of each pixel, both in the units of `_sources`."""
    height, width = images.shape[-2:]
    x, y = (  # pixel centres
        torch.arange(1 - size, size, 2, device=images.device).to(images.dtype) / size for size in (width, height)
    )
    x, y = x * aspect, y[:, None]
    (xx, xy, x0), (yx, yy, y0) = (row.unbind(1) for row in sources[:, :2, :, None, None].unbind(1))
    grid = torch.stack([(xx * x + xy * y + x0) / aspect, yx * x + yy * y + y0], dim=-1)  # (N, h, w, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _dye(images: Tensor, colours: Tensor) -> Tensor:
    """Apply `colours`, which speak of [-1, 1], to (N, 3, h, w) images in [0, 1]."""
    linear = colours[:, :3, :3, None, None]  # (N, 3, 3, 1, 1), result by origin
    offset = (colours[:, :3, 3] + 1 - colours[:, :3, :3].sum(dim=2)) / 2  # of A (2 i - 1) + t, brought back
    red, green, blue = (linear[:, :, i] * images[:, i : i + 1] for i in range(3))
    return red + green + blue + offset[:, :, None, None]


def _matrix(rows: Sequence[Sequence[Tensor | float]]) -> Tensor:
    """(N, k, k) from its elements, (N,) tensors and numbers."""
    like = next(element for element in itertools.chain(*rows) if isinstance(element, Tensor))
    columns = [e if isinstance(e, Tensor) else torch.full_like(like, e) for e in itertools.chain(*rows)]
    return torch.stack(columns, dim=1).unflatten(1, (len(rows), len(rows)))


def _compose(a: Tensor, b: Tensor) -> Tensor:
    """Product of (N, k, k) matrices; not by `@`, which in TF32 would be wrong by tenths of a pixel."""
    return (a.unsqueeze(3) * b.unsqueeze(1)).sum(dim=2)


class AdaController(nn.Module):
    """Steers p so that r_t = E[sign(D(real))], the sign of overfitting, stays at its target.

    Args:
        target: Of r_t.
        ramp_images: Images in which p can go from 0 to 1.
        interval: Steps between two calls of `update`; the caller counts.
        neutral: The logit at which the discriminator is undecided, 0.5 for least squares with labels 0 and 1.
    """

    p: Tensor
    sign_sum: Tensor
    count: Tensor

    def __init__(
        self, *, target: float = 0.6, ramp_images: int = 500_000, interval: int = 4, neutral: float = 0.0
    ) -> None:
        super().__init__()
        self.target, self.ramp_images, self.interval, self.neutral = target, ramp_images, interval, neutral
        for name in ("p", "sign_sum", "count"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def observe(self, real_logits: Tensor, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Count the signs of the discriminator's logits for real images.

        Args:
            real_logits: Of any shape, this process's.
            reduce_sum: Sum of a tensor over the processes, so that all of them hold, and any of them saves, the same.
        """
        signs = torch.sign(real_logits.float() - self.neutral)
        sign_sum, count = reduce_sum(torch.stack([signs.sum(), torch.full_like(self.count, signs.numel())])).unbind()
        self.sign_sum += sign_sum
        self.count += count

    @torch.no_grad()
    def update(self, images: int) -> Tensor:
        """Move p and begin to count anew.

        Args:
            images: Images that all processes have seen since the last update.

        Returns:
            r_t, (); NaN, and p stays, if nothing was observed.
        """
        overfitting = self.sign_sum / self.count
        direction = torch.sign((overfitting - self.target).nan_to_num(0.0))
        self.p.add_(direction * (images / self.ramp_images)).clamp_(0, 1)
        self.sign_sum.zero_()
        self.count.zero_()
        return overfitting
