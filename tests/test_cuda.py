"""What only a GPU can show. Run by hand: `pytest -m cuda`; skipped where there is none."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_step import FIVE, assert_same_gradients, collect_gradients, photographs, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from training.cost import matmul_peak
from training.draws import draw
from training.run.clock import StepClock
from training.step import training_step
from training.team import Team, create_team

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def run_step(team: Team, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    draws = draw(team.recipe, step, team.network, slice(0, 8)).to(device)
    return training_step(team, photographs().to(device), draws, step)


@pytest.mark.parametrize("method", FIVE)
@pytest.mark.parametrize("step", [1, 2], ids=["none due", "penalties due"])
def test_a_gpu_gives_the_gradients_of_the_cpu(method: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    teams = {device: create_team(tiny(method), device) for device in (CPU, CUDA)}
    collected = {device: collect_gradients(team) for device, team in teams.items()}
    for device, team in teams.items():
        run_step(team, step, device)
    assert_same_gradients(collected[CPU], {name: g.cpu() for name, g in collected[CUDA].items()})


@pytest.mark.parametrize("method", FIVE)
def test_bf16_trains_and_its_losses_are_float32(method: str) -> None:
    team = create_team(tiny(method, precision="bf16"), CUDA)
    for step in range(4):
        scalars = run_step(team, step, CUDA)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in scalars.values())


@pytest.mark.parametrize("method", ["mae", "stylegan2_ada_p"])
def test_compiled_networks_give_the_same_losses(method: str) -> None:
    losses = []
    for compiled in (False, True):
        team = create_team(tiny(method), CUDA)
        for player in (team.player, *([team.adversary.player] if team.adversary else [])):
            player.prepare(lambda network: network, compiled=compiled)
        losses.append([run_step(team, step, CUDA)["loss"].item() for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_fused_attention_runs_outside_the_penalties() -> None:
    team = create_team(tiny("ls_gan_p", precision="bf16"), CUDA)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert run_step(team, 1, CUDA)["loss"].isfinite()


def test_a_step_does_not_wait_for_the_gpu() -> None:
    team = create_team(tiny("stylegan2_ada_p"), CUDA)
    for step in range(5):
        run_step(team, step, CUDA)
    draws = draw(team.recipe, 5, team.network, slice(0, 8))
    images = photographs().to(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(team, images, draws.to(CUDA), 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_nccl_process_trains(tmp_path: Path) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        team = create_team(replace(tiny("msg_gan_p"), precision="bf16"), CUDA)
        assert team.adversary is not None
        for player in (team.player, team.adversary.player):
            player.prepare(DistributedDataParallel, compiled=False)
        assert run_step(team, 0, CUDA)["loss"].isfinite()
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointing_blocks_needs_less_memory() -> None:
    peaks = []
    for again in (False, True):
        team = create_team(tiny("mae"), CUDA)
        team.network.grad_checkpointing = again
        run_step(team, 0, CUDA)
        torch.cuda.reset_peak_memory_stats()
        run_step(team, 1, CUDA)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_clock_and_peak_measure_the_gpu() -> None:
    clock = StepClock(CUDA)
    assert matmul_peak(CUDA, "bf16", seconds=0.05) > 1e3
    clock.mark("matmul")
    assert clock.pop_shares() == {"matmul": 1.0}
