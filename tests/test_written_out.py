"""The step against the same step written out: its losses by their formulas, on the bare networks, pass by pass.

Also what goes into it: draws, optimisers, the schedule, and the paper's numbers.
"""

from dataclasses import replace

import pytest
import torch
from test_step import CPU, PICO, collect_gradients, photographs, run_step, tiny, without_jumps
from timm.data.constants import IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid

from perceptual_mae_models.autoencoder import image_pyramid, random_masking
from training.ada import augment
from training.draws import Draws, draw
from training.recipes import METHODS, AdversarialRecipe
from training.run.player import clip_gradient
from training.run.schedule import create_scheduler
from training.team import Adversary, Team, create_team

LOGITS = {  # of the discriminator for real, for rebuilt images, of the autoencoder
    "least_squares": (lambda x: (x - 1) ** 2 / 2, lambda x: x**2 / 2, lambda x: (x - 1) ** 2 / 2),
    "logistic": (lambda x: -logsigmoid(x), lambda x: -logsigmoid(-x), lambda x: -logsigmoid(x)),
    "hinge": (lambda x: (1 - x).clamp(min=0), lambda x: (1 + x).clamp(min=0), lambda x: -x),
    "wgan_gp": (lambda x: -x, lambda x: x, lambda x: -x),
}


def adversary_of(team: Team) -> Adversary:
    assert team.adversary is not None
    return team.adversary


def write_out(team: Team, images: Tensor, draws: Draws, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of both players' losses with their weights, differentiable; penalties without their interval."""
    adversary = adversary_of(team)
    network, judge, recipe = team.network, adversary.player.network, adversary.recipe
    output = network(images, draws.mask)
    fake, real = network.images(output.preds), image_pyramid(images, network.num_scales)

    def seen(pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if adversary.state.ada is None:
            return pyramid
        assert draws.ada is not None
        return augment(pyramid, draws.ada, adversary.state.ada.p)

    of_real, of_fake, of_fooled = LOGITS[recipe.adversarial_loss]
    judged_real, judged_fake = judge(seen(real)), judge(seen(fake))
    learned = judge(seen(tuple(image.detach() for image in fake)))
    difference = ((fake[0] - images) / torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)).abs()  # as networks see it
    if recipe.loss_on == "hidden":
        hidden = output.mask.reshape(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)  # (N, 1, 64, 64)
        reconstruction = (difference * hidden).sum() / (3 * hidden.sum())
    else:
        reconstruction = difference.mean()
    adversarial = of_fooled(judged_fake.logits).mean()
    weight = recipe.adversarial_weight
    if recipe.adaptive_weight:
        layer = network.decoder.last_layer
        sides = [torch.autograd.grad(x, layer, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
        weight *= (sides[0] / (sides[1] + 1e-4)).item()
    pairs = [(a, b.detach()) for a, b in zip(judged_fake.features, judged_real.features, strict=True)]
    grams = [[torch.einsum("ncij,ndij->ncd", x, x) / x[0].numel() for x in pair] for pair in pairs]
    of_g = {
        "reconstruction": reconstruction,
        "feature": recipe.feature_weight * sum((a - b).abs().mean() for a, b in pairs),
        "style": recipe.style_weight * sum((a - b).abs().mean() for a, b in grams),
        "adversarial": weight * adversarial,
    }
    of_d = {"adversarial": of_real(judged_real.logits).mean() + of_fake(learned.logits).mean()}
    if recipe.path_weight and step % recipe.path_every == 0:
        assert draws.path is not None
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            ids_keep, ids_restore, _ = random_masking(draws.mask[::2], network.mask_ratio)
            latent, skips = network.encode(images[::2], ids_keep)
            latent = latent.detach().requires_grad_()
            decoded = network.images(network.decode(latent, tuple(skip.detach() for skip in skips), ids_restore))[0]
            (slope,) = torch.autograd.grad(
                (decoded * draws.path / 64).sum(), latent, create_graph=True
            )  # 64 = sqrt(H W)
        lengths = (slope**2).sum(-1).mean(-1).sqrt()  # (N / 2,)
        of_g["path_length"] = recipe.path_weight * ((lengths - adversary.state.path_mean) ** 2).mean()
    if recipe.r1_gamma and step % recipe.r1_every == 0:
        inputs = tuple(image.clone().requires_grad_() for image in real)
        slopes = torch.autograd.grad(judge(seen(inputs)).logits.sum(), inputs, create_graph=True)
        of_d["r1"] = recipe.r1_gamma / 2 * sum((s**2).sum((1, 2, 3)) for s in slopes).mean()
    if recipe.adversarial_loss == "wgan_gp":
        assert draws.epsilon is not None
        between = (images * draws.epsilon.view(-1, 1, 1, 1) + fake[0] * (1 - draws.epsilon.view(-1, 1, 1, 1))).detach()
        between.requires_grad_()
        (slope,) = torch.autograd.grad(judge((between,)).logits.sum(), between, create_graph=True)
        of_d["gradient_penalty"] = 10 * (((slope**2).sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
    return of_g, of_d


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ls_gan_p", {}),
        ("ls_gan_p", {"loss_on": "hidden", "adversarial_loss": "hinge", "r1_gamma": 3.0}),
        ("ls_gan_p", {"adversarial_loss": "wgan_gp"}),
        ("ls_gan_p", {"adaptive_weight": True}),
        ("msg_gan_p", {}),
        ("stylegan2_ada_p", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "as it is",
)
def test_a_step_is_what_its_formulas_say(method: str, changes: dict[str, object]) -> None:
    recipe = tiny(method, **changes)
    assert isinstance(recipe, AdversarialRecipe)
    team, images = create_team(recipe, CPU), photographs()
    state = adversary_of(team).state
    state.path_mean.fill_(0.3)
    if state.ada:
        state.ada.p.fill_(0.9)
    draws = draw(recipe, 2, team.network, slice(0, 8))
    probed = {"G": team.network.decoder.last_layer, "D": next(adversary_of(team).player.network.parameters())}
    probed["E"] = team.network.encoder.get_parameter("blocks.0.mlp.fc1.weight")
    with without_jumps():
        of_g, of_d = write_out(team, images, draws, 2)
        counted = [sum(term * INTERVAL.get(name, 1) for name, term in terms.items()) for terms in (of_g, of_d)]
        expected = {
            name: torch.autograd.grad(counted[name == "D"], weight, retain_graph=True)[0]
            for name, weight in probed.items()
        }
        collected = collect_gradients(team)
        scalars = run_step(team, 2)
    for prefix, terms in (("loss", of_g), ("loss_d", of_d)):
        assert {name for name in scalars if name.startswith(f"{prefix}/")} == {f"{prefix}/{name}" for name in terms}
        for name, term in terms.items():
            torch.testing.assert_close(
                scalars[f"{prefix}/{name}"],
                term.detach(),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    assert len(of_g) + len(of_d) > 4
    names = {f"{'D' if name == 'D' else 'G'}.{key}": name for key, name in keys_of(team, probed).items()}
    for key, name in names.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(collected[key], expected[name], rtol=1e-3, atol=1e-3 * scale, msg=key)


INTERVAL = {"path_length": 2, "r1": 2}
"""Of `tiny`: a penalty that is due counts for the steps it skips."""


def keys_of(team: Team, probed: dict[str, Tensor]) -> dict[str, str]:
    named = [*team.network.named_parameters(), *adversary_of(team).player.network.named_parameters()]
    return {key: name for key, parameter in named for name, weight in probed.items() if weight is parameter}


def test_augmentation_is_steered_by_the_signs_of_real_images_alone() -> None:
    team = create_team(tiny("stylegan2_ada_p", ada_images=320), CPU)
    adversary = adversary_of(team)
    ada = adversary.state.ada
    assert ada is not None
    images, draws = photographs(), draw(team.recipe, 1, team.network, slice(0, 8))
    fake = team.network.images(team.network(images, draws.mask).preds)
    logits = [
        adversary.player.network(pyramid).logits for pyramid in (image_pyramid(images, team.network.num_scales), fake)
    ]
    ada.neutral = logits[0].median().item() + 1e-6  # so that the signs of real images are of both kinds
    signs = [(x - ada.neutral).sign().sum().item() for x in logits]
    assert signs[0] != signs[1]
    run_step(team, 1)
    assert (ada.sign_sum.item(), ada.count.item()) == (signs[0], 8)
    ada.target = -2.0  # always too little augmentation
    run_step(team, 2)
    assert ada.p.item() == 0
    run_step(team, 3)
    assert ada.p.item() == pytest.approx(4 * 8 / 320)
    assert ada.count.item() == 0


def test_undecided_is_what_the_loss_says() -> None:
    for loss, neutral in (("least_squares", 0.5), ("logistic", 0.0)):
        ada = adversary_of(create_team(tiny("stylegan2_ada_p", adversarial_loss=loss), CPU)).state.ada
        assert ada is not None
        assert ada.neutral == neutral


# --- draws -----------------------------------------------------------------------------------------------------------


def numbers_of(recipe: AdversarialRecipe, step: int, share: slice) -> dict[str, Tensor]:
    """All that is drawn of any method: no recipe has both an augmentation and a gradient penalty."""
    network = create_team(recipe, CPU).network
    draws = draw(recipe, step, network, share)
    mixed = draw(replace(recipe, adversarial_loss="wgan_gp", ada_target=None), step, network, share)
    assert draws.ada is not None
    assert draws.path is not None
    assert mixed.epsilon is not None
    return {"mask": draws.mask, "epsilon": mixed.epsilon, "path": draws.path, **draws.ada._asdict()}


def test_draws_differ_by_step_seed_and_sample_and_shares_are_parts_of_the_whole() -> None:
    recipe = tiny("stylegan2_ada_p")
    whole, share = (numbers_of(recipe, 2, part) for part in (slice(0, 8), slice(4, 8)))
    others = [numbers_of(recipe, 4, slice(0, 8)), numbers_of(replace(recipe, seed=1), 2, slice(0, 8))]
    for name, numbers in whole.items():
        assert torch.equal(share[name], numbers[len(numbers) // 2 :]), name
        flat = numbers.reshape(len(numbers), -1)  # (N, ...)
        assert len(flat.unique(dim=0)) == len(flat), name
        for other in others:
            assert not (other[name] == numbers).any(), name
    assert len({tuple(numbers.flatten()[:4].tolist()) for numbers in whole.values()}) == len(whole)


# --- optimisers and their rates --------------------------------------------------------------------------------------


def test_warm_up_rises_linearly_and_a_half_cosine_falls_to_nothing() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.5}])
    scheduler = create_scheduler(optimizer, 110, 10)
    rates = []
    for step in range(110):
        scheduler.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert all(second == pytest.approx(first / 2) for first, second in rates)
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.5 + 0.5**1.5, 60: 0.5, 85: 0.5 - 0.5**1.5}
    assert {step: rates[step][0] for step in expected} == pytest.approx(expected)
    assert rates[109][0] == pytest.approx(0.0, abs=3e-4)


def test_optimisers_have_the_recipes_settings() -> None:
    recipe = tiny("stylegan2_ada_p", d_lr=3e-3, d_betas=(0.1, 0.9), weight_decay=0.07, betas=(0.8, 0.95), r1_every=3)
    assert isinstance(recipe, AdversarialRecipe)
    team = create_team(recipe, CPU)
    names = {parameter: name for name, parameter in team.network.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in team.player.optimizer.param_groups for p in group["params"]}
    assert decays.keys() == {name for name, p in team.network.named_parameters() if p.requires_grad}
    undecayed = {name for name, decay in decays.items() if decay == 0}
    assert set(decays.values()) == {0, 0.07}
    assert {
        "encoder.cls_token",
        "decoder.mask_token",
        "encoder.norm.weight",
        "encoder.blocks.0.attn.qkv.bias",
    } <= undecayed
    assert not [name for name in undecayed if name.endswith(("fc1.weight", "qkv.weight", "proj.weight", "pred.weight"))]
    for group in team.player.optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (recipe.blr * recipe.batch_size / 256, (0.8, 0.95))
    for group in adversary_of(team).player.optimizer.param_groups:
        assert group["lr"] == pytest.approx(3e-3 * 3 / 4)
        assert group["betas"] == pytest.approx((0.1**0.75, 0.9**0.75))
        assert group["weight_decay"] == 0
    (plain,) = adversary_of(create_team(tiny("ls_gan_p"), CPU)).player.optimizer.param_groups
    assert (plain["lr"], plain["betas"]) == (2e-3, (0.0, 0.99))


def test_each_player_is_clipped_by_its_own_limit() -> None:
    team = create_team(tiny("ls_gan_p", clip_grad=1e-3, d_clip_grad=2e-3), CPU)
    collected = collect_gradients(team)
    scalars = run_step(team, 1)
    for player, limit, norm in (("G", 1e-3, "grad_norm"), ("D", 2e-3, "grad_norm_d")):
        gradients = [gradient for name, gradient in collected.items() if name.startswith(player)]
        assert scalars[norm] > limit
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(limit, rel=1e-3)
    assert clip_gradient([], None) == 0


# --- the paper's numbers ---------------------------------------------------------------------------------------------


def test_methods_have_the_papers_numbers() -> None:
    base = {name: METHODS[name]("vit_base_patch16_pmae") for name in ("mae", "ms_ssim", "ls_gan_p", "msg_gan_p")}
    base["stylegan2_ada_p"] = METHODS["stylegan2_ada_p"]("vit_base_patch16_pmae")
    losses = {name: (recipe.reconstruction, recipe.loss_on, recipe.norm_pix_loss) for name, recipe in base.items()}
    assert losses == {
        "mae": ("l2", "hidden", True),
        "ms_ssim": ("ssim_l1", "image", False),
        "ls_gan_p": ("l1", "image", False),
        "msg_gan_p": ("l1", "image", False),
        "stylegan2_ada_p": ("l1", "image", False),
    }
    assert [name for name, recipe in base.items() if recipe.multi_scale] == ["msg_gan_p", "stylegan2_ada_p"]
    for model in ("vit_base_patch16_pmae", PICO):
        for name in ("ls_gan_p", "msg_gan_p", "stylegan2_ada_p"):
            recipe = METHODS[name](model)
            assert isinstance(recipe, AdversarialRecipe)
            weights = (recipe.feature_weight, recipe.style_weight, recipe.adversarial_weight, recipe.phi)
            assert weights == (0.05, 40.0, 0.7, "discriminator")
            regularisers = (recipe.r1_gamma, recipe.r1_every, recipe.path_weight, recipe.path_every, recipe.path_decay)
            adversary = (recipe.adversarial_loss, recipe.ada_target)
            if name == "stylegan2_ada_p":
                assert (regularisers, adversary) == ((10.0, 16, 2.0, 4, 0.01), ("logistic", 0.6))
            else:
                assert (regularisers[0], regularisers[2], adversary) == (0.0, 0.0, ("least_squares", None))
