"""The masked autoencoder: patches, random masking, an encoder that sees the visible patches, a light decoder.

Conventions, defined here and nowhere else:

- images enter and leave as float in [0, 1], (N, 3, H, W); the network standardises them inside;
- patches are row-major over the grid, channels last within a patch: (N, L, p*p*3);
- in a mask, 1 means hidden and 0 means visible;
- a pyramid is a tuple of the same images at scales that halve, fine to coarse.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), section 3 and appendix A.1.
"""

from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, linear

from perceptual_mae_models.decoder import Decoder, MultiScaleDecoder, run_block


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


def image_pyramid(images: Tensor, num_scales: int) -> tuple[Tensor, ...]:
    """Images (N, C, H, W) at scales that halve, by average pooling: fine to coarse, the images themselves first."""
    pyramid = [images]
    for _ in range(num_scales - 1):
        pyramid.append(avg_pool2d(pyramid[-1], 2))
    return tuple(pyramid)


def hidden_pixels(mask: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Which pixels a mask (N, L) hides of images whose patches have that side: (N, 1, h*p, w*p) bool."""
    pixels = mask.unsqueeze(-1).expand(-1, -1, patch_size**2)  # (N, L, p*p)
    return unpatchify(pixels, patch_size, grid_size).bool()


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
        mask_ratio: Share of patches to hide, in [0, 1].

    Returns:
        The masking; K = int(L * (1 - mask_ratio)) patches stay visible.

    Raises:
        ValueError: If there is no such share.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio is {mask_ratio}: it must be from 0 to 1")
    length = noise.shape[1]
    num_keep = int(length * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :num_keep], ids_restore, (ids_restore >= num_keep).to(torch.float32))


def given_masking(mask: Tensor) -> Masking:
    """The masking that a mask means; unlike `random_masking` for any choice of patches, all and none included.

    Args:
        mask: (N, L), bool or 0 and 1: 1 hidden, 0 visible; the same number of hidden patches in every row.

    Returns:
        The masking; the encoder sees the visible patches in their order on the grid.

    Raises:
        ValueError: If the mask is not a row an image, or the rows hide different numbers of patches, which no
            rectangular batch can hold.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask is (N, L), a row an image, not {tuple(mask.shape)}: flatten the grid row by row")
    hidden: list[int] = mask.bool().sum(dim=1).tolist()
    if len(set(hidden)) != 1:
        raise ValueError(f"one batch hides the same number of patches in every image, not {hidden}")
    ids_shuffle = mask.bool().int().argsort(dim=1, stable=True)  # visible first
    num_keep = mask.shape[1] - hidden[0]
    return Masking(ids_shuffle[:, :num_keep], ids_shuffle.argsort(dim=1), mask.bool().to(torch.float32))


class Reconstruction(NamedTuple):
    """What one pass of the autoencoder gives."""

    preds: tuple[Tensor, ...]
    """(N, L, k*k*3) for every scale, fine to coarse; k = p at the finest."""
    mask: Tensor
    """(N, L): 1 hidden, 0 visible."""
    latent: Tensor
    """(N, 1 + K, D): the encoder's output after its final norm, class token first."""

    @property
    def pred(self) -> Tensor:
        """(N, L, p*p*3): the prediction for every patch at full size."""
        return self.preds[0]


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of MAE around an unchanged timm ViT.

    Args:
        encoder: A timm ViT with one class token and fixed position embeddings; what pretraining is for.
        decoder: Predicts pixels; dropped or kept aside afterwards.
        mask_ratio: Share of patches hidden from the encoder, in [0, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: VisionTransformer, decoder: Decoder | MultiScaleDecoder, *, mask_ratio: float) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = encoder.patch_embed.grid_size
        self.image_size: tuple[int, int] = encoder.patch_embed.img_size
        self.num_patches: int = encoder.patch_embed.num_patches
        cfg: dict[str, Any] = timm.data.resolve_model_data_config(encoder)  # type: ignore[no-untyped-call]
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1), persistent=False)

    def standardise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to the encoder's input space, by the mean and std that its pretrained cfg ships."""
        return (images - self.mean) / self.std

    def unstandardise(self, images: Tensor) -> Tensor:
        """Undo `standardise`."""
        return images * self.std + self.mean

    def encode(self, images: Tensor, ids_keep: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Encode the visible patches only.

        Args:
            images: (N, 3, H, W) in [0, 1].
            ids_keep: (N, K) places of the visible patches.

        Returns:
            The latent (N, 1 + K, D), class token first, and the outputs of the blocks that the decoder asks for, each
            of the same shape, in the decoder's order.

        Raises:
            ValueError: If the images have another size than the encoder was built for, or are not RGB, or are bytes.
        """
        if images.shape[1:] != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(f"images are {tuple(images.shape)}; this network takes (N, 3, {height}, {width})")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; this network takes floats in [0, 1]: divide bytes by 255")
        encoder, cls_token, pos_embed = self.encoder, self.encoder.cls_token, self.encoder.pos_embed
        assert cls_token is not None
        assert pos_embed is not None
        projection: Any = encoder.patch_embed.proj
        # the convolution as a linear map, of the visible patches only
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 3, p, p) -> (D, p*p*3)
        patches = self.target(images)
        patches = patches.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))  # (N, K, p*p*3)
        places = pos_embed[0, 1:][ids_keep]  # (N, K, D)
        x = encoder.patch_embed.norm(linear(patches, weight, projection.bias)) + places
        first = cls_token + pos_embed[:, :1]
        x = torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (N, 1 + K, D)
        outputs = []
        for block in encoder.blocks:
            x = run_block(block, x, again=self.grad_checkpointing)
            outputs.append(x)
        return encoder.norm(x), tuple(outputs[index] for index in self.decoder.skip_indices)

    def decode(self, latent: Tensor, skips: tuple[Tensor, ...], ids_restore: Tensor) -> tuple[Tensor, ...]:
        """Predict all patches at every scale, see `Reconstruction.preds`, from what `encode` gives."""
        preds: tuple[Tensor, ...] = self.decoder(latent, skips, ids_restore, self.grad_checkpointing)
        return preds

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Mask, encode, decode.

        Args:
            images: (N, 3, H, W) in [0, 1].
            noise: (N, L), decides the mask, see `random_masking`. None: drawn by torch's own generator.

        Returns:
            The prediction with its mask and latent.

        Raises:
            ValueError: If images or noise are not as said.
        """
        if noise is None:
            noise = torch.rand(len(images), self.num_patches, device=images.device)
        if noise.shape != (len(images), self.num_patches):
            raise ValueError(f"noise is {tuple(noise.shape)}; it is a row an image, of {self.num_patches} patches")
        ids_keep, ids_restore, mask = random_masking(noise, self.mask_ratio)
        latent, skips = self.encode(images, ids_keep)
        return Reconstruction(self.decode(latent, skips, ids_restore), mask, latent)

    @property
    def num_scales(self) -> int:
        """How many scales the decoder emits."""
        return len(self.decoder.factors)

    def images(self, preds: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Predictions as images (N, 3, h, w), float32 and not clipped to [0, 1], fine to coarse."""
        return tuple(
            self.unstandardise(unpatchify(pred.float(), factor, self.grid_size))
            for pred, factor in zip(preds, self.decoder.factors, strict=True)
        )

    def target(self, images: Tensor) -> Tensor:
        """The patches that `pred` is compared with: standardised pixels, (N, L, p*p*3)."""
        return patchify(self.standardise(images), self.patch_size)

    def take_contrast(self, preds: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, ...]:
        """Predictions of normalised patches, with the brightness and contrast of the patches of the images."""
        _, mean, std = normalise_patches(self.target(images))
        return (preds[0].float() * std + mean, *preds[1:])


def init_mae_weights(autoencoder: MaskedAutoencoder) -> None:
    """Initialise in place as MAE does: Xavier-uniform linear maps, tokens N(0, 0.02^2), unit layer norms."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    projection: Any = autoencoder.encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))  # the convolution is a linear map
    nn.init.zeros_(projection.bias)
    for token in (autoencoder.encoder.cls_token, autoencoder.decoder.mask_token):
        assert token is not None
        nn.init.normal_(token, std=0.02)


def build_autoencoder(
    encoder: nn.Module,
    *,
    decoder_dim: int,
    decoder_depth: int,
    decoder_heads: int,
    mask_ratio: float,
    multi_scale: bool = False,
) -> MaskedAutoencoder:
    """Put a fresh decoder behind an encoder.

    Args:
        encoder: A timm ViT with one class token; its position embeddings are frozen (MAE's are fixed).
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        mask_ratio: Share of patches hidden from the encoder.
        multi_scale: Decoder with skips from the encoder and an image at every scale.

    Raises:
        ValueError: If the encoder is not a plain ViT of RGB images with one class token that has a position.
    """
    if not isinstance(encoder, VisionTransformer) or encoder.pos_embed is None or not _is_plain(encoder):
        raise ValueError(
            "the encoder is not a plain ViT of RGB images with one class token: choose a vit_*_pmae model (`pmae list`)"
        )
    encoder.pos_embed.requires_grad_(False)
    grid_size, patch_size = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
    decoder: Decoder | MultiScaleDecoder
    if multi_scale:
        decoder = MultiScaleDecoder(
            encoder.embed_dim,
            len(encoder.blocks),
            grid_size,
            patch_size,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
        )
    else:
        decoder = Decoder(
            encoder.embed_dim, grid_size, patch_size, dim=decoder_dim, depth=decoder_depth, num_heads=decoder_heads
        )
    return MaskedAutoencoder(encoder, decoder, mask_ratio=mask_ratio)


def _is_plain(encoder: VisionTransformer) -> bool:
    """Whether `MaskedAutoencoder.encode` computes what the encoder does, where nothing is hidden."""
    return (
        encoder.cls_token is not None
        and encoder.num_prefix_tokens == 1
        and not encoder.no_embed_class
        and isinstance(encoder.norm_pre, nn.Identity)
        and encoder.patch_embed.proj.in_channels == 3
    )
