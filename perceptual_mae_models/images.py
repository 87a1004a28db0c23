"""Finding image files, and opening any image once and right.

Everything that enters a network here starts as an upright 8-bit RGB `PIL.Image`, whether it came from a file, from
Pillow or from an array, so that the three give the same features.
"""

import errno
import glob
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

ImageInput: TypeAlias = str | Path | Image.Image | NDArray[Any]

# What a folder or a glob contributes; a file that is named outright is opened whatever its suffix.
IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("avif", "bmp", "dib", "gif", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
# Photographs all the same, which Pillow does not read by itself.
UNREAD_SUFFIXES = frozenset((".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"))

# Float arrays that were resampled overshoot [0, 1] by a hair; more than this is a wrong value range.
FLOAT_TOLERANCE = 1e-3

# EXIF orientation -> what turns the stored pixels upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


OF_STORAGE = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EMFILE", "ENFILE", "ENOMEM")
    if hasattr(errno, name)
}
"""Errors of which another image in the place of this one would be no mending."""


class ImageError(ValueError):
    """An image that cannot be found, opened or understood.

    Attributes:
        name: The file, or a description of the array or Pillow image.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_image(image: ImageInput) -> Image.Image:
    """Opens an image as upright 8-bit RGB.

    - EXIF (or XMP) orientation is applied.
    - Grey, palette, CMYK and 1-bit images are converted; transparency of any kind is composited on **white**.
    - 16-bit values are divided by 257, so that a 16-bit photograph looks like its 8-bit copy; a warning says so of an
      image that uses no more than 12 bits of them. 32-bit integer and float files carry no value range of their own:
      see `grey_to_8_bit`.
    - Of an animation, the first frame; of a Pillow image, the frame it stands at.
    - PostScript is refused, and what may hold it: Pillow would have Ghostscript run it.

    Args:
        image: A path, a Pillow image (left as it is), or an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)
            holding uint8, uint16, bool, or floats in [0, 1]; four channels are RGBA.

    Returns:
        A new image of mode RGB without metadata. Opening it again changes nothing.

    Raises:
        ImageError: The file is missing, broken, truncated or a decompression bomb; or the array has another shape,
            dtype or value range. The message names the file.
        OSError: The storage fails, or files cannot be opened any more: that is no fault of this file (`OF_STORAGE`).
        MemoryError: There is not enough for it.
        TypeError: `image` is of none of these types.
    """
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image))
    if isinstance(image, Image.Image):
        return _decode(image, image_name(image))
    if not isinstance(image, str | Path):
        hint = ": FeatureExtractor.encode takes transformed pixels" if type(image).__name__ == "Tensor" else ""
        raise TypeError(f"an image is a path, a PIL.Image or a NumPy array, not {type(image).__name__}{hint}")

    name = str(image)
    try:
        opened = Image.open(image)
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except IsADirectoryError:
        raise ImageError(name, "is a folder: find_images lists what is in it") from None
    except UnidentifiedImageError:
        raise ImageError(name, _unidentified(image)) from None
    # Decoders fail on hostile bytes with whatever their parsers stumble over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise_others(error)
        raise ImageError(name, _reason(error)) from error
    with opened:
        return _decode(opened, name)


def image_name(image: ImageInput, index: int | None = None) -> str:
    """Names an image in messages and output files: its path if it has one, else its kind and place in the list."""
    if isinstance(image, str | Path):
        return str(image)
    filename = getattr(image, "filename", "")
    if filename:
        return os.fspath(filename)
    kind = "array" if isinstance(image, np.ndarray) else "image"
    return kind if index is None else f"{kind} #{index}"


def grey_to_8_bit(values: NDArray[Any], sixteen_bit: bool = False) -> NDArray[np.uint8]:
    """Brings grey values of unknown range to 8 bits.

    The full scale is the first of 1 (floats only), 255 and 65535 that holds every value; negative or larger values are
    stretched from their own minimum to their own maximum.

    Args:
        values: (H, W), integers or floats.
        sixteen_bit: The format says that the full scale is 65535, whatever values occur.

    Returns:
        (H, W) in 0..255.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    scales = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if sixteen_bit:
        _warn_of_few_bits(high)
        low, high = 0, 65535
    elif low >= 0 and high <= 65535:
        low, high = 0, next(scale for scale in scales if high <= scale)
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // values.shape[1])  # of large images at once, the floats would take gigabytes
    for first in range(0, len(values), rows):
        block = values[first : first + rows].astype(np.float64)
        grey[first : first + rows] = np.rint((block - low) * (255 / ((high - low) or 1.0)))
    return grey


def _warn_of_few_bits(high: float) -> None:
    """Says that values of 12 bits in 16 come out almost black; once a process, as warnings are."""
    if 0 < high < 4096:
        warnings.warn(
            f"a 16-bit image with no value above {high:g} is read on the full scale, 0 to 65535, and comes out almost"
            " black: if its values have fewer bits, stretch them first (such images are not named again)",
            stacklevel=2,
        )


def printable(name: str) -> str:
    """A name for terminals, pictures and pages: control characters and bytes that are not UTF-8 become U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Lists image files.

    Args:
        paths: Files (taken whatever their suffix), folders (searched recursively for `IMAGE_SUFFIXES`; hidden entries
            are left out and links to folders are not followed) and glob patterns; `**` is as a folder is.

    Returns:
        The files in the order of `paths`, sorted within each; a file reached twice is kept where it came first. A
        warning counts photographs of formats that Pillow does not read (HEIC, JPEG XL, raw ones).

    Raises:
        ImageError: An entry does not exist or holds no image.
    """
    found: dict[str, Path] = {}
    left_out: list[Path] = []
    for entry in map(str, paths):
        unread: list[Path] = []
        if os.path.lexists(entry):
            matches = _expand(Path(entry), unread, named=True)
        else:
            matched = sorted(_match(entry))
            if not matched:
                raise ImageError(entry, "no such file or folder, and no file matches it as a pattern")
            matches = [file for match in matched for file in _expand(match, unread, named=False)]
        if not matches:
            raise ImageError(entry, "no image in it" + (f"; {_left_out(unread)}" if unread else ""))
        for file in matches:
            # Not Path.resolve: links to one file under several names are several images.
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100
        left_out += unread
    warn_of_unread(left_out)
    return list(found.values())


def warn_of_unread(files: Sequence[str | Path]) -> None:
    """Warns of photographs that a folder holds and that are left out, if there are any."""
    if files:
        warnings.warn(_left_out(files), stacklevel=3)


def _left_out(files: Sequence[str | Path]) -> str:
    return (
        f"{len(files)} photograph(s) are left out, of formats that Pillow does not read, such as"
        f" {printable(str(files[0]))}: convert them to JPEG or PNG"
    )


def _match(pattern: str) -> Iterator[Path]:
    """Files and folders of a pattern; `**` stands for what a folder does: nothing hidden, and no link to a folder."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207  Path.glob takes no absolute patterns
        return
    first = parts.index("**")
    rest = Path(*parts[first:])
    hidden = any(part.startswith(".") for part in rest.parts)
    for root in glob.glob(str(Path(*parts[:first]))) if first else ["."]:  # noqa: PTH207
        for match in Path(root).glob(str(rest)):  # glob.glob follows links, without end where one leads upwards
            if hidden or not any(part.startswith(".") for part in match.relative_to(root).parts):
                yield match


def _expand(path: Path, unread: list[Path], named: bool) -> list[Path]:
    """The images of a file or folder; those that nothing here reads go to `unread`."""
    if not path.is_dir():
        if not named and path.suffix.lower() in UNREAD_SUFFIXES:
            unread.append(path)
        return [path] if named or path.suffix.lower() in IMAGE_SUFFIXES else []

    def unreadable(error: OSError) -> None:
        raise ImageError(str(error.filename), _reason(error))

    files = []
    for folder, subfolders, names in os.walk(path, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        unread += [file for file in visible if file.suffix.lower() in UNREAD_SUFFIXES]
        # a pipe of such a name would be waited for without end
        files += [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_fifo()]
    return sorted(files)


def refuse_programs(image: Image.Image) -> None:
    """Refuses what Pillow has another program read, whatever the file is called.

    Raises:
        ValueError: The image is PostScript, which Pillow hands to Ghostscript, or IPTC, in which that may be.
    """
    if image.format in ("EPS", "IPTC"):
        raise ValueError("is PostScript, or may hold it, which Ghostscript would run: convert it to a PNG first")


def raise_others(error: Exception) -> None:
    """Raises again what is no fault of the image that was being read: of storage, of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_STORAGE):
        raise error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        refuse_programs(image)
        # Before reading the orientation: Pillow's TIFF reader turns the image itself while loading.
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    except Exception as error:  # see open_image
        raise_others(error)
        raise ImageError(name, _reason(error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):
        return 1  # pixels are intact behind a broken EXIF block; without a word on orientation they are upright


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Older Pillow reads 16-bit PNGs as mode I; PPM is also what it calls files of floats.
        sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        values = grey_to_8_bit(np.asarray(image), sixteen_bit)
        # Of a TIFF, 0 says that white is zero; Pillow heeds it in 8 bits only.
        interpretation = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation)
        image = Image.fromarray(255 - values if interpretation == 0 else values)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = image.convert("RGB")
    rgb.info = {}  # an orientation that stays behind would be applied again by the next reader
    return rgb


def _from_array(array: NDArray[Any]) -> Image.Image:
    name = f"array of shape {array.shape}, {array.dtype}"
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        hint = "; channels come last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(name, f"an image has the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){hint}")

    if array.dtype == np.uint8:
        pixels = array
    elif array.dtype == np.uint16:
        _warn_of_few_bits(float(array.max()))
        pixels = np.rint(array / 257).astype(np.uint8)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        # Written so that NaN fails it too.
        if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
            raise ImageError(name, f"float images lie in [0, 1], these values in [{low:g}, {high:g}]")
        pixels = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    else:
        raise ImageError(name, "pixels are uint8, uint16, bool, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if array.ndim == 3 and channels == 1 else pixels))


def _unidentified(file: str | Path) -> str:
    try:
        empty = Path(file).stat().st_size == 0
    except FileNotFoundError:  # it was there when it was opened
        return "no such file"
    return "empty file" if empty else "not an image file, or of a kind that Pillow cannot read"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
