"""The fixed two-dimensional sine-cosine position embedding of masked autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

# The longest wavelength is 2 pi times this many patches: the value of the MAE paper, baked into every MAE checkpoint.
_TEMPERATURE = 10_000.0


def build_2d_sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Build MAE's position embedding for a grid of patches.

    The channels are four equal quarters, in MAE's order: sine and cosine of the column, then sine and cosine of the
    row. (timm's own ``build_sincos2d_pos_embed`` puts the row first, so the two are not interchangeable.)

    Args:
        dim: Width of the embedding, a multiple of 4.
        grid_size: Number of patches as (rows, columns), each at least 1. It need not be square.

    Returns:
        A (1, rows * columns, dim) float32 tensor on the CPU with values in [-1, 1], patches in row-major order. It is
        computed in float64 and rounded once, as MAE does.

    Raises:
        ValueError: If `dim` is not a positive multiple of 4 or a side of the grid is below 1.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(f"dim must be a positive multiple of 4 (sine and cosine of row and column), got {dim}")
    rows, columns = grid_size
    if rows < 1 or columns < 1:
        raise ValueError(f"grid_size must be at least (1, 1), got {grid_size}")
    quarter = dim // 4
    # The device is named because models are also built inside `with torch.device("meta")`.
    exponent = torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter
    frequency = _TEMPERATURE**-exponent
    row_angle = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * frequency
    column_angle = torch.arange(columns, dtype=torch.float64, device="cpu")[:, None] * frequency
    row_code = torch.cat([row_angle.sin(), row_angle.cos()], dim=1)
    column_code = torch.cat([column_angle.sin(), column_angle.cos()], dim=1)
    grid = torch.cat(
        [
            column_code[None, :, :].expand(rows, columns, 2 * quarter),
            row_code[:, None, :].expand(rows, columns, 2 * quarter),
        ],
        dim=2,
    )
    return grid.reshape(1, rows * columns, dim).float()
