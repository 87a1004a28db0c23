"""What the two players of the adversarial game minimise: functions of raw logits (N,)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses."""

    d_loss: Callable[[Tensor, Tensor], Tensor]
    """Of the discriminator: (logits of real images, logits of rebuilt ones) -> scalar."""
    g_loss: Callable[[Tensor], Tensor]
    """Of the autoencoder: (logits of rebuilt images) -> scalar."""
    neutral: float = 0.0
    """The logit at which the discriminator is undecided."""


ADVERSARIAL_LOSSES = {
    # Mao et al. 2017, labels 1 / 0 / 1; per sample and without a sigmoid
    "least_squares": AdversarialLoss(
        lambda real, fake: 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean(),
        lambda fake: 0.5 * (fake - 1).square().mean(),
        neutral=0.5,
    ),
    # Goodfellow et al. 2014, non-saturating; StyleGAN2's
    "logistic": AdversarialLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    # Lim and Ye 2017
    "hinge": AdversarialLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
    # Arjovsky et al. 2017; Gulrajani et al. 2017 add `regularizers.gradient_penalty`
    "wgan_gp": AdversarialLoss(
        lambda real, fake: fake.mean() - real.mean(),
        lambda fake: -fake.mean(),
    ),
}


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, reduce_mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """||grad reconstruction|| / (||grad adversarial|| + 1e-4) at a layer, in [0, 1e4] (Esser et al. 2021, equation 7).

    Args:
        reconstruction: Scalar loss.
        adversarial: Scalar loss.
        last_layer: The decoder's last weight.
        reduce_mean: Mean of a tensor over the processes: of the gradients, so that the norms are the joined batch's.

    Returns:
        A scalar without gradient, the same on every process.
    """
    norms = [
        reduce_mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
