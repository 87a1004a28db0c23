"""Images from strangers: what the page opens, and what it refuses before any pixel is decoded."""

from pathlib import Path

from PIL import Image

from perceptual_mae_models.images import ImageError, open_image

MAX_BYTES = 20 * 2**20
"""Of a file."""
MAX_PIXELS = 64_000_000
"""Of an image: more than telephones take by default, 192 MB as RGB. Pillow alone would refuse at 179 million."""
MAX_ASPECT = 16
"""Longer to shorter side. Fitting the short side of a strip to the network would enlarge the other without limit."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""No others: Pillow hands EPS to Ghostscript, and reads more formats than anybody uploads."""
KEPT_SIDE = 512
"""Shorter side, in pixels, of what a session keeps."""


def open_upload(file: str | Path) -> Image.Image:
    """Opens an uploaded image as upright 8-bit RGB, see `images.open_image`.

    Returns:
        A new image of mode RGB.

    Raises:
        ImageError: The file is larger than `MAX_BYTES`, is of no format in `FORMATS`, has more than `MAX_PIXELS`
            pixels, is a strip, or is broken. The message names the file without its folder.
    """
    path = Path(file)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(path.name, f"{size / 2**20:.0f} MB; files have at most {MAX_BYTES // 2**20} MB here")
        with _open(path) as opened:
            _check_size(path, *opened.size)
            image = open_image(opened)
        _check_size(path, *image.size)  # some files say one thing and hold another
        return image
    except ImageError as error:
        raise ImageError(path.name, error.reason) from error
    except OSError as error:
        raise ImageError(path.name, error.strerror or "cannot be read") from error


def _open(path: Path) -> Image.Image:
    """Opens it by the formats that are read here, and no others: a file may be of several."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # older Pillow lacks AVIF
    try:
        return Image.open(path, formats=formats)
    except Image.DecompressionBombError:
        raise ImageError(path.name, f"too many pixels: at most {MAX_PIXELS // 1_000_000} million here") from None
    except Exception as error:  # decoders fail on hostile bytes with whatever their parsers stumble over
        if path.stat().st_size == 0:
            raise ImageError(path.name, "empty file") from error
        raise ImageError(path.name, "broken, or not an image of a format that is read here") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        millions = f"{width * height / 1e6:.0f} million pixels; at most {MAX_PIXELS // 1_000_000} million here"
        raise ImageError(path.name, f"{width} x {height} are {millions}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(path.name, f"{width} x {height} is a strip: at most {MAX_ASPECT} times as long as wide here")


def keepable(image: Image.Image) -> Image.Image:
    """A copy whose shorter side is at most `KEPT_SIDE`: what a session holds in memory."""
    factor = KEPT_SIDE / min(image.size)
    if factor >= 1:
        return image.copy()
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
