"""The model of large runs: closed forms, drawn failures, a checkpoint on disk; and that SCALE.md is what it prints."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import scale, scaling
from training.draws import draw
from training.recipes import debug, mae
from training.run.checkpoint import save_checkpoint
from training.scaling import BATCH, Assumptions, Counts, Data
from training.step import training_step
from training.team import create_team

DOCUMENT = Path(scale.__file__).with_name("SCALE.md")
COUNTS = Counts({"autoencoder": 50.0, "discriminator": 50.0}, 0.0, 10**8, 12 * 10**8, 16 * 10**8)
# 10^14 operations a second: 1,000 images of 10^11 operations each
MACHINE = Assumptions(
    gpu_peak_tflops=200,
    utilisation=0.5,
    fixed_seconds=0.0,
    gpus_per_node=8,
    cores_per_node=88,
    node_bytes_per_second=1e15,
    network_bytes_per_second=1e15,
    overlap=0.0,
    storage_bytes_per_second=1e15,
    loader_images_per_second=1e6,
)


def test_compute_decides_where_nothing_else_costs() -> None:
    for gpus in (8, 64):
        seconds, bottleneck = scaling.step_seconds(COUNTS, gpus, MACHINE, streamed=False)
        assert seconds == pytest.approx(BATCH / gpus / 1000, rel=1e-4)
        assert bottleneck == "compute"


def test_each_resource_can_be_the_bottleneck() -> None:
    expected = {
        # a node's 88 cores less one a GPU
        "loader": (replace(MACHINE, loader_images_per_second=10), BATCH / (80 * 10)),
        "storage": (replace(MACHINE, storage_bytes_per_second=1e6, bytes_per_image=1e4), BATCH / 100),
        "fixed": (replace(MACHINE, fixed_seconds=2.0), 2 + BATCH / 8 / 1000),
        # 0.4 GB sent 2 * 7 / 8 times at 1 GB/s
        "all-reduce": (replace(MACHINE, node_bytes_per_second=1e9), 0.7 + BATCH / 8 / 1000),
    }
    for name, (machine, seconds) in expected.items():
        found = scaling.step_seconds(COUNTS, 8, machine, streamed=False)
        assert found == (pytest.approx(seconds, rel=1e-5), name)


def test_all_reduce_hides_behind_its_share_of_the_compute() -> None:
    machine = replace(MACHINE, node_bytes_per_second=1e9, overlap=0.5)
    compute = BATCH / 8 / 1000
    assert scaling.gpu_seconds(COUNTS, 8, machine)["all-reduce"] == pytest.approx(0.7 - compute / 2)
    assert scaling.gpu_seconds(COUNTS, 8, replace(machine, node_bytes_per_second=1e10))["all-reduce"] == 0


def test_ring_sends_what_its_steps_add_up_to() -> None:
    # n - 1 steps that reduce and n - 1 that gather, each of an n-th
    assert scaling.ring_seconds(1200, 4, 10) == pytest.approx((3 + 3) * 300 / 10)
    assert scaling.ring_seconds(1200, 1, 10) == 0


def test_a_stream_has_eight_workers_a_process() -> None:
    assert scaling.loader_cores(8, MACHINE, streamed=False) == 80
    assert scaling.loader_cores(8, MACHINE, streamed=True) == 64


def test_saturation_is_where_the_times_are_equal() -> None:
    machine = replace(MACHINE, fixed_seconds=0.01, network_bytes_per_second=5e9, loader_images_per_second=100)
    cores, fixed, reduce = scaling.saturation(COUNTS, machine)
    assert cores == pytest.approx(10)
    assert BATCH / fixed / 1000 == pytest.approx(0.01)
    assert BATCH / reduce / 1000 == pytest.approx(2 * (reduce - 1) / reduce * 4e8 / 5e9)


def test_youngs_interval_loses_least() -> None:
    write, restart, mtbf = 5.0, 300.0, 40_000.0
    best = scaling.best_interval(write, mtbf)
    least = scaling.lost_share(write, best, restart, mtbf)
    assert least == pytest.approx(math.sqrt(2 * write / mtbf) + restart / mtbf)
    assert all(scaling.lost_share(write, factor * best, restart, mtbf) > least for factor in (0.8, 1.25))


def test_formula_agrees_with_drawn_failures_while_they_are_rare() -> None:
    for interval in (100.0, 400.0):
        formula = scaling.lost_share(2.0, interval, 60.0, 20_000.0)
        assert scaling.simulate_lost_share(2.0, interval, 60.0, 20_000.0) == pytest.approx(formula, rel=0.04)


def test_drawn_failures_agree_with_the_exact_expectation_when_they_are_not() -> None:
    write, interval, restart, mtbf = 20.0, 500.0, 100.0, 700.0
    # uptimes are exponential, so the whole intervals in one are geometric
    exact = 1 - interval / ((mtbf + restart) * math.expm1((interval + write) / mtbf))
    assert scaling.simulate_lost_share(write, interval, restart, mtbf, failures=100_000) == pytest.approx(
        exact, abs=0.01
    )
    # to first order a failure always costs half an interval more, though the run had less to lose
    assert scaling.lost_share(write, interval, restart, mtbf) > exact + 0.05


def test_a_run_survives_up_to_the_tolerable_loss() -> None:
    mtbf = scaling.survivable_mtbf(5.0, 500.0, 300.0, 0.1)
    assert scaling.lost_share(5.0, 500.0, 300.0, mtbf) == pytest.approx(0.1)
    assert scaling.survivable_mtbf(60.0, 500.0, 300.0, 0.1) == math.inf


def test_a_stream_is_read_again_after_a_failure() -> None:
    machine = replace(MACHINE, restart_minutes=1, bytes_per_image=1000, storage_bytes_per_second=1e6)
    times = [scaling.restart_seconds(Data("", 2 * 10**6, streamed=streamed), 16, machine) for streamed in (False, True)]
    assert times == [60, 60 + 500]


def test_counted_checkpoint_is_as_large_as_the_one_on_disk(tmp_path: Path) -> None:
    recipe = debug("vit_pico_patch8_pmae")
    team = create_team(recipe, torch.device("cpu"))
    images = torch.rand(8, 3, *team.network.image_size)
    training_step(team, images, draw(recipe, 0, team.network, slice(0, 8)), 0)
    saved = save_checkpoint(tmp_path, team.modules(), team.optimizers(), {"step": 1}, keep=1)
    written = sum(path.stat().st_size for path in saved.iterdir())
    learned, checkpoint, with_ema = scaling.count_tensors(recipe)
    assert checkpoint == pytest.approx(written, rel=0.03)  # names and headers are not counted
    averaged = sum(tensor.nbytes for tensor in team.network.state_dict().values())
    assert with_ema - checkpoint == averaged
    assert learned == sum(p.numel() for m in team.modules().values() for p in m.parameters() if p.requires_grad)


def test_document_holds_what_the_script_prints() -> None:
    document = DOCUMENT.read_text()
    costs = scale.read_counts(document)
    assert list(costs) == [(size, method) for size in scale.RUNS for method in scale.RUNS[size]]
    _, _, rest = document.partition(scale.BEGIN)
    assert rest.partition(scale.END)[0].strip() == scale.report(costs, Assumptions())


def test_report_without_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="Counted"):
        scale.read_counts("| B | mae |")


def test_document_counts_what_the_code_does() -> None:
    # the other recipes take up to half a minute of a core each; tests/test_cost.py tests the counting itself
    counted = scale.read_counts(DOCUMENT.read_text())["B", "mae"]
    assert scaling.count(mae(scale.ENCODERS["B"])) == counted
