"""The `pmae` command: in this process for its messages, in its own for what a shell sees."""

import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from perceptual_mae_models import cli
from perceptual_mae_models.commands import images, models
from perceptual_mae_models.features import DEFAULT_MODEL, POOLS, PRECISIONS, FeatureBatch, FeatureExtractor
from perceptual_mae_models.gallery import GalleryRow, Tile, nearest, neighbour_gallery
from perceptual_mae_models.images import ImageError, find_images

PMAE = Path(sys.executable).parent / "pmae"
UNREADABLE = "not an image file, or of a kind that Pillow cannot read"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "pico.safetensors"
    save_file(timm.create_model(DEFAULT_MODEL, pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command here; returns its status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.jpg"
    path.write_text("no image")
    return path


def test_help_is_quick_and_leaves_torch_alone() -> None:
    def cpu_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(5):
        before = cpu_seconds()
        shown = subprocess.run([PMAE, "--help"], capture_output=True, text=True, check=True).stdout
        # Processor time, which is the wall time of a single thread on an idle machine: tests run on busy ones.
        seconds.append(cpu_seconds() - before)
    assert all(command in shown for command in ("list", "info", "embed", "similar"))
    assert statistics.median(seconds) < 0.3

    imports = subprocess.run(
        [sys.executable, "-X", "importtime", PMAE, "embed", "--help"], capture_output=True, text=True, check=True
    ).stderr
    assert "perceptual_mae_models.cli" in imports
    module = [sys.executable, "-m", "perceptual_mae_models", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout.startswith("pmae ")
    assert not {"torch", "timm", "numpy", "PIL"} & {line.rpartition("|")[2].strip() for line in imports.splitlines()}


def test_embed_in_a_shell(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "features.npz"
    command = [PMAE, "embed", "class1", "class0/*.png", "-o", output, "--checkpoint", checkpoint, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=photos)
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 x 192 features" in done.stdout
    expected = find_images([photos / "class1", photos / "class0"])
    with np.load(output) as file:
        assert [photos / name for name in file["names"]] == expected
        features = FeatureExtractor(DEFAULT_MODEL, checkpoint=checkpoint, device="cpu")(expected)
        np.testing.assert_allclose(file["features"], features, atol=1e-5)
        assert json.loads(str(file["metadata"]))["weights"] == "pico.safetensors"

    failed = subprocess.run([PMAE, "embed", "nowhere", "-o", output], capture_output=True, text=True, cwd=photos)
    assert failed.returncode == 1
    assert failed.stderr == "pmae: error: nowhere: no such file or folder, and no file matches it as a pattern\n"


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_embed_options(run, photos: Path, checkpoint: str, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"features.{suffix}"
    options = ["--pool", "cls", "--batch-size", 5, "--dtype", "bfloat16", "--model", DEFAULT_MODEL, "--device", "cpu"]
    status, out, err = run("embed", photos, "-o", output, "--checkpoint", checkpoint, *options)
    assert (status, err) == (0, "")
    assert f"{output}: 24 x 192 features in " in out
    if suffix == "safetensors":
        with safe_open(output, framework="pt") as file:
            metadata, features = file.metadata(), file.get_tensor("features")
        assert (metadata["pool"], metadata["dtype"]) == ("cls", "bfloat16")
    else:
        features = torch.tensor(pyarrow.parquet.read_table(output)["features"].to_pylist())
    extractor = FeatureExtractor(DEFAULT_MODEL, "cls", checkpoint=checkpoint, device="cpu", dtype="bfloat16")
    torch.testing.assert_close(features, extractor(find_images([photos]), batch_size=5))


def test_broken_images(run, photos: Path, checkpoint: str, tmp_path: Path, broken: Path) -> None:
    output = tmp_path / "features.npz"
    arguments = (
        "embed",
        photos,
        broken,
        "-o",
        output,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--batch-size",
        10,
    )
    status, _, err = run(*arguments)
    assert status == 1
    assert err == f"pmae: error: {broken}: {UNREADABLE} (--skip-broken leaves such images out)\n"
    assert {path.name for path in tmp_path.iterdir()} == {"broken.jpg"}

    status, out, err = run(*arguments, "--skip-broken")
    assert status == 0
    assert "24 x 192" in out
    assert err == f"skipped {broken}: {UNREADABLE}\n1 of 25 images were broken and are left out\n"

    options = ("--checkpoint", checkpoint, "--device", "cpu", "--skip-broken")
    status, _, err = run("embed", broken, "-o", tmp_path / "none.npz", *options)
    assert status == 1
    assert "none of the 1 images could be read" in err
    assert not (tmp_path / "none.npz").exists()


def test_problems_are_told_before_the_work(run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(_: object) -> None:
        raise AssertionError("began to compute")

    monkeypatch.setattr(images, "_extractor", no_work)
    assert "there is no folder" in run("embed", photos, "-o", tmp_path / "no" / "f.npz")[2]
    assert "must end in" in run("embed", photos, "-o", tmp_path / "f.csv")[2]
    assert "must end in .png" in run("similar", photos, photos, "-o", tmp_path / "f.npz")[2]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run("embed", photos, "-o", tmp_path / "f.parquet")
    assert status == 1
    assert "pip install pyarrow" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("embed",), "PATH"),
        (("embed", "a", "-o", "f.npz", "--batch-size", "0"), "0 is less than 1"),
        (("embed", "a", "-o", "f.npz", "--workers", "x"), "invalid integer value: 'x'"),
        (("similar", "a", "b", "--pool", "tokens"), "invalid choice"),
        (("serve", "--port", "70000"), "70000 is more than 65535"),
    ],
)
def test_wrong_usage(run, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err


def test_errors_are_a_line(run, photos: Path, tmp_path: Path) -> None:
    for name in ("vit_pico_pacth8_pmae", "vit_pico_patch8_pmae.nope"):
        for command in (("info", name), ("embed", photos, "-o", tmp_path / "f.npz", "--model", name)):
            status, _, err = run(*command)
            assert status == 1
            assert err.startswith("pmae: error: ")
            assert DEFAULT_MODEL in err
            assert err.count("\n") == 1
    status, _, err = run("embed", photos, "-o", tmp_path / "f.npz", "--model", "test_vit", "--checkpoint", "none.pth")
    assert (status, err) == (1, "pmae: error: no such checkpoint: none.pth\n")
    status, _, err = run("embed", photos, "-o", tmp_path / "f.npz", "--device", "nonsense")
    assert status == 1
    assert err.startswith("pmae: error: no device 'nonsense': ")
    assert err.count("\n") == 1


def test_interrupt(run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_extractor", interrupt)
    assert run("embed", photos, "-o", tmp_path / "f.npz")[0] == 130


def test_a_stopped_embed_leaves_nothing_and_says_so(photos: Path, checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "f.npz"
    arguments = [PMAE, "embed", photos, "-o", output, "--checkpoint", checkpoint, "--device", "cpu"]
    with subprocess.Popen([*arguments, "--batch-size", "1"], stderr=subprocess.PIPE, text=True) as process:
        while not any(spool.stat().st_size for spool in tmp_path.glob(".f.npz.*.rows")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
        assert "Traceback" not in process.stderr.read()
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_is_no_success() -> None:
    with subprocess.Popen([PMAE, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, "")


def test_list(run) -> None:
    status, out, _ = run("list")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0
    assert {"vit_pico_patch8_pmae.mae_imagenette", "vit_huge_patch14_pmae.fb_mae_in1k"} <= {
        line[0] for line in lines if line
    }
    base = next(line for line in out.splitlines() if line.startswith("vit_base_patch16_pmae.fb_mae_in1k"))
    assert "224 x 224   85.8 M   768  on the Hub: timm/vit_base_patch16_224.mae" in base
    assert "not published yet" in out

    status, out, _ = run("list", "PICO".lower())
    assert status == 0
    assert all(line.startswith("vit_pico") for line in out.splitlines()[1:-2])
    assert run("list", "nothing")[::2] == (1, "pmae: error: no model matches 'nothing'; `pmae list` names all\n")


def test_info(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("info", "vit_pico_patch8_pmae.mae_imagenette")
    assert status == 0
    parameters = sum(parameter.numel() for parameter in timm.create_model(DEFAULT_MODEL).parameters())
    for fact in (f"{parameters:,}", "64 patches + 1 prefix", "apache-2.0", "2111.06377", "CenterCrop(size=(64, 64))"):
        assert fact in out

    weights = tmp_path / "pico.safetensors"
    weights.touch()
    weights.with_suffix(".json").write_text('{"epochs": 123}')
    described = models.describe_model(DEFAULT_MODEL)
    described["cfg"]["file"] = str(weights)
    monkeypatch.setattr(models, "describe_model", lambda _: described)
    out = run("info", DEFAULT_MODEL)[1]
    assert "in the package" in out
    assert '"epochs": 123' in out


def test_similar(run, photos: Path, checkpoint: str, tmp_path: Path) -> None:
    files = find_images([photos])
    copy = tmp_path / "copy.png"
    Image.open(files[7]).save(copy)
    output = tmp_path / "similar.png"
    options = ["--checkpoint", checkpoint, "--device", "cpu", "-k", 3, "--batch-size", 10, "-o", output]
    status, out, err = run("similar", copy, files[2], photos, *options)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == str(copy)
    assert lines[1].split() == ["1.0000", str(files[7])]
    assert lines[4] == str(files[2])
    # The query's own file is in the folder, and is not its own neighbour.
    assert str(files[2]) not in " ".join(lines[5:8])
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 176

    again = run("similar", copy, tmp_path, *options)[1]  # the picture of before is no neighbour
    assert str(output) not in again.splitlines()[1:-1]
    many = tmp_path / "many"
    many.mkdir()
    for index in range(70):
        Image.new("L", (8, 8), index).save(many / f"{index}.png")
    status, out, err = run("similar", many, photos, *options[:-1], tmp_path / "similar.webp")
    assert (status, out) == (1, "")
    assert "848 x 17606 pixels, and .webp at most 16383 a side: ask for fewer queries" in err

    alone = tmp_path / "alone"
    alone.mkdir()
    Image.open(files[0]).save(alone / "only.png")
    assert "no image but the queries" in run("similar", alone / "only.png", alone, *options)[2]


def test_similar_goes_on_without_broken_queries(
    run, photos: Path, checkpoint: str, tmp_path: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = tmp_path / "猫.png"
    Image.open(find_images([photos])[0]).save(query)
    options = ["--checkpoint", checkpoint, "--device", "cpu", "-o", tmp_path / "similar.png"]
    assert "--skip-broken leaves" in run("similar", query, broken, photos, *options)[2]
    status, out, err = run("similar", query, broken, photos, *options, "--skip-broken")
    assert (status, err) == (0, f"skipped {broken}: {UNREADABLE}\n")
    assert out.startswith(f"{query}\n    1.0000  ")
    (tmp_path / "similar.png").unlink()
    assert "none of the 1 queries could be read" in run("similar", broken, photos, *options, "--skip-broken")[2]
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # a pipe on Windows
    monkeypatch.setattr(sys, "stdout", narrow)
    assert run("similar", query, photos, *options)[0] == 0
    narrow.seek(0)
    assert "\\u732b.png" in narrow.read()
    assert (tmp_path / "similar.png").exists()


def test_nearest_equals_sorting_everything(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=random)
    names = tuple(str(tmp_path / f"{index}.png") for index in range(50))
    for name in names:
        Path(name).touch()
    batches = [FeatureBatch(names[start : start + 8], features[start : start + 8], ()) for start in range(0, 50, 8)]
    found = nearest(FeatureBatch(names[:3], features[:3], ()), batches, 5)
    unit = features / features.norm(dim=1, keepdim=True)
    for query, matches in enumerate(found):
        order = [index for index in (-unit @ unit[query]).argsort().tolist() if index != query][:5]
        assert [match.name for match in matches] == [names[index] for index in order]
        np.testing.assert_allclose([match.similarity for match in matches], unit[order] @ unit[query], atol=1e-6)


def test_images_in_memory_with_the_same_number_are_not_the_same() -> None:
    features = torch.eye(3)
    query = FeatureBatch(("image #0",), features[:1], ())
    (matches,) = nearest(query, [FeatureBatch(("image #0", "image #1"), features[[0, 1]], ())], 3)
    assert [match.name for match in matches] == ["image #0", "image #1"]


def test_gallery_shows_the_images() -> None:
    colours = ["red", "lime", "blue", "orange"]
    tiles = [Tile(Image.new("RGB", (300, 90), colour), "a rather long name " * 5, 0.5) for colour in colours]
    picture = neighbour_gallery([GalleryRow(tiles[0], tiles[1:]), GalleryRow(tiles[1], tiles[:2])])
    shown = {colour for _, colour in picture.getcolors(2**24)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 165, 0)} <= shown
    assert picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="a row"):
        neighbour_gallery([])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What stands on it in the end: a carriage return goes back to the beginning of the line."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


class Broken:
    """An extractor of two batches with a broken image in the second."""

    def stream(self, *_: object) -> Iterator[FeatureBatch]:
        names = ("a", "b", "c", "d")
        yield FeatureBatch(names, torch.zeros(4, 2), ())
        yield FeatureBatch(names, torch.zeros(4, 2), (ImageError("e\n.jpg", "cut short"),))


def test_progress_is_a_line_that_goes_and_only_messages_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = cli._parser().parse_args(["embed", "a", "-o", "f.npz", "--skip-broken"])
    skipped = "skipped e\ufffd.jpg: cut short"

    def stream() -> list[int]:
        return [len(batch.names) for batch in images.stream_features(Broken(), [Path("a")] * 9, arguments)]

    def stream_to_terminal() -> Terminal:
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert stream() == [4, 4]
        assert terminal.screen() == [skipped, ""]
        return terminal

    assert stream() == [4, 4]
    assert capsys.readouterr() == ("", f"{skipped}\n")
    assert " 4/9 " in stream_to_terminal().getvalue()
    disable_progress_bars()
    try:
        assert stream_to_terminal().getvalue() == f"{skipped}\n"
    finally:
        enable_progress_bars()


def test_choices_are_those_of_the_extractor() -> None:
    options = cli._parser().parse_args(["embed", "a", "-o", "f.npz"])
    assert options.model == DEFAULT_MODEL
    for option, choices in {"--pool": POOLS, "--dtype": PRECISIONS}.items():
        for choice in choices:
            cli._parser().parse_args(["embed", "a", "-o", "f.npz", option, choice])
