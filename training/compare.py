"""Reconstructions of several runs side by side: the same photographs under the same masks.

    python training/compare.py runs/mae runs/ls_gan_p runs/stylegan2_ada_p --data photos/ --out compare.png

A run is a folder with the `encoder.safetensors` and `decoder.safetensors` that pretraining leaves.
"""

from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from torch import Tensor

from perceptual_mae_models.autoencoder import random_masking
from perceptual_mae_models.reconstruction import middle, rebuild
from perceptual_mae_models.serve.samples import photographs
from training.data.images import ImageSource
from training.demo import REBUILT
from training.grids import labelled_rows
from training.run.seeding import generator
from training.weights import open_embedded, open_run


def main(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: Path | None = None,
    count: int = 6,
    seed: int = 0,
    out: Path = Path("compare.png"),
) -> None:
    """Draw originals, what the encoders see, and a row of reconstructions for each run.

    Args:
        runs: Folders of finished runs, or models whose decoders come with the package, of one image and patch size.
        data: Folder or tar of images, of which the first ones are taken; by default photographs of scikit-image and
            scikit-learn.
        count: Images to show.
        seed: Decides the masks.
        out: Picture to write.
    """
    try:
        draw(runs, data, count, seed, out)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"compare.py: {error}") from error
    print(out)


def draw(runs: tuple[str, ...], data: Path | None, count: int, seed: int, out: Path) -> None:
    """Do what `main` says.

    Raises:
        OSError: If runs or images are not there, or the picture cannot be written.
        ValueError: If an image does not decode, or runs have nothing to compare.
        RuntimeError: If a run's files do not fit its recipe.
    """
    if not runs:
        raise ValueError("name the runs: folders that pretraining left, or vit_pico_patch8_pmae for the package's own")
    networks = [
        open_embedded(run) if timm.is_model(run) and not Path(run).exists() else open_run(Path(run)) for run in runs
    ]
    shapes = {(network.image_size, network.num_patches, network.mask_ratio) for network, _ in networks}
    if len(shapes) != 1:
        raise ValueError("the runs differ in image size, patch size or mask ratio")
    (((height, width), num_patches, mask_ratio),) = shapes
    if data:
        source = ImageSource(data)
        images = [source.load(index) for index in range(min(count, len(source)))]
    else:
        if count > len(REBUILT):
            raise ValueError(f"--count is {count}: without --data there are {len(REBUILT)} photographs")
        try:
            found = photographs()
        except ImportError as error:
            raise ValueError(f'{error}: give --data, or pip install -e ".[picture]" for photographs') from error
        images = [found[name] for name in REBUILT[:count]]
    batch = torch.stack([middle(image, (height, width)) for image in images])  # (N, 3, H, W)
    noise = torch.rand(len(batch), num_patches, generator=generator(seed, "compare"))
    masking = random_masking(noise, mask_ratio)
    views = [
        rebuild(network.eval(), batch, masking, norm_pix_loss=recipe.norm_pix_loss) for network, recipe in networks
    ]
    rows: dict[str, Tensor] = {"original": batch, f"{mask_ratio:.0%} hidden": views[0].masked}
    alike = len({Path(run).parent for run in runs}) == 1
    labels = [Path(run).name if alike else run for run in runs]
    rows |= {label: view.pasted for label, view in zip(labels, views, strict=True)}
    note = f"{height} x {width} pixels; visible patches as they are"
    helped = [label for label, (_, recipe) in zip(labels, networks, strict=True) if recipe.norm_pix_loss]
    if helped:
        note += f"; {', '.join(helped)}: colour and contrast of each hidden patch from the original"
    labelled_rows(rows, "Masked photographs, rebuilt", note, scale=max(1, 192 // height)).save(out)


if __name__ == "__main__":
    tyro.cli(main)
