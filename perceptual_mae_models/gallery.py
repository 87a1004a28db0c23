"""Nearest neighbours, and the picture that shows them."""

import heapq
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.functional import normalize

from perceptual_mae_models.features import FeatureBatch

# Pixels. The picture is drawn once at this size; no supersampling beyond the rounded corners.
TILE = 176
GAP = 14
MARGIN = 36
QUERY_GAP = 44
CORNER = 10
CAPTION = 52
ROW_GAP = 22
HEADER = 92

BACKGROUND = "#ffffff"
INK = "#1b1f24"
MUTED = "#6a737d"
LINE = "#e1e4e8"
ACCENT = "#2458c5"


@dataclass(frozen=True)
class Match:
    """A neighbour: its name and its cosine similarity to the query, in [-1, 1]."""

    name: str
    similarity: float


@dataclass(frozen=True)
class Tile:
    """One picture of the gallery; `similarity` is None for a query."""

    image: Image.Image
    caption: str
    similarity: float | None = None


@dataclass(frozen=True)
class GalleryRow:
    """A query and its neighbours, nearest first."""

    query: Tile
    neighbours: Sequence[Tile]


def nearest(queries: FeatureBatch, corpus: Iterable[FeatureBatch], k: int) -> list[list[Match]]:
    """Finds the images most like each query, by cosine similarity, in one pass over the corpus.

    Args:
        queries: Features (Q, D).
        corpus: Batches of features (N, D), as `FeatureExtractor.stream` yields them. Of these only the best are kept.
        k: Neighbours a query. The query's own file, where it is one, is never one of them.

    Returns:
        For each query at most k matches, nearest first; equal ones in the order of the corpus.
    """
    query_features = normalize(queries.features, dim=1)
    query_files = [_file_of(name) for name in queries.names]
    best: list[list[Match]] = [[] for _ in queries.names]
    for batch in corpus:
        similarities = (query_features @ normalize(batch.features, dim=1).T).tolist()
        files = [_file_of(name) for name in batch.names]
        for row, query_file in enumerate(query_files):
            found = [
                Match(name, similarity)
                for name, file, similarity in zip(batch.names, files, similarities[row], strict=True)
                if file is None or file != query_file
            ]
            best[row] = heapq.nlargest(k, best[row] + found, key=lambda match: match.similarity)
    return best


def _file_of(name: str) -> str | None:
    """The file of a name; None for an image in memory, whose name is a number that another image may have too."""
    return os.path.realpath(name) if Path(name).exists() else None


def neighbour_gallery(rows: Sequence[GalleryRow], title: str = "Nearest neighbours", subtitle: str = "") -> Image.Image:
    """Draws a row a query: the query on the left, its neighbours with their similarity beside it.

    Args:
        rows: At least one. Images of any size and mode RGB; they are shown cropped to their central square.
        title: Top left.
        subtitle: Smaller, beneath the title.

    Returns:
        An RGB image, 1000 to 1400 pixels wide for 4 to 6 neighbours.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("a gallery needs a row")
    width, height = gallery_size(len(rows), max(len(row.neighbours) for row in rows))
    neighbours_left = MARGIN + TILE + QUERY_GAP

    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 26), title, INK, _font(24))
    draw.text((MARGIN, 58), _elide(draw, subtitle, width - 2 * MARGIN, _font(14)), MUTED, _font(14))
    for index, row in enumerate(rows):
        top = HEADER + index * (TILE + CAPTION + ROW_GAP)
        _draw_tile(canvas, draw, row.query, MARGIN, top)
        separator = MARGIN + TILE + QUERY_GAP // 2
        draw.line((separator, top, separator, top + TILE), LINE, 2)
        for column, tile in enumerate(row.neighbours):
            _draw_tile(canvas, draw, tile, neighbours_left + column * (TILE + GAP), top)
    return canvas


def gallery_size(rows: int, columns: int) -> tuple[int, int]:
    """Width and height in pixels of a gallery of so many queries and neighbours of each."""
    width = MARGIN + TILE + QUERY_GAP + max(columns, 2) * (TILE + GAP) - GAP + MARGIN
    return width, HEADER + rows * (TILE + CAPTION + ROW_GAP) - ROW_GAP + MARGIN


def _draw_tile(canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    canvas.paste(square_tile(tile.image), (left, top), _rounded_mask())
    draw.rounded_rectangle((left, top, left + TILE - 1, top + TILE - 1), CORNER, outline=LINE)
    if tile.similarity is None:
        draw.text((left, top + TILE + 8), "query", ACCENT, _font(16))
    else:
        draw.text((left, top + TILE + 8), f"{tile.similarity:.3f}", INK, _font(16))
    draw.text((left, top + TILE + 30), _elide(draw, tile.caption, TILE, _font(13)), MUTED, _font(13))


def square_tile(image: Image.Image) -> Image.Image:
    """The central square of an image in the size in which a gallery shows it."""
    return ImageOps.fit(image, (TILE, TILE), Image.Resampling.LANCZOS)


def _rounded_mask() -> Image.Image:
    # Drawn large and shrunk: Pillow's own corners are not antialiased.
    large = Image.new("L", (4 * TILE, 4 * TILE), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * TILE - 1, 4 * TILE - 1), 4 * CORNER, fill=255)
    return large.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _elide(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Shortens text in its middle, since names of files differ at their ends."""
    kept = len(text)
    shortened = text
    while kept > 1 and draw.textlength(shortened, font) > width:
        kept -= 1
        shortened = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shortened
