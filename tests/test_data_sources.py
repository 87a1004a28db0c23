"""Every kind of source gives the files' own images; a stream's batches depend on the seed and on the step alone."""

import dataclasses
import gzip
import io
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perceptual_mae_models.images import ImageError
from training.data import hub, stream
from training.data.images import Batch, ImageSource, RandomViews, create_loader
from training.data.sampler import DeterministicBatchSampler
from training.data.stream import ImageStream, StreamViews, create_stream_loader, stand_ins
from training.data.tars import TarError, TarReader, expand_braces, number_classes, read_index
from training.evaluate.options import Options
from training.evaluate.sources import open_sources
from training.run.signals import ignore_in_workers


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(colour: int) -> bytes:
    """A small image of one colour, which a view of it shows, too."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (colour, 255 - colour, colour // 2)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(root: Path) -> Counter[bytes]:
    return Counter(Image.open(path).convert("RGB").tobytes() for path in root.rglob("*.png"))


def loaded(source: ImageSource) -> Counter[bytes]:
    return Counter(source.load(index).tobytes() for index in range(len(source)))


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos in three tars of eight, as WebDataset samples with a .cls and a .json member."""
    root = tmp_path_factory.mktemp("shards")
    files = sorted(photos.rglob("*.png"), key=lambda path: path.name)
    for number in range(3):
        members = []
        for path in files[number::3]:
            label = path.parent.name.removeprefix("class").encode()
            members += [(f"{path.stem}.cls", label), (f"{path.stem}.json", b"{}"), (path.name, path.read_bytes())]
        write_tar(root / f"photos-{number:03d}.tar", members)
    return root


# --- tars ---


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_of_a_tar_is_tarfiles(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "n" * 80
    names = ["a.png", "./b/c.png", long, *([] if format == tarfile.USTAR_FORMAT else ["ü" * 130, "deep/" * 60 + "x"])]
    path = write_tar(
        tmp_path / "some.tar", [(name, bytes(size)) for size, name in enumerate(names, 510)], format=format
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a.png")
    with tarfile.open(path, "a", format=format) as tar:
        tar.add(tmp_path / "folder", "folder")
        tar.add(tmp_path / "link", "link-" + "l" * (20 if format == tarfile.USTAR_FORMAT else 200))
        tar.addfile(tarfile.TarInfo("last"), io.BytesIO())
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert read_index(path) == expected
    assert [name for name, _, _ in expected] == [*names, "last"]


def test_tars_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.png", png(1)), ("b.png", bytes(5000))]).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:2560])
    with pytest.raises(TarError, match=r"cut\.tar: the tar is cut short"):
        read_index(cut)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(cut)
    with pytest.raises(TarError, match=r"zipped\.tar: not an uncompressed \.tar, or damaged at byte 0"):
        read_index(tmp_path / "zipped.tar")


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{0..1}/{9..10}") == ["0/9", "0/10", "1/9", "1/10"]
    assert expand_braces("plain") == ["plain"]


@pytest.mark.parametrize("spec", ["", "/photos-{000..002}.tar", "/photos-*.tar"])
def test_shards_hold_the_folders_images_and_labels(photos: Path, shards: Path, spec: str) -> None:
    source = ImageSource(f"{shards}{spec}")
    assert loaded(source) == pixels(photos)
    assert source.classes == ["0", "1", "2"]
    assert source.name(0) == "photos-000.tar/00.png"
    for index, label in enumerate(source.labels):
        number = int(Path(source.name(index)).stem)
        assert label == number % 3
        assert source.load(index) == Image.open(photos / f"class{label}" / f"{number:02d}.png").convert("RGB")


def test_folders_inside_several_tars_are_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("cat/1.png", png(1)), ("dog/2.png", png(2))])
    write_tar(tmp_path / "1.tar", [("cat/1.png", png(3))])
    source = ImageSource(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [(source.name(i), source.labels[i]) for i in range(3)] == [
        ("0.tar/cat/1.png", 0), ("0.tar/dog/2.png", 1), ("1.tar/cat/1.png", 0)
    ]  # fmt: skip
    (tmp_path / "beside.png").write_bytes(png(4))
    assert len(ImageSource(tmp_path)) == 1, "tars beside images are not shards"


def test_tars_of_the_same_name_keep_their_own_names_and_labels(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"tr{number}").mkdir()
        members = [("000.png", png(number)), ("000.cls", str(number).encode())]
        write_tar(tmp_path / f"tr{number}" / "00000.tar", members)
    source = ImageSource(f"{tmp_path}/tr{{0..1}}/00000.tar")
    assert [(source.name(i), source.labels[i]) for i in range(2)] == [
        ("tr0/00000.tar/000.png", 0), ("tr1/00000.tar/000.png", 1)
    ]  # fmt: skip
    for number in range(2):
        write_tar(tmp_path / f"tr{number}" / "00000.tar", [(f"class{number}/000.png", png(number))])
    source = ImageSource(f"{tmp_path}/tr{{0..1}}/00000.tar")
    assert (source.classes, list(source.labels)) == (["class0", "class1"], [0, 1])


def test_a_folder_that_cannot_be_read_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="class1"):
        ImageSource(photos)


def test_shards_in_forked_workers_are_those_in_this_process(shards: Path) -> None:
    source = ImageSource(shards)
    views = RandomViews(source, (16, 16), (0.2, 1.0), seed=0)
    runs = [
        list(create_loader(views, DeterministicBatchSampler(24, 6, range(8), 0), workers=workers)) for workers in (0, 2)
    ]
    assert not any(batch.broken for run in runs for batch in run)
    assert all(torch.equal(a.images, b.images) for a, b in zip(*runs, strict=True))


def test_missing_shards_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"photos-003\.tar: no such"):
        ImageSource(f"{shards}/photos-{{000..003}}.tar")
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match=r"uncompressed \.tar files, not a\.zip"):
        ImageSource(f"{tmp_path}/*.zip")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[datasets\]'"):
        ImageSource("hf:some/photos")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[datasets\]'"):
        ImageStream("hf-stream:some/photos")


# --- Hugging Face, map-style ---


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for constants in (module.config, pytest.importorskip("huggingface_hub").constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return module


@pytest.fixture
def rows(datasets: Any, photos: Path) -> Any:
    return datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")


def test_hugging_face_sources_hold_the_folders_images(rows: Any, photos: Path, tmp_path: Path) -> None:
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for number in range(2):
        rows.shard(2, number).to_parquet(str(tmp_path / "parquet" / f"train-{number}.parquet"))
    specs = (
        f"imagefolder:{photos}",
        str(tmp_path / "saved"),
        str(tmp_path / "parquet"),
        f"parquet:{tmp_path}/parquet/*.parquet",
    )
    for spec in specs:
        source = ImageSource(f"hf:{spec}")
        assert loaded(source) == pixels(photos), spec
        assert source.classes == ["class0", "class1", "class2"]
        assert source.labels == sorted(source.labels)
        assert source.name(0) == "class0/00000000"
        assert source.name(23) == "class2/00000023"


def test_hugging_face_splits_columns_and_refusals(datasets: Any, rows: Any, tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": rows, "test": rows.select(range(3))})
    splits.save_to_disk(str(tmp_path / "saved"))
    assert len(ImageSource(f"hf:{tmp_path}/saved", split="test")) == 3
    with pytest.raises(ValueError, match="split other"):
        ImageSource(f"hf:{tmp_path}/saved", split="other")
    alone = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(1), "path": None}] * 2, "label": [0, None]}, split="train"
    )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["only"])})
    alone.cast(features).save_to_disk(str(tmp_path / "alone"))
    source = ImageSource(f"hf:{tmp_path}/alone", split="train")
    assert ([source.name(index) for index in range(2)], list(source.labels)) == (["only/00000000", "00000001"], [0, -1])
    with pytest.raises(ValueError, match="split test: it was saved as the split train alone"):
        ImageSource(f"hf:{tmp_path}/alone", split="test")
    two = rows.add_column("mask", rows.cast_column("image", datasets.Image(decode=False))["image"])
    two.cast_column("mask", datasets.Image()).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="several image columns, choose one: image, mask"):
        ImageSource(f"hf:{tmp_path}/two")
    assert len(ImageSource(f"hf:{tmp_path}/two", column="mask")) == 24
    with pytest.raises(ValueError, match="label is no image column"):
        ImageSource(f"hf:{tmp_path}/two", column="label")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"no image column \(columns: text\)"):
        ImageSource(f"hf:{tmp_path}/text")
    with pytest.raises(ValueError, match="nobody/nothing"):
        ImageSource("hf:nobody/nothing")


def test_a_broken_row_is_named(datasets: Any, tmp_path: Path) -> None:
    images = [{"bytes": png(1), "path": None}, {"bytes": b"no image", "path": None}, None]
    features = datasets.Features({"photo": datasets.Image()})
    datasets.Dataset.from_dict({"photo": images}, features=features).save_to_disk(str(tmp_path / "rows"))
    source = ImageSource(f"hf:{tmp_path}/rows")
    assert source.load(0).getpixel((0, 0)) == (1, 254, 0)
    for index in (1, 2):
        with pytest.raises(ImageError, match=f"^0000000{index}: "):
            source.load(index)
    with pytest.raises(ValueError, match="has no column of classes"):
        _ = source.labels


def test_one_of_several_columns_of_images_and_of_classes_can_be_chosen(datasets: Any, tmp_path: Path) -> None:
    names = {"fine": ["oak", "rose"], "coarse": ["tree", "flower"]}
    columns: dict[str, Any] = {name: datasets.ClassLabel(names=classes) for name, classes in names.items()}
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), **columns})
    images = {side: [{"bytes": png(shade), "path": None}] for side, shade in (("left", 1), ("right", 2))}
    path = str(tmp_path / "rows")
    datasets.Dataset.from_dict({**images, "fine": [1], "coarse": [0]}, features=features).save_to_disk(path)
    with pytest.raises(ValueError, match="several image columns, choose one: left, right"):
        ImageSource(f"hf:{path}")
    with pytest.raises(ValueError, match="several columns of classes, choose one: fine, coarse"):
        _ = ImageSource(f"hf:{path}", column="left").labels
    with pytest.raises(ValueError, match="size is no column of classes; these are: fine, coarse"):
        ImageSource(f"hf:{path}", column="left", label_column="size")
    source = ImageSource(f"hf:{path}", column="right", label_column="coarse")
    assert (source.classes, source.labels, source.load(0).getpixel((0, 0))[:2]) == (["tree", "flower"], [0], (2, 253))


def test_evaluations_take_splits_and_columns_of_a_data_set(datasets: Any, tmp_path: Path) -> None:
    columns: dict[str, Any] = {name: datasets.ClassLabel(names=["a", "b"]) for name in ("coarse", "fine")}
    features = datasets.Features({"left": datasets.Image(), "right": datasets.Image(), **columns})
    splits = {}
    for split, shades in (("fit", (1, 2)), ("judge", (3, 4))):
        images = {
            side: [{"bytes": png(s + plus), "path": None} for s in shades]
            for side, plus in (("left", 0), ("right", 100))
        }
        rows = {**images, "coarse": [0, 0], "fine": [0, 1]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "rows"))
    place = f"hf:{tmp_path}/rows"
    chosen = Options(models=("pixels:4",), train=place, test=place, train_split="fit", test_split="judge")
    sources = open_sources(dataclasses.replace(chosen, column="right", label_column="fine"))
    seen = {split: (source.labels, source.load(0).getpixel((0, 0))[0]) for split, source in sources.items()}
    assert seen == {"train": ([0, 1], 101), "test": ([0, 1], 103)}
    with pytest.raises(ValueError, match="choose one: left, right"):
        open_sources(chosen)


def test_classes_whose_names_differ_by_case_or_zeros_alone_have_one_order() -> None:
    """A set gives them in another order in another process."""
    for names in itertools.permutations(("1", "01", "Crane", "crane")):
        assert number_classes(list(names))[0] == ["01", "1", "Crane", "crane"]


def test_labels_of_a_tar_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{number}.{suffix}", data) for number in range(3) for suffix, data in (("cls", b"2"), ("png", png(1)))]
    reader, read = ImageSource(write_tar(tmp_path / "some.tar", members)).reader, []
    assert isinstance(reader, TarReader)
    monkeypatch.setattr(reader, "_read", lambda *place: read.append(place) or b"2")
    assert (reader.labels, reader.classes, reader.labels) == ([2, 2, 2], ["0", "1", "2"], [2, 2, 2])
    assert len(read) == 3


# --- Hugging Face, streamed ---


@pytest.fixture
def colours(datasets: Any, tmp_path: Path) -> str:
    """Sixteen shards of eight images, each of its own colour, which names it."""
    for shard in range(16):
        write_tar(tmp_path / f"c-{shard:02d}.tar", [(f"{i}.png", png(8 * shard + i)) for i in range(8)])
    return f"hf-stream:webdataset:{tmp_path}/c-{{00..15}}.tar"


def batches(spec: str, steps: range, *, workers: int = 0, epoch: int | None = 128, **options: Any) -> list[Batch]:
    source = ImageStream(spec, epoch_images=epoch)
    options = {"seed": 0, "batch_size": 8, "buffer": 6, **options}
    return list(create_stream_loader(StreamViews(source, (8, 8), (0.5, 1), steps=steps, **options), workers=workers))


def seen(run: list[Batch]) -> list[int]:
    return [int(view[0, 0, 0]) for batch in run for view in batch.images]


def test_every_image_of_a_stream_is_seen_once_an_epoch(colours: str) -> None:
    order = seen(batches(colours, range(32)))
    assert sorted(order[:128]) == sorted(order[128:]) == list(range(128))
    assert order[:128] != order[128:]
    assert seen(batches(colours, range(16), seed=1)) != order[:128]


def test_two_processes_streams_join_to_a_partition(colours: str) -> None:
    first, second = (seen(batches(colours, range(16), rank=rank, world_size=2)) for rank in (0, 1))
    assert len(first) == len(second) == 64
    assert sorted(first + second) == list(range(128))


@pytest.mark.parametrize("epoch", [100, 30, None])
def test_a_stream_goes_on_exactly_and_workers_change_nothing(colours: str, epoch: int | None) -> None:
    straight = [batch.images for batch in batches(colours, range(21), epoch=epoch)]
    for start, workers in ((3, 0), (17, 3)):
        late = [batch.images for batch in batches(colours, range(start, 21), epoch=epoch, workers=workers)]
        assert len(late) == 21 - start
        assert all(map(torch.equal, late, straight[start:])), (start, workers)


def test_without_a_size_a_stream_is_passed_over_and_over(colours: str) -> None:
    order = seen(batches(colours, range(32), epoch=None))
    assert sorted(order) == sorted([*range(128), *range(128)])


def test_fewer_shards_than_processes_are_shared_image_by_image(datasets: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "one.tar", [(f"{i}.png", png(i)) for i in range(24)])
    shares = [
        seen(batches(f"hf-stream:webdataset:{path}", range(4), epoch=24, batch_size=6, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert [sorted(share) for share in shares] == [list(range(rank, 24, 3)) for rank in range(3)]


def test_parquet_and_folders_stream_too(rows: Any, photos: Path, tmp_path: Path) -> None:
    rows.to_parquet(str(tmp_path / "train.parquet"))
    for spec in (f"parquet:{tmp_path}/train.parquet", f"imagefolder:{photos}"):
        images = ImageStream(f"hf-stream:{spec}").preview(100)
        assert Counter(image.tobytes() for image in images) == pixels(photos), spec


def test_a_broken_image_of_a_stream_is_named_and_replaced_at_its_place(datasets: Any, tmp_path: Path) -> None:
    data = {3: b"no image", 7: b"", 8: b"neither"}
    path = write_tar(tmp_path / "some.tar", [(f"{i:02d}.png", data.get(i) or png(i)) for i in range(24) if i != 7])
    spec = f"hf-stream:webdataset:{path}"
    straight = batches(spec, range(4), epoch=None, batch_size=6, buffer=1)
    assert seen(straight) == [i if i not in (3, 8) else i + 1 for i in range(24) if i != 7] + [0]
    assert [batch.broken for batch in straight] == [
        ["shard 0, row 3 (03.png): not an image"], ["shard 0, row 7 (08.png): not an image"], [], []
    ]  # fmt: skip
    late = batches(spec, range(1, 4), epoch=None, batch_size=6, buffer=1)
    assert all(
        torch.equal(a.images, b.images) and a.broken == b.broken for a, b in zip(late, straight[1:], strict=True)
    )


def test_a_stream_of_rubbish_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_BROKEN_RUN", 5)
    with pytest.raises(ImageError, match="4: as the 4 images before it"):
        list(stand_ins((str(number), b"rubbish") for number in range(100)))
    ends = list(stand_ins([("good", png(7)), ("bad", b"rubbish")]))
    assert [broken for _, broken in ends] == [[]], "nothing comes after it to stand in"


def test_streams_that_cannot_work_are_refused(colours: str) -> None:
    with pytest.raises(ValueError, match="cannot be shared equally by 3"):
        batches(colours, range(1), world_size=3)
    with pytest.raises(ValueError, match="--data webdataset:nowhere"):
        ImageStream("hf-stream:webdataset:nowhere/*.tar")
    assert hub.image_bytes(None) == b""


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", ["size", "record"])
def test_a_damaged_tar_does_not_lead_in_a_circle(tmp_path: Path, damage: str) -> None:
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": "-1024"}
    data = bytearray(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    if damage == "record":
        data[512:514] = b"0 "  # its own length, after the 512 bytes of its header
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(TarError, match="damaged"):
        read_index(tmp_path / "a.tar")


def test_a_file_that_vanished_is_a_broken_image_of_a_stream(datasets: Any, photos: Path, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes((photos / "class0" / "00.png").read_bytes())
    source = ImageStream(f"hf-stream:imagefolder:{tmp_path}", epoch_images=4)
    (tmp_path / "2.png").unlink()
    [batch] = StreamViews(source, (32, 32), (0.2, 1.0), 0, batch_size=4, steps=range(1), buffer=2)
    [name] = batch.broken
    assert "2.png" in name


def test_loader_processes_leave_signals_to_the_training_process(datasets: Any, colours: str, photos: Path) -> None:
    views = RandomViews(ImageSource(photos), (32, 32), (0.2, 1.0), seed=0)
    streamed_views = StreamViews(ImageStream(colours), (8, 8), (1.0, 1.0), 0, batch_size=4, steps=range(2))
    loader: Any = create_loader(views, DeterministicBatchSampler(24, 4, range(2), 0), workers=1)
    streamed: Any = create_stream_loader(streamed_views, workers=1)
    assert loader.worker_init_fn is streamed.worker_init_fn is ignore_in_workers


# --- compressed tars and idx files -----------------------------------------------------------------------------------


def test_a_compressed_tar_holds_the_folders_images(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(photos, "photos")
    source = ImageSource(path)
    assert loaded(source) == loaded(ImageSource(photos))
    assert source.classes == ["class0", "class1", "class2"]
    assert (
        sum(
            len(batch.images)
            for batch in create_loader(
                RandomViews(source, (16, 16), (0.2, 1.0), 0), DeterministicBatchSampler(24, 8, range(3), 0), workers=1
            )
        )
        == 24
    )
    copy = source.reader.tars[0]  # type: ignore[attr-defined]
    assert copy.exists()
    del source
    assert not copy.exists()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TarError, match="does not unpack"):
        ImageSource(path)


def idx(dimensions: tuple[int, ...], content: bytes) -> bytes:
    return bytes([0, 0, 8, len(dimensions)]) + b"".join(n.to_bytes(4, "big") for n in dimensions) + content


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_grey_images_with_labels(compressed: bool, tmp_path: Path) -> None:
    images, labels = idx((3, 2, 4), bytes(range(24))), idx((3,), bytes([2, 0, 1]))
    ending = ".gz" if compressed else ""
    for name, data in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(data) if compressed else data)
    source = ImageSource(tmp_path / f"train-images-idx3-ubyte{ending}")
    assert (len(source), source.labels, source.classes) == (3, [2, 0, 1], ["0", "1", "2"])
    image = source.load(1)
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.tobytes()[::3] == bytes(range(8, 16))


def test_wrong_idx_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx((3, 2, 4), bytes(24)))
    with pytest.raises(FileNotFoundError, match="labels of train-images-idx3-ubyte are missing"):
        ImageSource(path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx((2,), bytes(2)))
    with pytest.raises(ValueError, match="do not belong together"):
        ImageSource(path)
    path.write_bytes(idx((3, 2, 4), bytes(23)))
    with pytest.raises(ValueError, match="or damaged"):
        ImageSource(path)
