"""HTML of pictures with captions. All text is escaped: names of files come from strangers."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        image: RGB, or (3, H, W) in [0, 1].
        title: Bold, the first line of the caption.
        note: The rest of it.
    """

    image: Image.Image | Tensor
    title: str
    note: str = ""


def data_url(image: Image.Image | Tensor) -> str:
    """A picture as a PNG inside its address, without loss."""
    picture = to_pil_image(image.cpu()) if isinstance(image, Tensor) else image
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figures(shown: Sequence[Figure], sharp: bool = True) -> str:
    """Pictures beside one another, as many in a line as the page is wide.

    Args:
        shown: In their order.
        sharp: Enlarge by repeating pixels rather than by blurring.
    """
    kind = "sharp" if sharp else "smooth"
    cells = [
        f'<figure><img src="{data_url(figure.image)}" alt="{escape(figure.title)}" class="{kind}">'
        f"<figcaption><b>{escape(figure.title)}</b> {escape(figure.note)}</figcaption></figure>"
        for figure in shown
    ]
    return f'<div class="pmae-figures">{"".join(cells)}</div>'


def sample_buttons(images: Mapping[str, Image.Image]) -> str:
    """Small pictures to press, of which `assets.PICK` tells the number."""
    cells = [
        f'<button type="button" data-index="{index}"><img src="{data_url(_square(image))}" alt="">'
        f"<span>{escape(name)}</span></button>"
        for index, (name, image) in enumerate(images.items())
    ]
    return f'<div class="pmae-samples" aria-label="Sample images">{"".join(cells)}</div>'


def _square(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (128, 128), Image.Resampling.LANCZOS)


def note(text: str) -> str:
    """A paragraph beneath pictures."""
    return f'<p class="pmae-note">{escape(text)}</p>' if text else ""


def message(text: str, error: bool = False) -> str:
    """What happened to the image that somebody chose."""
    kind = "pmae-error" if error else "pmae-ok"
    return f'<p class="pmae-message {kind}" role="{"alert" if error else "status"}">{escape(text)}</p>'


def painter(image: Tensor, grid: tuple[int, int], hidden: Sequence[bool]) -> str:
    """An image under a grid of cells, one a patch, that `assets.PAINT` lets a pointer hide and show.

    Args:
        image: (3, H, W) in [0, 1].
        grid: Patches per column and per row.
        hidden: One a patch, row-major.
    """
    cells = "".join('<i class="hidden"></i>' if cell else "<i></i>" for cell in hidden)
    style = f"grid-template-columns:repeat({grid[1]},1fr);background-image:url({data_url(image)})"
    return f'<div class="pmae-painter" role="img" aria-label="Image to paint on" style="{style}">{cells}</div>'
