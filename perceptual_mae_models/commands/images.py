"""`pmae embed` and `pmae similar`: features of the images on a disk."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perceptual_mae_models.features import FeatureBatch, FeatureExtractor

LARGEST_SIDE = {".webp": 16383, ".jpg": 65500}
"""Pixels that a format can hold in a row or column, where that is less than memory."""


def embed(arguments: argparse.Namespace) -> int:
    """`pmae embed`: features of many images into one file."""
    from perceptual_mae_models.images import find_images
    from perceptual_mae_models.writers import FeatureWriter, check_output

    check_output(arguments.output)
    files = find_images(arguments.paths)
    extractor = _extractor(arguments)
    start = time.perf_counter()
    with FeatureWriter(arguments.output, extractor.metadata) as writer:
        for batch in stream_features(extractor, files, arguments):
            writer.write(batch.names, batch.features)
        if not writer.rows:
            raise ValueError(f"none of the {len(files)} images could be read; nothing was written")
    seconds = time.perf_counter() - start
    shape = " x ".join(map(str, (writer.rows, *extractor.feature_shape)))
    print(f"{arguments.output}: {shape} features in {seconds:.1f} s ({writer.rows / seconds:.0f} images/s)")
    if writer.rows < len(files):
        print(f"{len(files) - writer.rows} of {len(files)} images were broken and are left out", file=sys.stderr)
    return 0


def similar(arguments: argparse.Namespace) -> int:
    """`pmae similar`: a picture of the nearest neighbours of some images in a folder."""
    import torch

    from perceptual_mae_models.features import FeatureBatch
    from perceptual_mae_models.gallery import GalleryRow, Tile, gallery_size, nearest, neighbour_gallery, square_tile
    from perceptual_mae_models.images import find_images, open_image, printable
    from perceptual_mae_models.writers import check_output

    check_output(arguments.output, (".png", ".jpg", ".webp"))
    queries = find_images(arguments.queries)
    files = [file for file in find_images([arguments.folder]) if file.absolute() != arguments.output.absolute()]
    _check_canvas(arguments.output, gallery_size(len(queries), min(arguments.k, len(files))))
    extractor = _extractor(arguments)
    batches = list(stream_features(extractor, queries, arguments))
    names = tuple(name for batch in batches for name in batch.names)
    if not names:
        raise ValueError(f"none of the {len(queries)} queries could be read")
    query_batch = FeatureBatch(names, torch.cat([batch.features for batch in batches]), ())
    matches = nearest(query_batch, stream_features(extractor, files, arguments), arguments.k)
    if not any(matches):
        raise ValueError(f"{arguments.folder} holds no image but the queries")

    def tile(name: str, similarity: float | None = None) -> Tile:
        shown = printable(Path(name).name)
        return Tile(square_tile(open_image(name)), shown, similarity)  # small, as there may be many

    rows = [
        GalleryRow(tile(query), [tile(match.name, match.similarity) for match in found])
        for query, found in zip(names, matches, strict=True)
    ]
    for query, found in zip(names, matches, strict=True):
        print(printable(query))
        for match in found:
            print(f"    {match.similarity:.4f}  {printable(match.name)}")
    facts = extractor.metadata
    weights = facts["tag"] or facts["weights"]
    subtitle = f"{facts['model']}, {weights}; cosine similarity of {facts['pool']} features; {len(files)} images"
    neighbour_gallery(rows, subtitle=subtitle).save(arguments.output)
    print(arguments.output)
    return 0


def _check_canvas(output: Path, size: tuple[int, int]) -> None:
    limit = LARGEST_SIDE.get(output.suffix)
    if limit and max(size) > limit:
        width, height = size
        raise ValueError(
            f"the picture would have {width} x {height} pixels, and {output.suffix} at most {limit} a side:"
            " ask for fewer queries or neighbours, or a .png"
        )


def _extractor(arguments: argparse.Namespace) -> "FeatureExtractor":
    from perceptual_mae_models.features import FeatureExtractor

    return FeatureExtractor(
        arguments.model, arguments.pool, arguments.device, arguments.dtype, checkpoint=arguments.checkpoint
    )


def stream_features(
    extractor: "FeatureExtractor", files: Sequence[Path], arguments: argparse.Namespace
) -> Iterator["FeatureBatch"]:
    """Streams features with a progress line on a terminal; names broken images, or says how to go on without them."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    from perceptual_mae_models.images import ImageError, printable

    batches = extractor.stream(files, arguments.batch_size, arguments.workers, arguments.skip_broken)
    try:
        with tqdm(total=len(files), unit=" images", leave=False, disable=None) as line:  # type: ignore[no-untyped-call]
            for batch in batches:
                for broken in batch.broken:
                    line.write(f"skipped {printable(str(broken))}", file=sys.stderr)
                line.update(len(batch.names) + len(batch.broken))
                yield batch
    except ImageError as error:
        raise ImageError(error.name, f"{error.reason} (--skip-broken leaves such images out)") from error
