"""The algorithm: what one optimisation step does. It knows nothing of devices, files or logs.

    L_G = reconstruction + d_f * feature + d_s * style + w_adv * adversarial          (mae, ms_ssim: the first alone)
    L_D = adversarial + penalties

Source: Tukra, Hoffman, Chatfield, "Improving Visual Representation Learning through Perceptual Understanding", CVPR
2023.

The order inside a step is what makes it right and cheap:

1. The path-length penalty runs on the bare decoder. It needs a second derivative, which neither fused attention nor
   compiled code nor a distributed wrapper has; its gradient waits in `.grad` for the main pass's all-reduce.
2. One pass of the autoencoder.
3. The discriminator's penalties run on the bare discriminator, for the same reason.
4. One pass of the discriminator over real and rebuilt images together: its own loss, and phi(I) for nothing.
5. One pass of the discriminator, its weights frozen, over the rebuilt images: all that the autoencoder learns from it.
6. Only then both optimisers step, so that phi(I) and phi(G(I_m)) come from the same weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from perceptual_mae_models.autoencoder import (
    MaskedAutoencoder,
    Reconstruction,
    hidden_pixels,
    image_pyramid,
    normalise_patches,
)
from training.draws import Draws
from training.losses.adversarial import ADVERSARIAL_LOSSES, adaptive_weight
from training.losses.perceptual import feature_matching, style_matching
from training.losses.pixel import patch_error
from training.losses.regularizers import update_mean_length
from training.losses.structural import ms_ssim_loss, ssim_l1
from training.penalties import Scene, penalise
from training.recipes import AdversarialRecipe, Recipe
from training.run.player import update_weights
from training.team import Adversary, Pyramid, Team, autocast

Terms = dict[str, Tensor]
"""Scalars of a loss by name, with their weights; their sum is minimised."""

PIXEL_POWER = {"l1": 1, "l2": 2}
STRUCTURAL_LOSS = {"ssim_l1": ssim_l1, "ms_ssim": ms_ssim_loss}


def training_step(
    team: Team,
    images: Tensor,
    draws: Draws,
    step: int,
    *,
    micro_batches: int = 1,
    mark: Callable[[str], None] = lambda part: None,
) -> dict[str, Tensor]:
    """One step of every player.

    Args:
        team: Who learns.
        images: (N, 3, H, W) in [0, 1], this process's share.
        draws: Its random numbers.
        step: Optimiser steps done before.
        micro_batches: Cut the share into that many passes, whose gradients add up to the same mean.
        mark: Called with the name of the part of the step that has just ended, for a clock.

    Returns:
        Detached float32 scalars of this process: `loss` and `loss/<term>` of the autoencoder, `loss_d` and
        `loss_d/<term>` of the discriminator, `grad_norm`, `grad_norm_d`, `logits/real`, `logits/fake`, `ada_p`,
        `path_length`. Penalties appear in the steps they run in.
    """
    adversary = team.adversary if team.adversary and step >= team.adversary.recipe.adversarial_start else None
    players = team.players if adversary else {"": team.player}
    scalars: dict[str, Tensor] = {}
    parts = zip(images.chunk(micro_batches), draws.split(micro_batches), strict=True)
    for index, (part, part_draws) in enumerate(parts):
        with ExitStack() as local:
            if index < micro_batches - 1:
                for player in players.values():
                    local.enter_context(player.local_gradients())
            if adversary:
                measured = adversarial_pass(team, adversary, part, part_draws, step, 1 / micro_batches, mark)
            else:
                measured = plain_pass(team, part, part_draws, 1 / micro_batches)
                mark("autoencoder")
        for name, value in measured.items():
            value = value.detach().float() / micro_batches
            scalars[name] = scalars[name] + value if name in scalars else value
    if adversary:
        scalars |= update_state(team, adversary, step, scalars.pop("lengths", None))
    losses = [value for name, value in scalars.items() if name.startswith("loss")]
    norms = update_weights([*players.values()], losses, team.guard, team.reduce_sum)
    scalars |= {f"grad_norm{suffix}": norm for suffix, norm in zip(players, norms, strict=True)}
    mark("optimisers")
    return scalars


def plain_pass(team: Team, images: Tensor, draws: Draws, scale: float) -> dict[str, Tensor]:
    """Gradients of the autoencoder without a discriminator; the arguments are those of `training_step`.

    A multi-scale decoder learns every scale here, so that the discriminator will meet images and no dead weights.
    """
    recipe, network = team.recipe, team.network
    with autocast(recipe, images.device.type):
        output: Reconstruction = team.player.model(images, draws.mask)
    terms = {"reconstruction": reconstruction_loss(output, images, network, recipe)}
    if network.num_scales > 1:
        pairs = zip(network.images(output.preds), image_pyramid(images, network.num_scales), strict=True)
        terms["coarse"] = torch.stack([(fake - real).abs().mean() for fake, real in pairs][1:]).sum()
    (total(terms) * scale).backward()
    return {"loss": total(terms), **{f"loss/{name}": term for name, term in terms.items()}}


def adversarial_pass(
    team: Team,
    adversary: Adversary,
    images: Tensor,
    draws: Draws,
    step: int,
    scale: float,
    mark: Callable[[str], None],
) -> dict[str, Tensor]:
    """Gradients of both players; the arguments are those of `training_step`, `scale` the micro-batch's share."""
    recipe, network, device_type = adversary.recipe, team.network, images.device.type
    scene = Scene(images, draws, image_pyramid(images, network.num_scales), ())
    measured = penalise("autoencoder", team.network, adversary, scene, step, scale, mark)

    with autocast(recipe, device_type):
        output: Reconstruction = team.player.model(images, draws.mask)
    fake = shown_images(output, scene, network, recipe)
    mark("autoencoder")

    scene = scene._replace(fake=tuple(image.detach() for image in fake))
    measured |= penalise("discriminator", team.network, adversary, scene, step, scale, mark)

    seen_real, seen_fake = (adversary.augment(pyramid, draws) for pyramid in (scene.real, fake))
    joined = tuple(torch.cat([real, made.detach()]) for real, made in zip(seen_real, seen_fake, strict=True))
    with autocast(recipe, device_type):
        judged = adversary.player.model(joined, parts=2)
    real_logits, fake_logits = judged.logits.float().chunk(2)  # (N,) each
    d_terms = {"adversarial": ADVERSARIAL_LOSSES[recipe.adversarial_loss].d_loss(real_logits, fake_logits)}
    (total(d_terms) * scale).backward()
    if adversary.state.ada:
        adversary.state.ada.observe(real_logits.detach(), team.reduce_sum)
    mark("discriminator")

    with frozen(adversary.player.network):
        with autocast(recipe, device_type):
            verdict = adversary.player.fast(seen_fake)
            if adversary.phi:
                with torch.no_grad():
                    real_features = adversary.phi(scene.real)
                fake_features = adversary.phi(fake)
            else:
                real_features = tuple(feature.detach().chunk(2)[0] for feature in judged.features)
                fake_features = verdict.features
        terms = generator_terms(team, adversary, output, images, verdict.logits, fake_features, real_features)
        (total(terms) * scale).backward()
    mark("autoencoder")

    measured |= {f"loss/{name}": term for name, term in terms.items()}
    measured |= {f"loss_d/{name}": term for name, term in d_terms.items()}
    logits = {"logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()}
    return {"loss": total(terms), "loss_d": total(d_terms), **measured, **logits}


def shown_images(
    output: Reconstruction, scene: Scene, network: MaskedAutoencoder, recipe: AdversarialRecipe
) -> Pyramid:
    """What the discriminator and phi see of a prediction, at every scale of the decoder."""
    preds = network.take_contrast(output.preds, scene.images) if recipe.norm_pix_loss else output.preds
    fake = network.images(preds)
    if recipe.paste_visible:
        hidden = [hidden_pixels(output.mask, side, network.grid_size) for side in network.decoder.factors]
        fake = tuple(torch.where(*parts) for parts in zip(hidden, fake, scene.real, strict=True))
    return fake


def reconstruction_loss(output: Reconstruction, images: Tensor, network: MaskedAutoencoder, recipe: Recipe) -> Tensor:
    """Distance between the prediction at full size and the images (N, 3, H, W): the recipe's, a float32 scalar."""
    if recipe.reconstruction in STRUCTURAL_LOSS:
        return STRUCTURAL_LOSS[recipe.reconstruction](network.images(output.preds)[0], images)
    target = network.target(images)
    if recipe.norm_pix_loss:
        target, _, _ = normalise_patches(target)
    mask = output.mask if recipe.loss_on == "hidden" else None
    return patch_error(output.pred, target, mask, PIXEL_POWER[recipe.reconstruction])


def generator_terms(
    team: Team,
    adversary: Adversary,
    output: Reconstruction,
    images: Tensor,
    logits: Tensor,
    fake_features: Sequence[Tensor],
    real_features: Sequence[Tensor],
) -> Terms:
    """L_G of the adversarial methods.

    Args:
        team: Whose autoencoder learns.
        adversary: Its recipe holds the weights.
        output: The autoencoder's output for `images`.
        images: (N, 3, H, W) in [0, 1].
        logits: (N,) the discriminator's of the rebuilt images, its weights frozen.
        fake_features: phi of the rebuilt images, (N, C, h, w) each.
        real_features: phi of the images.
    """
    recipe, network = adversary.recipe, team.network
    reconstruction = reconstruction_loss(output, images, network, recipe)
    adversarial = ADVERSARIAL_LOSSES[recipe.adversarial_loss].g_loss(logits.float())
    weight: float | Tensor = recipe.adversarial_weight
    if recipe.adaptive_weight:
        last_layer = network.decoder.last_layer
        weight = weight * adaptive_weight(reconstruction, adversarial, last_layer, team.reduce_mean)
    terms = {"reconstruction": reconstruction}
    if recipe.feature_weight:  # without weight it would cost its backward pass all the same
        terms["feature"] = recipe.feature_weight * feature_matching(fake_features, real_features)
    if recipe.style_weight:
        terms["style"] = recipe.style_weight * style_matching(fake_features, real_features)
    return terms | {"adversarial": weight * adversarial}


def update_state(team: Team, adversary: Adversary, step: int, lengths: Tensor | None) -> dict[str, Tensor]:
    """Move the running mean of path lengths, where there are new ones, and in time the augmentation's probability."""
    recipe, state = adversary.recipe, adversary.state
    measured = {}
    if lengths is not None:
        state.path_mean.copy_(update_mean_length(state.path_mean, lengths, team.reduce_mean, recipe.path_decay))
        measured["path_length"] = state.path_mean.clone()
    if state.ada:
        if (step + 1) % state.ada.interval == 0:
            measured["ada_sign"] = state.ada.update(recipe.batch_size * state.ada.interval)
        measured["ada_p"] = state.ada.p.clone()
    return measured


def total(terms: Terms) -> Tensor:
    """Sum of a loss's terms."""
    return torch.stack(list(terms.values())).sum()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within it, gradients pass through the network and none stays at its parameters."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
