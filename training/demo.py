"""What the embedded weights do, in one picture: similar photographs found, and masked ones rebuilt.

    python training/demo.py --out demo.png

The photographs come inside scikit-image and scikit-learn; nothing is downloaded.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from perceptual_mae_models.autoencoder import random_masking
from perceptual_mae_models.features import FeatureBatch, FeatureExtractor
from perceptual_mae_models.gallery import GalleryRow, Tile, nearest, neighbour_gallery
from perceptual_mae_models.reconstruction import middle, rebuild
from perceptual_mae_models.serve.samples import photographs
from training.grids import labelled_rows
from training.run.seeding import generator
from training.weights import open_embedded

MODEL = "vit_pico_patch8_pmae"
QUERIES = ("coffee", "chelsea", "china", "flower", "grass")
SHOWN = 6  # neighbours of a query: the three other crops of its photograph if all goes well, then what looks like it
REBUILT = ("china", "chelsea", "coffee", "flower", "astronaut", "rocket")


def crops(photograph: Image.Image) -> Iterator[Image.Image]:
    """Four overlapping square crops, towards the corners of a photograph."""
    side = round(0.7 * min(photograph.size))
    for top in (0, photograph.height - side):
        for left in (0, photograph.width - side):
            yield photograph.crop((left, top, left + side, top + side))


def similar_crops(extractor: FeatureExtractor, images: dict[str, Image.Image]) -> tuple[Image.Image, int]:
    """A row for each query crop with the others most like it; and how many of the first three are of its photograph."""
    tiles = {f"{name} {number}": crop for name, image in images.items() for number, crop in enumerate(crops(image), 1)}
    features = extractor(list(tiles.values()))
    names = [f"{name} 1" for name in QUERIES]
    rows_of = [list(tiles).index(name) for name in names]
    crops_found = nearest(
        FeatureBatch(tuple(names), features[rows_of], ()), [FeatureBatch(tuple(tiles), features, ())], k=SHOWN + 1
    )
    matches = [[m for m in found if m.name != name][:SHOWN] for name, found in zip(names, crops_found, strict=True)]
    rows = [
        GalleryRow(Tile(tiles[name], name), [Tile(tiles[m.name], m.name, m.similarity) for m in found])
        for name, found in zip(names, matches, strict=True)
    ]
    siblings = sum(
        m.name.split()[0] == name.split()[0] for name, found in zip(names, matches, strict=True) for m in found[:3]
    )
    subtitle = f"{len(tiles)} crops of {len(images)} photographs, cosine similarity of {MODEL} features"
    return neighbour_gallery(rows, "Nearest neighbours", subtitle), siblings


def rebuilt_photographs(images: dict[str, Image.Image]) -> Image.Image:
    """Photographs, what the encoder saw of them, and what the decoder made of that."""
    network, recipe = open_embedded(MODEL)
    batch = torch.stack([middle(images[name], network.image_size) for name in REBUILT])  # (N, 3, H, W)
    noise = torch.rand(len(batch), network.num_patches, generator=generator(0, "demo"))
    masking = random_masking(noise, recipe.mask_ratio)
    views = rebuild(network, batch, masking, norm_pix_loss=recipe.norm_pix_loss)
    rows = {"original": batch, f"{recipe.mask_ratio:.0%} hidden": views.masked, "rebuilt": views.pasted}
    height, width = network.image_size
    note = (
        f"{height} x {width} pixels; each hidden patch takes brightness and contrast from the original (norm_pix_loss)"
    )
    return labelled_rows(rows, "Masked photographs, rebuilt", note)


def main() -> None:
    """Write the picture and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    out: Path = parser.parse_args().out
    started = time.monotonic()
    images = photographs()
    neighbours, siblings = similar_crops(FeatureExtractor(MODEL), images)
    reconstructions = rebuilt_photographs(images)
    picture = Image.new(
        "RGB",
        (max(neighbours.width, reconstructions.width), neighbours.height + reconstructions.height),
        "white",
    )
    picture.paste(neighbours, (0, 0))
    picture.paste(reconstructions, (0, neighbours.height))
    picture.save(out)
    print(f"{siblings} of {3 * len(QUERIES)} nearest neighbours are crops of the same photograph as their query")
    print(f"{out.resolve()}: written in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
