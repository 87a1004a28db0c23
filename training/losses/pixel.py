"""Losses between predicted and true patches."""

from torch import Tensor


def patch_error(pred: Tensor, target: Tensor, mask: Tensor | None, power: int) -> Tensor:
    """Mean of |pred - target|^power over the hidden patches (MAE, section 3) or over the whole image.

    Args:
        pred: (N, L, P).
        target: (N, L, P).
        mask: (N, L), 1 hidden, at least one of them; None: the whole image.
        power: 1 or 2.

    Returns:
        A float32 scalar.
    """
    difference = pred.float() - target.float()
    error = (difference.abs() if power == 1 else difference.square()).mean(dim=-1)  # (N, L)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()
