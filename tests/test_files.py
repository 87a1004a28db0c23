"""A file is the one of before or the new one, and nothing else is ever left beside it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceptual_mae_models.files import replace_file, replace_text


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text("old")
    return path


def test_a_file_is_made_and_replaced_and_stands_alone(old: Path) -> None:
    new = old.with_name("new.json")
    for path in (old, new):
        replace_text(path, "né")
        assert path.read_bytes() == "né".encode()
    assert sorted(old.parent.iterdir()) == [new, old]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no JSON"), KeyboardInterrupt()])
def test_who_fails_in_writing_leaves_the_old_file_and_no_litter(old: Path, error: BaseException) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("ne")
        raise error

    for path in (old, old.with_name("new.json")):
        with pytest.raises(type(error)):
            replace_file(path, fail)
    assert list(old.parent.iterdir()) == [old]
    assert old.read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_who_is_killed_in_writing_leaves_the_old_file_and_litter_that_the_next_one_removes(old: Path) -> None:
    if (child := os.fork()) == 0:
        replace_file(old, lambda partial: (partial.write_text("ne"), os._exit(9)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert old.read_text() == "old"
    (litter,) = set(old.parent.iterdir()) - {old}
    assert litter.name.startswith(".")
    assert litter.suffix != old.suffix
    litter.chmod(0o400)
    replace_text(old, "new")
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.usefixtures("narrow_umask")
def test_the_permissions_are_those_of_any_new_file(old: Path) -> None:
    old.chmod(0o600)
    tensors = {"weight": torch.arange(3.0)}
    replace_file(old, lambda partial: save_file(tensors, partial))  # which has permissions of its own
    assert torch.equal(load_file(old)["weight"], tensors["weight"])
    replace_text(old.with_name("b"), "")
    assert {stat.S_IMODE(path.stat().st_mode) for path in old.parent.iterdir()} == {0o640}


def test_all_bytes_are_on_the_disk_before_the_name_is_taken(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def fsync(descriptor: int) -> None:
        facts = os.fstat(descriptor)
        flushed.append((facts.st_ino, facts.st_size, old.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_text(old, "anew")
    assert flushed == [(old.stat().st_ino, 4, "old")]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        replace_text(tmp_path / "nowhere" / "file", "new")
