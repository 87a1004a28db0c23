"""Opening and finding images; expected pixels come from NumPy, not from the functions under test."""

import errno
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

from perceptual_mae_models.images import ImageError, find_images, grey_to_8_bit, image_name, open_image, printable

HEIGHT, WIDTH = 24, 36


@pytest.fixture
def photo() -> np.ndarray:
    """Smooth, coloured and without any symmetry, (H, W, 3) uint8."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [5 * x + 2 * y, 200 - 4 * x + y, 9 * y]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def grey(photo: np.ndarray) -> np.ndarray:
    return photo[..., 0]


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def pixels(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def save_png_16(path: Path, values: np.ndarray) -> None:
    """Writes a 16-bit RGB PNG, which Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


# What a camera stores, from what one should see.
STORED = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, photo: np.ndarray, orientation: int, suffix: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](photo)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"rotated{suffix}"
    stored.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    if suffix == ".jpg":
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.abs(expected.astype(int) - photo).mean() < 8
    else:
        expected = photo
    np.testing.assert_array_equal(pixels(path), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels(image), expected)
    # Opening the opened: nothing is turned twice.
    np.testing.assert_array_equal(pixels(open_image(path)), expected)


def test_broken_exif_leaves_the_image_as_stored(tmp_path: Path, photo: np.ndarray) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path, exif=b"Exif\0\0junk, not a TIFF header")
    np.testing.assert_array_equal(pixels(path), photo)


def test_grey_and_one_bit(tmp_path: Path, grey: np.ndarray) -> None:
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), rgb(grey))
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png"), rgb(np.where(grey > 100, 255, 0)))


def test_transparency_is_composited_on_white(tmp_path: Path, photo: np.ndarray, grey: np.ndarray) -> None:
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
    weight = alpha[..., None] / 255
    on_white = photo * weight + 255 * (1 - weight)
    rgba = np.dstack([photo, alpha])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    assert np.abs(pixels(tmp_path / "rgba.png") - on_white).max() <= 1
    assert np.abs(pixels(tmp_path / "la.png") - (rgb(grey) * weight + 255 * (1 - weight))).max() <= 1
    np.testing.assert_array_equal(pixels(rgba), pixels(tmp_path / "rgba.png"))
    assert np.abs(pixels(Image.fromarray(rgba).convert("RGBa")).astype(int) - pixels(rgba)).max() <= 1


def test_palettes(tmp_path: Path, photo: np.ndarray) -> None:
    palette = Image.fromarray(photo).quantize(32)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "plain.gif")
    np.testing.assert_array_equal(pixels(tmp_path / "plain.png"), colours)
    np.testing.assert_array_equal(pixels(tmp_path / "plain.gif"), colours)

    clear = int(np.asarray(palette)[0, 0])
    holed = np.where(np.asarray(palette)[..., None] == clear, 255, colours)
    palette.save(tmp_path / "index.png", transparency=clear)
    palette.save(tmp_path / "bytes.png", transparency=bytes(0 if index == clear else 255 for index in range(32)))
    np.testing.assert_array_equal(pixels(tmp_path / "index.png"), holed)
    np.testing.assert_array_equal(pixels(tmp_path / "bytes.png"), holed)

    Image.fromarray(photo).save(tmp_path / "key.png", transparency=tuple(map(int, photo[3, 5])))
    keyed = np.where((photo == photo[3, 5]).all(-1, keepdims=True), 255, photo)
    np.testing.assert_array_equal(pixels(tmp_path / "key.png"), keyed)


def test_cmyk(tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.tiff")
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    np.testing.assert_array_equal(pixels(tmp_path / "cmyk.tiff"), photo)
    assert np.abs(pixels(tmp_path / "cmyk.jpg").astype(int) - photo).mean() < 4


def test_sixteen_bits_look_like_eight(tmp_path: Path, photo: np.ndarray, grey: np.ndarray) -> None:
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes()).save(tmp_path / "big_endian.tiff")
    save_png_16(tmp_path / "deep_rgb.png", photo.astype(np.uint16) * 257)
    for name in ("deep.png", "deep.tiff", "big_endian.tiff"):
        np.testing.assert_array_equal(pixels(tmp_path / name), rgb(grey), err_msg=name)
    np.testing.assert_array_equal(pixels(tmp_path / "deep_rgb.png"), photo)
    # A dark 16-bit image stays dark.
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "dark.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "dark.pgm")
    assert (tmp_path / "dark.pgm").read_bytes().split()[3] == b"65535"
    for name in ("dark.png", "dark.pgm"):
        with pytest.warns(UserWarning, match=rf"no value above {grey.max()} .*stretch them first"):
            assert pixels(tmp_path / name).max() <= 1, name
    with pytest.warns(UserWarning, match="no value above 4095"):
        assert open_image(np.full((4, 4), 4095, np.uint16)).getpixel((0, 0)) == (16, 16, 16)


def test_large_images_need_little_more_memory_than_their_values() -> None:
    deep = np.arange(65536, dtype=np.uint16).repeat(64).reshape(-1, 2048)  # every value, in several blocks
    np.testing.assert_array_equal(grey_to_8_bit(deep, sixteen_bit=True), np.rint(deep / 257))
    tracemalloc.start()
    grey_to_8_bit(deep, sixteen_bit=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # 34 MB as floats, in three copies


@pytest.mark.parametrize("name", ["cat.jpg", "cat.eps"])
def test_postscript_is_not_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / name, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("ran Ghostscript"))
    with pytest.raises(ImageError, match="PostScript"):
        open_image(tmp_path / name)


def test_postscript_inside_another_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def field(number: int, dataset: int, content: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, number, dataset, len(content)) + content

    postscript = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(postscript, "EPS")
    parts = field(3, 20, b"\0\x08") + field(3, 30, b"\0\x08") + field(3, 60, b"\1\0") + field(3, 120, b"\5")
    (tmp_path / "cat.jpg").write_bytes(parts + field(8, 10, postscript.getvalue()[:30000]))
    with Image.open(tmp_path / "cat.jpg") as opened:
        assert opened.format == "IPTC"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("ran Ghostscript"))
    with pytest.raises(ImageError, match="PostScript, or may hold it"):
        open_image(tmp_path / "cat.jpg")


def test_what_is_not_the_images_fault_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "some.png")
    for error in (OSError(errno.EIO, "I/O error"), OSError(errno.EMFILE, "Too many open files"), MemoryError()):
        for place in ("perceptual_mae_models.images.Image.open", "PIL.ImageFile.ImageFile.load"):
            with monkeypatch.context() as patched:
                patched.setattr(place, Mock(side_effect=error))
                with pytest.raises(type(error)) as caught:
                    open_image(tmp_path / "some.png")
                assert caught.value is error
    with monkeypatch.context() as patched:  # a file that goes while it is being opened
        patched.setattr("perceptual_mae_models.images.Image.open", Mock(side_effect=UnidentifiedImageError))
        with pytest.raises(ImageError, match="no such file"):
            open_image(tmp_path / "gone.png")


def test_floats_of_the_portable_kind_are_floats(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "half.pfm")
    assert open_image(tmp_path / "half.pfm").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_among_images_are_not_waited_for(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "some.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert [path.name for path in find_images([tmp_path])] == ["some.png"]


def test_names_for_terminals() -> None:
    assert printable("a b-é.jpg") == "a b-é.jpg"
    assert printable("a\n\x1b[2J\udce9.jpg") == "a\ufffd\ufffd[2J\ufffd.jpg"


def test_sixteen_bit_negatives_are_turned(tmp_path: Path, grey: np.ndarray) -> None:
    Image.fromarray((255 - grey).astype(np.uint16) * 257).save(tmp_path / "negative.tiff")
    stored = (tmp_path / "negative.tiff").read_bytes()
    entry = struct.pack("<HHI", ExifTags.Base.PhotometricInterpretation, 3, 1)
    assert stored.count(entry) == 1
    place = stored.index(entry) + len(entry)
    (tmp_path / "negative.tiff").write_bytes(stored[:place] + b"\0\0" + stored[place + 2 :])  # white is zero
    np.testing.assert_array_equal(pixels(tmp_path / "negative.tiff"), rgb(grey))


def test_integer_and_float_files(tmp_path: Path, grey: np.ndarray) -> None:
    scales = {"unit": (grey / 255).astype("f4"), "eight": grey.astype("f4"), "sixteen": grey.astype("i4") * 257}
    for name, values in scales.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        assert np.abs(pixels(tmp_path / f"{name}.tiff").astype(int) - rgb(grey)).max() <= 1, name
    stretched = grey_to_8_bit(grey.astype("f4") * 1e6 - 7e7)
    assert stretched.min() == 0
    assert stretched.max() == 255
    assert np.corrcoef(stretched.ravel(), grey.ravel())[0, 1] > 0.9999
    np.testing.assert_array_equal(grey_to_8_bit(np.full((2, 2), -5)), 0)

    Image.fromarray(np.full((4, 4), np.nan, "f4")).save(tmp_path / "nan.tiff")
    with pytest.raises(ImageError, match=r"nan\.tiff: .*NaN"):
        open_image(tmp_path / "nan.tiff")


def test_animation_gives_its_first_frame(tmp_path: Path, photo: np.ndarray) -> None:
    frames = [Image.fromarray(photo).quantize(64), Image.fromarray(255 - photo).quantize(64)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(tmp_path / "moving.gif"), np.asarray(frames[0].convert("RGB")))


def test_arrays(photo: np.ndarray, grey: np.ndarray) -> None:
    for same in (
        photo,
        photo / 255,
        (photo / 255).astype("f2"),
        photo.astype(np.uint16) * 257,
        np.asfortranarray(photo),
    ):
        np.testing.assert_array_equal(pixels(same), photo)
    for same in (grey, grey[..., None], grey[..., None] / 255):
        np.testing.assert_array_equal(pixels(same), rgb(grey))
    np.testing.assert_array_equal(pixels(grey > 9), rgb(np.where(grey > 9, 255, 0)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8)), "channels come last"),
        (np.zeros((8, 8, 2)), "shape"),
        (np.zeros((0, 8, 3)), "shape"),
        (np.zeros(8), "shape"),
        (np.full((8, 8), 200.0), r"float images lie in \[0, 1\], these values in \[200, 200\]"),
        (np.full((8, 8), -0.5), "float images"),
        (np.full((8, 8), np.nan), "float images"),
        (np.zeros((8, 8), np.int64), "pixels are uint8"),
    ],
)
def test_wrong_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(array)


def test_broken_files_are_named(tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "webp", "gif"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=f"cut.{suffix}: "):
            open_image(path)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, reason in {
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "none.jpg": "no such",
        ".": "folder",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert caught.value.name == str(tmp_path / name)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"whole\.png: .*decompression bomb"):
        open_image(tmp_path / "whole.png")
    with pytest.raises(TypeError, match="not bytes"):
        open_image(b"bytes")  # type: ignore[arg-type]


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "is broken")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "is broken", "a.jpg: is broken")


def test_names(tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as image:
        assert image_name(image, 3) == image_name(tmp_path / "photo.png") == str(tmp_path / "photo.png")
    assert image_name(photo, 3) == "array #3"
    assert image_name(Image.fromarray(photo), 4) == "image #4"


def test_photographs_that_pillow_does_not_read_are_counted(tmp_path: Path) -> None:
    for name in ("1.heic", "below/2.HEIF", "below/3.jxl", ".4.heic", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ImageError, match=r"no image in it; 3 photograph\(s\) are left out, .*1\.heic: convert them"):
        find_images([tmp_path])
    Image.new("RGB", (4, 4)).save(tmp_path / "5.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"no image in it$"):  # and nothing of the other folder's
        find_images([tmp_path, tmp_path / "empty"])
    with pytest.warns(UserWarning, match=r"^3 photograph\(s\) are left out"):
        assert find_images([tmp_path]) == [tmp_path / "5.jpg"]
    with pytest.warns(UserWarning, match=r"^3 photograph\(s\) are left out"):
        assert find_images([f"{tmp_path}/*"]) == [tmp_path / "5.jpg"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_images([tmp_path / "1.heic", tmp_path / "5.jpg"])[0] == tmp_path / "1.heic"


def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "b/2.JPG",
        "b/1.png",
        "a/x.webp",
        "a/notes.txt",
        "a/.hidden.png",
        ".git/z.png",
        "10.png",
        "named.dat",
        "[1].png",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)

    def found(*paths: str) -> list[str]:
        return [path.as_posix() for path in find_images(paths)]

    assert found(".") == ["10.png", "[1].png", "a/x.webp", "b/1.png", "b/2.JPG"]
    assert found("b", "a") == ["b/1.png", "b/2.JPG", "a/x.webp"]
    assert found("b/2.JPG", "b", str(tmp_path / "b/1.png")) == ["b/2.JPG", "b/1.png"]
    assert found("named.dat") == ["named.dat"]
    assert found("[1].png") == ["[1].png"]
    assert found("*.png") == ["10.png", "[1].png"]
    assert found("?") == ["a/x.webp", "b/1.png", "b/2.JPG"]
    assert found("**/*.png", "a/*") == ["10.png", "[1].png", "b/1.png", "a/x.webp"]
    (tmp_path / "void").mkdir()
    for path, reason in {"void": "no image", "nowhere": "no such", "*.bmp": "no such", "a/*.txt": "no image"}.items():
        with pytest.raises(ImageError, match=reason) as caught:
            find_images(["b", path])
        assert caught.value.name == path


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/1.png").touch()
    (tmp_path / "real/2.png").symlink_to("1.png")
    (tmp_path / "real/loop").symlink_to("..")
    (tmp_path / "link").symlink_to("real")
    assert [path.name for path in find_images([tmp_path / "link"])] == ["1.png", "2.png"]
    (tmp_path / "real/again").symlink_to(".")
    (tmp_path / "real/.hidden").mkdir()
    (tmp_path / "real/.hidden/3.png").touch()
    for pattern in ("**/*.png", "real/**", "r*/**/*.png", "real/**/"):
        found = find_images([tmp_path / pattern])
        assert [str(path.relative_to(tmp_path)) for path in found] == ["real/1.png", "real/2.png"], pattern
    (hidden,) = find_images([tmp_path / "**/.hidden/*.png"])
    assert hidden.name == "3.png"
