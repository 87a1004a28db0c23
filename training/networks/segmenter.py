"""Semantic segmentation on timm encoders, with the decoders of segmentation-models-pytorch.

Behind encoders whose maps all have one stride (ViTs) stands DPT's decoder (Ranftl et al. 2021, "Vision Transformers for
Dense Prediction"), on the maps of four blocks, evenly spaced and before the final norm. Behind encoders with a
hierarchy of maps stands a feature pyramid (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks").
"""

import inspect
import math
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

from training.networks.encoder_maps import OnEncoderMaps

DPT_BLOCKS = 4
PYRAMID_STRIDES = (4, 8, 16, 32)


class _DPT(nn.Module):
    """DPT's decoder and head, random.

    Args:
        encoder: A timm ViT; what lies behind its last map is taken away.
        reductions: Strides of its maps.
        channels: Of its maps.
        classes: Channels of the logits.
        width: Of the decoder.
    """

    def __init__(self, encoder: Any, reductions: list[int], channels: list[int], classes: int, width: int) -> None:
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
            encoder_out_channels=[channels[index] for index in self.indices],
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

    def __init__(self, encoder: Any, reductions: list[int], channels: list[int], classes: int, width: int) -> None:
        super().__init__()
        last = {reduction: index for index, reduction in enumerate(reductions)}
        if missing := set(PYRAMID_STRIDES) - last.keys():
            raise ValueError(f"{type(encoder).__name__} has no maps of stride {sorted(missing)}: no decoder fits it")
        self.indices = [last[stride] for stride in PYRAMID_STRIDES]
        self.least = PYRAMID_STRIDES[-1]
        self.decoder = FPNDecoder(
            encoder_channels=[channels[index] for index in self.indices],
            encoder_depth=len(self.indices),
            pyramid_channels=width,
            segmentation_channels=32 * max(1, width // 64),  # its norms have 32 groups
        )
        self.head = SegmentationHead(self.decoder.out_channels, classes, kernel_size=1, upsampling=4)

    def forward(self, maps: list[Any]) -> Tensor:
        logits: Tensor = self.head(self.decoder(maps))
        return logits


class Segmenter(OnEncoderMaps):
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
        super().__init__(encoder, frozen=frozen, what="decoder")
        plain = len(set(self.reductions)) == 1
        self.decoding: Any = (_DPT if plain else _Pyramid)(encoder, self.reductions, self.channels, classes, width)
        if any(side < self.decoding.least or side % self.decoding.least for side in size):
            least, name = self.decoding.least, type(encoder).__name__
            raise ValueError(f"--segmentation.size {size[0]} {size[1]}: both must be multiples of {least} for {name}")
        initialize_decoder(self.decoding.decoder)
        initialize_head(self.decoding.head)
        self.end_at(self.decoding.indices, norm=False)
        config = resolve_model_data_config(encoder)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1))
        self.try_size(size)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the images' size."""
        tokens = {"return_prefix_tokens": True} if self.decoding.prefix else {}
        maps = self.maps((images - self.mean) / self.std, self.decoding.indices, norm=False, **tokens)
        logits: Tensor = self.decoding(maps)
        if logits.shape[2:] != images.shape[2:]:
            logits = interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        return logits
