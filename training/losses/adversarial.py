"""What the two players of the adversarial game minimise: functions of raw logits (N,)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Term = Callable[[Tensor], Tensor]
"""Maps logits (N,) to their shares (N,) of a loss, sample by sample."""


@dataclass(frozen=True)
class AdversarialLoss:
    """A pair of losses: means over samples, in float32 whatever comes in."""

    real: Term
    """The discriminator's, of real images."""
    fake: Term
    """The discriminator's, of rebuilt images."""
    fooled: Term
    """The autoencoder's, of rebuilt images."""
    neutral: float = 0.0
    """The logit at which the discriminator is undecided."""

    def d_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, from logits (N,) of real and of rebuilt images."""
        with torch.autocast(real.device.type, enabled=False):
            return self.real(real.float()).mean() + self.fake(fake.float()).mean()

    def g_loss(self, fake: Tensor) -> Tensor:
        """The autoencoder's loss, from logits (N,) of rebuilt images."""
        with torch.autocast(fake.device.type, enabled=False):
            return self.fooled(fake.float()).mean()


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    # Mao et al. 2017, labels 1 / 0 / 1; per sample and without a sigmoid
    "least_squares": AdversarialLoss(
        real=lambda logits: 0.5 * (logits - 1).square(),
        fake=lambda logits: 0.5 * logits.square(),
        fooled=lambda logits: 0.5 * (logits - 1).square(),
        neutral=0.5,
    ),
    # Goodfellow et al. 2014, non-saturating; StyleGAN2's
    "logistic": AdversarialLoss(
        real=lambda logits: F.softplus(-logits), fake=F.softplus, fooled=lambda logits: F.softplus(-logits)
    ),
    # Lim and Ye 2017
    "hinge": AdversarialLoss(
        real=lambda logits: F.relu(1 - logits), fake=lambda logits: F.relu(1 + logits), fooled=torch.neg
    ),
    # Arjovsky et al. 2017; Gulrajani et al. 2017 add `regularizers.gradient_penalty`
    "wgan_gp": AdversarialLoss(real=torch.neg, fake=lambda logits: logits, fooled=torch.neg),
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
