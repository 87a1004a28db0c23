"""Resize images once, so that every epoch decodes small files.

    python training/prepare.py in1k/train in1k-256/train --short-side 256
    python training/prepare.py hf:user/photos photos-256 --short-side 256 --images-per-shard 10000

    python training/prepare.py imagenette2/train imagenette-128/train --short-side 128 --squash --quality 90

reads anything that `training/data/readers.py` lists and writes upright RGB JPEGs: a folder with the source's own
folders, or tars in WebDataset's layout, shuffled over all shards. Both are `--data` for pretrain.py. No image is
enlarged, and a JPEG that needs no change is copied as it is. A killed run goes on with the same command.
`prepare.json` in DST records settings, counts and the images that could not be read.
"""

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, Protocol

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from perceptual_mae_models.files import replace_file, replace_text
from perceptual_mae_models.images import ImageError
from training.data.images import decode
from training.data.readers import Reader, open_reader
from training.data.tars import read_index
from training.run.seeding import generator

MANIFEST = "prepare.json"


class Prepared(NamedTuple):
    """One image of the source, done."""

    target: str
    """Path below DST, or inside a shard."""
    data: bytes
    """The JPEG; empty if broken."""
    error: str
    """Why it is broken, with its name; empty if it is not."""


def resize_to_jpeg(data: bytes, name: str, short_side: int, quality: int, *, squash: bool = False) -> bytes:
    """An image as a JPEG whose shorter side is at most `short_side`.

    Args:
        data: A whole image file.
        name: What to call it in a message.
        short_side: Pixels; a smaller image keeps its size.
        quality: Pillow's JPEG quality, 1 to 95.
        squash: Make it a square of that side, whatever its shape.

    Returns:
        The file; `data` itself if it is an upright RGB JPEG and small enough.

    Raises:
        ImageError: If it does not decode.
    """
    image = decode(data, name)
    scale = min(1.0, short_side / min(image.size))
    width, height = (max(min(short_side, side), round(side * scale)) for side in image.size)
    size = (min(width, height),) * 2 if squash else (width, height)
    if size == image.size and _is_plain_jpeg(data):
        return data
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _is_plain_jpeg(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1  # orientation


def target_names(names: Iterable[str]) -> list[str]:
    """Where each image goes: its own path with .jpg for a suffix, and a number where that is taken.

    Names that differ in nothing but case are told apart, for file systems that do not tell them apart.
    """
    taken: set[str] = set()
    targets = []
    for name in names:
        # "..", a leading "/" and the like must not lead out of the folder
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        # WebDataset takes whatever follows the first dot of the last part for the suffix
        stem = "/".join([*parts[:-1], PurePosixPath(parts[-1]).stem.replace(".", "_")])
        target, number = f"{stem}.jpg", 1
        while target.casefold() in taken:
            number += 1
            target = f"{stem}-{number}.jpg"
        taken.add(target.casefold())
        targets.append(target)
    return targets


class Resizing(Dataset[Prepared]):
    """The source's images, resized by loader processes."""

    def __init__(
        self, reader: Reader, targets: list[str], short_side: int, quality: int, *, squash: bool = False
    ) -> None:
        self.reader, self.targets = reader, targets
        self.short_side, self.quality, self.squash = short_side, quality, squash

    def __getitem__(self, index: int) -> Prepared:
        name = self.reader.name(index)
        try:
            data = resize_to_jpeg(self.reader.read(index), name, self.short_side, self.quality, squash=self.squash)
        except ImageError as error:
            return Prepared(self.targets[index], b"", str(error))
        except OSError as error:
            return Prepared(self.targets[index], b"", f"{name}: {error}")
        return Prepared(self.targets[index], data, "")


class Layout(Protocol):
    """How results lie in DST."""

    def pending(self) -> list[int]:
        """Images that are not done, in the order in which `write` wants them."""

    def write(self, results: Iterator[Prepared]) -> None:
        """Write the pending images; whatever is on disk under its final name is whole."""

    def written(self) -> set[str]:
        """Targets that are on disk."""


class Folders:
    """One file an image."""

    def __init__(self, root: Path, targets: list[str]) -> None:
        self.root, self.targets = root, targets

    def pending(self) -> list[int]:
        """Images without a file."""
        written = self.written()
        return [index for index, target in enumerate(self.targets) if target not in written]

    def write(self, results: Iterator[Prepared]) -> None:
        """Write each under another name first."""
        for target, data, _ in results:
            if data:
                path = self.root / target
                path.parent.mkdir(parents=True, exist_ok=True)
                # not by replace_file: until the disk has an image takes longer than to resize it
                unfinished = path.with_name(f"{path.name}.partial")
                unfinished.write_bytes(data)
                unfinished.replace(path)

    def written(self) -> set[str]:
        """The targets that are there."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.root) for name in names)
        return {path.relative_to(self.root).as_posix() for path in found} & set(self.targets)


class Shards:
    """Tars of equally many images (to one).

    The images are shuffled over all of them: a stream reads whole shards, and a shard of one class is no sample.
    """

    def __init__(self, root: Path, targets: list[str], count: int) -> None:
        order = torch.randperm(len(targets), generator=generator(0, "prepare")).tolist()
        digits = max(5, len(str(count - 1)))
        self.root, self.targets = root, targets
        self.shards = {f"shard-{number:0{digits}d}.tar": order[number::count] for number in range(count)}

    def pending(self) -> list[int]:
        """The images of the shards that are missing."""
        return [index for indices in self._missing().values() for index in indices]

    def write(self, results: Iterator[Prepared]) -> None:
        """Write shard after shard, the same bytes whenever it is done."""
        for name, indices in self._missing().items():
            replace_file(self.root / name, partial(_write_shard, images=islice(results, len(indices))))

    def written(self) -> set[str]:
        """The members of all shards."""
        return {member.name for name in self.shards for member in read_index(self.root / name)}

    def _missing(self) -> dict[str, list[int]]:
        return {name: indices for name, indices in self.shards.items() if not (self.root / name).exists()}


def _write_shard(path: Path, images: Iterable[Prepared]) -> None:
    with tarfile.open(path, "w") as tar:
        for target, data, _ in images:
            if data:
                member = tarfile.TarInfo(target)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def claim(dst: Path, settings: dict[str, Any]) -> None:
    """Make sure that DST is new, or was begun with the same settings from the same images.

    Raises:
        SystemExit: If it is neither.
    """
    manifest = dst / MANIFEST
    if manifest.exists():
        begun = {"squash": False} | json.loads(manifest.read_text())["settings"]  # older ones do not say
        if changed := [key for key in settings if begun.get(key) != settings[key]]:
            raise SystemExit(f"prepare.py: {dst} was begun with other {', '.join(changed)}: choose a new folder")
    elif dst.exists() and any(dst.iterdir()):
        raise SystemExit(f"prepare.py: {dst} is not empty and not from prepare.py: choose a new folder")
    dst.mkdir(parents=True, exist_ok=True)


def save_manifest(dst: Path, manifest: dict[str, Any]) -> None:
    """Write `prepare.json` whole or not at all."""
    replace_text(dst / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def check_places(src: str, dst: Path) -> None:
    """Refuse a DST inside SRC, where a second run would take results for images.

    Raises:
        SystemExit: If it is.
    """
    source, target = Path(src.rpartition(":")[2]).resolve(), dst.resolve()
    if source in (target, *target.parents) and source.is_dir():
        raise SystemExit(f"prepare.py: {dst} lies in {src}: choose a folder beside the source")


def names_with_classes(reader: Reader) -> list[str]:
    """Names of all images, each with its class as the innermost folder, so that results keep their labels."""
    names = [reader.name(index) for index in range(len(reader))]
    try:
        labels, classes = reader.labels, reader.classes
    except ValueError:  # a source without labels
        return names
    for index, label in enumerate(labels):
        path, folder = PurePosixPath(names[index]), classes[label].replace("/", "_")
        if label >= 0 and folder != path.parent.name:
            names[index] = str(path.parent / folder / path.name)
    return names


def finish(dst: Path, manifest: dict[str, Any], layout: Layout, images: Resizing) -> str:
    """Complete the manifest.

    Returns:
        What to tell the user.
    """
    written = layout.written()
    missing = [index for index, target in enumerate(images.targets) if target not in written]
    # read once more, since an earlier, interrupted run may have met them
    broken = [images[index].error or f"{images.reader.name(index)}: could not be read before" for index in missing]
    save_manifest(dst, {**manifest, "complete": True, "written": len(written), "broken": broken})
    return f"{len(written)} images in {dst}, {len(broken)} could not be read (see {MANIFEST})"


def main(
    src: Annotated[str, tyro.conf.Positional],
    dst: Annotated[Path, tyro.conf.Positional],
    short_side: int,
    quality: int = 95,
    squash: bool = False,
    shards: int | None = None,
    images_per_shard: int | None = None,
    workers: int = os.cpu_count() or 1,
    split: str = "train",
    column: str | None = None,
) -> None:
    """Resize every image of SRC once and write it to DST.

    Args:
        src: A folder, a .tar, shards or `hf:…`, as pretrain.py's --data.
        dst: A new folder, or one that an interrupted run of this command left.
        short_side: Length of the shorter side in pixels; smaller images keep their size.
        quality: JPEG quality, 1 to 95.
        squash: Make every image a square of that side, whatever its shape.
        shards: Write so many tars instead of a folder.
        images_per_shard: Write tars of about so many images instead.
        workers: Processes; 0 resizes in this one.
        split: Split of a Hugging Face data set.
        column: Its image column, where it has several.
    """
    if shards and images_per_shard:
        raise SystemExit("prepare.py: give --shards or --images-per-shard, not both")
    counted = all(count is None or count >= 1 for count in (shards, images_per_shard))
    if not (short_side >= 1 and 1 <= quality <= 95 and counted and workers >= 0):
        raise SystemExit("prepare.py: sizes and counts are at least 1, --quality at most 95, --workers at least 0")
    check_places(src, dst)
    try:
        reader = open_reader(src, split=split, column=column)
        count = shards or (math.ceil(len(reader) / images_per_shard) if images_per_shard else 0)
        print(prepare(reader, dst, short_side, quality, squash=squash, shards=min(count, len(reader)), workers=workers))
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare.py: {error}") from error


def prepare(
    reader: Reader, dst: Path, short_side: int, quality: int, *, squash: bool = False, shards: int, workers: int
) -> str:
    """Do what `main` says, with `shards` 0 for a folder.

    Returns:
        What to tell the user.

    Raises:
        SystemExit: If DST holds something else.
    """
    names = names_with_classes(reader)
    settings = {
        "images": len(names),
        "names_sha256": hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest(),
        "short_side": short_side,
        "quality": quality,
        "shards": shards,
        "squash": squash,
    }
    claim(dst, settings)
    manifest = {"settings": settings, "complete": False}
    save_manifest(dst, manifest)
    targets = target_names(names)
    layout: Layout = Shards(dst, targets, shards) if shards else Folders(dst, targets)
    images, pending = Resizing(reader, targets, short_side, quality, squash=squash), layout.pending()
    loader: DataLoader[Any] = DataLoader(
        images, batch_size=None, sampler=pending, num_workers=workers, prefetch_factor=16 if workers else None
    )
    with tqdm(total=len(names), initial=len(names) - len(pending), unit="image") as bar:
        layout.write(_shown(loader, bar))
    return finish(dst, manifest, layout, images)


def _shown(results: Iterable[Prepared], bar: Any) -> Iterator[Prepared]:
    for result in results:
        if result.error:
            bar.write(f"skipped {result.error}")
        bar.update()
        yield result


if __name__ == "__main__":
    tyro.cli(main)
