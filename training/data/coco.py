"""Images with boxes, and masks where there are any, in the COCO layout (Lin et al. 2014, https://cocodataset.org).

| in a folder, or in one uncompressed .tar | |
|---|---|
| `annotations/instances_train.json` | images, annotations, categories |
| `train/` | the images, by the `file_name` of the json |
| the same with `test`, else with `val` | what is judged by |

A year may follow a split's name (`instances_train2017.json` with `train2017/`), as in COCO itself, whose test split
comes without annotations: COCO is judged by its `val`. Where both are there, `val` is not used: nothing is chosen.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from training.data.images import ImageSource
from training.data.readers import refuse_folder
from training.data.tars import read_index

Json = dict[str, Any]

MOST_DROPPED = 0.05
"""Share of boxes without area up to which they are dropped and counted; COCO's own json has a few in a million."""


class _Files(Protocol):
    """Files by their path below a root. Shared by forked loader processes, so no file position is held."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        walk = os.walk(self.root, onerror=refuse_folder, followlinks=True)
        return [Path(folder, file).relative_to(self.root).as_posix() for folder, _, files in walk for file in files]

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class _Tar:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.members = {name.removeprefix("./"): (offset, size) for name, offset, size in read_index(path)}

    def names(self) -> list[str]:
        return list(self.members)

    def read(self, name: str) -> bytes:
        offset, size = self.members[name]
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image, in its own pixels."""

    boxes: Tensor
    """(K, 4) float32: left, top, right, bottom."""
    labels: Tensor
    """(K,) int64 from 1: 0 is the background."""
    crowd: Tensor
    """(K,) bool: a region of uncounted objects: background where boxes are learned, judged neither right nor wrong."""
    areas: Tensor
    """(K,) float32 in pixels, as annotated."""
    segments: list[Json] | None
    """Run-length codes (pycocotools), where masks are wanted."""

    def masks(self, height: int, width: int) -> Tensor:
        """The segments as (K, H, W) uint8, 1 = object."""
        return decode_masks(self.segments or [], height, width)


class CocoReader:
    """Images and annotations of one split; a `Reader` of images without labels.

    Args:
        files: Where they lie.
        split: Name in the layout, without the year.
        place: What to call the whole in a message.

    Raises:
        FileNotFoundError: If the json or an image is missing.
        ValueError: If the json is not of this format or annotates nothing.
    """

    def __init__(self, files: _Files, split: str, place: str) -> None:
        names = set(files.names())
        self.files = files
        self.json = _find_json(names, split, place)
        self.where = f"{place}: {self.json}"
        self.text = files.read(self.json)
        try:
            found = json.loads(self.text)
            images, annotations, categories = (found[key] for key in ("images", "annotations", "categories"))
            self.classes = _classes(categories, self.where)
            numbers = {entry["id"]: self.classes.index(str(entry["name"])) + 1 for entry in categories}
            self.images: list[Json] = sorted(images, key=lambda image: str(image["file_name"]))
            folder = re.sub(r".*instances_(\w+)\.json$", r"\1", self.json)
            self.names = [f"{folder}/{image['file_name']}" for image in self.images]
            places = {image["id"]: index for index, image in enumerate(self.images)}
            self._refuse_doubles(places)
            self._refuse_missing(names)
            self._sort(annotations, places, numbers)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.where}: not COCO's json of instances: {error!r}") from error

    def _refuse_doubles(self, places: dict[int, int]) -> None:
        for values, what in ((self.names, "file_name"), ([image["id"] for image in self.images], "id of an image")):
            if len(set(values)) < len(values):
                double, _ = Counter(values).most_common(1)[0]
                raise ValueError(f"{self.where}: the {what} {double} occurs twice")
        if not places:
            raise ValueError(f"{self.where}: names no image")

    def _refuse_missing(self, names: set[str]) -> None:
        if missing := [name for name in self.names if name not in names]:
            raise FileNotFoundError(
                f"{self.where}: {len(missing)} of its {len(self.names)} images are missing, such as {missing[0]}"
            )

    def _sort(self, annotations: list[Json], places: dict[int, int], numbers: dict[int, int]) -> None:
        """Put every annotation to its image, clipped to it; those without area are dropped and counted."""
        self.annotations: list[list[Json]] = [[] for _ in self.images]
        self.dropped = 0
        for entry in annotations:
            if entry["image_id"] not in places or entry["category_id"] not in numbers:
                raise ValueError(f"{self.where}: annotation {entry.get('id')} is of an unknown image or category")
            image = self.images[places[entry["image_id"]]]
            left, top, width, height = map(float, entry["bbox"])
            box = (max(left, 0), max(top, 0), min(left + width, image["width"]), min(top + height, image["height"]))
            if not (box[2] > box[0] and box[3] > box[1]):  # so written, NaN counts too
                self.dropped += 1
                continue
            self.annotations[places[entry["image_id"]]].append(
                {**entry, "box": box, "label": numbers[entry["category_id"]]}
            )
        if not any(self.annotations):
            raise ValueError(f"{self.where}: annotates nothing that has an area")
        if self.dropped > MOST_DROPPED * len(annotations):
            raise ValueError(
                f"{self.where}: {self.dropped} of {len(annotations)} boxes have no area inside their image; "
                "they must be left, top, width and height in pixels"
            )

    @property
    def labels(self) -> list[int]:
        """There are none: whole images have no class."""
        raise ValueError(f"{self.where}: has boxes, not one label an image")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path below the folder, or inside the tar."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """The image's file."""
        return self.files.read(self.names[index])


def _jsons(names: Iterable[str], split: str) -> list[str]:
    pattern = re.compile(rf"annotations/instances_{split}(\d{{4}})?\.json")
    return sorted(name for name in names if pattern.fullmatch(name))


def _find_json(names: set[str], split: str, place: str) -> str:
    found = _jsons(names, split)
    if not found:
        raise FileNotFoundError(f"{place}: holds no annotations/instances_{split}.json")
    if len(found) > 1:
        raise ValueError(f"{place}: which of {', '.join(found)} is meant? Leave one there")
    return found[0]


def _classes(categories: list[Json], where: str) -> list[str]:
    names = [str(entry["name"]) for entry in sorted(categories, key=lambda entry: int(entry["id"]))]
    if len(set(names)) < len(names) or len({entry["id"] for entry in categories}) < len(names) or not names:
        raise ValueError(f"{where}: no categories, or two of the same id or name: {names}")
    return names


class CocoSource(ImageSource):
    """One split, images decoded.

    Attributes:
        dropped: How many boxes are left out, because they have no area inside their image.

    Args:
        reader: The split.
        masks: Give masks too.

    Raises:
        ValueError: If masks are wanted and only some annotations have one.
    """

    reader: CocoReader

    def __init__(self, reader: CocoReader, *, masks: bool) -> None:
        super().__init__(reader.where, reader=reader)
        self.dropped = reader.dropped
        without = [entry for entries in reader.annotations for entry in entries if not entry.get("segmentation")]
        if masks and without:
            raise ValueError(
                f"{reader.where}: {len(without)} annotations, such as {without[0].get('id')}, have no segmentation: "
                "complete them, or learn boxes alone"
            )
        self.masks = masks

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with the annotations; those of `fingerprint_data` do with images."""
        return hashlib.sha256(self.reader.text).hexdigest()[:16]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels, as the json has them."""
        image = self.reader.images[index]
        return int(image["height"]), int(image["width"])

    def look_at_all(self) -> None:
        """Decode everything once, before hours of training are spent on it.

        Raises:
            ImageError: If an image does not decode or is not of the size that the json has.
            ValueError: If a segmentation is none.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
            for _ in pool.map(self._look_at, range(len(self))):
                pass

    def _look_at(self, index: int) -> None:
        self.load(index)
        self.objects(index)

    def objects(self, index: int) -> Objects:
        """What is annotated in an image; perhaps nothing.

        Raises:
            ValueError: If a segmentation is none.
        """
        entries, size = self.reader.annotations[index], self.size(index)
        try:
            segments = [_encode(entry["segmentation"], *size) for entry in entries] if self.masks else None
        except Exception as error:  # pycocotools fails with whatever it stumbles over
            raise ValueError(f"{self.spec}: a segmentation in {self.name(index)} is none: {error}") from error
        boxes = torch.tensor([entry["box"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        annotated = [entry.get("area") for entry in entries]
        areas = [float(w * h) if a is None else float(a) for a, w, h in zip(annotated, width, height, strict=True)]
        return Objects(
            boxes,
            torch.tensor([entry["label"] for entry in entries], dtype=torch.int64),
            torch.tensor([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=torch.bool),
            torch.tensor(areas, dtype=torch.float32),
            segments,
        )


def _encode(segmentation: Any, height: int, width: int) -> Json:
    """Polygons or a run-length code of any form, as one compressed run-length code."""
    if isinstance(segmentation, list):  # [x, y, x, y, ...] of every part
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its mask is of {segmentation['size']}, the image of {[height, width]} (height, width)")
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return dict(segmentation)


def decode_masks(segments: list[Json], height: int, width: int) -> Tensor:
    """Run-length codes as (K, H, W) uint8, 1 = object."""
    if not segments:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    return torch.from_numpy(coco_mask.decode(segments)).permute(2, 0, 1).contiguous()  # (H, W, K) -> (K, H, W)


def encode_mask(mask: NDArray[np.bool_]) -> Json:
    """An (H, W) mask as a run-length code."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def open_coco(data: Path, *, masks: bool = True) -> tuple[CocoSource, CocoSource]:
    """The split to learn from and the split to be judged by: `train`, and `test` where it is annotated, else `val`.

    Args:
        data: A folder, or an uncompressed .tar.
        masks: Give masks too, where both splits have any.

    Raises:
        FileNotFoundError: If a json or an image is missing.
        ValueError: If a json is not of this format, the splits' categories differ, or a class is never annotated in
            `train`.
    """
    if data.is_dir():
        files: _Files = _Folder(data)
    elif data.suffix == ".tar" and data.is_file():
        files = _Tar(data)
    else:
        raise FileNotFoundError(f"{data}: no such folder or uncompressed .tar")
    judged_by = next((split for split in ("test", "val") if _jsons(files.names(), split)), None)
    if judged_by is None:
        raise FileNotFoundError(f"{data}: holds no annotations/instances_test.json and none of val to be judged by")
    train, test = (CocoReader(files, split, str(data)) for split in ("train", judged_by))
    _check_classes(train, test)
    annotated = [[bool(a.get("segmentation")) for part in split.annotations for a in part] for split in (train, test)]
    masks = masks and all(any(split) for split in annotated)
    return CocoSource(train, masks=masks), CocoSource(test, masks=masks)


def _check_classes(train: CocoReader, test: CocoReader) -> None:
    """Both splits get one numbering: that of `train`."""
    if set(train.classes) != set(test.classes):
        raise ValueError(f"the categories differ: {train.where}: {train.classes}; {test.where}: {test.classes}")
    for entry in (entry for part in test.annotations for entry in part):
        entry["label"] = train.classes.index(test.classes[entry["label"] - 1]) + 1
    test.classes = train.classes
    learned, asked = ({entry["label"] for part in split.annotations for entry in part} for split in (train, test))
    if missing := [train.classes[label - 1] for label in sorted(asked - learned)]:
        raise ValueError(f"{train.where}: has no box of {', '.join(missing)}, which {test.where} asks for")
