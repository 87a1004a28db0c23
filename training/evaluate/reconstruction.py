"""How well a masked image is rebuilt: L1, PSNR, SSIM and MS-SSIM under masks that the seed decides.

`hidden` counts the hidden patches: their pixels for L1 and PSNR, windows centred on them for SSIM, and for MS-SSIM,
which has no place in the image, the image with its visible patches pasted in. `image` counts the prediction of every
patch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from training.data.images import ImageSource
from training.grids import middle, reconstruct
from training.losses.structural import WINDOW, ms_ssim_each, ssim_map
from training.networks.autoencoder import MaskedAutoencoder, random_masking, unpatchify
from training.recipes import Recipe
from training.run.seeding import generator

METRICS = ("l1", "psnr", "ssim", "ms_ssim")


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
    network: MaskedAutoencoder, recipe: Recipe, source: ImageSource, *, seed: int = 0, batch_size: int = 64
) -> dict[tuple[str, str], Tensor]:
    """Compare every image of a source with what the network makes of a quarter of it.

    Args:
        network: The autoencoder, on the CPU or a GPU.
        recipe: Of its training; with `norm_pix_loss` a patch takes mean and deviation from the original.
        source: Images; the middle of each is taken.
        seed: Decides the masks; an image's mask depends on its number and on nothing else.
        batch_size: Images a pass; changes the speed only.

    Returns:
        (N,) float32 by place ("hidden", "image") and metric.
    """
    network.eval()
    found: dict[tuple[str, str], list[Tensor]] = {}
    for images, noise in _batches(source, network, seed, batch_size):
        views = reconstruct(network, images, noise, recipe)
        mask = random_masking(noise, network.mask_ratio).mask  # (N, L)
        pixels = mask.unsqueeze(-1).expand(-1, -1, network.patch_size**2)  # (N, L, p*p)
        hidden = unpatchify(pixels, network.patch_size, network.grid_size)  # (N, 1, H, W)
        for place, made, where in (
            ("hidden", views["pasted"], hidden),
            ("image", views["rebuilt"], torch.ones_like(hidden)),
        ):
            values = compare_images(made, images, where) | {"ms_ssim": ms_ssim_each(made, images)}
            for metric in METRICS:
                found.setdefault((place, metric), []).append(values[metric].cpu())
    return {key: torch.cat(values) for key, values in found.items()}


def _batches(
    source: ImageSource, network: MaskedAutoencoder, seed: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    device = network.mean.device
    for start in range(0, len(source), batch_size):
        numbers = range(start, min(start + batch_size, len(source)))
        images = [middle(source.load(index), network.image_size) for index in numbers]
        noise = [
            torch.rand(network.num_patches, generator=generator(seed, "reconstruction", index)) for index in numbers
        ]
        yield torch.stack(images).to(device), torch.stack(noise).to(device)
