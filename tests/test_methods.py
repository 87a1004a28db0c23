"""Whole runs of the adversarial methods: killed, interrupted, resumed, on two processes, with other runtime options."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from test_pretrain import ROOT, environment, fail_here, kill_after, losses, metrics, run, run_here

from training.run.signals import EXIT_INTERRUPTED

FIVE = ("mae", "ms_ssim", "ls_gan_p", "msg_gan_p", "stylegan2_ada_p")
TINY = (
    *("--model", "vit_pico_patch8_pmae", "--decoder-dim", "16", "--decoder-heads", "2", "--steps", "5"),
    *("--batch-size", "8", "--log-every", "1", "--grid-every", "0", "--workers", "0", "--device", "cpu"),
    *("--checkpoint-every", "1"),
)
EXTRA = {
    "ls_gan_p": ("--d-width", "8", "--phi", "snapshot", "--phi-refresh", "1"),
    "msg_gan_p": ("--d-width", "256", "--adversarial-start", "2"),
    "stylegan2_ada_p": ("--d-width", "256", "--r1-every", "2", "--path-every", "2", "--ada-images", "100"),
}


def arguments(method: str, photos: Path, out: Path, *more: object) -> list[str]:
    return [str(x) for x in (method, "--data", photos, "--out", out, *TINY, *EXTRA.get(method, ()), *more)]


def checkpoint_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint of a run holds."""
    last = max((out / "checkpoints").iterdir())
    tensors = {}
    for file in last.glob("*.safetensors"):
        tensors |= {f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()}
    for file in last.glob("*.pt"):
        for index, state in torch.load(file, weights_only=True)["state"].items():
            tensors |= {f"{file.stem}.{index}.{name}": value for name, value in state.items()}
    return tensors


def assert_same_checkpoints(a: Path, b: Path) -> None:
    left, right = checkpoint_tensors(a), checkpoint_tensors(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run of every method."""
    folder = tmp_path_factory.mktemp("methods")
    for method in FIVE:
        run_here(*arguments(method, photos, folder / method))
    return folder


def test_both_players_rates_follow_the_schedule(straight: Path) -> None:
    checkpoint = straight / "stylegan2_ada_p" / "checkpoints" / "step_00000005"
    for name in ("optimizer", "discriminator_optimizer"):
        for group in torch.load(checkpoint / f"{name}.pt", weights_only=True)["param_groups"]:
            assert group["lr"] / group["initial_lr"] == pytest.approx((1 + math.cos(0.8 * math.pi)) / 2)  # 4 of 5 steps


@pytest.mark.parametrize("method", FIVE)
def test_killed_at_some_step_and_resumed_ends_bit_equal(
    method: str, photos: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    told = [*arguments(method, photos, out), "--resume", "auto"]
    kill_after(out, 3, told)
    run_here(*told)
    assert_same_checkpoints(out, straight / method)
    assert losses(out) == losses(straight / method)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_leaves_with_its_own_code(
    number: signal.Signals, photos: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "interrupted"
    told = [*arguments("ls_gan_p", photos, out), "--resume", "auto", "--checkpoint-every", "1000", "--workers", "1"]
    code, said = kill_after(out, 1, told, number)
    assert code == EXIT_INTERRUPTED, said
    assert number.name in said
    assert "--resume auto" in said
    assert "Traceback" not in said
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert 1 <= int(checkpoint.name.removeprefix("step_")) < 5
    run_here(*told)
    assert_same_checkpoints(out, straight / "ls_gan_p")


def test_processes_leave_together_when_the_checkpoint_is_written(photos: Path, tmp_path: Path) -> None:
    """A launcher kills the others soon after one has left; only the first one writes."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        """
import os, pathlib, signal, sys, time
from training import pretrain
from training.run import record

def save_slowly(*arguments, **options):
    time.sleep(2)
    save(*arguments, **options)

def signal_after(self, *arguments):
    after_step(self, *arguments)
    if self.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

save, after_step = record.save_checkpoint, record.RunRecord.after_step
record.save_checkpoint, record.RunRecord.after_step = save_slowly, signal_after
try:
    pretrain.main(sys.argv[1:])
finally:
    folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    found = sorted(path.name for path in (folder / "checkpoints").iterdir())
    (folder / f"left{os.environ['RANK']}").write_text(" ".join(found))
"""
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = arguments("mae", photos, tmp_path / "out", "--checkpoint-every", "1000")
    finished = subprocess.run(
        [sys.executable, *launcher, str(driver), *told],
        env={**environment(2), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "SIGTERM after step 2" in finished.stderr
    assert [(tmp_path / "out" / f"left{rank}").read_text() for rank in (0, 1)] == ["step_00000002"] * 2


@pytest.mark.parametrize(
    "options",
    [("--micro-batches", "2"), ("--grad-checkpointing",), ("--workers", "2", "--cache-images")],
    ids=["micro-batches", "checkpointing", "workers"],
)
def test_runtime_options_do_not_change_the_losses(
    options: tuple[str, ...], photos: Path, straight: Path, tmp_path: Path
) -> None:
    run_here(*arguments("stylegan2_ada_p", photos, tmp_path / "out"), *options)
    for one, other in zip(metrics(straight / "stylegan2_ada_p"), metrics(tmp_path / "out"), strict=True):
        for name in (key for key in one if key.startswith(("loss", "logits", "ada", "path"))):
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiling_both_networks_changes_rounding_only(photos: Path, straight: Path, tmp_path: Path) -> None:
    finished = run(*arguments("ls_gan_p", photos, tmp_path / "out", "--compile"))
    assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(straight / "ls_gan_p"), rel=1e-3)


def test_resuming_on_another_number_of_processes_follows_the_same_run(
    photos: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    shutil.copytree(straight / "stylegan2_ada_p", out)
    shutil.rmtree(max((out / "checkpoints").iterdir()))  # back to step 4
    finished = run(*arguments("stylegan2_ada_p", photos, out, "--resume", "auto"), processes=2)
    assert finished.returncode == 0, finished.stderr
    one, two = metrics(straight / "stylegan2_ada_p")[-1], metrics(out)[-1]
    assert two["step"] == 5
    for name in (key for key in one if key.startswith(("loss", "logits", "ada", "path"))):
        assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


def test_a_snapshot_is_renewed_every_so_many_epochs(photos: Path, tmp_path: Path) -> None:
    run_here(*arguments("ls_gan_p", photos, tmp_path / "out", "--keep-checkpoints", "5"))
    place = tmp_path / "out" / "checkpoints"
    phi = [load_file(place / f"step_{step:08d}" / "phi.safetensors") for step in range(1, 6)]
    judge = load_file(place / "step_00000003" / "discriminator.safetensors")

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    assert same(phi[0], phi[1])
    assert same(phi[1], phi[2])
    assert not same(phi[2], phi[3])  # 24 images: the second epoch begins with the fourth step
    assert same(phi[3], phi[4])
    assert same({name.removeprefix("copy."): tensor for name, tensor in phi[3].items()}, judge)


def test_a_run_says_what_happened(straight: Path) -> None:
    line = metrics(straight / "stylegan2_ada_p")[2]
    expected = {"loss", "loss_d", "loss/feature", "loss/style", "loss/adversarial", "loss_d/r1", "loss/path_length"}
    assert expected | {"grad_norm", "grad_norm_d", "ada_p", "utilisation", "share/discriminator"} <= line.keys()
    shares = [value for name, value in line.items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1)
    assert 0 < line["utilisation"] < 1
    assert (straight / "stylegan2_ada_p" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "loss_d/r1" not in metrics(straight / "stylegan2_ada_p")[1]


def test_a_non_finite_term_stops_the_run_by_name(photos: Path, tmp_path: Path) -> None:
    said = fail_here(*arguments("stylegan2_ada_p", photos, tmp_path / "out"), "--r1-gamma", "1e41")
    assert "loss_d/r1" in said
    assert "became non-finite" in said
    assert not (tmp_path / "out" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--batch-size", "6"), "--batch-size 6 must be a multiple of 4"),
        (("--micro-batches", "4"), "--batch-size 8 must be a multiple of 16"),
        (("--adaptive-weight", "--micro-batches", "2"), "--adaptive-weight compares"),
        (("--phi", "vgg"), "--phi is vgg: it must be discriminator, snapshot or timm:NAME"),
        (("--norm-pix-loss", "--multi-scale"), "--norm-pix-loss is True: it must be off"),
        (("--norm-pix-loss", "--path-weight", "1"), "--path-weight is 1.0: it must be at least 0, and 0 with"),
        (("--r1-every", "0"), "--r1-every is 0: it must be above 0"),
        (("--decoder-heads", "0"), "--decoder-heads is 0: it must be above 0"),
        (("--decoder-dim", "30", "--decoder-heads", "2"), "--decoder-dim is 30: it must be a multiple of 4"),
        (("--max-broken", "-1"), "--max-broken is -1.0: it must be a share"),
        (("--log-every", "-3"), "--log-every is -3: it must be at least 1"),
        (("--epoch-images", "8"), "--epoch-images is for streams"),
        (("--steps", "2", "--warmup", "0.8"), "--warmup 0.8: none of the 2 steps comes after it"),
        (("--phi", "timm:no_such_model"), "--phi timm:no_such_model"),
        (("--mask-ratio", "0.99"), "--mask-ratio 0.99 hides 64 of 64 patches"),
        (("--mask-ratio", "1e-17"), "--mask-ratio 1e-17 hides 0 of 64 patches"),
        (("--weight-decay", "-1"), "--weight-decay is -1.0: it must be at least 0"),
        (("--d-betas", "-0.5", "0.99"), "--d-betas is (-0.5, 0.99): it must be two numbers"),
        (("--adversarial-loss", "wgan_gp", "--ada-target", "0.6"), "whose logits have no zero"),
        (("--multi-scale", "--d-width", "64"), "--d-width is 64: it must be channels times resolution"),
        (("--d-width", "6144"), "--d-width is 6144: it must be channels times resolution"),
    ],
)
def test_wrong_adversarial_flags_stop_before_training(
    change: tuple[str, ...], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [*arguments("ls_gan_p", photos, tmp_path / "out"), *change]
    said = fail_here(*told) + capsys.readouterr().err
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_flag_of_another_method_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fail_here(*arguments("mae", photos, tmp_path / "out", "--r1-gamma", "1")) + capsys.readouterr().err
    assert "--r1-gamma" in said
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_not_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    said = fail_here(*arguments("mae", photos, tmp_path / "out"), "--track", "tensorboard", "wandb")
    assert "--track wandb: not installed" in said
    assert not (tmp_path / "out").exists()


def test_metrics_reach_tensorboard(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_here(*arguments("mae", photos, tmp_path / "out"), "--track", "tensorboard")
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


def test_the_debug_recipe_runs_every_term(photos: Path, tmp_path: Path) -> None:
    told = ["debug", "--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu", "--log-every", "1"]
    run_here(*told)
    assert len(metrics(tmp_path / "out")) == json.loads((tmp_path / "out" / "recipe.json").read_text())["total_steps"]
