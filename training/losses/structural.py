"""Structural similarity: of the release's multi-scale loss, and MS-SSIM as its authors define it.

All functions take images (N, 3, H, W) in the range [0, 1], predictions may leave it, and compute in float32 whatever
autocast says: a variance in bfloat16 goes negative.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

K = (0.01, 0.03)
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11


def ssim_l1(pred: Tensor, target: Tensor, *, num_scales: int = 4, ssim_weight: float = 0.85) -> Tensor:
    """The release's loss: 0.85 (1 - SSIM) / 2 + 0.15 L1, summed over scales that halve.

    SSIM over 3 x 3 boxes, as in Godard et al., "Unsupervised Monocular Depth Estimation with Left-Right Consistency"
    (CVPR 2017), equation 2.

    Args:
        pred: (N, 3, H, W).
        target: (N, 3, H, W) in [0, 1]; H and W at least 3 * 2^(num_scales - 1).
        num_scales: How many scales, the full one included.
        ssim_weight: Weight of the SSIM part; L1 has the rest.

    Returns:
        A float32 scalar, at least 0.

    Raises:
        ValueError: If the images are smaller.
    """
    if min(target.shape[-2:]) < (least := 3 * 2 ** (num_scales - 1)):
        raise ValueError(f"SSIM over {num_scales} scales needs images of at least {least} pixels a side")
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = pred.float(), target.float()
        losses = []
        for scale in range(num_scales):
            if scale:
                pred, target = F.avg_pool2d(pred, 2), F.avg_pool2d(target, 2)
            luminance, structure = _ssim_parts(pred, target, lambda images: F.avg_pool2d(images, 3, stride=1))
            dissimilarity = ((1 - luminance * structure) / 2).clamp(0, 1).mean()
            losses.append(ssim_weight * dissimilarity + (1 - ssim_weight) * (pred - target).abs().mean())
        return torch.stack(losses).sum()


def ssim_map(pred: Tensor, target: Tensor) -> Tensor:
    """SSIM at every place (Wang et al. 2004): eleven-tap Gaussian of sigma 1.5, without padding.

    Args:
        pred: (N, 3, H, W).
        target: (N, 3, H, W) in [0, 1]; H and W at least 11.

    Returns:
        (N, 3, H - 10, W - 10) float32 in [-1, 1]; the mean over an image is its SSIM.
    """
    with torch.autocast(pred.device.type, enabled=False):
        luminance, structure = _ssim_parts(pred.float(), target.float(), _gaussian_blur)
        return luminance * structure


def ms_ssim(pred: Tensor, target: Tensor, *, floor: float = 0.0) -> Tensor:
    """Mean of `ms_ssim_each`, which see: a float32 scalar."""
    return ms_ssim_each(pred, target, floor=floor).mean()


def ms_ssim_each(pred: Tensor, target: Tensor, *, floor: float = 0.0) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003) of each image, in [0, 1].

    Eleven-tap Gaussian of sigma 1.5 without padding, average pooling between scales, the paper's five weights. An image
    too small for five scales has as many as the window fits in, with weights renormalised. A negative term, whose power
    does not exist, counts as zero.

    Args:
        pred: (N, 3, H, W).
        target: (N, 3, H, W) in [0, 1]; H and W at least 11.
        floor: Least value of a scale's term before its power, see `ms_ssim_loss`; 0 is the definition.

    Returns:
        (N,) float32; 1 for equal images.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    sides = [min(target.shape[-2:]) // 2**scale for scale in range(len(MS_SSIM_WEIGHTS))]
    num_scales = sum(side >= WINDOW for side in sides)
    if num_scales == 0:
        raise ValueError(f"MS-SSIM needs images of at least {WINDOW} pixels a side, not {tuple(target.shape[-2:])}")
    weights = MS_SSIM_WEIGHTS[:num_scales]
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = pred.float(), target.float()
        similarity = torch.ones(len(pred), device=pred.device)  # (N,)
        for scale, weight in enumerate(weights):
            if scale:
                pred, target = F.avg_pool2d(pred, 2), F.avg_pool2d(target, 2)
            luminance, structure = _ssim_parts(pred, target, _gaussian_blur)
            last = scale == num_scales - 1
            part = (luminance * structure if last else structure).mean(dim=(1, 2, 3))
            similarity = similarity * part.clamp(min=floor) ** (weight / sum(weights))
        return similarity


def ms_ssim_loss(pred: Tensor, target: Tensor) -> Tensor:
    """1 - `ms_ssim`, for training: a float32 scalar in [0, 1].

    One scale at zero would leave the image without any gradient, and one just above zero with a huge one. So each scale
    counts at least 0.001, below any contrast term of a flat prediction, which is c2 / (variance + c2) >= 0.0036.
    """
    return 1 - ms_ssim(pred, target, floor=1e-3)


def _ssim_parts(pred: Tensor, target: Tensor, blur: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """SSIM's luminance term and its contrast-structure term, in [-1, 1], at every place of the window."""
    c1, c2 = (k**2 for k in K)
    mean_p, mean_t, square_p, square_t, product = blur(
        torch.cat([pred, target, pred * pred, target * target, pred * target])
    ).chunk(5)
    variances = (square_p - mean_p**2) + (square_t - mean_t**2)
    covariance = product - mean_p * mean_t
    luminance = (2 * mean_p * mean_t + c1) / (mean_p**2 + mean_t**2 + c1)
    # neither bound binds in exact arithmetic; rounding breaks both where a prediction is far outside [0, 1]
    structure = ((2 * covariance + c2) / (variances + c2).clamp(min=c2 / 2)).clamp(-1, 1)
    return luminance, structure


def _gaussian_blur(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, device=images.device, dtype=images.dtype) - WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    channels = images.shape[1]
    # a group a channel: cuDNN may run ungrouped convolutions in TF32, too coarse for a difference of squares
    rows = F.conv2d(images, taps.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
