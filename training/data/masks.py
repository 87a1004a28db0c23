"""Images with a mask of classes each, for semantic segmentation.

| in a folder, or in one uncompressed .tar | with the same below | class c |
|---|---|---|
| `train/images/x.jpg`, `train/masks/x.png` | `test`, else `val` | has the value c |
| `images/training/x.jpg`, `annotations/training/x.png` | `validation` | has the value c + 1, and 0 is void |

The second one is ADE20K's (Zhou et al. 2017). An image and its mask have the same path but for these folders and the
ending. Masks hold one number a pixel: grey, 1-bit or palette files without loss, not coloured ones. Where `test` has
masks, `val` is not used: nothing is chosen.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from perceptual_mae_models.images import ImageError, refuse_programs
from training.data.images import ImageSource
from training.data.readers import PartReader, Reader, open_reader

VOID = -1
"""A pixel of no class, which is neither learned nor judged."""

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies the values of 2- and 4-bit grey files with."""
LISTED = 5
"""Names in a message."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set keeps what, and what its values mean."""

    pattern: re.Pattern[str]
    """Groups: what comes before, the split, the kind, and the rest of the path."""
    masks: str
    """Name of the kind that holds masks; the other one is `images`."""
    splits: dict[str, tuple[str, ...]]
    """Names of the splits by what they are for, the first that is there counts."""
    first: int
    """Value of class 0."""


LAYOUTS = (
    Layout(
        pattern=re.compile(
            r"(?P<before>.*?/|)(?P<split>train|val|validation|test)/(?P<kind>images|masks)/(?P<rest>.+)"
        ),
        masks="masks",
        splits={"train": ("train",), "test": ("test", "val", "validation")},
        first=0,
    ),
    Layout(
        pattern=re.compile(
            r"(?P<before>.*?/|)(?P<kind>images|annotations)/(?P<split>training|validation)/(?P<rest>.+)"
        ),
        masks="annotations",
        splits={"train": ("training",), "test": ("validation",)},
        first=1,
    ),
)


class _Part(PartReader):
    """Some files of a reader, whose folders are no classes."""

    @property
    def classes(self) -> list[str]:
        raise ValueError("segmented images have a mask each, not one class an image")

    @property
    def labels(self) -> list[int]:
        raise ValueError("segmented images have a mask each, not one label an image")


@dataclass(frozen=True)
class Census:
    """What one pass over all images and masks of a split says about it."""

    pixels: Tensor
    """(C,) int64: of every class, in the whole split."""
    digest: str
    """Sixteen hexadecimal digits that change with the masks' files or names."""


class MaskSource(ImageSource):
    """One split: images decoded, with their masks.

    Attributes:
        num_classes: Classes that a mask may hold; None: any number.

    Args:
        images: The image files.
        masks: Of each its mask.
        spec: What to call the whole.
        void: Values in the files that are no class.
        first: Value in the files of class 0; smaller ones are no class.
        num_classes: See the attribute.
    """

    def __init__(
        self,
        images: Reader,
        masks: Reader,
        spec: str,
        *,
        void: tuple[int, ...] = (),
        first: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(spec, reader=images)
        self.masks, self.void, self.first, self.num_classes = masks, void, first, num_classes

    @property
    def classes(self) -> list[str]:
        """Their numbers, as text: masks carry no names."""
        return [str(number) for number in range(self.num_classes or 0)]

    def mask(self, index: int) -> Tensor:
        """The classes of an image's pixels, (H, W) int64, `VOID` where there is none.

        Raises:
            ImageError: If the file is not a mask or holds more classes than there are.
        """
        name = self.masks.name(index)
        try:
            values = _read_values(self.masks.read(index))
        except Exception as error:  # on hostile bytes Pillow's parsers fail with whatever they stumble over
            raise ImageError(name, str(error) or "not an image") from error
        classes = values - self.first
        classes[(classes < 0) | np.isin(values, self.void)] = VOID
        if self.num_classes is not None and (highest := int(classes.max())) >= self.num_classes:
            raise ImageError(
                name,
                f"holds the value {highest + self.first}, class {highest} of {self.num_classes} (counted from 0): "
                "name it by --segmentation.void if it is no class, or correct --segmentation.num-classes",
            )
        return torch.from_numpy(classes)

    def census(self) -> Census:
        """Decode everything once, before hours of training are spent on it.

        Raises:
            ImageError: If an image or mask is unreadable, they differ in size, or a mask holds too many classes.
            ValueError: If every pixel is void.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
            found = list(pool.map(self._look_at, range(len(self))))
        pixels = torch.zeros(max(len(counts) for counts, _ in found), dtype=torch.int64)
        digest = hashlib.sha256()
        for counts, content in found:
            pixels[: len(counts)] += counts
            digest.update(content)
        if not pixels.sum():
            raise ValueError(
                f"{self.spec}: all pixels of its {len(self)} masks are void: is --segmentation.void right?"
            )
        return Census(pixels, digest.hexdigest()[:16])

    def _look_at(self, index: int) -> tuple[Tensor, bytes]:
        image, mask = self.load(index), self.mask(index)
        if image.size != (mask.shape[1], mask.shape[0]):
            raise ImageError(
                self.masks.name(index),
                f"is {mask.shape[1]} x {mask.shape[0]} (width, height), its image {image.size[0]} x {image.size[1]}",
            )
        content = hashlib.sha256(self.masks.name(index).encode("utf-8", "surrogateescape") + self.masks.read(index))
        return torch.bincount(mask[mask != VOID], minlength=self.num_classes or 0), content.digest()


def _read_values(data: bytes) -> NDArray[np.int64]:
    """The numbers in a mask's file, (H, W).

    Raises:
        ValueError: If it holds anything but one number a pixel.
    """
    with Image.open(io.BytesIO(data)) as image:
        refuse_programs(image)
        if image.format == "JPEG":
            raise ValueError("a mask as JPEG: its numbers are not what was stored; store it as PNG")
        raw = str(image.tile[0].args) if image.tile else ""
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise ValueError(
                f"a mask of mode {image.mode}: it must hold one number a pixel (grey or palette), not colours"
            )
        return np.asarray(image).astype(np.int64) // GREY_STEPS.get(raw, 1)


def open_masks(
    data: Path, *, void: tuple[int, ...] = (255,), num_classes: int | None = None
) -> tuple[MaskSource, MaskSource, dict[str, Census]]:
    """The split to learn from and the split to be judged by: `train`, and `test` where there is one, else `val`.

    Every image and mask is read and decoded once.

    Args:
        data: A folder or a .tar in one of the layouts above.
        void: Values in masks that are no class; in ADE20K's layout 0 is none anyway.
        num_classes: How many there are. None: as many as the training masks hold.

    Returns:
        Both, with the same number of classes, and the census of each as `train` and `test`.

    Raises:
        FileNotFoundError: If there is no such data set, or an image or mask of it is missing.
        ValueError: If it has another layout, or its masks say nothing to learn or to judge.
        ImageError: At an image or mask that cannot be used.
    """
    if not data.is_dir() and not data.name.endswith((".tar", ".tar.gz", ".tgz")):
        raise FileNotFoundError(f"{data}: no such folder or .tar")
    reader = open_reader(str(data))
    layout, files = _find_layout(reader, str(data))
    parts = [_pair(reader, files, layout, use, str(data)) for use in ("train", "test")]
    train, test = (
        MaskSource(images, masks, spec, void=void, first=layout.first, num_classes=num_classes)
        for images, masks, spec in parts
    )
    census = {"train": train.census()}
    train.num_classes = test.num_classes = num_classes or len(census["train"].pixels)
    if train.num_classes < 2:
        raise ValueError(
            f"{train.spec}: its masks hold one class beside void ({', '.join(map(str, void))}). Where 255 is a class, "
            "as in masks of black and white, name other values by --segmentation.void and store 255 as 1"
        )
    census["test"] = test.census()
    asked, learned = census["test"].pixels > 0, census["train"].pixels > 0
    if missing := (asked & ~learned).nonzero().flatten().tolist():
        raise ValueError(f"{train.spec}: no pixel is of class {_listed(missing)}, which {test.spec} asks for")
    return train, test, census


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in list(values)[:LISTED])


Files = dict[tuple[str, bool], dict[str, int]]
"""Numbers of the files by path without ending, for each split and for images (False) and masks (True)."""


def _find_layout(reader: Reader, place: str) -> tuple[Layout, Files]:
    names = [(index, reader.name(index)) for index in range(len(reader))]
    for layout in LAYOUTS:
        found = [(index, match) for index, name in names if (match := layout.pattern.fullmatch(name))]
        # macOS puts ._x beside every x it packs
        found = [(index, match) for index, match in found if not PurePosixPath(match["rest"]).name.startswith(".")]
        if found:
            break
    else:
        raise ValueError(
            f"{place}: give train/images with train/masks and the same below test or val, or ADE20K's "
            f"images/training with annotations/training; it holds {_listed(name for _, name in names)}"
        )
    if len(before := sorted({match["before"] for _, match in found})) > 1:
        raise ValueError(f"{place}: holds more than one data set: {_listed(before)}")
    files: Files = {}
    for index, match in found:
        stems = files.setdefault((match["split"], match["kind"] == layout.masks), {})
        stem = PurePosixPath(match["rest"]).with_suffix("").as_posix()
        if stem in stems:
            raise ValueError(
                f"{place}: {reader.name(stems[stem])} and {reader.name(index)} differ by their ending only"
            )
        stems[stem] = index
    return layout, files


def _pair(reader: Reader, files: Files, layout: Layout, use: str, place: str) -> tuple[Reader, Reader, str]:
    split = next((name for name in layout.splits[use] if (name, True) in files), None)
    if split is None:
        raise FileNotFoundError(f"{place}: holds no masks of {' or '.join(layout.splits[use])}")
    images, masks = files.get((split, False), {}), files.get((split, True), {})
    for have, want, what in ((images, masks, "mask"), (masks, images, "image")):
        if missing := [reader.name(number) for stem, number in have.items() if stem not in want]:
            raise FileNotFoundError(
                f"{place}: {len(missing)} of {len(have)} files have no {what} of the same name: {_listed(missing)}"
            )
    numbers = list(images.values())
    return _Part(reader, numbers), _Part(reader, [masks[stem] for stem in images]), f"{place}: {split}"
