"""Semantic segmentation as dense transfer, judged at the masks' own size; see `dense.py`."""

import colorsys
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop, functional

from perceptual_mae_models.images import ImageError
from training.data.masks import VOID, MaskSource, open_masks
from training.data.sampler import ImageKey
from training.evaluate.dense import DenseData, DenseSettings, Mode, create_optimizer, learn
from training.evaluate.encoders import build_encoder
from training.evaluate.features import combine, cut, fingerprint_data, fingerprint_weights, load_items
from training.evaluate.iou import bootstrap, count_pixels, score
from training.evaluate.rows import Place, Row
from training.evaluate.split import refuse_copies
from training.evaluate.trainer import Task
from training.grids import labelled_rows
from training.networks.segmenter import Segmenter
from training.run.seeding import derive_seed, seeded
from training.settings import Checks, at_least

SHOWN = 6
"""Test images in the picture."""
SHOWN_WIDTH = 256
"""Screen pixels that an image in it is wide, about."""
ASPECT = (3 / 4, 4 / 3)
"""Least and most that a crop's sides are out of the image's proportion."""


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(DenseSettings):
    """How a segmentation network learns."""

    protocol: ClassVar[str] = "segmentation"

    data: Path | None = None
    """A folder or an uncompressed .tar with images and masks, see `training/data/masks.py`."""
    void: tuple[int, ...] = (255,)
    """Values in masks that are no class; in ADE20K's layout 0 is none anyway."""
    num_classes: int | None = None
    """None: as many as the training masks hold."""
    size: tuple[int, int] = (224, 224)
    """Height and width in pixels that images are brought to: multiples of 32, of 28 for patches of 14."""
    batch_size: int = 16
    """Images a step, over all processes and micro-batches together; the decoder's batch norm sees those of one pass."""
    crop_scale: tuple[float, float] = (0.25, 1.0)
    """Share of an image's area that a training crop covers, least and most."""
    width: int = 256
    """Channels of the decoder."""

    def checks(self) -> Checks:
        """For each field that can be wrong: whether it is right, and what it must be."""
        low, high = self.crop_scale
        return {
            **super().checks(),
            "crop_scale": (0 < low <= high <= 1, "two ascending numbers in (0, 1]"),
            **at_least(self, {"resamples": 1, "width": 8, "num_classes": 2}),
        }


class SegmentationViews(Dataset[Any]):
    """Images with their masks.

    An item of an `ImageKey` is a crop of both, resized and perhaps flipped, which seed, epoch and image alone decide:
    (3, h, w) in [0, 1] and (h, w) classes or `VOID`. One of a number is the whole image, resized, and the mask as it
    is.

    Args:
        source: The images.
        settings: Size, crops, seed.
    """

    def __init__(self, source: MaskSource, settings: SegmentationSettings) -> None:
        self.source, self.settings = source, settings

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: ImageKey | int) -> tuple[Tensor, Tensor] | ImageError:
        index = key.image if isinstance(key, ImageKey) else key
        try:
            image = functional.pil_to_tensor(self.source.load(index))
            mask = self.source.mask(index)
        except ImageError as error:
            return error
        if isinstance(key, ImageKey):
            with seeded(derive_seed(self.settings.seed, "view", *key)):
                image, mask = self._draw_view(image, mask)
        else:
            image = functional.resize(image, list(self.settings.size), antialias=True)
        return image.float() / 255, mask

    def _draw_view(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        aspect, size = image.shape[2] / image.shape[1], list(self.settings.size)
        # crops are squeezed as whole images are when they are judged
        ratio = [bound * aspect for bound in ASPECT]
        box = RandomResizedCrop.get_params(image, list(self.settings.crop_scale), ratio)
        image = functional.resized_crop(image, *box, size, antialias=True)
        # torchvision's joint transforms take plain nearest for masks, which moves them by half a pixel of the view
        mask = functional.resized_crop(mask[None], *box, size, InterpolationMode.NEAREST_EXACT)[0]
        if torch.rand(()) < 0.5:
            image, mask = functional.hflip(image), functional.hflip(mask)
        return image, mask


def pixel_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy; void pixels count as zero, so that passes of any size weigh every pixel alike."""
    losses = F.cross_entropy(model(batch[0]).float(), batch[1], ignore_index=VOID, reduction="none")
    return {"cross_entropy": losses.mean()}


def create_task(
    name: str, train: MaskSource, settings: SegmentationSettings, mode: Mode
) -> tuple[Task, dict[str, Any]]:
    """What is learned, and what besides the images decides the result.

    Raises:
        ValueError: If the model means nothing, or no decoder stands on it at this size.
        FileNotFoundError: If its weights are missing.
    """
    encoder: Any = build_encoder(name, seed=settings.seed, num_classes=0, img_size=settings.size)
    weights = fingerprint_weights(encoder)
    with seeded(derive_seed(settings.seed, "segmenter")):
        network = Segmenter(
            encoder,
            settings.size,
            classes=len(train.classes),
            width=settings.width,
            frozen=mode == "frozen",
        )
    optimizer, recipe = create_optimizer(name, encoder, network.decoding, settings, mode)
    recipe |= {"num_classes": len(train.classes), "weights": weights}
    return Task(network, optimizer, SegmentationViews(train, settings), pixel_loss), recipe


@torch.inference_mode()
def predict(
    network: nn.Module, source: MaskSource, settings: SegmentationSettings, place: Place
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(3, h, w) image, (H, W) truth and (H, W) predicted classes of every image, in order, on the CPU.

    Raises:
        ImageError: At an image that does not decode.
    """
    batches = cut(range(len(source)), min(place.batch_size, settings.batch_size))
    device = next(network.parameters()).device
    for batch in load_items(SegmentationViews(source, settings), batches, place.engine.workers):
        logits = network(torch.stack([image for image, _ in batch]).to(device)).float()
        for (image, truth), own in zip(batch, logits, strict=True):
            full = F.interpolate(own[None], truth.shape, mode="bilinear", align_corners=False)
            yield image, truth, full[0].argmax(dim=0).cpu()


def open_segmentation(settings: SegmentationSettings, groups: str | None = None) -> DenseData[MaskSource]:
    """Open the images and look at every mask.

    Args:
        settings: Where they are, and what is in the masks.
        groups: See `name_groups`; none may be in both splits.

    Raises:
        ValueError: If data or settings do not allow it.
        FileNotFoundError: If there are none.
        ImageError: At a mask that does not decode.
    """
    data = settings.find_data()
    train, test, census = open_masks(data, void=settings.void, num_classes=settings.num_classes)
    learned = {"train": fingerprint_data(train), "masks": census["train"].digest}
    everything = combine(*learned.values(), fingerprint_data(test), census["test"].digest)
    return DenseData(
        train=train,
        test=test,
        learned=learned,
        facts={"name": data.name, "images": len(test), "fingerprint": everything},
        duplicates=refuse_copies(train, test, groups),
    )


def run_segmentation(
    name: str, data: DenseData[MaskSource], settings: SegmentationSettings, place: Place
) -> Iterator[Row]:
    """Learn on `train`; judge once on `test`, or on `val` where there is no test split.

    Args:
        name: Of the encoder, see `training/evaluate/models.py`.
        data: Of `open_segmentation`.
        settings: How to learn.
        place: Where and how fast to run.

    Yields:
        For each way of using the encoder `miou` and `pixel_accuracy`.

    Raises:
        ValueError: If model or settings do not allow it.
        FileNotFoundError: If weights are missing.
        ImageError: At an image that does not decode.
        RunError: If a loss is not finite.
    """
    for mode in settings.encoder:
        task, recipe = create_task(name, data.train, settings, mode)
        network, detail, seconds = learn(task, recipe, data.learned, settings, place)
        started = time.monotonic()
        counts, shown = judge(network, data.test, settings, place)
        miou, accuracy = bootstrap(counts, settings.resamples, settings.seed)
        picture = Path("pictures") / f"{Path(str(detail['run'])).name}.png"
        if PartialState().is_main_process:
            draw(shown, f"{name}, {mode}: mIoU {miou.mean:.3f}", data.test, place.out / picture)
        detail |= {
            "picture": picture.as_posix(),
            "test": data.test.spec,
            "data": data.facts,
            "train_images": len(data.train),
            "duplicates": dataclasses.asdict(data.duplicates),
            "iou_by_class": [None if math.isnan(iou) else iou for iou in score(counts.sum(dim=0))[2].tolist()],
        }
        seconds += time.monotonic() - started
        for metric, value in (("miou", miou), ("pixel_accuracy", accuracy)):
            yield Row(protocol="segmentation", setting=mode, metric=metric, value=value, seconds=seconds, detail=detail)


Shown = list[tuple[Tensor, Tensor, Tensor]]
"""Image, truth, prediction."""


def judge(network: nn.Module, test: MaskSource, settings: SegmentationSettings, place: Place) -> tuple[Tensor, Shown]:
    """(N, 3, C) counts of every test image, and some of the images evenly spaced."""
    numbers = {round(index * (len(test) - 1) / max(1, SHOWN - 1)) for index in range(SHOWN)}
    counts, shown = [], []
    for index, (image, truth, predicted) in enumerate(predict(network, test, settings, place)):
        counts.append(count_pixels(truth, predicted, len(test.classes)))
        if index in numbers:
            shown.append((image, truth, predicted))
    return torch.stack(counts), shown


def draw(shown: Shown, title: str, test: MaskSource, path: Path) -> None:
    """Write a PNG with images, truths and predictions, void in black."""
    size = shown[0][0].shape[1:]
    colours = torch.tensor([*_colours(len(test.classes)), (0.0, 0.0, 0.0)])  # void, which is -1, finds the last one

    def paint(mask: Tensor) -> Tensor:
        near = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        return colours[near].permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)

    rows = {
        "image": torch.stack([image for image, _, _ in shown]),
        "truth": torch.stack([paint(truth) for _, truth, _ in shown]),
        "predicted": torch.stack([paint(predicted) for _, _, predicted in shown]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f"{Path(test.spec).name}, {len(shown)} of {len(test)} images; black: void"
    labelled_rows(rows, title, note, scale=max(1, round(SHOWN_WIDTH / size[1]))).save(path)


def _colours(classes: int) -> list[tuple[float, float, float]]:
    """By the golden ratio, so that neighbours differ."""
    return [
        colorsys.hsv_to_rgb(0.618034 * index % 1, (0.9, 0.5)[index % 2], (1.0, 0.75)[index // 2 % 2])
        for index in range(classes)
    ]
