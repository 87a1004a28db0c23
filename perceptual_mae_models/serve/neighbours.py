"""The images of a folder, encoded once and searched as often as somebody asks."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import normalize

from perceptual_mae_models.features import FeatureBatch, FeatureExtractor
from perceptual_mae_models.gallery import Match


class NeighbourIndex:
    """Features of the images of a folder.

    Unlike `gallery.nearest`, which reads a corpus once for many queries, it keeps the features in memory (4 bytes times
    the width an image) and answers a query by one matrix product.

    Args:
        extractor: Computed the features, and will those of the queries.
        batches: What `extractor.stream` yields for the folder.
        folder: Named on the page.

    Raises:
        ValueError: If no image could be read.
    """

    def __init__(self, extractor: FeatureExtractor, batches: Iterable[FeatureBatch], folder: Path) -> None:
        names: list[str] = []
        features = []
        for batch in batches:
            names += batch.names
            features.append(normalize(batch.features, dim=1))
        if not names:
            raise ValueError(f"{folder}: none of its images could be read")
        self.extractor = extractor
        self.folder = folder
        self.names = names
        self.features = torch.cat(features)  # (N, D), of length 1

    def nearest(self, image: Image.Image, k: int) -> list[Match]:
        """The k images most like one, by cosine similarity, nearest first; equal ones in the order of the folder."""
        similarities = self.features @ normalize(self.extractor([image])[0], dim=0)
        order = similarities.argsort(descending=True, stable=True)[:k].tolist()
        return [Match(self.names[place], similarities[place].item()) for place in order]
