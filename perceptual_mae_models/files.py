"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there once it is whole and on the disk.

        replace_file(path, lambda partial: torch.save(state, partial))

    Who opens the path finds the file of before or the new one, at whatever moment this process is killed. What a killed
    one leaves is hidden, and goes when the file is written again.

    Args:
        path: In a folder that exists. A file that is there is replaced, whatever its permissions: the new one has those
            of any new file.
        write: Gets the path to write to, where an empty file is, which it may replace too; what it returns is not
            looked at. If it raises, the file of before stays.

    Raises:
        OSError: If there is no such folder, or the disk is full, for example; `write` raises what it likes.
    """
    partial = path.with_name(f".{path.name}.partial")  # by its ending no image, shard or result for those who list them
    partial.unlink(missing_ok=True)
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        write(partial)
        if partial.stat().st_mode != mode:  # safetensors' save_file leaves what only its owner can read
            partial.chmod(mode)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8, as `replace_file` does.

    Raises:
        OSError: If it cannot be written.
    """
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
