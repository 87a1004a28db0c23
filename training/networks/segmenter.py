"""Semantic segmentation on timm encoders, with the decoders of segmentation-models-pytorch.

Behind encoders whose maps all have one stride (ViTs) stands DPT's decoder (Ranftl et al. 2021, "Vision Transformers for
Dense Prediction"), on the maps of four blocks, evenly spaced and before the final norm. Behind encoders with a
hierarchy of maps stands a feature pyramid (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks").
"""

import inspect
import math
from contextlib import nullcontext
from typing import Any

import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.encoders.timm_vit import sample_block_indices_uniformly
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import interpolate

DPT_BLOCKS = 4
PYRAMID_STRIDES = (4, 8, 16, 32)


class _DPT(nn.Module):
    """DPT's decoder and head, random.

    Args:
        encoder: A timm ViT; what lies behind its last map is taken away.
        reductions: Of its maps.
        classes: Channels of the logits.
        width: Of the decoder.
    """

    def __init__(self, encoder: Any, reductions: list[int], classes: int, width: int) -> None:
        super().__init__()
        depth = min(DPT_BLOCKS, len(reductions))
        self.indices = sample_block_indices_uniformly(depth, len(reductions))
        # maps can come with the tokens before them, but not from every model that has such
        gives = "return_prefix_tokens" in inspect.signature(encoder.forward_intermediates).parameters
        self.prefix = gives and getattr(encoder, "num_prefix_tokens", 0) > 0
        # strides between powers of two (patches of 14) are taken for the next one; the logits are resized in the end
        stride = 2 ** math.ceil(math.log2(reductions[0]))
        self.least = reductions[0] * max(1, 2 ** (depth + 1) // stride)
        self.decoder = DPTDecoder(
            encoder_out_channels=[_channels(encoder)[index] for index in self.indices],
            encoder_output_strides=[stride] * depth,
            encoder_has_prefix_tokens=self.prefix,
            readout="cat" if self.prefix else "ignore",
            intermediate_channels=(width, 2 * width, 4 * width, 4 * width)[:depth],
            fusion_channels=width,
        )
        self.head = DPTSegmentationHead(width, classes, upsampling=2)

    def forward(self, maps: list[Any]) -> Tensor:
        pairs = maps if self.prefix else [(level, None) for level in maps]
        logits: Tensor = self.head(self.decoder([level for level, _ in pairs], [tokens for _, tokens in pairs]))
        return logits


class _Pyramid(nn.Module):
    """A feature pyramid and its head, random; arguments as above."""

    prefix = False

    def __init__(self, encoder: Any, reductions: list[int], classes: int, width: int) -> None:
        super().__init__()
        last = {reduction: index for index, reduction in enumerate(reductions)}
        if missing := set(PYRAMID_STRIDES) - last.keys():
            raise ValueError(f"{type(encoder).__name__} has no maps of stride {sorted(missing)}: no decoder fits it")
        self.indices = [last[stride] for stride in PYRAMID_STRIDES]
        self.least = PYRAMID_STRIDES[-1]
        self.decoder = FPNDecoder(
            encoder_channels=[_channels(encoder)[index] for index in self.indices],
            encoder_depth=len(self.indices),
            pyramid_channels=width,
            segmentation_channels=32 * max(1, width // 64),  # its norms have 32 groups
        )
        self.head = SegmentationHead(self.decoder.out_channels, classes, kernel_size=1, upsampling=4)

    def forward(self, maps: list[Any]) -> Tensor:
        logits: Tensor = self.head(self.decoder(maps))
        return logits


def _info(encoder: Any) -> list[dict[str, Any]]:
    info = getattr(encoder, "feature_info", None)
    return list(getattr(info, "info", info) or ())


def _channels(encoder: Any) -> list[int]:
    return [int(level["num_chs"]) for level in _info(encoder)]


class Segmenter(nn.Module):
    """(N, 3, H, W) images in [0, 1] -> (N, C, H, W) logits.

    Attributes:
        encoder: The timm model.
        decoding: Decoder and head, drawn from torch's global generator.

    Args:
        encoder: A timm model with its weights, for images of `size`; what lies behind its maps is taken away.
        size: Height and width of the images in pixels.
        classes: C.
        width: Channels of the decoder.
        frozen: The encoder stays as it is, in evaluation mode.

    Raises:
        ValueError: If the encoder gives no feature maps, none that a decoder fits, or cannot take the size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Any, size: tuple[int, int], *, classes: int, width: int, frozen: bool) -> None:
        super().__init__()
        name, reductions = type(encoder).__name__, [int(level["reduction"]) for level in _info(encoder)]
        if not reductions or not hasattr(encoder, "forward_intermediates"):
            raise ValueError(f"{name} gives no feature maps (timm's forward_intermediates): no decoder stands on it")
        self.encoder = encoder
        self.frozen = frozen
        plain = len(set(reductions)) == 1
        self.decoding: Any = (_DPT if plain else _Pyramid)(encoder, reductions, classes, width)
        if any(side < self.decoding.least or side % self.decoding.least for side in size):
            raise ValueError(
                f"--segmentation.size {size[0]} {size[1]}: both must be multiples of {self.decoding.least} for {name}"
            )
        initialize_decoder(self.decoding.decoder)
        initialize_head(self.decoding.head)
        # what lies behind the maps would get no gradient, which several processes do not forgive
        self.encoder.prune_intermediate_layers(self.decoding.indices, prune_norm=True, prune_head=True)
        if frozen:
            self.encoder.requires_grad_(False)
        config = resolve_model_data_config(encoder)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1))
        self._try(size)

    @torch.no_grad()
    def _try(self, size: tuple[int, int]) -> None:
        try:
            self.eval()(torch.zeros(1, 3, *size))
        except (RuntimeError, AssertionError) as error:
            name = type(self.encoder).__name__
            raise ValueError(f"{name} cannot take images of {size[0]} x {size[1]}: {error}") from error

    def train(self, mode: bool = True) -> "Segmenter":
        """A frozen encoder stays in evaluation mode: no drop path, no new batch statistics."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the images' size."""
        with torch.no_grad() if self.frozen else nullcontext():
            maps = self.encoder.forward_intermediates(
                (images - self.mean) / self.std,
                indices=self.decoding.indices,
                norm=False,
                intermediates_only=True,
                output_fmt="NCHW",
                **({"return_prefix_tokens": True} if self.decoding.prefix else {}),
            )
        logits: Tensor = self.decoding(maps)
        if logits.shape[2:] != images.shape[2:]:
            logits = interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        return logits
