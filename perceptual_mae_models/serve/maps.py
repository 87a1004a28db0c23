"""Pictures of what an encoder makes of an image: where its class token looks, and how its patches group."""

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# Dark to bright through violet and orange, of even steps in lightness, so that it reads in grey as well.
_HEAT = torch.tensor([(8, 6, 30), (66, 15, 117), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 180)]) / 255


class FeatureMaps(NamedTuple):
    """What one pass of an encoder over whole images gives."""

    attention: Tensor
    """(N, heads, 1 + L): of the class token in the last block, to itself and then to the patches; sums to 1."""
    tokens: Tensor
    """(N, L, D): the patch tokens after the final norm."""


@torch.inference_mode()
def feature_maps(encoder: VisionTransformer, pixels: Tensor) -> FeatureMaps:
    """Attention and patch features of images that nothing is hidden of.

    Args:
        encoder: A timm ViT with one class token, in evaluation mode.
        pixels: (N, 3, H, W), standardised as the encoder wants them.

    Returns:
        Float32, on the encoder's device.
    """
    # The states before the last block, because fused attention keeps its weights to itself. No hooks: requests of
    # several visitors run at once on one network.
    states: Any = encoder.forward_intermediates(
        pixels, indices=[len(encoder.blocks) - 2], return_prefix_tokens=True, output_fmt="NLC"
    )
    final, ((patches, prefix),) = states
    last: Any = encoder.blocks[-1]
    x = last.norm1(torch.cat([prefix, patches], dim=1))
    attn = last.attn
    n, length, _ = x.shape
    qkv = attn.qkv(x).reshape(n, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, N, heads, 1 + L, d)
    query, key = attn.q_norm(qkv[0, :, :, :1]), attn.k_norm(qkv[1])
    attention = (query * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1).squeeze(2)
    return FeatureMaps(attention.float(), final[:, encoder.num_prefix_tokens :].float())


def attention_map(attention: Tensor, grid: tuple[int, int], head: int | None = None) -> Tensor:
    """The attention to patches as a heat map.

    Args:
        attention: (heads, 1 + L), see `FeatureMaps`.
        grid: Patches per column and per row.
        head: From 0; None: the mean of all.

    Returns:
        (3, h, w) in [0, 1]: black is no attention, the brightest patch has the most.

    Raises:
        ValueError: There is no such head.
    """
    if head is not None and not 0 <= head < len(attention):
        raise ValueError(f"there are heads 1 to {len(attention)}, no {head + 1}")
    values = (attention.mean(dim=0) if head is None else attention[head])[1:]
    place = (values / values.max().clamp(min=1e-12)) * (len(_HEAT) - 1)
    below = place.floor().long().clamp(max=len(_HEAT) - 2)
    share = (place - below).unsqueeze(1)
    colours = _HEAT.to(values.device)
    return (colours[below] * (1 - share) + colours[below + 1] * share).T.reshape(3, *grid)


def principal_components(tokens: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Places of one image's patches along the directions in which they differ most.

    Args:
        tokens: (L, D).
        count: How many directions, at most min(L, D).

    Returns:
        (L, count), and the share of the variance that each explains (count,). Of each direction the largest entry is
        positive, since its sign means nothing and should not depend on the machine.
    """
    tokens = tokens.cpu().double()  # Apple's GPUs have no float64
    centred = tokens - tokens.mean(dim=0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    signs = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).sign().squeeze(1)  # (min(L, D),)
    variance = s.square()
    explained = variance / variance.sum().clamp(min=1e-12)
    return (u * s * signs)[:, :count].float(), explained[:count].float()


def pca_map(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first three principal components of one image's patch tokens as red, green and blue.

    Args:
        tokens: (L, D).
        grid: Patches per column and per row.

    Returns:
        (3, h, w), each component stretched over [0, 1]; and the share of variance that each explains, (3,).
    """
    scores, explained = principal_components(tokens)
    low, high = scores.min(dim=0).values, scores.max(dim=0).values
    return ((scores - low) / (high - low).clamp(min=1e-12)).T.reshape(3, *grid), explained
