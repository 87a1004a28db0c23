"""The algorithm: what one optimisation step does. It knows nothing of devices, files or logs."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.losses.pixel import masked_l2, normalise_patches
from training.networks.autoencoder import MaskedAutoencoder, Reconstruction
from training.recipes import Recipe


def autocast(recipe: Recipe, device_type: str) -> AbstractContextManager[None]:
    """The recipe's mixed precision, for the networks' forward pass only: losses are float32."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


def mae_loss(
    output: Reconstruction, images: Tensor, network: MaskedAutoencoder, *, norm_pix_loss: bool
) -> dict[str, Tensor]:
    """MAE's loss: squared error of the hidden patches.

    Args:
        output: The autoencoder's output for `images`.
        images: (N, 3, H, W) in [0, 1].
        network: Defines the space of the target.
        norm_pix_loss: Normalise every target patch to zero mean and unit variance.

    Returns:
        The terms of the loss; their sum is minimised.
    """
    target = network.target(images)
    if norm_pix_loss:
        target, _, _ = normalise_patches(target)
    return {"reconstruction": masked_l2(output.pred, target, output.mask)}


@dataclass
class NonFiniteGuard:
    """Stops updates, without a device synchronisation, from the first non-finite gradient norm on.

    The fused optimisers skip a step whose `found_inf` is 1: it is set here and never cleared, so the weights stay those
    of the last good step until the loop, at its next log line, reads `tripped` and stops the run.
    """

    tripped: Tensor

    def watch(self, grad_norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm of this step's gradient and tell the optimiser."""
        self.tripped.copy_(torch.maximum(self.tripped, (~torch.isfinite(grad_norm)).float()))
        optimizer.found_inf = self.tripped  # type: ignore[attr-defined]


def generator_update(
    model: nn.Module,
    network: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    guard: NonFiniteGuard,
    images: Tensor,
    noise: Tensor,
    recipe: Recipe,
) -> dict[str, Tensor]:
    """One step of the autoencoder.

    Args:
        model: `network`, or its distributed wrapper: what the forward pass goes through.
        network: The bare autoencoder.
        optimizer: Over the network's parameters, fused.
        guard: Withholds the update if the gradient is not finite.
        images: (N, 3, H, W) in [0, 1].
        noise: (N, L), decides the masks.
        recipe: Loss and precision.

    Returns:
        Detached float32 scalars: `loss`, `loss/<term>` and `grad_norm`.
    """
    with autocast(recipe, images.device.type):
        output: Reconstruction = model(images, noise)
    terms = mae_loss(output, images, network, norm_pix_loss=recipe.norm_pix_loss)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    grad_norm = clip_gradient(network.parameters(), recipe.clip_grad)
    guard.watch(grad_norm, optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": loss.detach(),
        **{f"loss/{name}": term.detach() for name, term in terms.items()},
        "grad_norm": grad_norm,
    }


def clip_gradient(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Norm of the gradient before clipping; the gradient is scaled down to `limit` if it is larger."""
    return nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))


@torch.no_grad()
def reconstruct(network: MaskedAutoencoder, images: Tensor, noise: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Pictures of what the network does.

    With `norm_pix_loss` the prediction has no brightness or contrast of its own: each patch takes those of the
    original, as in MAE's figures.

    Args:
        network: The autoencoder.
        images: (N, 3, H, W) in [0, 1].
        noise: (N, L), decides the masks.
        recipe: Tells the space of the prediction.

    Returns:
        (N, 3, H, W) images in [0, 1]: `original`, `masked` (hidden patches grey), `rebuilt` (every patch predicted) and
        `pasted` (visible patches as they are, hidden ones predicted).
    """
    output: Reconstruction = network(images, noise)
    target, pred = network.target(images), output.pred.float()
    if recipe.norm_pix_loss:
        _, mean, std = normalise_patches(target)
        pred = pred * std + mean
    hidden = output.mask.unsqueeze(-1)  # (N, L, 1)
    masked = network.to_images(target * (1 - hidden))  # 0 in the standardised space is ImageNet's mean colour
    return {
        "original": images,
        "masked": masked,
        "rebuilt": network.to_images(pred),
        "pasted": network.to_images(target * (1 - hidden) + pred * hidden),
    }
