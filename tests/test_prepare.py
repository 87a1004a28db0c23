"""Prepared images are the source's, smaller; whatever happens in between, the end is the same."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest
import tyro
from PIL import Image

from training import prepare
from training.data.images import ImageSource
from training.prepare import main, target_names


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def manifest(root: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((root / "prepare.json").read_text())
    return loaded


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_a_folder_keeps_its_classes_and_gets_the_short_side(photos: Path, tmp_path: Path) -> None:
    before = tree(photos)
    main(str(photos), tmp_path / "small", short_side=40, workers=2)
    assert tree(photos) == before
    source, small = ImageSource(photos), ImageSource(tmp_path / "small")
    assert (small.classes, small.labels) == (source.classes, source.labels)
    for index in range(24):
        assert small.name(index) == source.name(index).replace(".png", ".jpg")
        assert small.load(index).size == (48, 40)
        expected = jpeg(source.load(index).resize((48, 40), Image.Resampling.BICUBIC), quality=95)
        assert small.reader.read(index) == expected
    assert manifest(tmp_path / "small")["written"] == 24


def test_nothing_is_enlarged_and_plain_jpegs_are_copied(photos: Path, tmp_path: Path) -> None:
    image = Image.open(photos / "class0" / "00.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    source = tmp_path / "source"
    source.mkdir()
    (source / "plain.jpg").write_bytes(plain := jpeg(image, quality=60))
    (source / "turned.jpg").write_bytes(jpeg(image, exif=turned))
    (source / "grey.jpg").write_bytes(jpeg(image.convert("L")))
    image.resize((97, 200)).save(source / "high.png")
    main(str(source), tmp_path / "out", short_side=90, quality=90, workers=0)
    assert (tmp_path / "out" / "plain.jpg").read_bytes() == plain
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").glob("*.jpg")}
    assert sizes == {"plain.jpg": (96, 80), "turned.jpg": (80, 96), "grey.jpg": (96, 80), "high.jpg": (90, 186)}
    assert {Image.open(path).mode for path in (tmp_path / "out").glob("*.jpg")} == {"RGB"}
    assert "exif" not in Image.open(tmp_path / "out" / "turned.jpg").info


def test_squashed_images_are_squares(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "square"
    main(str(photos), out, short_side=40, squash=True, workers=0)
    source, small = ImageSource(photos), ImageSource(out)
    expected = jpeg(source.load(5).resize((40, 40), Image.Resampling.BICUBIC), quality=95)
    assert small.reader.read(5) == expected
    main(str(photos), tmp_path / "large", short_side=400, squash=True, workers=0)
    assert ImageSource(tmp_path / "large").load(5).size == (80, 80), "nothing is enlarged"
    with pytest.raises(SystemExit, match="begun with other squash"):
        main(str(photos), out, short_side=40, workers=0)


def test_names_never_collide_or_lead_out() -> None:
    names = ["a/x.png", "a/x.jpg", "a/X.PNG", "b/x.png", "a/x-2.png", "/etc/x.png", "../../x.png", "a/v1.2.png"]
    targets = target_names(names)
    assert targets == [
        *("a/x.jpg", "a/x-2.jpg", "a/X-3.jpg", "b/x.jpg", "a/x-2-2.jpg", "etc/x.jpg", "x.jpg", "a/v1_2.jpg")
    ]


@pytest.mark.parametrize("options", [{"shards": 3}, {"images_per_shard": 10}])
def test_shards_hold_what_the_folder_holds(photos: Path, tmp_path: Path, options: dict[str, int]) -> None:
    main(str(photos), tmp_path / "folder", short_side=32, workers=0)
    main(str(photos), tmp_path / "shards", short_side=32, workers=2, **options)
    tars = sorted(path.name for path in (tmp_path / "shards").glob("*.tar"))
    assert tars == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]
    folder, shards = ImageSource(tmp_path / "folder"), ImageSource(tmp_path / "shards")
    assert folder.classes == shards.classes
    inside = {shards.name(i).split("/", 1)[1]: (shards.reader.read(i), shards.labels[i]) for i in range(24)}
    assert inside == {folder.name(i): (folder.reader.read(i), folder.labels[i]) for i in range(24)}
    for tar in tars:
        labels = [shards.labels[i] for i in range(24) if shards.name(i).startswith(tar)]
        assert len(labels) == 8
        assert set(labels) == {0, 1, 2}, "images of a class are spread over the shards"


def killed_in_the_eleventh_image(src: str, dst: Path, short_side: int, shards: int | None) -> None:
    original, calls = prepare.resize_to_jpeg, itertools.count(1)

    def deadly(data: bytes, name: str, *settings: int, **options: bool) -> bytes:
        if next(calls) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(data, name, *settings, **options)

    prepare.resize_to_jpeg = deadly
    main(src, dst, short_side=short_side, shards=shards, workers=0)


@pytest.mark.parametrize("shards", [None, 3])
def test_an_interrupted_run_goes_on_to_the_same_files(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int | None
) -> None:
    main(str(photos), tmp_path / "whole", short_side=32, shards=shards, workers=0)
    arguments = (str(photos), tmp_path / "killed", 32, shards)
    process = multiprocessing.get_context("fork").Process(target=killed_in_the_eleventh_image, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert manifest(tmp_path / "killed")["complete"] is False
    done = {path for path in tree(tmp_path / "killed") if path.endswith((".jpg", ".tar"))}
    assert len(done) == (1 if shards else 10)
    resized = []
    original = prepare.resize_to_jpeg

    def counted(data: bytes, name: str, *settings: int, **options: bool) -> bytes:
        resized.append(name)
        return original(data, name, *settings, **options)

    monkeypatch.setattr(prepare, "resize_to_jpeg", counted)
    main(str(photos), tmp_path / "killed", short_side=32, shards=shards, workers=0)
    assert len(resized) == (16 if shards else 14)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


@pytest.mark.parametrize("shards", [None, 2])
def test_broken_images_are_counted_and_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int | None
) -> None:
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    for number in range(4):
        (source / "a" / f"{number}.png").write_bytes((photos / "class0" / "00.png").read_bytes())
    (source / "a" / "2.png").write_bytes(b"no image")
    for _ in range(2):  # the second run has nothing left to do, and says the same
        main(str(source), tmp_path / "out", short_side=32, shards=shards, workers=0)
        assert "3 images in" in capsys.readouterr().out
        assert manifest(tmp_path / "out")["broken"] == ["a/2.png: not an image"]
    assert len(ImageSource(tmp_path / "out")) == 3


def test_labels_beside_the_images_become_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for number, label in enumerate((1, 0)):
            data = jpeg(Image.new("RGB", (8, 8), (number, 0, 0)))
            for name, content in ((f"{number}.jpg", data), (f"{number}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    main(str(tmp_path / "some.tar"), tmp_path / "out", short_side=8, workers=0)
    assert set(tree(tmp_path / "out")) == {"1/0.jpg", "0/1.jpg", "prepare.json"}


def test_what_would_do_harm_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lies in"):
        main(str(photos), photos / "class0" / "small", short_side=32)
    with pytest.raises(SystemExit, match="lies in"):
        main(str(photos), photos, short_side=32)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not empty and not from prepare"):
        main(str(photos), tmp_path, short_side=32)
    main(str(photos), tmp_path / "out", short_side=32, workers=0)
    with pytest.raises(SystemExit, match="begun with other short_side, quality"):
        main(str(photos), tmp_path / "out", short_side=40, quality=90)
    with pytest.raises(SystemExit, match="not both"):
        main(str(photos), tmp_path / "both", short_side=32, shards=1, images_per_shard=1)
    with pytest.raises(SystemExit, match="at least 1"):
        main(str(photos), tmp_path / "both", short_side=0)
    with pytest.raises(SystemExit, match="no such folder"):
        main(str(tmp_path / "nowhere"), tmp_path / "both", short_side=32)
    with pytest.raises(SystemExit, match="--workers at least 0"):
        main(str(photos), tmp_path / "both", short_side=32, workers=-2)
    with pytest.raises(SystemExit, match=r"prepare\.py: .*mine\.txt"):
        main(str(photos), tmp_path / "mine.txt", short_side=32)


def test_the_command_line(photos: Path, tmp_path: Path) -> None:
    arguments = [str(photos), str(tmp_path / "out"), "--short-side", "32", "--shards", "2", "--workers", "1"]
    tyro.cli(main, args=arguments)
    assert len(ImageSource(tmp_path / "out")) == 24
