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
    """
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


def ms_ssim(pred: Tensor, target: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003), mean over the batch, in [0, 1].

    Eleven-tap Gaussian of sigma 1.5 without padding, average pooling between scales, the paper's five weights. An image
    too small for five scales has as many as the window fits in, with weights renormalised. Contrast terms are cut at
    zero before their power is taken, whose gradient is not finite otherwise.

    Args:
        pred: (N, 3, H, W).
        target: (N, 3, H, W) in [0, 1]; H and W at least 11.

    Returns:
        A float32 scalar; 1 for equal images.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    sides = [min(target.shape[-2:]) // 2**scale for scale in range(len(MS_SSIM_WEIGHTS))]
    num_scales = sum(side >= WINDOW for side in sides)
    if num_scales == 0:
        raise ValueError(f"MS-SSIM needs images of at least {WINDOW} pixels a side, not {tuple(target.shape[-2:])}")
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = pred.float(), target.float()
        weights = torch.tensor(MS_SSIM_WEIGHTS[:num_scales], device=pred.device)
        weights = weights / weights.sum()
        similarity = torch.ones(len(pred), device=pred.device)  # (N,)
        for scale in range(num_scales):
            if scale:
                pred, target = F.avg_pool2d(pred, 2), F.avg_pool2d(target, 2)
            luminance, structure = _ssim_parts(pred, target, _gaussian_blur)
            last = scale == num_scales - 1
            part = (luminance * structure if last else structure).mean(dim=(1, 2, 3))
            # the floor keeps the gradient of the power finite, at a hundred-millionth of the value's range
            similarity = similarity * part.clamp(min=1e-8) ** weights[scale]
        return similarity.mean()


def ms_ssim_loss(pred: Tensor, target: Tensor) -> Tensor:
    """1 - `ms_ssim`."""
    return 1 - ms_ssim(pred, target)


def _ssim_parts(pred: Tensor, target: Tensor, blur: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """SSIM's luminance term and its contrast-structure term at every place of the window."""
    c1, c2 = (k**2 for k in K)
    mean_p, mean_t, square_p, square_t, product = blur(
        torch.cat([pred, target, pred * pred, target * target, pred * target])
    ).chunk(5)
    variances = (square_p - mean_p**2) + (square_t - mean_t**2)
    covariance = product - mean_p * mean_t
    luminance = (2 * mean_p * mean_t + c1) / (mean_p**2 + mean_t**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _gaussian_blur(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, device=images.device, dtype=images.dtype) - WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    flat = images.flatten(0, 1).unsqueeze(1)  # (N*C, 1, H, W)
    flat = F.conv2d(F.conv2d(flat, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return flat.unflatten(0, images.shape[:2]).squeeze(2)
