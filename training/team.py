"""The players of a run: networks, optimisers and the state between steps, as the recipe asks for them."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from perceptual_mae_models.autoencoder import MaskedAutoencoder, init_mae_weights
from perceptual_mae_models.building import check_model_name, weights_file
from perceptual_mae_models.unreadable import WeightsUnavailableError
from perceptual_mae_models.vision_transformer_pmae import list_encoders
from perceptual_mae_models.weights import CheckpointError
from training.ada import AdaController, augment
from training.draws import Draws
from training.losses.adversarial import ADVERSARIAL_LOSSES
from training.losses.regularizers import lazy_optimizer_settings
from training.networks.discriminator import MultiScaleDiscriminator, SingleScaleDiscriminator
from training.phi import SnapshotPhi, TimmPhi, create_phi
from training.recipes import AdversarialRecipe, Recipe
from training.run.player import NonFiniteGuard, Player, avoid_slow_attention
from training.run.seeding import derive_seed
from training.weights import build_from_recipe, build_random_encoder

Pyramid = tuple[Tensor, ...]
"""The same images at every scale, fine to coarse: (N, 3, h, w) float32, [0, 1] where they are real."""


def autocast(recipe: Recipe, device_type: str) -> AbstractContextManager[None]:
    """The recipe's mixed precision, for the networks' forward pass only: losses are float32."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


class AdversaryState(nn.Module):
    """What the adversarial game remembers between steps; part of every checkpoint.

    Args:
        recipe: Tells what is remembered.
        neutral: The logit at which the discriminator is undecided.
    """

    path_mean: Tensor

    def __init__(self, recipe: AdversarialRecipe, neutral: float) -> None:
        super().__init__()
        self.register_buffer("path_mean", torch.zeros(()))
        self.ada = (
            AdaController(target=recipe.ada_target, ramp_images=recipe.ada_images, neutral=neutral)
            if recipe.ada_target is not None
            else None
        )


@dataclass
class Adversary:
    """The discriminator's side."""

    recipe: AdversarialRecipe
    player: Player
    state: AdversaryState
    phi: SnapshotPhi | TimmPhi | None
    """Where features come from; None: the live discriminator."""

    def augment(self, pyramid: Pyramid, draws: Draws) -> Pyramid:
        """What the discriminator sees of images: the same draw gives the same change, at every scale."""
        if self.state.ada is None:
            return pyramid
        assert draws.ada is not None
        return augment(pyramid, draws.ada, self.state.ada.p)


def _unreduced(value: Tensor) -> Tensor:
    return value


@dataclass
class Team:
    """All that learns in a run, and everything about it that a checkpoint must hold."""

    recipe: Recipe
    player: Player
    guard: NonFiniteGuard
    ema: ModelEmaV3 | None = None
    adversary: Adversary | None = None
    reduce_sum: Callable[[Tensor], Tensor] = field(default=_unreduced)
    """Sum of a tensor over the processes."""
    reduce_mean: Callable[[Tensor], Tensor] = field(default=_unreduced)
    """Mean of a tensor over the processes."""

    @property
    def network(self) -> MaskedAutoencoder:
        """The bare autoencoder."""
        network = self.player.network
        assert isinstance(network, MaskedAutoencoder)
        return network

    @property
    def players(self) -> dict[str, Player]:
        """Who learns, by the end of the names of its scalars, such as `grad_norm` and `grad_norm_d`."""
        return {"": self.player, **({"_d": self.adversary.player} if self.adversary else {})}

    @property
    def exported(self) -> MaskedAutoencoder:
        """The network that the run is for: the average where there is one."""
        if self.ema is None:
            return self.network
        assert isinstance(self.ema.module, MaskedAutoencoder)
        return self.ema.module

    def refresh_phi(self) -> None:
        """Renew phi's snapshot of the discriminator, where there is one."""
        if self.adversary and isinstance(self.adversary.phi, SnapshotPhi):
            self.adversary.phi.refresh(self.adversary.player.network)

    def modules(self) -> dict[str, nn.Module]:
        """Networks and other state by their names in a checkpoint."""
        modules: dict[str, nn.Module] = {"network": self.network}
        if self.ema:
            modules["ema"] = self.ema.module
        if self.adversary:
            modules |= {"discriminator": self.adversary.player.network, "adversary": self.adversary.state}
            if isinstance(self.adversary.phi, SnapshotPhi):
                modules["phi"] = self.adversary.phi
        return modules

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers by their names in a checkpoint."""
        optimizers = {"optimizer": self.player.optimizer}
        if self.adversary:
            optimizers["discriminator_optimizer"] = self.adversary.player.optimizer
        return optimizers


def create_encoder(recipe: Recipe) -> nn.Module:
    """The recipe's encoder with random weights.

    Raises:
        ValueError: If it is none of ours: MAE's decoder and fixed positions ask for a certain ViT, which others with
            the same modules are not.
    """
    check_model_name(recipe.model)
    known = list_encoders()
    if (architecture := recipe.model.partition(".")[0]) in known and architecture != recipe.model:
        raise ValueError(f"--model is an architecture: give --model {architecture} --init {recipe.model}")
    if recipe.model not in known:
        raise ValueError(f"--model {recipe.model} is none that can be pretrained here: choose {', '.join(known)}")
    encoder: Any = build_random_encoder(recipe)
    if recipe.img_size and recipe.img_size % (patch := encoder.patch_embed.patch_size[0]):
        raise ValueError(
            f"--img-size {recipe.img_size} is no multiple of {patch}, the size of {recipe.model}'s patches"
        )
    return encoder


def create_team(recipe: Recipe, device: torch.device, *, encoder: nn.Module | None = None) -> Team:
    """Networks with the weights that the seed decides, and their optimisers, for one process.

    Args:
        recipe: What to build.
        device: Where.
        encoder: What to train instead of a new `create_encoder`.

    Raises:
        ValueError: If the recipe's model is unknown or cannot be pretrained, or all its patches or none are hidden.
    """
    # float32 is what penalties on gradients ask for; by itself cuDNN rounds what it convolves to TF32's ten bits
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(derive_seed(recipe.seed, "init"))
    player = _create_autoencoder(recipe, encoder or create_encoder(recipe), device)
    team = Team(recipe, player, NonFiniteGuard(torch.zeros((), device=device)))
    if recipe.ema_decay:
        team.ema = ModelEmaV3(player.network, decay=recipe.ema_decay)
    if isinstance(recipe, AdversarialRecipe):
        team.adversary = _create_adversary(recipe, team.network, device)
    return team


def load_initial(team: Team) -> None:
    """Give a new team's encoder the weights that its recipe names.

    Raises:
        ValueError: If they are no file and no tag of the recipe's model, cannot be had, or do not fit.
    """
    recipe = team.recipe
    assert recipe.init is not None
    name, overlay = recipe.init, None
    file = weights_file(Path(recipe.init))
    if file.is_file():
        name, overlay = recipe.model, {"file": str(file)}
    elif recipe.init.partition(".")[0] != recipe.model:
        raise ValueError(f"--init {recipe.init} is neither a file nor a tag of --model {recipe.model}")
    check_model_name(name)
    try:
        size = team.network.image_size  # positions of weights for another one are resampled
        found = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, img_size=size)
    except (CheckpointError, WeightsUnavailableError) as error:
        raise ValueError(f"--init {recipe.init}: {error}") from error
    team.network.encoder.load_state_dict(found.state_dict())
    if team.ema:
        team.exported.load_state_dict(team.network.state_dict())


def _create_autoencoder(recipe: Recipe, encoder: nn.Module, device: torch.device) -> Player:
    network = build_from_recipe(encoder, recipe)
    hidden = network.num_patches - int(network.num_patches * (1 - recipe.mask_ratio))
    if not 0 < hidden < network.num_patches:
        raise ValueError(f"--mask-ratio {recipe.mask_ratio} hides {hidden} of {network.num_patches} patches")
    init_mae_weights(network)
    avoid_slow_attention(network, recipe.precision, device)
    _move(network, device)
    groups = param_groups_weight_decay(
        network, recipe.weight_decay, no_weight_decay_list=["encoder.cls_token", "decoder.mask_token"]
    )
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    return Player(network, optimizer, recipe.clip_grad)


def _create_discriminator(recipe: AdversarialRecipe, network: MaskedAutoencoder, device: torch.device) -> nn.Module:
    discriminator: nn.Module
    if recipe.multi_scale:
        discriminator = MultiScaleDiscriminator(network.image_size, network.num_scales, recipe.d_width)
    else:
        discriminator = SingleScaleDiscriminator(network.image_size, recipe.d_width)
    _move(discriminator, device)
    return discriminator


def _create_adversary(recipe: AdversarialRecipe, network: MaskedAutoencoder, device: torch.device) -> Adversary:
    torch.manual_seed(derive_seed(recipe.seed, "init", 1))
    discriminator = _create_discriminator(recipe, network, device)
    lr, betas = lazy_optimizer_settings(recipe.d_lr, recipe.d_betas, recipe.r1_every if recipe.r1_gamma else None)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)
    state = AdversaryState(recipe, ADVERSARIAL_LOSSES[recipe.adversarial_loss].neutral)
    _move(state, device)
    create_twin = functools.partial(_create_discriminator, recipe, network, device)
    phi = create_phi(recipe, discriminator, create_twin, network.image_size, device)
    return Adversary(recipe, Player(discriminator, optimizer, recipe.d_clip_grad), state, phi)


def _move(module: nn.Module, device: torch.device) -> None:
    # not on the CPU, where it would do nothing but refuse the fake tensors of training/cost.py
    if device.type != "cpu":
        module.to(device)
