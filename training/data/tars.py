"""Random access to the images of uncompressed tars, by an index of where their members lie.

`tarfile`, made to forget every member it has told, gives the same index in about twice the processor's time; but at a
damaged header it ends without a word, as if the tar ended there, and a data set would lose images.
A compressed tar has no random access: it is unpacked first. Sparse members, which no image is, are refused.
"""

import gzip
import mmap
import os
import re
import shutil
import tempfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.utils.misc import natural_key

from perceptual_mae_models.images import IMAGE_SUFFIXES

BLOCK = 512
REGULAR = frozenset((b"0", b"\0", b"7"))
WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # links, devices, folders, pipes


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Where its first byte is."""
    size: int
    """Bytes."""


class TarError(ValueError):
    """A tar that cannot be indexed."""


def read_index(path: Path) -> list[Member]:
    """The regular files of a tar (POSIX.1-1988, POSIX.1-2001 "pax" or GNU format), in their order.

    Raises:
        TarError: If it is compressed, no tar at all, damaged or cut short.
    """
    if not path.stat().st_size:
        return []  # an empty file cannot be mapped
    # a map, not reads: one system call a member would be most of the time
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        if hasattr(tar, "madvise"):
            tar.madvise(mmap.MADV_RANDOM)  # else the system reads ahead, at every header, and so the whole file
        members, position = [], 0
        extended: dict[str, str] = {}  # what precedes a member and replaces its header's fields
        # two zero blocks end a tar; some writers leave them out
        while (header := tar[position : position + BLOCK]).strip(b"\0"):
            kind, data = header[156:157], position + BLOCK
            try:
                if header[257:262] != b"ustar":  # at every header: catches damage at a fraction of a check sum's time
                    raise ValueError("no tar header")
                size = _number(header[124:136]) if kind not in WITHOUT_DATA else 0
                if kind == b"L":
                    extended["path"] = _text(tar[data : data + size])
                elif kind == b"x":
                    extended |= _pax_records(tar[data : data + size])
                elif kind == b"S":
                    raise ValueError("sparse files are not supported")
                elif kind not in (b"K", b"g"):  # K: a long link's target; g: defaults, never of path or size
                    size = int(extended.get("size", size))
                    if kind in REGULAR:
                        members.append(Member(extended.get("path") or _name(header), data, size))
                    extended = {}
                if size < 0:
                    raise ValueError("a size that leads backwards")
            except ValueError as error:
                raise TarError(f"{path}: not an uncompressed .tar, or damaged at byte {position}") from error
            position = data + -(-size // BLOCK) * BLOCK
        missing = members[-1].offset + members[-1].size - len(tar) if members else 0
        if missing > 0:
            raise TarError(f"{path}: the tar is cut short, {missing} bytes are missing")
    return members


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form for what does not fit."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_records(data: bytes) -> dict[str, str]:
    """Lines of `LENGTH KEY=VALUE`, LENGTH counting the whole line; a value may hold line breaks."""
    records, position = {}, 0
    while position < len(data):
        digits = data[position:].split(b" ", 1)[0]
        end = position + int(digits)
        if end <= position:
            raise ValueError("a record that does not end")
        key, _, value = data[position + len(digits) + 1 : end - 1].partition(b"=")
        records[_text(key)] = _text(value)
        position = end
    return records


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar; any number of ranges; without one, the pattern."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    before, after = pattern[: match.start()], pattern[match.end() :]
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [part for number in numbers for part in expand_braces(f"{before}{number}{after}")]


def _tell_apart(tars: list[Path]) -> list[str]:
    """What stands before the names of a tar's members: of several tars its name, or its path where names are equal."""
    if len(tars) == 1:
        return [""]
    if len({tar.name for tar in tars}) == len(tars):
        return [f"{tar.name}/" for tar in tars]
    common = os.path.commonpath([tar.parent for tar in tars])
    return [f"{tar.relative_to(common).as_posix()}/" for tar in tars]


class TarReader:
    """The images of one or more tars: tar by tar, in natural order inside each.

    Labels are the `.cls` members of WebDataset's layout where there are any, else the folders inside the tars.

    Args:
        tars: The files.

    Raises:
        FileNotFoundError: If there is no image in them.
        TarError: If one cannot be indexed.
    """

    def __init__(self, tars: list[Path]) -> None:
        self.tars = tars
        self._prefixes = _tell_apart(tars)
        self.names: list[str] = []
        self._label_files: dict[str, tuple[int, int, int]] = {}
        places = []
        for number, tar in enumerate(tars):
            members = read_index(tar)
            images = [member for member in members if is_image(member.name)]
            images.sort(key=lambda member: (natural_key(member.name), member.name))
            self.names += [self._qualified(number, member.name) for member in images]
            places += [(number, member.offset, member.size) for member in images]
            for name, offset, size in members:
                if name.endswith(".cls"):
                    self._label_files[_sample_key(self._qualified(number, name))] = (number, offset, size)
        if not self.names:
            raise FileNotFoundError(f"{tars[0]}: no image found")
        self.places = np.array(places)  # (N, 3) number of the tar, offset, size

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path inside the tar, behind the tar's own name where there are several."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """The image's bytes."""
        return self._read(*self.places[index].tolist())

    @cached_property
    def classes(self) -> list[str]:
        """Names of the folders inside the tars, or the numbers in the .cls members."""
        if self._label_files:
            return [str(number) for number in range(max(self.labels) + 1)]
        return number_classes(self._folders())[0]

    @cached_property
    def labels(self) -> list[int]:
        """Label of every image.

        Raises:
            ValueError: If an image has no .cls member while others do.
        """
        if not self._label_files:
            return number_classes(self._folders())[1]
        try:
            return [int(self._read(*self._label_files[_sample_key(name)])) for name in self.names]
        except KeyError as error:
            raise ValueError(f"{error.args[0]} has no label (.cls)") from error
        except ValueError as error:
            raise ValueError(f"{self.tars[0]}: a label (.cls) is no whole number: {error}") from error

    def _qualified(self, tar: int, name: str) -> str:
        return self._prefixes[tar] + name.removeprefix("./")

    def _folders(self) -> list[str]:
        inside = (
            name.removeprefix(self._prefixes[tar])
            for name, tar in zip(self.names, self.places[:, 0].tolist(), strict=True)
        )
        return [name.rpartition("/")[0].rpartition("/")[2] for name in inside]

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        # opened anew for every image: thousands of shards would exceed the limit of open files
        with self.tars[tar].open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


class CompressedTarReader(TarReader):
    """The images of a .tar.gz, unpacked into a temporary file that is gone when the reader is.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no image in it.
        TarError: If it does not unpack, or not to a tar.
    """

    def __init__(self, path: Path) -> None:
        self._folder_of_copy = tempfile.TemporaryDirectory(prefix="pmae-")
        copy = Path(self._folder_of_copy.name) / path.name
        try:
            with gzip.open(path) as packed, copy.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
        except (OSError, EOFError, zlib.error) as error:
            raise TarError(f"{path}: does not unpack: {error}") from error
        super().__init__([copy])


def number_classes(folders: list[str]) -> tuple[list[str], list[int]]:
    """Names of the classes in natural order, and the label of each image, whose folder's name is its class."""
    # the name itself decides between names such as 1 and 01, which the natural key takes for equal
    classes = sorted(set(folders), key=lambda name: (natural_key(name), name))
    numbers = {folder: number for number, folder in enumerate(classes)}
    return classes, [numbers[folder] for folder in folders]


def is_shown(name: str) -> bool:
    """Whether no part of a path is hidden, as macOS's ._NAME beside a file is, or a folder .ipynb_checkpoints."""
    return not any(part.startswith(".") for part in name.removeprefix("./").split("/"))


def is_image(name: str) -> bool:
    """Whether a path is that of an image, by its ending, and nothing in it is hidden."""
    return is_shown(name) and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _sample_key(name: str) -> str:
    """What the members of one WebDataset sample share: the path up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}"
