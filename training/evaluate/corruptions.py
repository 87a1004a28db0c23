"""Common corruptions of an image at five severities, in the spirit of ImageNet-C (Hendrycks and Dietterich 2019).

They are not ImageNet-C's files: figures compare models judged here with one another, not with published ones. Elastic,
glass, frost and snow are left out, and so are the libraries that have them: they take no seed, and their strengths are
made for one size of image.

A corruption is applied to the image as it is stored, before any model's transform, so every model sees the same one. A
model that shrinks its input averages noise away and sees less of it.

Lengths (of blurs and blocks) are those of ImageNet-C for 224 pixels and grow with the image's short side; at least they
are what CIFAR-10-C takes for 32 pixels, or near it, since the same share of so small an image is less than a pixel.
Noise is a pixel's, and JPEG's blocks have eight pixels, whatever the size.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.signal import fftconvolve
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as V

from training.data.images import ImageSource, decode
from training.data.readers import PartReader
from training.grids import labelled_rows
from training.run.seeding import generator

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224
SHOWN_SIDE = 160
"""Largest side of an image in a picture, in pixels."""
ZOOMS = 12
"""Images that a zoom blur is the mean of."""
FOG_CELLS = (2, 4, 8, 16, 32, 64)
"""A side, of the noise that fog is made of, one octave each."""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How an image is damaged, and how much."""

    family: str
    """noise, blur, colour or digital."""
    apply: Callable[[Image.Image, float, Generator], Image.Image]
    """(RGB image, strength, draws) -> RGB image of the same size."""
    strengths: tuple[float, ...]
    """By severity; a length in pixels of an image of 224 where there is `least`."""
    least: tuple[float, ...] = ()
    """By severity, the shortest length in pixels of an image of any size."""

    def strength(self, severity: int, short_side: int) -> float:
        """What `apply` takes for an image of so many pixels."""
        value = self.strengths[severity - 1]
        return max(value * short_side / REFERENCE_SIDE, self.least[severity - 1]) if self.least else value


def corrupt(image: Image.Image, name: str, severity: int, *, seed: int = 0, number: int = 0) -> Image.Image:
    """Damage an image.

    What is drawn depends on seed, corruption and number and not on the severity: from one severity to the next it is
    the same noise or the same direction, only stronger.

    Args:
        image: RGB, of any size; it stays as it is.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5; 0 gives back the image itself.
        seed: Decides what is drawn.
        number: Of the image in its source.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the image is not RGB, or there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"{name}: no such corruption; there are {', '.join(CORRUPTIONS)}")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity {severity}: give 1 to 5, or 0 for the image as it is")
    if image.mode != "RGB":
        raise ValueError(f"corruptions are made for RGB images, not for mode {image.mode}")
    if severity == 0:
        return image
    corruption = CORRUPTIONS[name]
    strength = corruption.strength(severity, min(image.size))
    return corruption.apply(image, strength, generator(seed, f"corruption/{name}", number))


def _on_pixels(change: Callable[[Tensor, float, Generator], Tensor]) -> Callable[..., Image.Image]:
    """A function of (3, H, W) floats in [0, 1], whose results are clipped to it, as one of images."""

    def apply(image: Image.Image, strength: float, draws: Generator) -> Image.Image:
        pixels = V.pil_to_tensor(image).float() / 255
        changed = change(pixels, strength, draws).clamp(0, 1)
        result: Image.Image = V.to_pil_image((changed * 255).round().to(torch.uint8))
        return result

    return apply


def _gaussian_noise(pixels: Tensor, deviation: float, draws: Generator) -> Tensor:
    return pixels + deviation * torch.randn(pixels.shape, generator=draws)


def _shot_noise(pixels: Tensor, photons: float, draws: Generator) -> Tensor:
    return torch.poisson(pixels * photons, generator=draws) / photons


def _impulse_noise(pixels: Tensor, share: float, draws: Generator) -> Tensor:
    hit, salt = torch.rand((2, *pixels.shape), generator=draws)
    return pixels.where(hit >= share, (salt < 0.5).float())


def _gaussian_blur(image: Image.Image, deviation: float, draws: Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(deviation))


def _offsets(radius: int) -> tuple[Tensor, Tensor]:
    """Rows and columns from the middle of a (2 * radius + 1)^2 kernel."""
    line = torch.arange(-radius, radius + 1, dtype=torch.float32)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return rows, columns


def _convolve(pixels: Tensor, kernel: Tensor) -> Tensor:
    """(3, H, W) with a kernel of odd side whose values are brought to a sum of 1; the border's pixels go on outside."""
    padded = F.pad(pixels, [len(kernel) // 2] * 4, mode="replicate")
    # by Fourier transform: a photograph of 4,000 pixels is blurred by kernels of hundreds
    mixed = fftconvolve(padded.numpy(), (kernel / kernel.sum())[None].numpy(), mode="valid", axes=(1, 2))
    return torch.from_numpy(mixed)


def _defocus_blur(pixels: Tensor, radius: float, draws: Generator) -> Tensor:
    rows, columns = _offsets(math.ceil(radius))
    return _convolve(pixels, (radius + 0.5 - torch.hypot(rows, columns)).clamp(0, 1))  # a disk with a soft edge


def _motion_blur(pixels: Tensor, length: float, draws: Generator) -> Tensor:
    rows, columns = _offsets(math.ceil(length / 2) + 1)
    angle = math.pi * torch.rand((), generator=draws)
    along = (columns * angle.cos() + rows * angle.sin()).clamp(-length / 2, length / 2)
    distance = torch.hypot(columns - along * angle.cos(), rows - along * angle.sin())
    return _convolve(pixels, (1 - distance).clamp(min=0))  # a line a pixel wide


def _zoom_blur(image: Image.Image, zoom: float, draws: Generator) -> Image.Image:
    width, height = image.size
    total = torch.zeros(3, height, width)
    for factor in torch.linspace(1, 1 + zoom, ZOOMS).tolist():
        left, top = (width - width / factor) / 2, (height - height / factor) / 2
        box = (left, top, width - left, height - top)
        total += V.pil_to_tensor(image.resize(image.size, Image.Resampling.BILINEAR, box))
    result: Image.Image = V.to_pil_image((total / ZOOMS).round().to(torch.uint8))
    return result


def _fog(pixels: Tensor, amount: float, draws: Generator) -> Tensor:
    """Mixes in clouds of all sizes; as in ImageNet-C, where they are thin the image gets darker."""
    height, width = pixels.shape[1:]
    side = (max(height, width),) * 2
    clouds = torch.zeros(1, 1, *side)
    for cells in FOG_CELLS:
        noise = torch.rand((1, 1, cells, cells), generator=draws)
        clouds += F.interpolate(noise, side, mode="bicubic", align_corners=True) / cells
    clouds -= clouds.min()
    clouds /= clouds.max().clamp(min=1e-6)
    return (pixels + amount * clouds[0, :, :height, :width]) / (1 + amount)


def _brightness(pixels: Tensor, amount: float, draws: Generator) -> Tensor:
    """Adds to the value of HSV; hue and saturation stay."""
    value = pixels.amax(dim=0, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, pixels * (brighter / value.clamp(min=1 / 255)), brighter)


def _contrast(pixels: Tensor, factor: float, draws: Generator) -> Tensor:
    contrast: Tensor = V.adjust_contrast(pixels, factor)
    return contrast


def _saturation(pixels: Tensor, factor: float, draws: Generator) -> Tensor:
    saturation: Tensor = V.adjust_saturation(pixels, factor)
    return saturation


def _pixelate(image: Image.Image, block: float, draws: Generator) -> Image.Image:
    width, height = (max(1, round(side / block)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def _jpeg(image: Image.Image, quality: float, draws: Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return decode(file.getvalue(), "the image's JPEG copy")


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        # ImageNet-C's; deviation of values in [0, 1]
        "gaussian_noise": Corruption(
            family="noise", apply=_on_pixels(_gaussian_noise), strengths=(0.08, 0.12, 0.18, 0.26, 0.38)
        ),
        # ImageNet-C's; photons that white is made of
        "shot_noise": Corruption(family="noise", apply=_on_pixels(_shot_noise), strengths=(60, 25, 12, 5, 3)),
        # ImageNet-C's; share of values that become 0 or 1
        "impulse_noise": Corruption(
            family="noise", apply=_on_pixels(_impulse_noise), strengths=(0.03, 0.06, 0.09, 0.17, 0.27)
        ),
        # ImageNet-C's and CIFAR-10-C's; deviation
        "gaussian_blur": Corruption(
            family="blur", apply=_gaussian_blur, strengths=(1, 2, 3, 4, 6), least=(0.4, 0.6, 0.7, 0.8, 1)
        ),
        # ImageNet-C's, on small images ours; radius of the disk
        "defocus_blur": Corruption(
            family="blur",
            apply=_on_pixels(_defocus_blur),
            strengths=(3, 4, 6, 8, 10),
            least=(0.7, 0.85, 1, 1.25, 1.5),
        ),
        # ours, as wide as the Gaussian streaks of ImageNet-C and CIFAR-10-C; length of the line
        "motion_blur": Corruption(
            family="blur",
            apply=_on_pixels(_motion_blur),
            strengths=(6, 10, 14, 17, 20),
            least=(2, 2.75, 3.5, 4.25, 5),
        ),
        # ImageNet-C's; enlargement of the last image less 1
        "zoom_blur": Corruption(family="blur", apply=_zoom_blur, strengths=(0.1, 0.15, 0.2, 0.24, 0.3)),
        # ours, as ImageNet-C's severities 3 and 4 are equally dense; clouds in units of the image
        "fog": Corruption(family="colour", apply=_on_pixels(_fog), strengths=(1, 1.5, 2, 2.5, 3)),
        # ImageNet-C's; added to values in [0, 1]
        "brightness": Corruption(family="colour", apply=_on_pixels(_brightness), strengths=(0.1, 0.2, 0.3, 0.4, 0.5)),
        # ImageNet-C's; what is left of the contrast
        "contrast": Corruption(family="colour", apply=_on_pixels(_contrast), strengths=(0.4, 0.3, 0.2, 0.1, 0.05)),
        # ours, as ImageNet-C's goes down and then up; what is left of the colour
        "saturation": Corruption(family="colour", apply=_on_pixels(_saturation), strengths=(0.6, 0.4, 0.25, 0.1, 0)),
        # ImageNet-C's and CIFAR-10-C's; side of a block
        "pixelate": Corruption(
            family="digital",
            apply=_pixelate,
            strengths=(1 / 0.6, 2, 2.5, 1 / 0.3, 4),
            least=(1 / 0.95, 1 / 0.9, 1 / 0.85, 1 / 0.75, 1 / 0.65),
        ),
        # ImageNet-C's; quality
        "jpeg": Corruption(family="digital", apply=_jpeg, strengths=(25, 18, 15, 10, 7)),
    }
)
"""By name."""


class CorruptedSource(ImageSource):
    """Some images of a source, damaged when they are loaded; `reader` has their files as they are.

    Args:
        source: The images.
        numbers: Which of them.
        corruption: One of `CORRUPTIONS`.
        severity: 0 to 5.
        seed: Decides what is drawn, with an image's number in `source`; which others there are does not matter.
    """

    def __init__(self, source: ImageSource, numbers: Sequence[int], corruption: str, severity: int, seed: int) -> None:
        # names are in the fingerprint of data: no cache takes damaged images for others
        prefix = f"{corruption}/{severity}/seed {seed}/"
        super().__init__(source.spec, reader=PartReader(source.reader, numbers, prefix))
        self.source, self.numbers = source, numbers
        self.corruption, self.severity, self.seed = corruption, severity, seed

    def load(self, index: int) -> Image.Image:
        """Decode and damage an image.

        Raises:
            ImageError: If it cannot be read or does not decode.
        """
        number = self.numbers[index]
        return corrupt(self.source.load(number), self.corruption, self.severity, seed=self.seed, number=number)


def draw_examples(
    image: Image.Image, names: Sequence[str], note: str, *, seed: int = 0, number: int = 0
) -> Image.Image:
    """A picture of an image under corruptions, one a row, at severities 0 to 5.

    Args:
        image: RGB; large ones are damaged as they are and shown smaller.
        names: Of `CORRUPTIONS`.
        note: Below the title.
        seed: Decides what is drawn.
        number: Of the image in its source.
    """
    shrink = max(1.0, max(image.size) / SHOWN_SIDE)
    size = max(1, round(image.width / shrink)), max(1, round(image.height / shrink))
    rows = {}
    for name in names:
        damaged = (corrupt(image, name, severity, seed=seed, number=number) for severity in (0, *SEVERITIES))
        shown = [one.resize(size, Image.Resampling.BOX) if shrink > 1 else one for one in damaged]
        rows[name] = torch.stack([V.pil_to_tensor(one).float() / 255 for one in shown])  # (6, 3, h, w)
    scale = max(1, SHOWN_SIDE // max(size))
    return labelled_rows(rows, "Corruptions, severity 0 to 5 from left to right", note, scale=scale)
