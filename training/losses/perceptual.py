"""Losses between feature maps: L_feat of the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """Which channels are active together: F F^T / (C H W), in float32 whatever autocast says.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, C, C) float32.
    """
    _, channels, height, width = features.shape
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)  # (N, C, H*W)
        return flat @ flat.transpose(1, 2) / (channels * height * width)


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over maps of the mean absolute difference; zero for equal maps. `real` gets no gradient.

    Args:
        fake: (N, C_j, H_j, W_j) each.
        real: As `fake`.
    """
    pairs = zip(fake, real, strict=True)
    return torch.stack([(a.float() - b.detach().float()).abs().mean() for a, b in pairs]).sum()


def style_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over maps of the mean absolute difference of their Gram matrices. `real` gets no gradient.

    Args:
        fake: (N, C_j, H_j, W_j) each.
        real: As `fake`.
    """
    return feature_matching([gram(a) for a in fake], [gram(b.detach()) for b in real])
