"""phi: the network whose features the perceptual terms compare, where it is not the live discriminator."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from training.recipes import AdversarialRecipe


class SnapshotPhi(nn.Module):
    """A frozen copy of the discriminator, renewed from time to time.

    Args:
        twin: A network of the discriminator's shape.
        discriminator: What to copy.
    """

    def __init__(self, twin: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.copy = twin.requires_grad_(False)
        self.refresh(discriminator)

    def refresh(self, discriminator: nn.Module) -> None:
        """Take over the discriminator's present weights."""
        self.copy.load_state_dict(discriminator.state_dict())

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Feature maps of images (N, 3, h, w) in [0, 1], fine to coarse; gradients pass, weights do not learn."""
        return tuple(self.copy(pyramid).features)


class TimmPhi(nn.Module):
    """Feature maps of a pretrained timm model.

    Args:
        name: A timm model with `features_only`.
        file: Local weights instead of the Hub's.
        image_size: Height and width in pixels of what it will see.

    Raises:
        ValueError: If timm does not know the model, or cannot give its feature maps of such images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, file: str | None, image_size: tuple[int, int]) -> None:
        super().__init__()
        overlay = {"file": file} if file else None
        try:
            self.model = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, OSError, AttributeError) as error:
            raise ValueError(
                f"--phi timm:{name}: {error}. Give a name of timm.list_models(), and --phi-file FILE for local weights"
            ) from error
        self.model.requires_grad_(False).eval()
        cfg = timm.data.resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1))
        info: Any = self.model.feature_info
        try:
            with torch.no_grad():
                maps = self.model(torch.zeros(1, 3, *image_size))
        except (AssertionError, RuntimeError) as error:
            side = " x ".join(map(str, image_size))
            raise ValueError(f"--phi timm:{name} takes no images of {side} pixels: {error}") from error
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        if [m.shape[-1 if self.channels_last else 1] for m in maps] != info.channels():
            raise ValueError(f"--phi timm:{name}: its feature maps are not of the channels that timm says")

    def train(self, mode: bool = True) -> "TimmPhi":
        """Stay in evaluation mode: the batch statistics of a pretrained network are part of it."""
        return super().train(False)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(N, C, h, w) maps of the finest images, (N, 3, H, W) in [0, 1]; gradients pass, weights do not learn."""
        maps = self.model((pyramid[0] - self.mean) / self.std)
        return tuple(m.movedim(-1, 1) if self.channels_last else m for m in maps)


def create_phi(
    recipe: AdversarialRecipe,
    discriminator: nn.Module,
    create_twin: Callable[[], nn.Module],
    image_size: tuple[int, int],
    device: torch.device,
) -> SnapshotPhi | TimmPhi | None:
    """The recipe's phi, or None for the live discriminator.

    Args:
        recipe: Names it.
        discriminator: The live one.
        create_twin: Makes another network of its shape, for a snapshot.
        image_size: Height and width in pixels of the finest images.
        device: Where.

    Raises:
        ValueError: If a timm model cannot be had, or not for such images.
    """
    if recipe.phi == "discriminator":
        return None
    if recipe.phi == "snapshot":
        return SnapshotPhi(create_twin(), discriminator)
    return TimmPhi(recipe.phi.removeprefix("timm:"), recipe.phi_file, image_size).to(device)
