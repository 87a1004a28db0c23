"""Where images lie: one interface over folders, tars and Hugging Face data sets; bytes by number, nothing decoded.

| spec | images |
|---|---|
| `photos/` | a folder, any nesting; its innermost folders are the classes |
| `photos.tar` | an uncompressed tar with the same inside |
| `photos.tar.gz` | the same compressed: unpacked into a temporary file, so for small sets |
| `…-images-idx3-ubyte.gz` | MNIST's format, the labels' file beside it |
| `shards/`, `shards-{000..127}.tar`, `shards-*.tar` | tars, WebDataset's layout or any other |
| `hf:…` | a Hugging Face data set, see `training/data/hub.py` |
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from timm.utils.misc import natural_key

from perceptual_mae_models.images import IMAGE_SUFFIXES, OF_STORAGE, UNREAD_SUFFIXES, warn_of_unread
from training.data.hub import HubReader
from training.data.idx import IdxReader, is_idx
from training.data.tars import CompressedTarReader, TarReader, expand_braces, is_image, is_shown, number_classes

HUB_PREFIX = "hf:"
RETRY_AFTER = (1.0, 5.0, 20.0)
"""Seconds after which storage that fails is asked again."""


class StorageError(RuntimeError):
    """A disk, or a file system of a network, that does not answer."""


class Reader(Protocol):
    """Encoded images by number. Readers are shared by forked loader processes, so they hold no file position."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label."""

    @property
    def labels(self) -> list[int]:
        """Label of every image; ValueError where the data set has none."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called inside its source; no two are called the same."""

    def read(self, index: int) -> bytes:
        """The image's file; OSError where it cannot be read."""


class FolderReader:
    """The image files below a folder in natural order; nothing hidden; links to folders are followed.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If there is no image in it.
        ValueError: If a link leads back to a folder above it.
    """

    def __init__(self, root: Path) -> None:
        # the name itself decides between names that differ by case only, which the natural key takes for equal
        unread: list[str] = []
        self.names = sorted(_walk(root, unread), key=lambda name: (natural_key(name), name))
        warn_of_unread(unread)
        if not self.names:
            raise FileNotFoundError(f"{root}: no image found")
        self.root = root
        self.classes, self.labels = number_classes([name.rpartition("/")[0].rpartition("/")[2] for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """The file."""
        return (self.root / self.names[index]).read_bytes()


def refuse_folder(error: OSError) -> None:
    """End a walk at a folder that cannot be read: one left out silently would change the data set."""
    raise error


def _walk(root: Path, unread: list[str]) -> Iterator[str]:
    """Paths below a folder of its images; to `unread` go those of photographs that Pillow does not read.

    A link to a folder above it would be followed for ever, and is refused.
    """
    for folder, subfolders, files in os.walk(root, onerror=refuse_folder, followlinks=True):
        for link in (Path(folder, name) for name in subfolders):
            if link.is_symlink() and link.resolve() in (here := Path(folder).resolve(), *here.parents):
                raise ValueError(f"{link} leads back to a folder that it lies in: take the link away")
        subfolders[:] = filter(is_shown, subfolders)
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        shown = filter(is_shown, files)
        unread += [f"{below}/{file}" for file in shown if Path(file).suffix.lower() in UNREAD_SUFFIXES]
        yield from (file if below == "." else f"{below}/{file}" for file in files if is_image(file))


class PartReader:
    """Some images of another reader.

    Args:
        reader: The other one.
        numbers: Which of its images, in the order in which they are wanted.
        prefix: Put before their names, where something is done to them: names are in the fingerprint of data.
    """

    def __init__(self, reader: Reader, numbers: Sequence[int], prefix: str = "") -> None:
        self.reader, self.numbers, self.prefix = reader, numbers, prefix

    @property
    def classes(self) -> list[str]:
        """Names of all the reader's classes, by label."""
        return self.reader.classes

    @property
    def labels(self) -> list[int]:
        """Label of every image; ValueError where the reader has none."""
        labels = self.reader.labels
        return [labels[number] for number in self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """What the reader calls it, behind the prefix."""
        return self.prefix + self.reader.name(self.numbers[index])

    def read(self, index: int) -> bytes:
        """The image's file."""
        return self.reader.read(self.numbers[index])


def read_patiently(reader: Reader, index: int) -> bytes:
    """An image's file, read again where the storage may be at fault, and not the file.

    Raises:
        OSError: If the file cannot be read.
        StorageError: If the storage failed every time.
    """
    pauses = iter(RETRY_AFTER)
    while True:
        try:
            return reader.read(index)
        except OSError as error:
            if error.errno not in OF_STORAGE:
                raise
            if (pause := next(pauses, None)) is None:
                told = f"{error}, {1 + len(RETRY_AFTER)} times; --resume auto goes on with a run"
                raise StorageError(f"{reader.name(index)}: {told}") from error
        time.sleep(pause)


def open_reader(
    spec: str, *, split: str = "train", column: str | None = None, label_column: str | None = None
) -> Reader:
    """Find out what a spec names and index it.

    Args:
        spec: See the table above.
        split: Split of a Hugging Face data set.
        column: Its image column, where it has several.
        label_column: Its column of classes, where it has several.

    Raises:
        FileNotFoundError: If there is no such thing or no image in it.
        ValueError: If it is of no kind that can be read.
    """
    if spec.startswith(HUB_PREFIX):
        return HubReader(spec.removeprefix(HUB_PREFIX), split, column, label_column)
    path = Path(spec)
    if path.is_file():
        if is_idx(path):
            return IdxReader(path)
        if path.name.endswith((".tar.gz", ".tgz")):
            return CompressedTarReader(path)
        if path.suffix != ".tar":
            raise ValueError(f"{spec}: give a folder of images or a .tar of them")
        return TarReader([path])
    tars = _tars_in(path) if path.is_dir() else _tars_matching(spec)
    return TarReader(tars) if tars else FolderReader(path)


def _tars_in(folder: Path) -> list[Path]:
    """The tars of a folder of shards. A tar that lies beside images or folders is not meant."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        return []
    return sorted((e for e in entries if e.suffix == ".tar"), key=lambda e: natural_key(e.name))


def _tars_matching(pattern: str) -> list[Path]:
    found = []
    for part in expand_braces(pattern):
        path = Path(part)
        matches = sorted(path.parent.glob(path.name), key=lambda match: natural_key(match.name))
        if not matches:
            raise FileNotFoundError(f"{part}: no such folder or tar file")
        found += matches
    if wrong := next((path for path in found if path.suffix != ".tar"), None):
        raise ValueError(f"{pattern}: a pattern names uncompressed .tar files, not {wrong.name}")
    return found
