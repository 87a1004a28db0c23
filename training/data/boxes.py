"""Images with boxes as a detector sees them: on a canvas of one size, and in training never twice the same."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from perceptual_mae_models.images import ImageError
from training.data.coco import CocoSource
from training.data.sampler import ImageKey
from training.run.seeding import generator

Target = dict[str, Tensor]

SMALLEST = 1.0
"""Sides in pixels of the canvas below which an object is not learned."""


def fit_to_canvas(size: tuple[int, int], canvas: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Height and width of an image that is enlarged to touch the canvas's borders from inside, times `scale`."""
    ratio = scale * min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, round(side * ratio)) for side in size)
    return height, width


class DetectionViews(Dataset[Any]):
    """Letterboxed images, for training flipped and rescaled by draws that seed, epoch and image alone decide.

    An item of an `ImageKey` is a (3, h, w) image in [0, 1] at most of the canvas's size, and its target: (K, 4)
    `boxes`, (K,) `labels` and perhaps (K, h, w) `masks`. One of a number is that image as it is judged, without target.

    Args:
        source: The images.
        canvas: Height and width in pixels.
        scale_jitter: Least and most that a training image is enlarged by; the logarithm is uniform.
        seed: The run's seed.
    """

    def __init__(
        self, source: CocoSource, canvas: tuple[int, int], scale_jitter: tuple[float, float], seed: int
    ) -> None:
        self.source, self.canvas, self.scale_jitter, self.seed = source, canvas, scale_jitter, seed

    def __len__(self) -> int:
        return len(self.source)

    def _load(self, index: int) -> Tensor:
        image: Tensor = transforms.pil_to_tensor(self.source.load(index))
        if tuple(image.shape[1:]) != self.source.size(index):
            height, width = self.source.size(index)
            raise ImageError(
                self.source.name(index),
                f"is {image.shape[1]} x {image.shape[2]} (height, width), its json says {height} x {width}",
            )
        return image

    def __getitem__(self, key: ImageKey | int) -> tuple[Tensor, Target] | ImageError:
        try:
            if isinstance(key, ImageKey):
                return self._view(self._load(key.image), key)
            return self._resize(self._load(key), 1.0), {}
        except ImageError as error:
            return error

    def _resize(self, image: Tensor, scale: float) -> Tensor:
        size = fit_to_canvas((image.shape[1], image.shape[2]), self.canvas, scale)
        resized: Tensor = transforms.resize(image, list(size), antialias=True)
        return resized.float() / 255

    def _view(self, image: Tensor, key: ImageKey) -> tuple[Tensor, Target]:
        low, high = self.scale_jitter
        flip, zoom, down, right = torch.rand(4, generator=generator(self.seed, "view", *key)).tolist()
        objects, size = self.source.objects(key.image), self.source.size(key.image)
        view = self._resize(image, low * (high / low) ** zoom)
        boxes, masks = resize_boxes(objects.boxes, size, view.shape[1:]), None
        if self.source.masks:
            masks = transforms.resize(objects.masks(*size), list(view.shape[1:]), InterpolationMode.NEAREST_EXACT)
        if flip < 0.5:
            view, masks = view.flip(2), None if masks is None else masks.flip(2)
            boxes = torch.stack([view.shape[2] - boxes[:, 2], boxes[:, 1], view.shape[2] - boxes[:, 0], boxes[:, 3]], 1)
        height, width = (min(pair) for pair in zip(view.shape[1:], self.canvas, strict=True))
        top, left = round(down * (view.shape[1] - height)), round(right * (view.shape[2] - width))
        rows, columns = slice(top, top + height), slice(left, left + width)
        boxes = clip_boxes_to_image(boxes - torch.tensor([left, top, left, top]), (height, width))
        learned = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1) & ~objects.crowd
        target = {"boxes": boxes, "labels": objects.labels}
        if masks is not None:
            target["masks"] = masks[:, rows, columns]
            learned &= target["masks"].bool().any(2).any(1)
        return view[:, rows, columns].contiguous(), {name: values[learned] for name, values in target.items()}
