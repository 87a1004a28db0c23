"""The idx format of MNIST and its relatives: all images of a split in one array file, their labels in another."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTES = 0x08


def is_idx(path: Path) -> bool:
    """Whether a file's name is that of an array of images, such as `train-images-idx3-ubyte.gz`."""
    return path.name.removesuffix(".gz").endswith(("-images-idx3-ubyte", "-images.idx3-ubyte"))


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of bytes, compressed or not.

    Raises:
        ValueError: If it is another kind of file, or not as long as it says.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged, or cut short: {error}") from error
    dimensions = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES or len(data) != start + math.prod(shape):
        raise ValueError(f"{path}: not an idx file of bytes, or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class IdxReader:
    """Grey images of an idx file; their labels lie beside it, in a file called `labels` and `idx1` instead.

    Args:
        path: The images' file.

    Raises:
        FileNotFoundError: If the labels' file is missing.
        ValueError: If either is damaged, or they are of different length.
    """

    def __init__(self, path: Path) -> None:
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        if not labels.is_file():
            raise FileNotFoundError(f"{labels}: the labels of {path.name} are missing")
        self.images = read_idx(path)  # (N, h, w)
        self.labels: list[int] = read_idx(labels).tolist()
        if self.images.ndim != 3 or len(self.images) != len(self.labels):
            raise ValueError(f"{path}: {self.images.shape} images and {len(self.labels)} labels do not belong together")
        self.classes = [str(number) for number in range(max(self.labels) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Its number."""
        return f"{index:06d}"

    def read(self, index: int) -> bytes:
        """The image as a portable grey map."""
        height, width = self.images.shape[1:]
        return b"P5 %d %d 255\n" % (width, height) + self.images[index].tobytes()
