"""Losses between predicted and true pixels."""

from torch import Tensor


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring every patch to zero mean and unit variance (MAE, section 4: "normalised pixels").

    Args:
        patches: (N, L, p*p*3).

    Returns:
        The normalised patches, and the mean and standard deviation (N, L, 1) that undo it.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def masked_l2(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the hidden patches (MAE, section 3).

    Args:
        pred: (N, L, P).
        target: (N, L, P).
        mask: (N, L), 1 hidden; at least one patch is hidden.

    Returns:
        A float32 scalar.
    """
    error = (pred.float() - target.float()).square().mean(dim=-1)  # (N, L)
    return (error * mask).sum() / mask.sum()
