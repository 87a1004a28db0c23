"""Feature files, read back by the formats' own libraries."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors
import torch

import perceptual_mae_models.writers as writers
from perceptual_mae_models.version import __version__
from perceptual_mae_models.writers import FeatureWriter, OutputError, check_output

NAMES = ["photos/a b.jpg", "ünï/日本.png", "line\nbreak.png", "", "x" * 300, "last, with 'quotes' \"both\".gif"]
METADATA = {"model": "some_model", "pool": "avg"}


def write(path: Path, features: torch.Tensor, names: list[str] = NAMES, batch: int = 4) -> None:
    with FeatureWriter(path, METADATA) as writer:
        for start in range(0, len(names), batch):
            writer.write(names[start : start + batch], features[start : start + batch])
            writer.write([], features[:0])
        assert writer.rows == len(names)


def read(path: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    if path.suffix == ".npz":
        with np.load(path) as file:
            return file["names"].tolist(), file["features"], json.loads(str(file["metadata"]))
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "numpy") as file:
            names = file.get_tensor("names").tobytes().decode().split("\0")
            return names, file.get_tensor("features"), file.metadata()
    table = pyarrow.parquet.read_table(path)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    features = np.array(table["features"].to_pylist(), np.float32).reshape(-1, *json.loads(metadata["shape"]))
    return table["name"].to_pylist(), features, metadata


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("suffix", writers.SUFFIXES)
def test_round_trip(tmp_path: Path, suffix: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "CHUNK_BYTES", 64)  # several chunks even here
    features = torch.randn(len(NAMES), *shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"features{suffix}"
    write(path, features)
    names, rows, metadata = read(path)
    assert names == NAMES
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, features.numpy())
    assert {**METADATA, "perceptual_mae_models": __version__}.items() <= metadata.items()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", writers.SUFFIXES)
def test_other_types_and_layouts(tmp_path: Path, suffix: str) -> None:
    features = torch.arange(12.0).reshape(4, 3).to(torch.bfloat16).T  # not contiguous, (3, 4)
    write(tmp_path / f"f{suffix}", features, names=["a", "b", "c"])
    np.testing.assert_array_equal(read(tmp_path / f"f{suffix}")[1], features.float().numpy())


@pytest.mark.parametrize("suffix", writers.SUFFIXES)
def test_file_names_that_are_not_utf_8(tmp_path: Path, suffix: str) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    write(tmp_path / f"f{suffix}", torch.zeros(1, 2), names=[name])
    assert read(tmp_path / f"f{suffix}")[0] == ["caf\ufffd.jpg"]
    write(tmp_path / f"half{suffix}", torch.zeros(1, 2), names=["\ud800.jpg"])  # as Windows may have it
    assert read(tmp_path / f"half{suffix}")[0] == ["\ufffd.jpg"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    write(path, torch.zeros(len(NAMES), 2))
    before = path.read_bytes()

    def interrupted() -> None:
        with FeatureWriter(path) as writer:
            writer.write(["a"], torch.ones(1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="no features"), FeatureWriter(path):
        pass
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_full_disk_leaves_what_was_computed_and_says_where(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(writers.shutil, "copyfileobj", disk_full)
    features = torch.arange(2.0 * len(NAMES)).reshape(-1, 2)
    with pytest.raises(OutputError, match=rf"no space left.*\({len(NAMES)} x 2 little-endian float32\)") as caught:
        write(tmp_path / f"features{suffix}", features)
    rows, names = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (rows.suffix, names.suffix) == (".rows", ".names")
    assert str(rows) in str(caught.value)
    assert str(names) in str(caught.value)
    np.testing.assert_array_equal(np.fromfile(rows, "<f4").reshape(-1, 2), features.numpy())
    assert len(names.read_bytes().split(b"\0")) == len(NAMES)


def test_a_bug_while_assembling_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers.shutil, "copyfileobj", None)
    with pytest.raises(TypeError):
        write(tmp_path / "features.safetensors", torch.zeros(len(NAMES), 2))
    assert not list(tmp_path.iterdir())


def test_wrong_rows(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "f.npz") as writer:
        writer.write(["a"], torch.zeros(1, 2))
        for names, features, message in [
            (["b"], torch.zeros(2, 2), "1 names for 2 rows"),
            (["b"], torch.zeros(1, 3), "shape"),
            (["b\0c"], torch.zeros(1, 2), "NUL"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write(names, features)
    assert read(tmp_path / "f.npz")[0] == ["a"]


def test_problems_are_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name, message in {
        "f.csv": r"must end in \.npz or \.safetensors or \.parquet",
        "f": "must end in",
        "folder.npz": "is a folder",
        "missing/f.npz": "there is no folder",
    }.items():
        with pytest.raises(OutputError, match=message):
            FeatureWriter(tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OutputError, match=r"\(pip install pyarrow\)"):
        check_output(tmp_path / "f.parquet")
    check_output(tmp_path / "f.npz")
