"""Discriminators: they tell photographs from reconstructions, and their features are what the paper calls phi.

Both see a pyramid of images in [0, 1] (one scale or all) and give logits and feature maps from one pass. They have no
batch norm, which would mix the statistics of real and rebuilt images, and learn at an equalised rate: weights start as
N(0, 1) and are scaled when used (Karras et al. 2018, section 4.1).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STDDEV_GROUP = 4
"""Images that share a minibatch statistic: a pass over a multiple of it gives the same, however a batch is cut."""
_GAIN = math.sqrt(2)  # keeps the variance behind a leaky rectifier


class Judgement(NamedTuple):
    """What a discriminator makes of images."""

    logits: Tensor
    """(N,) float32; large where an image looks real."""
    features: tuple[Tensor, ...]
    """(N, C, h, w) each, fine to coarse."""


class EqualisedConv2d(nn.Module):
    """Convolution with weights N(0, 1), scaled at run time by gain / sqrt(fan-in).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Of the kernel.
        padding: Zeros around the input.
        gain: Wanted standard deviation of the output for an input of 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        gain: float = _GAIN,
    ) -> None:
        super().__init__()
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = gain / math.sqrt(in_channels * size[0] * size[1])
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, h, w)."""
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """How much a group of images varies, as one more channel (Karras et al. 2018, section 3).

    Args:
        x: (N, C, h, w).
        group: Images that follow each other and share the statistic; divides N.

    Returns:
        (N, C + 1, h, w).
    """
    n, _, height, width = x.shape
    with torch.autocast(x.device.type, enabled=False):
        groups = x.float().unflatten(0, (n // group, group))  # (N/group, group, C, h, w)
        # eps inside the root: equal images would have no finite gradient
        deviation = (groups.var(dim=1, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (N/group,)
    channel = deviation.to(x.dtype).repeat_interleave(group).view(n, 1, 1, 1).expand(n, 1, height, width)
    return torch.cat([x, channel], dim=1)


class Epilogue(nn.Module):
    """From the last feature map to a logit: minibatch statistic, 3 x 3, a kernel as large as the map, 1 x 1.

    Args:
        in_channels: Channels of the map.
        size: Its height and width.
        channels: Channels inside; they decide the size of the large kernel.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.conv = EqualisedConv2d(in_channels + 1, channels, 3, padding=1)
        self.gather = EqualisedConv2d(channels, channels, size)
        self.logit = EqualisedConv2d(channels, 1, 1, gain=1.0)

    def forward(self, x: Tensor, parts: int) -> Tensor:
        """(N, C, h, w) -> (N,) float32."""
        each = x.shape[0] // parts
        # gcd alone would break a compiled graph, which takes batches of several sizes for symbols
        group = STDDEV_GROUP if each % STDDEV_GROUP == 0 else math.gcd(each, STDDEV_GROUP)
        x = minibatch_stddev(x, group)
        x = _rectify(self.conv(x))
        x = _rectify(self.gather(x))
        return self.logit(x).flatten().float()


def _rectify(x: Tensor) -> Tensor:
    # in place: a convolution's own output is not needed again, and these maps are most of what a GAN step holds
    return F.leaky_relu(x, 0.2, inplace=True)


def _to_network(images: Tensor) -> Tensor:
    """[0, 1] to [-1, 1], in the layout in which convolutions are fast."""
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last)


class SingleScaleDiscriminator(nn.Module):
    """Four strided convolutions in the manner of DCGAN (Radford et al. 2016); each gives a feature map.

    Args:
        image_size: Height and width, at least 16.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, image_size: tuple[int, int], width: int) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            EqualisedConv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(channels)
        )
        # few channels inside: the large kernel is 14 x 14 for images of 224
        self.epilogue = Epilogue(channels[-1], (image_size[0] // 16, image_size[1] // 16), width)

    def forward(self, pyramid: Sequence[Tensor], parts: int = 1) -> Judgement:
        """Judge images.

        Args:
            pyramid: One tensor (N, 3, H, W) in [0, 1].
            parts: Kinds of images joined in the batch, one after the other (2 for real and rebuilt ones): the minibatch
                statistic never mixes them.
        """
        (images,) = pyramid
        x, features = _to_network(images), []
        for stage in self.stages:
            x = _rectify(stage(x))
            features.append(x)
        return Judgement(self.epilogue(x, parts), tuple(features))


class _Block(nn.Module):
    """3 x 3, 3 x 3, average pool."""

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv2d(in_channels, channels, 3, padding=1)
        self.conv2 = EqualisedConv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _rectify(self.conv1(x))
        return F.avg_pool2d(_rectify(self.conv2(x)), 2)


class MultiScaleDiscriminator(nn.Module):
    """Images of every scale enter where the features have come down to their size (Karnewar and Wang 2020, MSG-GAN).

    Args:
        image_size: Height and width of the finest scale.
        num_scales: Scales of the pyramid.
        base: Channels times resolution: a map of side r has base / r channels.
        max_channels: Upper bound of the channels.
    """

    def __init__(self, image_size: tuple[int, int], num_scales: int, base: int, max_channels: int = 256) -> None:
        super().__init__()

        def channels(side: int) -> int:
            return max(8, min(max_channels, base // side // 8 * 8))

        sides = [image_size]
        while (min(sides[-1]) > 7 and all(side % 2 == 0 for side in sides[-1])) or len(sides) < num_scales:
            sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
        widths = [channels(max(side)) for side in sides]
        self.from_rgb = nn.ModuleList(EqualisedConv2d(3, width, 1) for width in widths[:num_scales])
        self.blocks = nn.ModuleList()
        for level, (width, after) in enumerate(pairwise(widths)):
            joined = width if level == 0 or level >= num_scales else 2 * width
            self.blocks.append(_Block(joined, width, after))
        last = len(sides) - 1
        self.epilogue = Epilogue(2 * widths[-1] if 0 < last < num_scales else widths[-1], sides[-1], widths[-1])

    def forward(self, pyramid: Sequence[Tensor], parts: int = 1) -> Judgement:
        """Judge images.

        Args:
            pyramid: (N, 3, h, w) in [0, 1] for every scale, fine to coarse.
            parts: Kinds of images joined in the batch, one after the other (2 for real and rebuilt ones): the minibatch
                statistic never mixes them.

        Returns:
            Logits, and the feature map behind every scale's block but the last's.
        """
        entries = [_rectify(entry(_to_network(images))) for entry, images in zip(self.from_rgb, pyramid, strict=True)]
        x, features = entries[0], []
        for level, block in enumerate(self.blocks):
            if 0 < level < len(entries):
                x = torch.cat([x, entries[level]], dim=1)
            x = block(x)
            if level < len(entries) - 1:
                features.append(x)
        if 0 < len(self.blocks) < len(entries):
            x = torch.cat([x, entries[-1]], dim=1)
        return Judgement(self.epilogue(x, parts), tuple(features))
