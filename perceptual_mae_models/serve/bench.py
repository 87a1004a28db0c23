"""What the page computes: reconstructions, neighbours and maps of one image, as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from perceptual_mae_models.autoencoder import MaskedAutoencoder, given_masking, random_masking
from perceptual_mae_models.features import find_device
from perceptual_mae_models.images import ImageError, open_image, printable
from perceptual_mae_models.reconstruction import middle, open_shipped, rebuild, shipped_autoencoders
from perceptual_mae_models.serve.maps import attention_map, feature_maps, pca_map
from perceptual_mae_models.serve.markup import Figure, figures, note
from perceptual_mae_models.serve.neighbours import NeighbourIndex

NEIGHBOURS = 8
THUMBNAIL = 176
"""Pixels a side."""


@dataclass(frozen=True)
class Method:
    """An autoencoder of the package.

    Attributes:
        name: `<arch>.<tag>`.
        network: In evaluation mode.
        norm_pix_loss: Whether it predicts patches without their brightness and contrast.
    """

    name: str
    network: MaskedAutoencoder
    norm_pix_loss: bool


class Workbench:
    """The methods that come with the package, and the images of a folder.

    Args:
        device: Where the methods compute.
        index: Of the folder; None: no neighbours are shown.

    Raises:
        ValueError: If no method comes with the package, or there is no such device.
    """

    def __init__(self, device: str | torch.device = "cpu", index: NeighbourIndex | None = None) -> None:
        self.device = find_device(device)
        self.index = index
        self.methods = []
        for name in shipped_autoencoders():
            network, recipe = open_shipped(name)
            self.methods.append(Method(name, network.to(self.device), bool(recipe["norm_pix_loss"])))
        if not self.methods:
            raise ValueError("this installation holds no encoder with its decoder, so that nothing can be rebuilt")

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of the mask that is painted: those of the first method."""
        return self.methods[0].network.grid_size

    @cached_property
    def heads(self) -> int:
        """Attention heads that every method has in its last block."""
        blocks: list[Any] = [method.network.encoder.blocks[-1] for method in self.methods]
        return min(int(block.attn.num_heads) for block in blocks)

    def picture(self, image: Image.Image) -> Tensor:
        """What the first method is given of an image: (3, H, W) in [0, 1]."""
        return middle(image, self.methods[0].network.image_size)

    def random_mask(self, ratio: float, seed: int) -> Tensor:
        """A mask as in pretraining.

        Args:
            ratio: Share of patches to hide, in [0, 1].
            seed: Decides which.

        Returns:
            (h, w) bool on the first method's grid: True hidden.

        Raises:
            ValueError: If the ratio is no share, or the seed is negative or of more than 63 bits.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"a share lies in [0, 1], not {ratio:g}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"a seed lies between 0 and 2^63 - 1, not {seed}")
        rows, columns = self.grid
        noise = torch.rand(1, rows * columns, generator=torch.Generator().manual_seed(seed))
        return random_masking(noise, ratio).mask.bool().reshape(rows, columns)

    def painted_mask(self, cells: str) -> Tensor:
        """A mask from what the page's painter says.

        Args:
            cells: A digit a patch, row-major: 1 hidden, 0 visible.

        Returns:
            (h, w) bool: True hidden.

        Raises:
            ValueError: If it is no such text.
        """
        rows, columns = self.grid
        if len(cells) != rows * columns or set(cells) - {"0", "1"}:
            raise ValueError(f"a painted mask has {rows * columns} digits, each 0 or 1")
        return torch.tensor([cell == "1" for cell in cells]).reshape(rows, columns)

    def reconstruct(self, image: Image.Image, hidden: Tensor) -> list[Figure]:
        """The image, what encoders see of it, and what each method makes of that.

        Args:
            image: RGB, of any size; the middle is taken.
            hidden: (h, w) bool: True hidden. Methods with another grid take the nearest patch.
        """
        shown: list[Figure] = []
        for method in self.methods:
            network = method.network
            images = middle(image, network.image_size).unsqueeze(0).to(self.device)
            mask = interpolate(hidden[None, None].float(), network.grid_size, mode="nearest-exact").flatten(1)
            views = rebuild(network, images, given_masking(mask.to(self.device)), norm_pix_loss=method.norm_pix_loss)
            if not shown:
                size = " x ".join(map(str, network.image_size))
                count = f"{int(mask.sum())} of {mask.numel()} patches hidden"
                shown = [Figure(images[0], "Image", f"{size} pixels"), Figure(views.masked[0], "Masked", count)]
            kind = "patches standardised" if method.norm_pix_loss else "plain pixels"
            shown.append(Figure(views.pasted[0], self._label(method), kind))
        return shown

    def reconstruction(self, image: Image.Image, hidden: Tensor) -> str:
        """HTML of `reconstruct`, with what one has to know to judge it."""
        notes = ["Visible patches stay as they are; only hidden ones are predicted."]
        if any(method.norm_pix_loss for method in self.methods):
            notes.append(
                "Where it says “patches standardised”, a method was trained with norm_pix_loss: it predicts each patch"
                " without its brightness and contrast. To show a picture, every hidden patch is given the mean and the"
                " deviation of the original patch, as in MAE's figures: its overall colour is not a prediction."
            )
        if hidden.all():
            notes.append("Everything is hidden: the encoder sees nothing but its class token.")
        elif not hidden.any():
            notes.append("Nothing is hidden, so that the result is the image itself.")
        return figures(self.reconstruct(image, hidden)) + note(" ".join(notes))

    def maps(self, image: Image.Image, head: int | None) -> str:
        """HTML of the attention map and the PCA map of each method, of the whole image.

        Args:
            image: RGB, of any size; the middle is taken.
            head: Attention head, from 0; None: the mean of all.

        Raises:
            ValueError: If there is no such head.
        """
        shown: list[Figure] = []
        for method in self.methods:
            network = method.network
            images = middle(image, network.image_size).unsqueeze(0).to(self.device)
            found = feature_maps(network.encoder, network.standardise(images))
            attention = found.attention[0] if head is None else found.attention[0, head : head + 1]
            pca, explained = pca_map(found.tokens[0], network.grid_size)
            heat = attention_map(found.attention[0], network.grid_size, head)
            most, own = attention.mean(dim=0)[1:].max().item(), attention.mean(dim=0)[0].item()
            if not shown:
                shown.append(Figure(images[0], "Image", "nothing hidden"))
            facts = f"brightest patch {most:.3f}, class token {own:.3f}"
            shown.append(Figure(heat, f"Attention, {self._label(method)}", facts))
            shares = " + ".join(f"{share:.2f}" for share in explained.tolist())
            shown.append(Figure(pca, f"PCA, {self._label(method)}", f"{shares} of the variance"))
        text = (
            "Attention: from the class token to the patches, in the last block; the shares of all patches and of the"
            " class token itself add up to 1. PCA: the first three principal components of this image's patch"
            " features as red, green and blue; like colours are like features, the colours themselves mean nothing."
        )
        return figures(shown) + note(text)

    def neighbours(self, image: Image.Image) -> str:
        """HTML of the images of the folder that are most like one, with their cosine similarity."""
        if self.index is None:
            return note("No folder was given. Start the page with “pmae serve --folder DIR” to search your images.")
        shown = []
        for match in self.index.nearest(image, NEIGHBOURS):
            path = Path(match.name)
            try:
                tile = ImageOps.fit(open_image(path), (THUMBNAIL, THUMBNAIL))
            except ImageError:  # moved or changed since the folder was read
                tile = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#d0d4da")
            shown.append(Figure(tile, f"{match.similarity:.3f}", printable(path.name)))
        facts = self.index.extractor.metadata
        text = (
            f"Cosine similarity of {facts['pool']} features of {facts['model']}; {len(self.index.names)} images in"
            f" {printable(self.index.folder.name)}."
        )
        return figures(shown, sharp=False) + note(text)

    def _label(self, method: Method) -> str:
        architectures = {other.name.partition(".")[0] for other in self.methods}
        return method.name.partition(".")[2] if len(architectures) == 1 else method.name


def mask_text(hidden: Tensor | Sequence[bool]) -> str:
    """What `Workbench.painted_mask` reads: a digit a patch, row-major."""
    flat = hidden.flatten().tolist() if isinstance(hidden, Tensor) else hidden
    return "".join("1" if cell else "0" for cell in flat)
