"""Decoders: what rebuilds the image from the visible patches' latents, and is dropped after pretraining."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceptual_mae_models.pos_embed import build_2d_sincos_pos_embed


def run_block(block: nn.Module, x: Tensor, *, again: bool) -> Tensor:
    """Run a block; `again` computes it anew in the backward pass instead of keeping what is inside it."""
    y: Tensor = checkpoint(block, x, use_reentrant=False) if again and torch.is_grad_enabled() else block(x)
    return y


def pyramid_factors(patch_size: int) -> tuple[int, ...]:
    """Pixels per token and side at each scale, fine to coarse: the patch size, halved as long as it is even."""
    factors = [patch_size]
    while factors[-1] % 2 == 0:
        factors.append(factors[-1] // 2)
    return tuple(factors)


def skip_indices(encoder_depth: int, decoder_depth: int) -> tuple[int, ...]:
    """Encoder blocks whose outputs join the decoder, in its order: one before each decoder block but the first.

    The last block's output is the latent itself, so they run from the last but one down to a third of the depth, evenly
    spaced: 10, 9, ..., 4 for the release's 12 and 8 blocks.
    """
    deepest, shallowest, count = encoder_depth - 2, encoder_depth // 3, decoder_depth - 1
    stride = (deepest - shallowest) / max(1, count - 1)
    return tuple(max(0, round(deepest - i * stride)) for i in range(count))


def fill_in(visible: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """Put visible tokens back in their places and the mask token in all others.

    Args:
        visible: (N, 1 + K, dim): class token, then the visible patches.
        mask_token: (1, 1, dim).
        ids_restore: (N, L), see `Masking`.

    Returns:
        (N, 1 + L, dim): class token, then all patches, row-major.
    """
    n, length = ids_restore.shape
    hidden = mask_token.to(visible.dtype).expand(n, length + 1 - visible.shape[1], -1)
    patches = torch.cat([visible[:, 1:], hidden], dim=1)  # (N, L, dim), [visible, hidden]
    patches = patches.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, visible.shape[2]))  # (N, L, dim), row-major
    return torch.cat([visible[:, :1], patches], dim=1)


class Decoder(nn.Module):
    """A narrow ViT that predicts the pixels of every patch from the visible patches' latents.

    Args:
        encoder_dim: Width of the latents.
        grid_size: Patches per column and per row.
        patch_size: Side of a patch in pixels.
        dim: Width of the decoder, a multiple of 4 and of `num_heads`.
        depth: Number of transformer blocks.
        num_heads: Attention heads.
    """

    pos_embed: Tensor
    skip_indices: tuple[int, ...] = ()

    def __init__(
        self, encoder_dim: int, grid_size: tuple[int, int], patch_size: int, *, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.factors: tuple[int, ...] = (patch_size,)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        pos_embed = build_2d_sincos_pos_embed(dim, grid_size)  # (1, L, dim)
        pos_embed = torch.cat([torch.zeros(1, 1, dim), pos_embed], dim=1)  # the class token has no place
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
        )
        self.norm = norm_layer(dim)
        self.pred = nn.Linear(dim, patch_size**2 * 3)

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels at full size."""
        return self.pred.weight

    def start(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(N, 1 + L, dim): the latent in its places, with positions."""
        return fill_in(self.embed(latent), self.mask_token, ids_restore) + self.pos_embed

    def forward(
        self, latent: Tensor, skips: Sequence[Tensor], ids_restore: Tensor, again: bool = False
    ) -> tuple[Tensor, ...]:
        """Predict all patches.

        Args:
            latent: (N, 1 + K, encoder_dim): class token, then the visible patches.
            skips: Empty: no output of the encoder but the last joins this decoder.
            ids_restore: (N, L), see `Masking`.
            again: See `run_block`.

        Returns:
            (N, L, p*p*3), in the space that the loss defines; the only scale.
        """
        x = self.start(latent, ids_restore)
        for block in self.blocks:
            x = run_block(block, x, again=again)
        return (self.pred(self.norm(x)[:, 1:]),)


class MultiScaleDecoder(Decoder):
    """The plain decoder joined to the encoder as in a U-Net, with an image at every scale.

    Before each block but the first, the output of an encoder block is embedded, gets mask tokens in the hidden places,
    is concatenated with the running state and projected back to its width. Evenly spaced blocks emit images, the
    coarsest first; a token makes k x k pixels of the scale that is k times finer than the grid.

    Args:
        encoder_dim: Width of the latents.
        encoder_depth: Blocks of the encoder.
        grid_size: Patches per column and per row.
        patch_size: Side of a patch in pixels.
        dim: Width of the decoder, a multiple of 4 and of `num_heads`.
        depth: Number of transformer blocks.
        num_heads: Attention heads.
    """

    def __init__(
        self,
        encoder_dim: int,
        encoder_depth: int,
        grid_size: tuple[int, int],
        patch_size: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__(encoder_dim, grid_size, patch_size, dim=dim, depth=depth, num_heads=num_heads)
        self.factors = pyramid_factors(patch_size)
        self.skip_indices = skip_indices(encoder_depth, depth)
        self.skip_embeds = nn.ModuleList(nn.Linear(encoder_dim, dim) for _ in self.skip_indices)
        self.skip_joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in self.skip_indices)
        coarse = self.factors[1:]
        self.coarse_norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in coarse)
        self.coarse_preds = nn.ModuleList(nn.Linear(dim, k * k * 3) for k in coarse)
        num_scales = len(self.factors)
        # the block after which each scale, fine to coarse, is emitted: the last one for the finest
        self.taps = tuple(math.ceil((num_scales - j) * depth / num_scales) - 1 for j in range(num_scales))

    def forward(
        self, latent: Tensor, skips: Sequence[Tensor], ids_restore: Tensor, again: bool = False
    ) -> tuple[Tensor, ...]:
        """Predict all patches at every scale.

        Args:
            latent: (N, 1 + K, encoder_dim): class token, then the visible patches.
            skips: Outputs of the encoder blocks `skip_indices`, each as `latent`.
            ids_restore: (N, L), see `Masking`.
            again: See `run_block`.

        Returns:
            (N, L, k*k*3) for each k of `factors`, fine to coarse.
        """
        x = self.start(latent, ids_restore)
        states = []
        for index, block in enumerate(self.blocks):
            if index:
                embed, join = self.skip_embeds[index - 1], self.skip_joins[index - 1]
                skip = fill_in(embed(skips[index - 1]), self.mask_token, ids_restore)
                x = join(torch.cat([x, skip], dim=2))  # (N, 1 + L, 2*dim) -> (N, 1 + L, dim)
            x = run_block(block, x, again=again)
            states.append(x)
        heads = zip((self.norm, *self.coarse_norms), (self.pred, *self.coarse_preds), self.taps, strict=True)
        return tuple(pred(norm(states[tap])[:, 1:]) for norm, pred, tap in heads)
