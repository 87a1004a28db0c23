"""The step: every term learns where it should and nowhere else, bad updates are withheld, processes add up."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from perceptual_mae_models.autoencoder import image_pyramid, normalise_patches
from training.draws import draw, draw_ahead
from training.networks import discriminator
from training.penalties import Scene
from training.phi import TimmPhi
from training.recipes import METHODS, AdversarialRecipe, Recipe
from training.run.player import NonFiniteGuard, avoid_slow_attention, clip_gradient
from training.step import reconstruction_loss, shown_images, training_step
from training.team import Team, create_team

PICO = "vit_pico_patch8_pmae"
FIVE = ("mae", "ms_ssim", "ls_gan_p", "msg_gan_p", "stylegan2_ada_p")
CPU = torch.device("cpu")


@contextmanager
def without_jumps() -> Iterator[None]:
    """What makes gradients of the same step differ by more than rounding, on one processor or another, taken away.

    oneDNN's convolutions have another precision for another size of the batch (7e-4 instead of 6e-6), and a leaky
    ReLU's slope jumps at zero: a smooth stand-in with its slopes far from there takes its place.
    """
    before, kinked = torch.backends.mkldnn.enabled, discriminator._rectify
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of Intel GPUs
    discriminator._rectify = lambda x: 0.2 * x + 0.8 * torch.nn.functional.softplus(x, beta=5)
    yield
    discriminator._rectify = kinked
    torch._C._set_mkldnn_enabled(before)


@pytest.fixture
def _without_jumps() -> Iterator[None]:
    with without_jumps():
        yield


def tiny(method: str, **changes: object) -> Recipe:
    """A method at the smallest size: 64 pixel images, a decoder of one narrow block for each scale."""
    recipe = METHODS[method](PICO)
    small: dict[str, object] = {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 2, "batch_size": 8}
    if isinstance(recipe, AdversarialRecipe):
        small |= {"d_width": 512 if recipe.multi_scale else 8, "r1_every": 2, "path_every": 2}
    return replace(recipe, **{**small, **changes})


def photographs(n: int = 8) -> Tensor:
    """Smooth images in [0, 1] that differ from each other."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")


def run_step(team: Team, step: int, *, share: slice = slice(0, 8), micro_batches: int = 1) -> dict[str, Tensor]:
    draws = draw(team.recipe, step, team.network, share)
    return training_step(team, photographs()[share], draws, step, micro_batches=micro_batches)


def gradients_of_step(recipe: Recipe, step: int, **arguments: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the optimisers of a fresh team are given, by player and parameter, and the scalars."""
    team = create_team(recipe, CPU)
    collected = collect_gradients(team)
    scalars = run_step(team, step, **arguments)
    return collected, scalars


def collect_gradients(team: Team) -> dict[str, Tensor]:
    """Have the optimisers of a team hand out the gradients instead of using them."""
    collected: dict[str, Tensor] = {}
    players = {"G": team.player, **({"D": team.adversary.player} if team.adversary else {})}
    for name, player in players.items():

        def keep(name: str = name, network: torch.nn.Module = player.network) -> None:
            for key, parameter in network.named_parameters():
                if parameter.grad is not None:
                    collected[f"{name}.{key}"] = parameter.grad.clone()

        player.optimizer.step = keep  # type: ignore[assignment, method-assign]
    return collected


# --- who learns from what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FIVE)
@pytest.mark.parametrize("step", [0, 1], ids=["penalties due", "none due"])
def test_every_parameter_of_every_method_learns(method: str, step: int) -> None:
    team = create_team(tiny(method), CPU)
    collected = collect_gradients(team)
    run_step(team, step)
    expected = {f"G.{name}" for name, _ in team.network.named_parameters()} - {"G.encoder.pos_embed"}
    if team.adversary:
        expected |= {f"D.{name}" for name, _ in team.adversary.player.network.named_parameters()}
    assert {name for name, gradient in collected.items() if gradient.any()} == expected
    assert all(gradient.isfinite().all() for gradient in collected.values())


def test_hidden_patches_alone_teach_every_parameter_too() -> None:
    ours = {"norm_pix_loss": True, "reconstruction": "l2", "loss_on": "hidden", "paste_visible": True}
    collected, _ = gradients_of_step(tiny("ls_gan_p", **ours), 1)
    usual, _ = gradients_of_step(tiny("ls_gan_p"), 1)
    assert {name for name, gradient in collected.items() if gradient.any()} == usual.keys()


@pytest.mark.parametrize("term", ["feature", "style", "adversarial"])
@pytest.mark.parametrize("method", ["ls_gan_p", "msg_gan_p", "stylegan2_ada_p"])
def test_each_term_alone_reaches_the_autoencoder_and_not_the_discriminator(method: str, term: str) -> None:
    """Difference of two steps that differ in one weight: the discriminator's gradients must not feel it."""
    weights = {"feature_weight": 0.0, "style_weight": 0.0, "adversarial_weight": 0.0}
    without, _ = gradients_of_step(tiny(method, **weights), 1)
    alone, scalars = gradients_of_step(tiny(method, **{**weights, f"{term}_weight": 1000.0}), 1)
    assert scalars[f"loss/{term}"] != 0
    name = "G.decoder.pred.weight"
    assert (alone[name] - without[name]).abs().max() > 1e-7
    for name, gradient in without.items():
        if name.startswith("D."):
            assert torch.equal(gradient, alone[name]), name


@pytest.mark.parametrize("term", ["feature", "style"])
def test_a_term_without_weight_is_not_computed(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = gradients_of_step(tiny("msg_gan_p", **{f"{term}_weight": 0.0}), 1)
    monkeypatch.setattr(f"training.step.{term}_matching", lambda *_: pytest.fail("computed"))
    collected, scalars = gradients_of_step(tiny("msg_gan_p", **{f"{term}_weight": 0.0}), 1)
    assert f"loss/{term}" not in scalars
    assert all(torch.equal(gradient, expected[name]) for name, gradient in collected.items())


def test_the_discriminators_update_leaves_no_gradient_at_the_autoencoder() -> None:
    """With all weights of the autoencoder's terms but L1 at zero, its gradient is that of L1 alone."""
    weights = {"feature_weight": 0.0, "style_weight": 0.0, "adversarial_weight": 0.0}
    recipe = tiny("ls_gan_p", **weights)
    adversarial, _ = gradients_of_step(recipe, 1)
    plain = Recipe(**{name: getattr(recipe, name) for name in Recipe.__dataclass_fields__})
    expected, _ = gradients_of_step(plain, 1)
    for name, gradient in expected.items():
        torch.testing.assert_close(adversarial[name], gradient, atol=1e-8, rtol=1e-5)


def test_feature_and_style_are_zero_for_a_perfect_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """phi(I) of the shared pass and phi(G(I_m)) come from the same weights and the same augmentation."""
    team = create_team(tiny("stylegan2_ada_p"), CPU)
    assert team.adversary is not None
    assert team.adversary.state.ada is not None
    team.adversary.state.ada.p.fill_(0.8)
    images, imperfect = photographs(), run_step(team, 1)
    monkeypatch.setattr(team.network, "images", lambda preds: tuple(pyramid_of(team, images)))
    scalars = run_step(team, 1)
    for term in ("loss/feature", "loss/style"):  # up to rounding: the two passes are of different size
        assert scalars[term].abs() < 1e-5 * imperfect[term]


@pytest.mark.parametrize("method", ["ls_gan_p", "msg_gan_p"])
def test_pasted_images_teach_the_hidden_patches_alone_at_every_scale(method: str) -> None:
    team = create_team(tiny(method, paste_visible=True), CPU)
    network, images, noise = team.network, photographs(), torch.rand(8, 64)
    output = network(images, noise)
    for pred in output.preds:
        pred.retain_grad()
    real = image_pyramid(images, network.num_scales)
    shown = shown_images(
        output, Scene(images, draw(team.recipe, 0, network, slice(0, 8)), real, ()), network, team.recipe
    )
    rebuilt = network.images(output.preds)
    torch.stack([(image * torch.rand_like(image)).sum() for image in shown]).sum().backward()
    for pred, image, made, photograph in zip(output.preds, shown, rebuilt, real, strict=True):
        learns = pred.grad.abs().sum(dim=2) > 0  # (N, L)
        assert torch.equal(learns, output.mask.bool())
        hidden = output.mask.view(8, 1, 8, 8).repeat_interleave(image.shape[2] // 8, 2)
        hidden = hidden.repeat_interleave(image.shape[3] // 8, 3).bool().expand_as(image)
        assert torch.equal(image[hidden], made[hidden])
        assert torch.equal(image[~hidden], photograph[~hidden])


def test_the_discriminator_sees_normalised_predictions_with_the_photographs_contrast() -> None:
    team = create_team(tiny("ls_gan_p", norm_pix_loss=True, reconstruction="l2", loss_on="hidden"), CPU)
    network, images = team.network, photographs()
    scene = Scene(images, draw(team.recipe, 0, network, slice(0, 8)), (images,), ())
    perfect, _, _ = normalise_patches(network.target(images))
    output = network(images, scene.draws.mask)._replace(preds=(perfect,))
    assert reconstruction_loss(output, images, network, team.recipe) < 1e-10
    torch.testing.assert_close(shown_images(output, scene, network, team.recipe), (images,), atol=1e-5, rtol=0)
    (flat,) = shown_images(output._replace(preds=(torch.zeros_like(perfect),)), scene, network, team.recipe)
    means = torch.nn.functional.avg_pool2d(network.standardise(images), 8).mean(dim=1)  # of a patch over its colours
    expected = network.unstandardise(means[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3))
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=0)


def pyramid_of(team: Team, images: Tensor) -> tuple[Tensor, ...]:
    return tuple(image.clone().requires_grad_() for image in image_pyramid(images, team.network.num_scales))


def test_before_its_start_the_discriminator_does_not_run() -> None:
    team = create_team(tiny("msg_gan_p", adversarial_start=2), CPU)
    assert team.adversary is not None
    before = {key: value.clone() for key, value in team.adversary.player.network.state_dict().items()}
    team.adversary.player.network.forward = None  # type: ignore[assignment]
    collected = collect_gradients(team)
    scalars = run_step(team, 0)
    assert "loss_d" not in scalars
    assert {name for name, g in collected.items() if g.any()} >= {"G.decoder.pred.weight", "G.encoder.cls_token"}
    missing = {f"G.{name}" for name, _ in team.network.named_parameters()} - collected.keys()
    assert missing == {"G.encoder.pos_embed"}, "coarse scales learn too"
    assert all(torch.equal(before[k], v) for k, v in team.adversary.player.network.state_dict().items())
    del team.adversary.player.network.forward
    assert "loss_d" in run_step(team, 2)


@pytest.mark.parametrize("phi", ["snapshot", "timm"])
def test_other_phis_lend_features_and_do_not_learn(phi: str, tmp_path: Path) -> None:
    changes: dict[str, object] = {"phi": "snapshot"}
    if phi == "timm":
        weights = tmp_path / "resnet.safetensors"
        save_file(timm.create_model("test_resnet").state_dict(), weights)
        changes = {"phi": "timm:test_resnet", "phi_file": str(weights)}
    team = create_team(tiny("ls_gan_p", **changes), CPU)
    assert team.adversary is not None
    assert team.adversary.phi is not None
    before = {key: value.clone() for key, value in team.adversary.phi.state_dict().items()}
    first = run_step(team, 1)["loss/feature"]
    assert first > 0
    run_step(team, 2)
    assert all(torch.equal(before[key], value) for key, value in team.adversary.phi.state_dict().items())
    assert not any(p.requires_grad for p in team.adversary.phi.parameters())
    if phi == "snapshot":
        team.refresh_phi()
        assert any(not torch.equal(before[key], value) for key, value in team.adversary.phi.state_dict().items())


def test_an_unknown_phi_is_explained() -> None:
    with pytest.raises(ValueError, match="--phi timm:resnet_of_mine"):
        create_team(tiny("ls_gan_p", phi="timm:resnet_of_mine"), CPU)


@pytest.mark.parametrize("name", ["test_mambaout", "vit_tiny_patch16_224"])
def test_maps_of_phi_have_their_channels_first_or_it_is_refused(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(name).state_dict(), weights)
    if name == "vit_tiny_patch16_224":
        with pytest.raises(ValueError, match=r"--phi timm:vit_tiny_patch16_224 takes no images of 64 x 64 pixels"):
            TimmPhi(name, str(weights), (64, 64))
        return
    phi = TimmPhi(name, str(weights), (64, 64))
    images = torch.rand(2, 3, 64, 64)
    raw = phi.model((images - phi.mean) / phi.std)
    maps = phi([images])
    assert [m.shape[1] for m in maps] == [m.shape[-1] for m in raw] == phi.model.feature_info.channels()  # type: ignore[operator, union-attr]
    assert all(torch.equal(ours.permute(0, 2, 3, 1), theirs) for ours, theirs in zip(maps, raw, strict=True))


def test_draws_ahead_are_those_of_each_step_and_path_noise_waits_for_the_discriminator() -> None:
    recipe = tiny("stylegan2_ada_p", adversarial_start=5, path_every=2)
    network = create_team(recipe, CPU).network
    ahead = list(draw_ahead(recipe, range(3, 8), network, slice(0, 4)))
    for step, drawn in zip(range(3, 8), ahead, strict=True):
        own = draw(recipe, step, network, slice(0, 4))
        assert torch.equal(drawn.mask, own.mask)
        assert (drawn.path is not None) == (own.path is not None) == (step == 6)
    assert torch.equal(ahead[3].path, draw(recipe, 6, network, slice(0, 4)).path)  # type: ignore[arg-type]
    assert not list(draw_ahead(recipe, range(3, 3), network, slice(0, 4)))
    stopped = draw_ahead(recipe, range(99), network, slice(0, 4))
    next(stopped)
    stopped.close()  # an interrupted run does not wait for steps that are not to come


# --- lazy penalties and state ----------------------------------------------------------------------------------------


def test_penalties_run_when_due_and_count_for_their_interval() -> None:
    due, scalars = gradients_of_step(tiny("stylegan2_ada_p"), 2)
    skipped, none = gradients_of_step(tiny("stylegan2_ada_p"), 1)
    assert {"loss/path_length", "loss_d/r1"} <= scalars.keys()
    assert not {"loss/path_length", "loss_d/r1"} & none.keys()
    # twice the interval, twice the strength: the mean over steps is the same
    name = next(key for key in due if key.startswith("D.") and key.endswith("weight"))
    base, _ = gradients_of_step(tiny("stylegan2_ada_p", r1_gamma=0.0), 4)
    every_2, _ = gradients_of_step(tiny("stylegan2_ada_p", r1_every=2), 4)
    every_4, _ = gradients_of_step(tiny("stylegan2_ada_p", r1_every=4), 4)
    torch.testing.assert_close(every_4[name] - base[name], 2 * (every_2[name] - base[name]), rtol=1e-3, atol=1e-7)
    assert skipped.keys() == due.keys()


def test_penalties_in_two_passes_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    two, scalars = gradients_of_step(tiny("stylegan2_ada_p"), 2)
    monkeypatch.setattr("training.penalties.PARTS", 1)
    one, whole = gradients_of_step(tiny("stylegan2_ada_p"), 2)
    assert_same_gradients(one, two)
    for name in ("loss_d/r1", "loss/path_length"):
        torch.testing.assert_close(scalars[name], whole[name])


def test_path_length_spares_the_encoder_unless_told() -> None:
    weights = {"r1_gamma": 0.0, "path_every": 2}
    off, _ = gradients_of_step(tiny("stylegan2_ada_p", path_weight=0.0, **weights), 2)
    decoder, _ = gradients_of_step(tiny("stylegan2_ada_p", **weights), 2)
    both, _ = gradients_of_step(tiny("stylegan2_ada_p", path_to_encoder=True, **weights), 2)
    for name, gradient in off.items():
        if name.startswith("G.encoder"):
            torch.testing.assert_close(decoder[name], gradient)
    assert not torch.allclose(decoder["G.decoder.blocks.0.mlp.fc1.weight"], off["G.decoder.blocks.0.mlp.fc1.weight"])
    assert not torch.allclose(both["G.encoder.blocks.0.mlp.fc1.weight"], off["G.encoder.blocks.0.mlp.fc1.weight"])


def test_path_mean_and_ada_move_and_are_in_the_checkpoint() -> None:
    team = create_team(tiny("stylegan2_ada_p", ada_images=320), CPU)
    assert team.adversary is not None
    for step in range(4):
        scalars = run_step(team, step)
    state = team.modules()["adversary"].state_dict()
    assert state["path_mean"] > 0
    # 32 images of 320: p went up by a tenth or would have gone down from 0
    assert state["ada.p"].item() == pytest.approx(0.1 if scalars["ada_sign"] > 0.6 else 0.0)


def test_a_checkpoint_holds_all_that_learns_or_remembers() -> None:
    assert create_team(tiny("mae", ema_decay=0.9), CPU).modules().keys() == {"network", "ema"}
    own = {"network", "discriminator", "adversary"}
    assert create_team(tiny("ls_gan_p"), CPU).modules().keys() == own
    team = create_team(tiny("ls_gan_p", phi="snapshot"), CPU)
    assert team.modules().keys() == {*own, "phi"}
    assert team.optimizers().keys() == {"optimizer", "discriminator_optimizer"}


# --- bad numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mae", "ls_gan_p"])
def test_a_non_finite_gradient_withholds_this_and_later_updates(method: str) -> None:
    team = create_team(tiny(method), CPU)
    before = [p.clone() for module in team.modules().values() for p in module.parameters()]

    def unchanged() -> bool:
        now = [p for module in team.modules().values() for p in module.parameters()]
        return all(torch.equal(a, b) for a, b in zip(before, now, strict=True))

    bad = photographs()
    bad[0, 0, 0, 0] = float("nan")
    scalars = training_step(team, bad, draw(team.recipe, 1, team.network, slice(0, 8)), 1)
    assert not scalars["loss/reconstruction"].isfinite() or not scalars["grad_norm"].isfinite()
    run_step(team, 2)
    assert team.guard.tripped.item() == 1
    assert unchanged()
    team.guard = NonFiniteGuard(torch.zeros(()))
    run_step(team, 3)
    assert not unchanged()


@pytest.mark.parametrize(("limit", "expected"), [(None, 5.0), (1.0, 1.0)])
def test_clipping_reports_the_norm_and_scales_down(limit: float | None, expected: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradient([parameter], limit).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", FIVE)
def test_bf16_is_close_and_its_losses_are_float32(method: str) -> None:
    _, exact = gradients_of_step(tiny(method), 2)
    _, rough = gradients_of_step(tiny(method, precision="bf16"), 2)
    assert rough.keys() == exact.keys()
    assert all(value.dtype == torch.float32 for value in rough.values())
    assert rough["loss"] != exact["loss"], "autocast was not on"
    assert rough["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processors_take_no_fused_attention_in_bf16_and_nothing_else_changes(precision: str) -> None:
    recipe = tiny("ls_gan_p", precision=precision)
    fused = [
        module.fused_attn for module in create_team(recipe, CPU).network.modules() if hasattr(module, "fused_attn")
    ]
    assert len(fused) > recipe.decoder_depth
    assert set(fused) == {precision == "fp32"}
    network = create_team(tiny("ls_gan_p"), CPU).network
    images = torch.rand(2, 3, *network.image_size)
    expected = network.encoder(images)
    avoid_slow_attention(network, precision, CPU)
    torch.testing.assert_close(network.encoder(images), expected)


# --- the same result however the batch is cut ------------------------------------------------------------------------


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(right[name], gradient, atol=1e-6 + 1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.usefixtures("_without_jumps")
@pytest.mark.parametrize("method", FIVE)
@pytest.mark.parametrize("step", [1, 2], ids=["none due", "penalties due"])
def test_micro_batches_change_nothing(method: str, step: int) -> None:
    whole, scalars = gradients_of_step(tiny(method), step)
    parts, parts_scalars = gradients_of_step(tiny(method), step, micro_batches=2)
    assert_same_gradients(whole, parts)
    for name in scalars:
        torch.testing.assert_close(parts_scalars[name], scalars[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", FIVE)
def test_checkpointing_blocks_changes_nothing(method: str) -> None:
    whole, _ = gradients_of_step(tiny(method), 2)
    team = create_team(tiny(method), CPU)
    team.network.grad_checkpointing = True
    collected = collect_gradients(team)
    run_step(team, 2)
    assert_same_gradients(whole, collected)


def two_process_cases() -> list[tuple[str, Recipe, int]]:
    """Name, recipe and step of what two processes are compared on."""
    cases = [(f"{method}-{step}", tiny(method), step) for method in FIVE for step in (1, 2)]
    cases.append(("wgan", tiny("msg_gan_p", adversarial_loss="wgan_gp"), 1))
    cases.append(("adaptive", tiny("ls_gan_p", adaptive_weight=True), 1))
    return cases


def worker(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def reduce(scale: float) -> Callable[[Tensor], Tensor]:
        def apply(value: Tensor) -> Tensor:
            value = value.clone()
            torch.distributed.all_reduce(value)
            return value * scale

        return apply

    for name, recipe, step in two_process_cases():
        team = create_team(recipe, CPU)
        team.reduce_sum, team.reduce_mean = reduce(1.0), reduce(0.5)
        for player in (team.player, *([team.adversary.player] if team.adversary else [])):
            player.model = DistributedDataParallel(player.network)
        if team.adversary and team.adversary.state.ada:
            team.adversary.state.ada.p.fill_(0.5)
        collected = collect_gradients(team)
        run_step(team, step, share=slice(4 * rank, 4 * rank + 4))
        torch.save(collected, folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_without_jumps")
def test_two_gloo_processes_give_the_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], cwd=Path(__file__).parent)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    for name, recipe, step in two_process_cases():
        team = create_team(recipe, CPU)
        if team.adversary and team.adversary.state.ada:
            team.adversary.state.ada.p.fill_(0.5)
        joined = collect_gradients(team)
        run_step(team, step)
        for rank in (0, 1):
            assert_same_gradients(joined, torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True))


# --- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FIVE)
def test_four_images_are_overfitted(method: str) -> None:
    lazy = {"r1_every": 16, "path_every": 4} if method == "stylegan2_ada_p" else {}
    recipe = tiny(method, batch_size=4, norm_pix_loss=False, decoder_dim=64, **lazy)
    team = create_team(recipe, CPU)
    for name, lr in (("optimizer", 3e-3), ("discriminator_optimizer", 2e-4)):
        for group in team.optimizers()[name].param_groups if name in team.optimizers() else ():
            group["lr"] = lr
    squares = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = squares.repeat_interleave(16, 2).repeat_interleave(16, 3)  # (4, 3, 64, 64)
    mask = draw(recipe, 0, team.network, slice(0, 4)).mask
    losses: list[float] = []
    for step in range(120):
        draws = replace(draw(recipe, step, team.network, slice(0, 4)), mask=mask)
        losses.append(training_step(team, images, draws, step)["loss/reconstruction"].item())
        if losses[-1] < 0.6 * losses[0]:
            return
    pytest.fail(f"from {losses[0]:.3f} to {losses[-1]:.3f} only")


if __name__ == "__main__":
    with without_jumps():
        worker(int(sys.argv[1]), Path(sys.argv[2]))
