"""Detectors on timm encoders: a pyramid of feature maps in front of torchvision's Faster R-CNN and Mask R-CNN.

Behind encoders whose maps all have one stride (ViTs) stands the simple feature pyramid of ViTDet (Li et al. 2022,
"Exploring Plain Vision Transformer Backbones for Object Detection", section 3): every level is made of the last map
alone. All blocks attend to the whole image: the windows of that paper, which spare memory at 1,024 pixels, are not
here. Behind encoders with a hierarchy of maps stands a feature pyramid network (Lin et al. 2017).
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from training.networks.encoder_maps import OnEncoderMaps

ANCHOR_STRIDES = 8
"""Side of a level's anchors in its strides: 32 pixels at stride 4, as in Lin et al. 2017."""
SCALES = (4.0, 2.0, 1.0, 0.5)
"""Levels of the simple feature pyramid, in resolutions of the encoder's map."""


@dataclass(frozen=True, kw_only=True)
class DetectorShape:
    """What is built on the encoder."""

    size: tuple[int, int] = (512, 512)
    """Height and width in pixels of the canvas that images are fitted to."""
    scales: tuple[float, ...] = SCALES
    """Levels of the simple feature pyramid, in resolutions of the encoder's map: neighbours among 4, 2, 1 and 0.5."""
    width: int = 256
    """Channels of the pyramid and of the mask head."""
    head_width: int = 1024
    """Width of the box head's two layers."""
    proposals: int = 1000
    """Boxes of the first stage that the second one looks at, an image."""
    sampled_boxes: int = 512
    """How many of them the second stage learns from, at most a quarter of them on objects."""
    score_threshold: float = 0.05
    """Predictions below it are left out."""
    max_detections: int = 100
    """Predictions an image."""


class _Sample(nn.Sequential):
    """ViTDet's levels: what brings the last map to `scale` times its resolution, then 1 x 1 and 3 x 3."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        def convolve(inside: int, kernel: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, width, kernel, padding=kernel // 2, bias=False), LayerNorm2d(width)]

        def enlarge(inside: int, outside: int) -> nn.Module:
            return nn.ConvTranspose2d(inside, outside, 2, stride=2)

        half, quarter = channels // 2, channels // 4
        steps: dict[float, tuple[list[nn.Module], int]] = {
            4.0: (
                [enlarge(channels, half), LayerNorm2d(half), nn.GELU(), enlarge(half, quarter)],
                quarter,
            ),
            2.0: ([enlarge(channels, half)], half),
            1.0: ([], channels),
            0.5: ([nn.MaxPool2d(2)], channels),
        }
        sampling, inside = steps[scale]
        super().__init__(*sampling, *convolve(inside, 1), *convolve(width, 3))


class SimpleFeaturePyramid(nn.Module):
    """(N, C, h, w) -> a map of `width` channels for every scale, fine to coarse, and one pooled from the last.

    Args:
        channels: C.
        width: Of every level.
        scales: Neighbours among 4, 2, 1 and 0.5, falling.

    Raises:
        ValueError: If the scales are others.
    """

    def __init__(self, channels: int, width: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        runs = [SCALES[first:last] for last in range(len(SCALES) + 1) for first in range(last)]
        if scales not in runs:
            raise ValueError(f"the pyramid's scales are {scales}: give neighbours among 4, 2, 1 and 0.5, falling")
        self.levels = nn.ModuleList([_Sample(channels, width, scale) for scale in scales])

    def forward(self, feature: Tensor) -> "OrderedDict[str, Tensor]":
        """The levels by the names that torchvision gives them: "0", "1", ... and "pool"."""
        maps = [level(feature) for level in self.levels]
        return OrderedDict([*((str(i), level) for i, level in enumerate(maps)), ("pool", maps[-1][:, :, ::2, ::2])])


class PyramidBackbone(OnEncoderMaps):
    """An encoder with a pyramid; the `backbone` of torchvision's detectors.

    Attributes:
        strides: Pixels between neighbours in each level, the pooled one last; (2, 4, 8, 16, 32) for patches of 8.
        out_channels: Channels of every level.

    Args:
        encoder: A timm model with its weights, for images of its own size; it is changed.
        size: Height and width of the images to come, in pixels.
        width: Channels of every level.
        scales: Levels of the simple feature pyramid; encoders with a hierarchy give what they have from stride 4 on.
        frozen: The encoder stays as it is, in evaluation mode; only the pyramid learns.

    Raises:
        ValueError: If the encoder gives no feature maps or cannot take the size.
    """

    def __init__(
        self, encoder: Any, size: tuple[int, int], *, width: int, scales: tuple[float, ...], frozen: bool
    ) -> None:
        super().__init__(encoder, frozen=frozen, what="detector")
        self.out_channels, reductions = width, self.reductions
        self.plain = len(set(reductions)) == 1 and len(reductions) > 1
        last = {reduction: index for index, reduction in enumerate(reductions) if self.plain or reduction >= 4}
        self.indices = list(last.values())
        _fit_size(self.encoder, size, reductions[-1], pool=self.plain and scales[-1:] == (0.5,))
        self.end_at(self.indices, norm=self.plain)
        channels = [self.channels[index] for index in self.indices]
        self.pyramid: nn.Module
        if self.plain:
            self.pyramid = SimpleFeaturePyramid(channels[0], width, scales)
            levels = [reductions[0] / scale for scale in scales]
        else:
            self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())
            levels = [float(reduction) for reduction in last]
        self.strides = (*levels, 2 * levels[-1])
        for level, stride in zip(self.try_size(size).values(), self.strides[:-1], strict=False):
            if tuple(level.shape[2:]) != tuple(math.ceil(side / stride) for side in size):
                name = type(encoder).__name__
                raise ValueError(f"{name} says that a map has the stride {stride:g}, but it is {tuple(level.shape)}")

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalised (N, 3, H, W) -> levels (N, width, H / stride, W / stride), float32."""
        maps = self.maps(images, self.indices, norm=self.plain)
        levels = self.pyramid(maps[0] if self.plain else OrderedDict((str(i), level) for i, level in enumerate(maps)))
        return OrderedDict((name, level.float()) for name, level in levels.items())


def _fit_size(encoder: Any, size: tuple[int, int], stride: int, *, pool: bool) -> None:
    """Make an encoder take images of this size; position embeddings are resampled from those of its own size."""
    least = 2 * stride if pool else stride
    if any(side % least or side < least for side in size):
        raise ValueError(f"the size is {size[0]} x {size[1]}: both must be multiples of {least} for this encoder")
    embed = getattr(encoder, "patch_embed", None)
    if embed is None or getattr(embed, "img_size", None) in (None, size):
        return
    if not hasattr(encoder, "set_input_size"):
        raise ValueError(f"{type(encoder).__name__} takes images of {embed.img_size} alone: give that size")
    encoder.set_input_size(img_size=size)
    positions = getattr(encoder, "pos_embed", None)
    prefix = 0 if getattr(encoder, "no_embed_class", False) else getattr(encoder, "num_prefix_tokens", 0)
    wanted = (size[0] // embed.patch_size[0]) * (size[1] // embed.patch_size[1]) + prefix
    if isinstance(positions, Tensor) and positions.ndim == 3 and positions.shape[1] != wanted:
        raise RuntimeError(f"{positions.shape[1]} position embeddings for {wanted} tokens: they were not resampled")


class Canvas(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Images of at most the canvas's size: normalised, and at its top left; the rest is the mean colour.

    torchvision's own rescales to a short side instead, and pads to the largest image of each batch.

    Args:
        size: Height and width in pixels.
        mean: Of the encoder's images.
        std: Of the encoder's images.
    """

    def __init__(self, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(min(size), max(size), list(mean), list(std), size_divisible=1)
        self.size = size

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Nothing; the data set has done it."""
        if image.shape[1] > self.size[0] or image.shape[2] > self.size[1]:
            raise ValueError(f"an image of {tuple(image.shape[1:])} does not fit on the canvas of {self.size}")
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 1) -> Tensor:
        """(N, 3, H, W) of the canvas."""
        height, width = self.size
        return torch.stack(
            [nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        )


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """One size a level at its true stride; torchvision's own guesses strides from sizes, in whole pixels."""

    def __init__(self, strides: tuple[float, ...]) -> None:
        sides = tuple((ANCHOR_STRIDES * stride,) for stride in strides)
        super().__init__(sides, ((0.5, 1.0, 2.0),) * len(sides))
        self.strides = strides

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """(K, 4) of every level."""
        device = strides[0][0].device
        own = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, own)
        return anchors


def _float32(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    return outputs.float() if isinstance(outputs, Tensor) else type(outputs)(_float32(_module, (), o) for o in outputs)


def build_detector(encoder: nn.Module, shape: DetectorShape, *, classes: int, masks: bool, frozen: bool) -> FasterRCNN:
    """A detector with random heads, drawn from torch's global generator, on a given encoder.

    Called with a list of (3, h, w) images in [0, 1], at most of the canvas's size, and in training with targets
    (`boxes`, `labels` from 1, `masks`) it gives what torchvision's detectors give; `backbone.strides` says the strides.

    Args:
        encoder: A timm model with its weights; it is changed.
        shape: What to build.
        classes: Without the background.
        masks: Mask R-CNN; else Faster R-CNN.
        frozen: Whether the encoder stays as it is.

    Raises:
        ValueError: If the encoder gives no feature maps or cannot take the size.
    """
    config = resolve_model_data_config(encoder)
    backbone = PyramidBackbone(encoder, shape.size, width=shape.width, scales=shape.scales, frozen=frozen)
    strides = backbone.strides
    arguments: dict[str, Any] = {
        "rpn_anchor_generator": _Anchors(strides),
        "box_roi_pool": _pool(strides, 7),
        "box_head": TwoMLPHead(shape.width * 7 * 7, shape.head_width),
        "box_predictor": FastRCNNPredictor(shape.head_width, classes + 1),
        "rpn_post_nms_top_n_train": shape.proposals,
        "rpn_post_nms_top_n_test": shape.proposals,
        "box_batch_size_per_image": shape.sampled_boxes,
        "box_score_thresh": shape.score_threshold,
        "box_detections_per_img": shape.max_detections,
    }
    if masks:
        network: FasterRCNN = MaskRCNN(
            backbone,
            mask_roi_pool=_pool(strides, 14),
            mask_head=MaskRCNNHeads(shape.width, (shape.width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(shape.width, shape.width, classes + 1),
            **arguments,
        )
    else:
        network = FasterRCNN(backbone, **arguments)
    network.transform = Canvas(shape.size, config["mean"], config["std"])
    # bf16 has 8 bits: boxes that come out of it, or anchors that are cast to it, are off by pixels
    for head in (network.rpn.head, network.roi_heads.box_predictor):
        head.register_forward_hook(_float32)
    return network


def _pool(strides: tuple[float, ...], side: int) -> MultiScaleRoIAlign:
    """Pooling from all levels but the last; without this it guesses strides from its first batch, padding included."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides) - 1)], side, 2)
    pool.scales = [1 / stride for stride in strides[:-1]]
    first = round(math.log2(strides[0]))
    pool.map_levels = initLevelMapper(first, first + len(strides) - 2)
    return pool
