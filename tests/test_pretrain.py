"""Whole runs, through the command line that users type."""

import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from perceptual_mae_models.features import FeatureExtractor
from training import compare, pretrain
from training.data.feed import Feed, batches, describe_data
from training.data.images import ImageSource, RandomViews, create_loader, evenly_by_class
from training.data.sampler import DeterministicBatchSampler
from training.draws import draw
from training.evaluate.features import extract
from training.evaluate.knn import knn_predict
from training.evaluate.monitor import KnnMonitor
from training.pretrain import parse
from training.recipes import recipe_from_json
from training.run.folder import create_run_folder, own_run_folder
from training.step import reconstruction_loss
from training.team import create_team
from training.weights import load_autoencoder, open_embedded

ROOT = Path(__file__).parents[1]
# a fraction of a second a step: the smallest decoder that the recipe allows behind the smallest encoder
TINY = (
    *("--model", "vit_pico_patch8_pmae", "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2"),
    *("--batch-size", "8", "--log-every", "1", "--grid-every", "0", "--workers", "0", "--device", "cpu"),
)


def command(*arguments: object, processes: int = 1) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *launcher, str(ROOT / "training" / "pretrain.py"), *map(str, arguments)]


def environment(processes: int = 1) -> dict[str, str]:
    """As many threads as here, for the same bits."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)), "COLUMNS": "200"}


def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes),
        env=environment(processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def run_here(*arguments: object) -> None:
    """The same command in this process, which has imported everything already."""
    pretrain.main([str(argument) for argument in arguments])


def fail_here(*arguments: object) -> str:
    """The same for a command that ends with a message; returns it."""
    with pytest.raises(SystemExit) as ended:
        run_here(*arguments)
    assert ended.value.code not in (None, 0)
    return str(ended.value.code)


def kill_after(
    out: Path, lines: int, arguments: Sequence[object], number: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Start a run in a process of its own and signal it once it has logged; returns its exit code and words."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < lines:
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, number)  # the loader's workers too, as a terminal or a launcher does
    _, said = process.communicate(timeout=100)
    return process.returncode, said


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def assert_same_files(a: Path, b: Path) -> None:
    for name in ("encoder", "decoder"):
        left, right = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert left.keys() == right.keys()
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different


def accuracies(out: Path) -> dict[float, float]:
    """k-NN accuracies by step."""
    return {line["step"]: line["knn"] for line in metrics(out) if "knn" in line}


def knn_of(weights: Path, held_out: Path, bank: Path | None = None) -> float:
    """The same figure from the exported file, by way of the evaluation's own functions."""
    extractor, source = FeatureExtractor("vit_pico_patch8_pmae", checkpoint=weights), ImageSource(held_out)
    rows, labels = extract(extractor, source), torch.tensor(source.labels)
    others = ImageSource(bank) if bank else source
    known = extract(extractor, others), torch.tensor(others.labels)
    found = knn_predict(*known, rows, [20], leave_one_out=bank is None)[20]
    return (found == labels).double().mean().item()


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 images, two classes whose colours overlap; not those of `photos`."""
    root, rng = tmp_path_factory.mktemp("held_out"), np.random.default_rng(1)
    for number in range(26):
        pixels = rng.integers(0, 226, (5, 6, 3)) + np.array([30, 0, 0]) * (number % 2)
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(pixels.astype(np.uint8))
        coarse.resize((80, 96), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nobody disturbs."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    arguments = (*TINY, "--steps", 8, "--ema-decay", 0.9, "--grid-every", 4, "--checkpoint-every", 2)
    finished = run("mae", "--data", photos, "--out", out, *arguments)
    assert finished.returncode == 0, finished.stderr
    return out


def test_a_run_folder_holds_what_it_should(photos: Path, straight: Path) -> None:
    recipe = json.loads((straight / "recipe.json").read_text())
    assert recipe["recipe"]["model"] == "vit_pico_patch8_pmae"
    assert recipe["recipe"]["batch_size"] == 8
    assert (recipe["data"]["name"], recipe["data"]["images"]) == (photos.name, 24)
    assert [line["step"] for line in metrics(straight)] == list(range(1, 9))
    assert [path.name for path in sorted((straight / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]
    assert [path.name for path in sorted((straight / "grids").iterdir())] == [
        f"step_{step:08d}.png" for step in (0, 4, 8)
    ]
    assert not [path for path in straight.rglob(".*") if "partial" in path.name]


def test_learning_rate_follows_the_schedule(photos: Path, tmp_path: Path) -> None:
    run_here("mae", "--data", photos, "--out", tmp_path / "run", *TINY, "--steps", 4, "--warmup", 0.5)
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx([2e-3 * 8 / 256 * share for share in (0, 0.5, 1, 0.5)])


def test_the_first_loss_is_that_of_the_loaded_images_in_their_range_under_the_drawn_masks(
    photos: Path, straight: Path
) -> None:
    recipe = recipe_from_json(json.loads((straight / "recipe.json").read_text())["recipe"])
    network = create_team(recipe, torch.device("cpu")).network
    sampler = DeterministicBatchSampler(24, 8, range(1), 0)
    (batch,) = create_loader(RandomViews(ImageSource(photos), (64, 64), (0.2, 1.0), 0), sampler, workers=0)
    assert batch.images.amax() > 200
    images = batch.images / torch.tensor(255.0)
    output = network(images, draw(recipe, 0, network, slice(0, 8)).mask)
    loss = reconstruction_loss(output, images, network, recipe).item()
    assert losses(straight)[0] == pytest.approx(loss, rel=1e-5)


def test_what_is_said_of_images_reaches_those_who_read_them(photos: Path) -> None:
    told = ("--data", "hf:x", "--split", "test", "--column", "left", "--epoch-images", "7", "--cache-images")
    assert parse(["mae", "--out", "x", *told]).feed == Feed("hf:x", "test", "left", 7, True)
    recipe = parse(["mae", *map(str, TINY), "--crop-scale", "0.9", "1", "--seed", "3"]).recipe
    (batch,) = batches(ImageSource(photos), recipe, (64, 64), range(1), rank=0, world_size=1, workers=0)
    sampler = DeterministicBatchSampler(24, 8, range(1), 3)
    (expected,) = create_loader(RandomViews(ImageSource(photos), (64, 64), (0.9, 1.0), 3), sampler, workers=0)
    assert torch.equal(batch.images, expected.images)


def test_the_average_is_that_of_the_weights_after_each_step(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (*TINY, "--steps", 3, "--ema-decay", 0.9, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    run_here("mae", "--data", photos, "--out", out, *arguments)
    recipe = recipe_from_json(json.loads((out / "recipe.json").read_text())["recipe"])
    average = create_team(recipe, torch.device("cpu")).network.state_dict()
    for step in (1, 2, 3):
        raw, kept = (load_file(out / f"checkpoints/step_{step:08d}/{name}.safetensors") for name in ("network", "ema"))
        for key, value in raw.items():
            average[key] = 0.9 * average[key] + 0.1 * value
            torch.testing.assert_close(kept[key], average[key], rtol=1e-5, atol=1e-7)


def test_exported_encoder_loads_in_timm_and_decoder_behind_it(straight: Path) -> None:
    file = straight / "encoder.safetensors"
    encoder = timm.create_model("vit_pico_patch8_pmae", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert encoder.state_dict().keys() == load_file(file).keys()
    network, recipe = load_autoencoder(encoder, straight / "decoder.safetensors")
    assert recipe.decoder_dim == 16
    average = load_file(straight / "checkpoints" / "step_00000008" / "ema.safetensors")
    raw = load_file(straight / "checkpoints" / "step_00000008" / "network.safetensors")
    state = network.state_dict()
    assert all(torch.equal(state[key], average[key]) for key in state), "the export is the moving average"
    assert any(not torch.equal(average[key], raw[key]) for key in state)


def test_runs_are_compared_on_the_same_images(photos: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "copy")
    compare.main((str(straight), str(tmp_path / "copy")), data=photos, count=2, out=tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    tile, step = 3 * 64, 3 * 64 + 14
    right = picture.shape[1] - 36 - tile  # the second image of each row
    original, masked, one, other = (picture[92 + row * step :, right:][:tile, :tile] for row in range(4))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, original)
    shown = (masked == original).all(axis=2)
    assert 0.2 < shown.mean() < 0.4, "a quarter of the patches is visible"
    assert np.array_equal(one[shown], original[shown])
    with pytest.raises(SystemExit, match="a run writes it at its end"):
        compare.main((str(tmp_path),))
    with pytest.raises(SystemExit, match="name the runs"):
        compare.main(())
    with pytest.raises(SystemExit, match="--count is 9: without --data there are 6 photographs"):
        compare.main((str(straight),), count=9)
    for wrong in ({"data": tmp_path / "nowhere"}, {"out": tmp_path / "nowhere" / "out.png"}):
        with pytest.raises(SystemExit, match=r"compare\.py: .*nowhere"):
            compare.main((str(straight),), **wrong)


def test_the_packages_own_autoencoder_rebuilds_ones_own_images(photos: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        compare.main(("vit_pico_patch8_pmae.mae_imagenette",), data=photos, count=2, out=tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    network, recipe = open_embedded("vit_pico_patch8_pmae.mae_imagenette")
    assert recipe.method == "mae"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height == 92 + 3 * (3 * network.image_size[0] + 14) - 14 + 36


def test_killed_and_resumed_ends_bit_equal(photos: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = ("mae", "--data", photos, "--out", out, *TINY, "--steps", 8, "--ema-decay", 0.9)
    arguments = (*arguments, "--grid-every", 4, "--checkpoint-every", 2, "--resume", "auto")
    kill_after(out, 3, arguments)  # past a checkpoint, before the next
    assert not (out / "encoder.safetensors").exists()

    run_here(*arguments)
    assert_same_files(out, straight)
    assert losses(out) == losses(straight)
    optimizer = "checkpoints/step_00000008/optimizer.pt"
    left, right = (torch.load(folder / optimizer, weights_only=True) for folder in (out, straight))
    for index, state in left["state"].items():
        assert all(torch.equal(state[key], right["state"][index][key]) for key in state)


def test_workers_and_logging_do_not_change_the_result(photos: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "other_runtime"
    arguments = [*TINY, "--steps", 8, "--ema-decay", 0.9, "--log-every", 3, "--checkpoint-every", 0]
    arguments[arguments.index("--workers") + 1] = "2"
    run_here("mae", "--data", photos, "--out", out, *arguments)
    assert_same_files(out, straight)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiling_changes_rounding_only(photos: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "compiled"
    finished = run("mae", "--data", photos, "--out", out, *TINY, "--steps", 8, "--ema-decay", 0.9, "--compile")
    assert finished.returncode == 0, finished.stderr
    assert losses(out) == pytest.approx(losses(straight), rel=1e-4)


def test_two_processes_follow_one(photos: Path, held_out: Path, straight: Path, tmp_path: Path) -> None:
    """Losses and gradients of the joined batch, and so the weights, up to the order of float additions."""
    out = tmp_path / "two"
    arguments = (*TINY, "--steps", 8, "--ema-decay", 0.9, "--knn-data", held_out, "--knn-every", 1)
    finished = run("mae", "--data", photos, "--out", out, *arguments, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert list(accuracies(out)) == [3, 6, 8]
    assert accuracies(out)[8] == knn_of(out / "encoder.safetensors", held_out)
    for one, two in zip(metrics(straight), metrics(out), strict=True):
        for name in ("loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    left, right = load_file(straight / "encoder.safetensors"), load_file(out / "encoder.safetensors")
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=2e-6, rtol=1e-4)


def test_bf16_trains_close_to_float32(photos: Path, tmp_path: Path) -> None:
    out, straight, short = tmp_path / "bf16", tmp_path / "fp32", ("--steps", 2, "--batch-size", 2)
    for folder, precision in ((out, "bf16"), (straight, "fp32")):
        run_here("mae", "--data", photos, "--out", folder, *TINY, *short, "--precision", precision)
    assert losses(out) == pytest.approx(losses(straight), rel=0.02)
    assert losses(out) != losses(straight), "autocast was not on"
    assert load_file(out / "encoder.safetensors")["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--mask-ratio", 1.5), "--mask-ratio is 1.5: it must be between 0 and 1"),
        (("--decoder-dim", 18), "--decoder-dim is 18"),
        (("--data", "nowhere"), "--data nowhere: no such folder or tar file"),
        (("--model", "resnet50"), "--model resnet50 is none that can be pretrained here: choose vit_base"),
        (("--model", "vit_tiny_patch16_224"), "--model vit_tiny_patch16_224 is none that can be pretrained here"),
        (("--model", "vit_nano"), "unknown model 'vit_nano'"),
        (
            ("--model", "vit_pico_patch8_pmae.mae_imagenette"),
            "give --model vit_pico_patch8_pmae --init vit_pico_patch8_p",
        ),
        (("--steps", "many"), "--steps"),
        (("--workers", -1), "--workers is -1: it must be at least 0"),
        (("--devices", 0), "--devices is 0: it must be above 0"),
    ],
)
def test_wrong_flags_stop_before_training(
    change: tuple[str, object], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fail_here("mae", "--data", photos, "--out", tmp_path / "out", *TINY, "--steps", 1, *change)
    assert message in " ".join((said + capsys.readouterr().err).split())
    assert not (tmp_path / "out").exists()


def test_a_message_and_not_a_traceback_reaches_the_terminal(photos: Path, tmp_path: Path) -> None:
    finished = run("mae", "--data", tmp_path / "nowhere", "--out", tmp_path / "out", *TINY, "--steps", 1)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("pretrain.py: --data")
    assert "Traceback" not in finished.stderr


def test_a_folder_with_a_run_is_not_overwritten_nor_continued_otherwise(photos: Path, straight: Path) -> None:
    before = (straight / "encoder.safetensors").read_bytes()
    arguments = ("mae", "--data", photos, "--out", straight, *TINY, "--steps", 8, "--ema-decay", 0.9)
    assert "already holds a run: pass --resume auto" in fail_here(*arguments)
    assert "recipe.blr: was 0.002, now 1" in fail_here(*arguments, "--resume", "auto", "--blr", 1)
    assert (straight / "encoder.safetensors").read_bytes() == before


def test_a_folder_in_which_nothing_was_learned_is_taken_over_and_one_in_use_is_not(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    create_run_folder(out, {"recipe": {"batch_size": 4096}, "data": {}})  # and then memory ran out
    arguments = ("mae", "--data", photos, "--out", out, *TINY, "--steps", 1)
    with own_run_folder(out):
        assert f"{out} belongs to a run that is going on" in fail_here(*arguments)
        assert "going on" in fail_here(*arguments, "--resume", "auto")
    run_here(*arguments)
    assert json.loads((out / "recipe.json").read_text())["recipe"]["batch_size"] == 8
    assert "already holds a run" in fail_here(*arguments)
    assert f"{photos / 'class0' / '00.png'}" in fail_here(*arguments, "--out", photos / "class0" / "00.png")


def test_a_file_system_that_cannot_lock_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", missing)
    with own_run_folder(tmp_path / "out"):
        assert "cannot lock" in capsys.readouterr().err
        with own_run_folder(tmp_path / "out"):  # a marker of a killed run would keep this one out
            pass


def test_an_error_ends_a_run_whose_loaders_are_other_processes(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(16):
        (tmp_path / "data" / f"{number}.png").write_bytes(b"")
    arguments = ("mae", "--data", tmp_path / "data", "--out", tmp_path / "out", *TINY, "--workers", 2, "--steps", 9)
    finished = run(*arguments)  # within its time
    assert finished.returncode not in (0, 75)
    assert "none of its 16 images decodes" in finished.stderr


def test_an_encoder_begins_with_given_weights(photos: Path, straight: Path, tmp_path: Path) -> None:
    weights, given = tmp_path / "weights.safetensors", load_file(straight / "encoder.safetensors")
    shutil.copy(straight / "encoder.safetensors", weights)
    still = ("mae", "--data", photos, *TINY, "--steps", 1, "--blr", 1e-12, "--weight-decay", 0, "--ema-decay", 0.9)
    run_here(*still, "--out", tmp_path / "out", "--init", weights)
    learned = load_file(tmp_path / "out" / "encoder.safetensors")
    for name, tensor in given.items():
        torch.testing.assert_close(learned[name], tensor, msg=name)
    weights.unlink()  # a checkpoint has all of it
    run_here(*still, "--out", tmp_path / "out", "--init", weights, "--resume", "auto")
    run_here(*still, "--out", tmp_path / "run", "--init", straight)
    assert_same_files(tmp_path / "run", tmp_path / "out")
    run_here(*still, "--out", tmp_path / "tag", "--init", "vit_pico_patch8_pmae.mae_imagenette")
    embedded = timm.create_model("vit_pico_patch8_pmae.mae_imagenette", pretrained=True).state_dict()
    found = load_file(tmp_path / "tag" / "encoder.safetensors")
    torch.testing.assert_close(found["blocks.0.attn.qkv.weight"], embedded["blocks.0.attn.qkv.weight"])
    for wrong, message in (("vit_base_patch16_pmae.fb_mae_in1k", "neither a file nor a tag"), (weights, "nor a tag")):
        assert message in fail_here(*still, "--out", tmp_path / "no", "--init", wrong)
    assert "complete encoder" in fail_here(*still, "--out", tmp_path / "no", "--init", straight / "decoder.safetensors")


def test_a_run_from_before_a_field_of_the_recipe_goes_on_as_long_as_the_field_is_at_its_default(
    photos: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "old"
    shutil.copytree(straight, out)
    description = json.loads((out / "recipe.json").read_text())
    assert description["recipe"].pop("weight_decay") == 0.05
    (out / "recipe.json").write_text(json.dumps(description))
    arguments = ("mae", "--data", photos, "--out", out, *TINY, "--steps", 8, "--ema-decay", 0.9, "--resume", "auto")
    assert "recipe.weight_decay: was 0.05, now 1" in fail_here(*arguments, "--weight-decay", 1)
    run_here(*arguments)


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "diverges"
    arguments = (*TINY, "--blr", 1e25, "--warmup", 0, "--steps", 20, "--checkpoint-every", 1)
    assert "became non-finite" in fail_here("mae", "--data", photos, "--out", out, *arguments)
    for checkpoint in (out / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "network.safetensors").values())


def test_a_share_of_broken_images_is_skipped_and_too_many_stop(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in photos.rglob("*.png"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "00.png").write_bytes(b"")
    arguments = ("mae", "--data", data, *TINY, "--steps", 3)
    run_here(*arguments, "--out", tmp_path / "tolerant", "--max-broken", 0.1)
    told = capsys.readouterr()
    assert "mae, vit_pico_patch8_pmae: 3 steps of 8 images on 1 x cpu" in told.err
    assert "skipped an image that does not decode: 00.png: empty" in told.err
    assert re.search(r"step 3/3  left 00:00  loss \d", told.err)
    encoder = tmp_path / "tolerant" / "encoder.safetensors"
    assert told.out == f"{encoder}: of step 3, the last; its decoder is beside it\n"
    assert metrics(tmp_path / "tolerant")[-1]["broken"] == 1
    strict = (*arguments, "--out", tmp_path / "strict", "--checkpoint-every", 1)
    said = fail_here(*strict, "--max-broken", 0)
    assert "did not decode, more than --max-broken 0" in said
    assert "or raise --max-broken, and --resume auto goes on" in said
    run_here(*strict, "--max-broken", 0.1, "--resume", "auto")
    for path in data.iterdir():
        path.write_bytes(b"")
    said = fail_here(*arguments, "--out", tmp_path / "none", "--grid-every", 1)
    assert f"{data}: of the images looked at none decodes" in said


def test_a_second_interrupt_ends_a_run_whose_loader_hangs(photos: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(photos / "class0", data)
    os.mkfifo(data / "stalled.png")  # like a file of a network that is gone
    count, batch = len(list(data.iterdir())), 8
    first = lambda seed: next(iter(DeterministicBatchSampler(count, batch, range(1), seed)))  # noqa: E731
    seed = next(seed for seed in range(99) if count - 1 not in {key.image for key in first(seed)})
    arguments = ("mae", "--data", data, "--out", out, *TINY, "--workers", 1, "--steps", 9, "--seed", seed)
    arguments = (*arguments, "--grid-every", 0, "--log-every", 1)
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or not metrics(out):  # then it waits for the second batch
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0


def test_a_run_on_another_column_is_another_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = ImageSource(photos), str(photos)
    described = describe_data(Feed(name), source, 1)
    assert described == {"name": photos.name, "images": 24}, "as older runs say"
    other = describe_data(Feed(name, "test", "left"), source, 1)
    assert other == {**described, "split": "test", "column": "left"}
    monkeypatch.chdir(photos)
    assert describe_data(Feed("."), ImageSource("."), 1) == described


# --- held-out images -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(photos: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`straight` once more, with k-NN every epoch of three steps."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    arguments = (*TINY, "--steps", 8, "--ema-decay", 0.9, "--log-every", 4, "--checkpoint-every", 6)
    run_here("mae", "--data", photos, "--out", out, *arguments, "--knn-data", held_out, "--knn-every", 1)
    return out


def test_watching_a_run_changes_nothing_in_it(watched: Path, straight: Path) -> None:
    assert_same_files(watched, straight)
    assert [line["step"] for line in metrics(watched)] == [3, 4, 6, 8], "measurements bring log lines"
    assert metrics(watched)[1]["loss"] == losses(straight)[3], "and windows end with them"
    windows = [line["loss"] for line in metrics(watched)]
    expected = [statistics.mean(losses(straight)[start:stop]) for start, stop in ((0, 3), (3, 4), (4, 6), (6, 8))]
    assert windows == pytest.approx(expected, rel=1e-6)


def test_held_out_images_are_measured_every_epoch_and_at_the_end(watched: Path, held_out: Path) -> None:
    assert list(accuracies(watched)) == [3, 6, 8]
    assert accuracies(watched)[8] == knn_of(watched / "encoder.safetensors", held_out), "of the average, as exported"
    panels = Image.open(watched / "curves.png").height // 260
    assert panels == 4, "losses, gradient norms, accuracies, speed"


def test_a_watched_run_goes_on_with_the_same_figures(
    photos: Path, held_out: Path, watched: Path, tmp_path: Path
) -> None:
    out = tmp_path / "resumed"
    shutil.copytree(watched, out)
    for path in ("checkpoints/step_00000008", "encoder.safetensors"):
        shutil.rmtree(out / path) if (out / path).is_dir() else (out / path).unlink()
    arguments = (*TINY, "--steps", 8, "--ema-decay", 0.9, "--log-every", 4, "--checkpoint-every", 6)
    arguments = (*arguments, "--resume", "auto", "--knn-data", held_out, "--knn-every", 1)
    run_here("mae", "--data", photos, "--out", out, *arguments)
    assert_same_files(out, watched)
    assert accuracies(out) == accuracies(watched)


def test_the_monitor_equals_the_evaluation_and_leaves_no_trace(
    photos: Path, held_out: Path, watched: Path, tmp_path: Path
) -> None:
    encoder = timm.create_model("vit_pico_patch8_pmae", pretrained=False, num_classes=0, drop_path_rate=0.5)
    encoder.load_state_dict(load_file(watched / "encoder.safetensors"))
    encoder.train()
    bank = tmp_path / "bank"
    for path in (*photos.rglob("class0/*"), *photos.rglob("class1/*")):
        (bank / path.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(2):  # more than 20 neighbours
            shutil.copy(path, bank / path.parent.name / f"{path.stem}_{copy}.png")
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    for others in (None, bank):
        generator = torch.get_rng_state()
        knn = KnnMonitor(encoder, ImageSource(held_out), ImageSource(others) if others else None)
        found = knn(encoder), knn(encoder)
        assert torch.equal(torch.get_rng_state(), generator)
        assert found == (knn_of(watched / "encoder.safetensors", held_out, others),) * 2
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())


def test_of_many_images_evenly_spaced_ones_are_kept() -> None:
    labels = torch.tensor([1, 0] * 300 + [2] * 200)
    kept = evenly_by_class(labels, 80)
    assert labels[kept].bincount().tolist() == [30, 30, 20]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert evenly_by_class(labels, 800).tolist() == list(range(800))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--knn-data", "nowhere"), "--knn-data nowhere: no such folder"),
        (("--knn-data", "{held_out}/class0"), "has one class"),
        (("--knn-data", "{photos}"), "holds images of --data"),
        (("--knn-data", "{photos}", "--data", "{photos}/class0"), "holds images of --data"),
        (("--knn-data", "{few}"), "5 neighbours are too few"),
        (("--knn-data", "{copy}"), "holds images of --data"),
        (("--knn-data", "{held_out}", "--knn-bank", "{held_out}"), "holds images of --knn-bank"),
        (("--knn-data", "{held_out}", "--knn-bank", "{photos}"), "do not hold the same classes"),
        (("--knn-data", "{held_out}", "--knn-every", 0), "--knn-every is 0.0: it must be above 0"),
        (("--knn-bank", "{held_out}"), "--knn-bank holds neighbours of --knn-data"),
        (("--knn-data", "{held_out}", "--data", "hf-stream:webdataset:{tar}"), "--knn-every counts epochs"),
    ],
)
def test_held_out_images_that_say_nothing_stop_the_run_before_it(
    change: tuple[object, ...],
    message: str,
    photos: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"photos": photos, "held_out": held_out, "few": tmp_path / "few", "copy": tmp_path / "copy"}
    shutil.copytree(photos, places["copy"])
    for path in sorted(held_out.rglob("*.png"))[10:16]:
        (places["few"] / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, places["few"] / path.parent.name)
    if "hf-stream" in str(change):
        pytest.importorskip("datasets")
        places["tar"] = tmp_path / "photos.tar"
        with tarfile.open(places["tar"], "w") as tar:
            for path in photos.rglob("*.png"):
                tar.add(path, path.name)
    change = tuple(str(part).format(**places) for part in change)
    said = fail_here("mae", "--data", photos, "--out", tmp_path / "out", *TINY, "--steps", 1, *change)
    assert message in " ".join((said + capsys.readouterr().err).split())
    assert not (tmp_path / "out").exists()
