"""How well a masked image is rebuilt: L1, PSNR, SSIM and MS-SSIM under masks that the seed decides.

`hidden` counts the hidden patches: their pixels for L1 and PSNR, windows centred on them for SSIM, and for MS-SSIM,
which has no place in the image, the image with its visible patches pasted in. `image` counts the prediction of every
patch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from perceptual_mae_models.autoencoder import MaskedAutoencoder, random_masking
from perceptual_mae_models.reconstruction import Views, middle, rebuild
from training.data.images import ImageSource, evenly
from training.evaluate.features import cut, load_views
from training.grids import labelled_rows
from training.losses.structural import WINDOW, ms_ssim_each, ssim_map
from training.recipes import Recipe
from training.run.seeding import generator

METRICS = ("l1", "psnr", "ssim", "ms_ssim")
SHOWN = 8
"""Images in a picture."""


def rebuild_all(
    network: MaskedAutoencoder,
    recipe: Recipe,
    source: ImageSource,
    *,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Views]]:
    """Mask and rebuild images, batch by batch.

    Args:
        network: The autoencoder, on the CPU or a GPU.
        recipe: Of its training; with `norm_pix_loss` a patch takes mean and deviation from the original.
        source: Images; the middle of each is taken.
        numbers: Which; by default all.
        seed: Decides the masks; an image's mask depends on its number and on nothing else.
        batch_size: Images a pass; changes the speed only.
        workers: Processes that decode.

    Yields:
        Images, (N, 3, H, W) in [0, 1], and what the network makes of them.

    Raises:
        ImageError: At an image that does not decode.
    """
    network.eval()
    device, numbers = network.mean.device, range(len(source)) if numbers is None else numbers
    fit, start = partial(middle, size=network.image_size), 0
    for images in load_views(source, fit, cut(numbers, batch_size), workers):
        places = [generator(seed, "reconstruction", number) for number in numbers[start : start + len(images)]]
        start += len(images)
        noise = torch.stack([torch.rand(network.num_patches, generator=place) for place in places]).to(device)
        images, masking = images.to(device), random_masking(noise, network.mask_ratio)
        yield images, rebuild(network, images, masking, norm_pix_loss=recipe.norm_pix_loss)


def compare_images(made: Tensor, original: Tensor, where: Tensor) -> dict[str, Tensor]:
    """L1, PSNR in decibel and SSIM of each image at some of its pixels.

    Args:
        made: (N, 3, H, W) in [0, 1].
        original: The same.
        where: (N, 1, H, W), 1 where it counts.

    Returns:
        (N,) float32 each; PSNR is at most 100.
    """
    error, border = made - original, WINDOW // 2

    def mean(values: Tensor, at: Tensor) -> Tensor:
        return (values * at).sum(dim=(1, 2, 3)) / (at.sum(dim=(1, 2, 3)) * values.shape[1])

    centres = where[:, :, border:-border, border:-border]
    return {
        "l1": mean(error.abs(), where),
        "psnr": -10 * mean(error.square(), where).clamp(min=1e-10).log10(),  # a mean of infinities says nothing
        "ssim": mean(ssim_map(made, original), centres),
    }


@torch.no_grad()
def measure_reconstruction(
    network: MaskedAutoencoder,
    recipe: Recipe,
    source: ImageSource,
    *,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    watchers: Sequence[Callable[[Tensor, Views], None]] = (),
) -> dict[tuple[str, str], Tensor]:
    """Compare every image of a source with what the network makes of a quarter of it.

    Args:
        network: See `rebuild_all`, as for the others.
        recipe: Of its training.
        source: The images.
        numbers: Which.
        seed: Decides the masks.
        batch_size: Images a pass.
        workers: Processes that decode.
        watchers: Called with every batch of images and what the network makes of them, for what else is to be known.

    Returns:
        (N,) float32 by place ("hidden", "image") and metric.

    Raises:
        ImageError: At an image that does not decode.
        ValueError: If a prediction is not finite.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    for images, views in rebuild_all(
        network, recipe, source, numbers=numbers, seed=seed, batch_size=batch_size, workers=workers
    ):
        hidden = views.hidden.float()
        for place, made, where in (("hidden", views.pasted, hidden), ("image", views.rebuilt, torch.ones_like(hidden))):
            values = compare_images(made, images, where) | {"ms_ssim": ms_ssim_each(made, images)}
            for metric in METRICS:
                found.setdefault((place, metric), []).append(values[metric].cpu())
        for watch in watchers:
            watch(images, views)
    measured = {key: torch.cat(values) for key, values in found.items()}
    if broken := int((~torch.stack(list(measured.values())).isfinite()).any(dim=0).sum()):
        raise ValueError(f"the network's reconstructions of {broken} images are not finite: damaged weights")
    return measured


def spread(total: int, count: int | None) -> list[int]:
    """So many numbers below `total`, evenly spaced; all of them if there are fewer, or for None.

    Raises:
        ValueError: If none is asked for.
    """
    if count is not None and count < 1:
        raise ValueError(f"--reconstruction.images is {count}: at least 1")
    return evenly(total, count or total)


def draw_reconstructions(
    name: str, network: MaskedAutoencoder, recipe: Recipe, source: ImageSource, *, seed: int = 0
) -> Image.Image:
    """A picture of some images of a source: as they are, masked, rebuilt, rebuilt where they were hidden."""
    numbers = spread(len(source), SHOWN)
    images, views = next(rebuild_all(network, recipe, source, numbers=numbers, seed=seed, batch_size=SHOWN))
    rows = {
        "original": images,
        f"{network.mask_ratio:.0%} hidden": views.masked,
        "rebuilt": views.rebuilt,
        "pasted": views.pasted,
    }
    height, width = network.image_size
    contrast = "; contrast of the original's patches (norm_pix_loss)" if recipe.norm_pix_loss else ""
    note = f"{height} x {width} pixels; rebuilt: every patch predicted; pasted: visible patches as they are{contrast}"
    return labelled_rows(
        {label: images.cpu() for label, images in rows.items()}, name, note, scale=max(1, 160 // width)
    )
