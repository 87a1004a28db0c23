"""The lazy regularisers of the adversarial methods, as a table.

All of them need a second derivative. They run eagerly on the bare networks, before the pass whose distributed wrapper
averages the gradients: what they leave in `.grad` is averaged with it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceptual_mae_models.autoencoder import MaskedAutoencoder, random_masking
from training.draws import Draws
from training.losses.regularizers import gradient_penalty, path_length_penalty, path_lengths, r1_penalty
from training.networks.discriminator import STDDEV_GROUP
from training.recipes import AdversarialRecipe
from training.team import Adversary, Pyramid, autocast


class Scene(NamedTuple):
    """What a penalty may look at."""

    images: Tensor
    """(N, 3, H, W) in [0, 1]."""
    draws: Draws
    real: Pyramid
    fake: Pyramid
    """The rebuilt images, detached; empty before the autoencoder's pass."""

    def split(self, parts: int) -> Iterator["Scene"]:
        """Cut into equal parts."""
        for part, draws in enumerate(self.draws.split(parts)):
            real, fake = (tuple(x.chunk(parts)[part] for x in pyramid) for pyramid in (self.real, self.fake))
            yield Scene(self.images.chunk(parts)[part], draws, real, fake)


class Penalty(NamedTuple):
    """A regulariser of one player."""

    name: str
    of: str
    every: int
    """Steps between two uses, each of which counts that many times; 0: never."""
    loss: Callable[[MaskedAutoencoder, Adversary, Scene], dict[str, Tensor]]
    """Gives the penalty under `name`, and what else is to be known of the pass."""


PARTS = 2
"""Passes to cut a penalty into, because second derivatives need memory; the statistic's groups of images stay whole."""


def penalties(recipe: AdversarialRecipe) -> tuple[Penalty, ...]:
    """The recipe's regularisers."""
    wgan = recipe.adversarial_loss == "wgan_gp"
    return (
        Penalty("path_length", "autoencoder", recipe.path_every if recipe.path_weight else 0, path_length),
        Penalty("r1", "discriminator", recipe.r1_every if recipe.r1_gamma else 0, r1),
        Penalty("gradient_penalty", "discriminator", 1 if wgan else 0, wasserstein_gradient),
    )


def penalise(
    of: str,
    network: MaskedAutoencoder,
    adversary: Adversary,
    scene: Scene,
    step: int,
    scale: float,
    mark: Callable[[str], None],
) -> dict[str, Tensor]:
    """Add the gradients of one player's penalties that are due.

    Args:
        of: "autoencoder" or "discriminator".
        network: The bare autoencoder.
        adversary: The discriminator's side.
        scene: What there is to look at.
        step: Optimiser steps done before.
        scale: Share of the micro-batch in the step.
        mark: Called with the name of each penalty that has just run.

    Returns:
        The penalties, not yet multiplied by their interval: `loss/<name>` or `loss_d/<name>`; and `lengths`, the mean
        path length, where the path-length penalty was due.
    """
    key = {"autoencoder": "loss", "discriminator": "loss_d"}[of]
    measured: dict[str, Tensor] = {}
    for penalty in penalties(adversary.recipe):
        if penalty.of == of and penalty.every and step % penalty.every == 0:
            parts = PARTS if len(scene.images) % (PARTS * STDDEV_GROUP) == 0 else 1
            passes = []
            for part in scene.split(parts):
                with sdpa_kernel(SDPBackend.MATH):  # in the backward pass too, where checkpointed blocks run again
                    found = penalty.loss(network, adversary, part)
                    (found[penalty.name] * (penalty.every * scale / parts)).backward()
                passes.append({name: value.detach() for name, value in found.items()})
            means = {name: torch.stack([found[name] for found in passes]).mean() for name in passes[0]}
            measured[f"{key}/{penalty.name}"] = means.pop(penalty.name)
            measured |= means
            mark(penalty.name)
    return measured


def r1(network: MaskedAutoencoder, adversary: Adversary, scene: Scene) -> dict[str, Tensor]:
    """R1 at the real images, through the augmentation."""
    return {"r1": r1_penalty(_judge(adversary, scene.draws), scene.real, adversary.recipe.r1_gamma)}


def wasserstein_gradient(network: MaskedAutoencoder, adversary: Adversary, scene: Scene) -> dict[str, Tensor]:
    """WGAN-GP's penalty between real and rebuilt images."""
    assert scene.draws.epsilon is not None
    judge = _judge(adversary, scene.draws)
    return {"gradient_penalty": gradient_penalty(judge, scene.real, scene.fake, scene.draws.epsilon)}


def path_length(network: MaskedAutoencoder, adversary: Adversary, scene: Scene) -> dict[str, Tensor]:
    """Path-length penalty of the decoder on every second sample.

    It compares with the running mean of the steps before; StyleGAN2 first moves the mean, by a hundredth, which could
    not be done exactly for a batch that comes in parts: the end of the step moves it by all their `lengths`.
    """
    recipe = adversary.recipe
    images, noise = scene.images[::2], scene.draws.mask[::2]
    assert scene.draws.path is not None
    ids_keep, ids_restore, _ = random_masking(noise, network.mask_ratio)
    with torch.set_grad_enabled(recipe.path_to_encoder), autocast(recipe, images.device.type):
        latent, skips = network.encode(images, ids_keep)
    latent, skips = latent.float(), tuple(skip.float() for skip in skips)
    if not recipe.path_to_encoder:
        latent.requires_grad_()
    lengths = path_lengths(
        lambda latent: network.images(network.decode(latent, skips, ids_restore))[0], latent, scene.draws.path
    )
    penalty = recipe.path_weight * path_length_penalty(lengths, adversary.state.path_mean)
    return {"path_length": penalty, "lengths": lengths.mean()}


def _judge(adversary: Adversary, draws: Draws) -> Callable[[Pyramid], Tensor]:
    return lambda pyramid: adversary.player.network(adversary.augment(pyramid, draws)).logits
