"""Photographs that come inside scikit-image and scikit-learn; nothing is downloaded."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from perceptual_mae_models.images import open_image

PHOTOGRAPHS = {
    "skimage.data": (
        *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
SAMPLES = ("china", "chelsea", "coffee", "flower", "astronaut", "rocket", "motorcycle_left", "coins")
"""Those of the page: photographs of things, of which an encoder of photographs knows most."""


def photographs() -> dict[str, Image.Image]:
    """The photographs by name, RGB.

    Raises:
        ModuleNotFoundError: If scikit-image or scikit-learn is not installed.
    """
    return {
        Path(name).stem: open_image(Path(str(files(package) / name)))
        for package, names in PHOTOGRAPHS.items()
        for name in names
    }


def samples() -> dict[str, Image.Image]:
    """The photographs of the page by name, RGB; none where scikit-image or scikit-learn is not installed."""
    if not (find_spec("skimage") and find_spec("sklearn")):
        return {}
    found = photographs()
    return {name.removesuffix("_left"): found[name] for name in SAMPLES}
