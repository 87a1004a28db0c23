"""The masked autoencoder: patches, random masking, an encoder that sees the visible patches, a light decoder.

Conventions, defined here and nowhere else:

- images enter and leave as float in [0, 1], (N, 3, H, W); the network standardises them inside;
- patches are row-major over the grid, channels last within a patch: (N, L, p*p*3);
- in a mask, 1 means hidden and 0 means visible.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), section 3 and appendix A.1.
"""

from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from perceptual_mae_models.pos_embed import build_2d_sincos_pos_embed


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into a row-major sequence of flat patches.

    Args:
        images: (N, C, H, W), H and W multiples of `patch_size`.
        patch_size: Side of a patch in pixels.

    Returns:
        (N, L, p*p*C) with L = (H/p) * (W/p).
    """
    n, c, height, width = images.shape
    h, w, p = height // patch_size, width // patch_size, patch_size
    x = images.reshape(n, c, h, p, w, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (N, h, w, p, p, C)
    return x.reshape(n, h * w, p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Undo `patchify`.

    Args:
        patches: (N, L, p*p*C).
        patch_size: Side of a patch in pixels.
        grid_size: Patches per column and per row, (h, w), with h * w = L.

    Returns:
        (N, C, h*p, w*p).
    """
    n, p, (h, w) = patches.shape[0], patch_size, grid_size
    x = patches.reshape(n, h, w, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, h, p, w, p)
    return x.reshape(n, -1, h * p, w * p)


class Masking(NamedTuple):
    """Which patches are hidden, in the three forms that the networks and losses need."""

    ids_keep: Tensor
    """(N, K) int64: places of the visible patches, in the order the encoder sees them."""
    ids_restore: Tensor
    """(N, L) int64: where to find each place in the sequence [visible, hidden]."""
    mask: Tensor
    """(N, L) float: 1 hidden, 0 visible."""


def random_masking(noise: Tensor, mask_ratio: float) -> Masking:
    """Hide the patches with the largest noise, the same number in every image.

    Args:
        noise: (N, L), one number a patch. The caller draws it, so a run, a test and a picture can fix it.
        mask_ratio: Share of patches to hide, in [0, 1).

    Returns:
        The masking; K = int(L * (1 - mask_ratio)) patches stay visible.
    """
    length = noise.shape[1]
    num_keep = int(length * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :num_keep], ids_restore, (ids_restore >= num_keep).to(torch.float32))


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

    def __init__(
        self, encoder_dim: int, grid_size: tuple[int, int], patch_size: int, *, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
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

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict all patches.

        Args:
            latent: (N, 1 + K, encoder_dim): class token, then the visible patches.
            ids_restore: (N, L), see `Masking`.

        Returns:
            (N, L, p*p*3), in the space that the loss defines.
        """
        x = self.embed(latent)
        n, length = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(n, length + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)  # (N, L, dim), [visible, hidden]
        patches = patches.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[2]))  # (N, L, dim), row-major
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.pred(x[:, 1:])


class Reconstruction(NamedTuple):
    """What one pass of the autoencoder gives."""

    pred: Tensor
    """(N, L, p*p*3): the prediction for every patch."""
    mask: Tensor
    """(N, L): 1 hidden, 0 visible."""
    latent: Tensor
    """(N, 1 + K, D): the encoder's output after its final norm, class token first."""


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of MAE around an unchanged timm ViT.

    Args:
        encoder: A timm ViT with one class token and fixed position embeddings; what pretraining is for.
        decoder: Predicts pixels; dropped or kept aside afterwards.
        mask_ratio: Share of patches hidden from the encoder, in [0, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VisionTransformer, decoder: Decoder, *, mask_ratio: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = encoder.patch_embed.grid_size
        self.image_size: tuple[int, int] = encoder.patch_embed.img_size
        self.num_patches: int = encoder.patch_embed.num_patches
        cfg = timm.data.resolve_model_data_config(encoder)
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1), persistent=False)

    def standardise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to the encoder's input space, by the mean and std that its pretrained cfg ships."""
        return (images - self.mean) / self.std

    def unstandardise(self, images: Tensor) -> Tensor:
        """Undo `standardise`."""
        return images * self.std + self.mean

    def encode(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible patches only.

        Args:
            images: (N, 3, H, W) in [0, 1].
            ids_keep: (N, K) places of the visible patches.

        Returns:
            (N, 1 + K, D), class token first.
        """
        encoder, cls_token, pos_embed = self.encoder, self.encoder.cls_token, self.encoder.pos_embed
        assert cls_token is not None
        assert pos_embed is not None
        x = encoder.patch_embed(self.standardise(images))  # (N, L, D)
        x = x + pos_embed[:, 1:]
        x = x.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[2]))  # (N, K, D)
        first = cls_token + pos_embed[:, :1]
        x = torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (N, 1 + K, D)
        return encoder.norm(encoder.blocks(x))

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Mask, encode, decode.

        Args:
            images: (N, 3, H, W) in [0, 1].
            noise: (N, L), decides the mask, see `random_masking`.

        Returns:
            The prediction with its mask and latent.
        """
        ids_keep, ids_restore, mask = random_masking(noise, self.mask_ratio)
        latent = self.encode(images, ids_keep)
        return Reconstruction(self.decoder(latent, ids_restore), mask, latent)

    def target(self, images: Tensor) -> Tensor:
        """The patches that `pred` is compared with: standardised pixels, (N, L, p*p*3)."""
        return patchify(self.standardise(images), self.patch_size)

    def to_images(self, patches: Tensor) -> Tensor:
        """Standardised patches (N, L, p*p*3) to images (N, 3, H, W) in [0, 1], clipped."""
        return self.unstandardise(unpatchify(patches, self.patch_size, self.grid_size)).clamp(0, 1)


def init_mae_weights(autoencoder: MaskedAutoencoder) -> None:
    """Initialise in place as MAE does: Xavier-uniform linear maps, tokens N(0, 0.02^2), unit layer norms."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    projection = autoencoder.encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))  # the convolution is a linear map
    nn.init.zeros_(projection.bias)
    for token in (autoencoder.encoder.cls_token, autoencoder.decoder.mask_token):
        assert token is not None
        nn.init.normal_(token, std=0.02)


def build_autoencoder(
    encoder: nn.Module, *, decoder_dim: int, decoder_depth: int, decoder_heads: int, mask_ratio: float
) -> MaskedAutoencoder:
    """Put a fresh decoder behind an encoder.

    Args:
        encoder: A timm ViT with one class token; its position embeddings are frozen (MAE's are fixed).
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        mask_ratio: Share of patches hidden from the encoder.

    Raises:
        ValueError: If the encoder is not a plain ViT with one class token.
    """
    if not isinstance(encoder, VisionTransformer) or encoder.num_prefix_tokens != 1 or encoder.pos_embed is None:
        raise ValueError("the encoder is not a plain ViT with one class token: choose a vit_*_pmae model (`pmae list`)")
    encoder.pos_embed.requires_grad_(False)
    decoder = Decoder(
        encoder.embed_dim,
        encoder.patch_embed.grid_size,
        encoder.patch_embed.patch_size[0],
        dim=decoder_dim,
        depth=decoder_depth,
        num_heads=decoder_heads,
    )
    return MaskedAutoencoder(encoder, decoder, mask_ratio=mask_ratio)
