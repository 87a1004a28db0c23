"""The run folder: one run, one recipe."""

import errno
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from perceptual_mae_models.files import replace_text
from perceptual_mae_models.version import __version__
from training.run.checkpoint import newest_checkpoint


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do instead."""


def find_checkpoint(
    out: Path, description: dict[str, Any], *, resume: bool, defaults: Mapping[str, Any] | None = None
) -> Path | None:
    """Look into a run folder before anything is written to it.

    Args:
        out: The run folder, which need not exist.
        description: What `recipe.json` would record.
        resume: Go on if the folder holds a run.
        defaults: Of the recipe: what a run did before a field was one.

    Returns:
        The checkpoint to go on from, or None for a fresh start.

    Raises:
        RunError: If the folder holds a run and `resume` is not set, or a run of another recipe or other data.
    """
    if not has_begun(out):
        return None
    if not resume:
        raise RunError(f"{out} already holds a run: pass --resume auto to go on with it, or another --out")
    old, new = json.loads((out / "recipe.json").read_text()), json.loads(json.dumps(description))
    old["recipe"] = json.loads(json.dumps(dict(defaults or {}))) | old["recipe"]
    _require_same(old, new, out)
    return newest_checkpoint(out / "checkpoints")


def has_begun(out: Path) -> bool:
    """Whether a folder holds a run that has come so far that it is worth something."""
    some = (out / "metrics.jsonl").exists() or any((out / "checkpoints").glob("step_*"))
    return some and (out / "recipe.json").exists()


@contextmanager
def own_run_folder(out: Path) -> Iterator[None]:
    """Keep other processes of this machine from running in a folder, where its file system can lock.

    Raises:
        RunError: If one does.
    """
    out.mkdir(parents=True, exist_ok=True)
    # a soft lock would outlive a killed process, and refuse whoever goes on with the run on another machine
    lock = FileLock(out / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{out} belongs to a run that is going on: wait for it, or give another --out") from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        print(f"{out}: its file system cannot lock; nothing keeps a second run out of it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def create_run_folder(out: Path, description: dict[str, Any]) -> None:
    """Create a run folder, or leave one in which a run has begun as it is.

    Args:
        out: The run folder.
        description: JSON-able; what `recipe.json` records. Its "recipe" and "data" decide the result and must not
            change when the run is resumed.
    """
    for folder in ("checkpoints", "grids"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if not has_begun(out):
        replace_text(out / "recipe.json", json.dumps(description, indent=2) + "\n")


def _require_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    differences = [
        f"{section}.{key}: was {old[section].get(key)!r}, now {new[section].get(key)!r}"
        for section in ("recipe", "data")
        for key in sorted({*old[section], *new[section]})
        if old[section].get(key) != new[section].get(key)
    ]
    if differences:
        raise RunError(
            f"{out} was started otherwise ({'; '.join(differences)}): give the same values, or another --out"
        )


def versions() -> dict[str, str]:
    """Versions of whatever decides the bits of a run."""
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "pillow")}
    return {"perceptual_mae_models": __version__, "python": platform.python_version(), **packages}
