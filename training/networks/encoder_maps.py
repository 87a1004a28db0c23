"""What networks for segmentation and detection have in common: something learns on the feature maps of an encoder."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class OnEncoderMaps(nn.Module):
    """A network on the feature maps of a timm encoder, to be completed by a subclass.

    Attributes:
        encoder: The timm model.
        frozen: See below.
        reductions: Strides of its maps in pixels.
        channels: Of its maps.

    Args:
        encoder: A timm model with its weights; it is changed.
        frozen: The encoder stays as it is, in evaluation mode; only what stands on it learns.
        what: Stands on it, for messages.

    Raises:
        ValueError: If the encoder gives no feature maps.
    """

    def __init__(self, encoder: Any, *, frozen: bool, what: str) -> None:
        super().__init__()
        info = getattr(encoder, "feature_info", None)
        info = getattr(info, "info", info)
        if not info or not hasattr(encoder, "forward_intermediates"):
            name = type(encoder).__name__
            raise ValueError(f"{name} gives no feature maps (timm's forward_intermediates): no {what} stands on it")
        self.encoder, self.frozen = encoder, frozen
        self.reductions = [int(level["reduction"]) for level in info]
        self.channels = [int(level["num_chs"]) for level in info]

    def end_at(self, indices: Sequence[int], *, norm: bool) -> None:
        """Take away what lies behind the maps that are used, and the final norm too unless it is.

        Args:
            indices: Of the maps.
            norm: Whether the final norm is used.
        """
        # it would get no gradient, which several processes do not forgive
        self.encoder.prune_intermediate_layers(indices, prune_norm=not norm, prune_head=True)
        if self.frozen:
            self.encoder.requires_grad_(False)

    def maps(self, images: Tensor, indices: Sequence[int], *, norm: bool, **options: Any) -> list[Any]:
        """Maps of normalised images (N, 3, H, W), each (N, C, h, w).

        Args:
            images: The images.
            indices: Of the maps.
            norm: Whether the final norm is applied.
            options: More of `forward_intermediates`.
        """
        with torch.no_grad() if self.frozen else nullcontext():
            maps: list[Any] = self.encoder.forward_intermediates(
                images, indices=indices, norm=norm, intermediates_only=True, output_fmt="NCHW", **options
            )
        return maps

    @torch.no_grad()
    def try_size(self, size: tuple[int, int]) -> Any:
        """What comes out for an image of this height and width; the network is in evaluation mode then.

        Raises:
            ValueError: If the encoder cannot take it.
        """
        try:
            return self.eval()(torch.zeros(1, 3, *size))
        except (RuntimeError, AssertionError) as error:
            name = type(self.encoder).__name__
            raise ValueError(f"{name} cannot take images of {size[0]} x {size[1]}: {error}") from error

    def train(self, mode: bool = True) -> "OnEncoderMaps":
        """A frozen encoder stays in evaluation mode: no drop path, no new batch statistics."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self
