"""Detection and instance segmentation: a detector learns on an encoder, which stays frozen or learns too.

Training images are letterboxed into a canvas (their sides keep their ratio), with flips and changes of scale; test
images are letterboxed, and what is found there is judged in the images' own pixels.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from training.data.boxes import DetectionViews, Target, fit_to_canvas
from training.data.coco import CocoSource, Objects, decode_masks, encode_mask, open_coco
from training.evaluate.average_precision import AveragePrecision, Predictions, average_precision
from training.evaluate.dense import DenseData, DenseSettings, Mode, create_optimizer, learn
from training.evaluate.features import combine, cut, fingerprint_data, fingerprint_model, load_items
from training.evaluate.models import open_model
from training.evaluate.rows import Place, Row
from training.evaluate.split import refuse_copies
from training.evaluate.trainer import Task
from training.grids import labelled_rows
from training.networks.pyramid import DetectorShape, build_detector
from training.run.seeding import derive_seed, seeded
from training.settings import Checks

SHOWN = 6
"""Test images in the picture."""
SHOWN_SCORE = 0.5
TILE = (288, 384)
"""Height and width in pixels of an image in it."""
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6")
"""Colours of the classes, in turn."""


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(DetectorShape, DenseSettings):
    """How a detector learns."""

    protocol: ClassVar[str] = "detection"
    not_in_recipe: ClassVar[tuple[str, ...]] = (*DenseSettings.not_in_recipe, "score_threshold", "max_detections")

    data: Path | None = None
    """COCO's layout: a folder or an uncompressed .tar, see `training/data/coco.py`."""
    masks: bool = True
    """Learn masks too (Mask R-CNN), where the images have any."""
    epochs: float = 50
    """Passes over the training images."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    layer_decay: float = 0.7
    """Factor of the learning rate from each of the encoder's layers to the one below; 1 for random weights always."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    scale_jitter: tuple[float, float] = (0.8, 1.25)
    """Least and most that a training image is enlarged by; what leaves the canvas is cut off."""
    resamples: int = 200
    """Draws of test images for the intervals."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16: autocast in training; boxes stay float32."""

    def checks(self) -> Checks:
        """For each field that can be wrong: whether it is right, and what it must be."""
        low, high = self.scale_jitter
        return {
            **super().checks(),
            "scale_jitter": (0 < low <= high, "two ascending numbers above 0"),
            "score_threshold": (0 <= self.score_threshold < 1, "at least 0 and below 1"),
        }


def _views(source: CocoSource, settings: DetectionSettings) -> DetectionViews:
    return DetectionViews(source, settings.size, settings.scale_jitter, settings.seed)


def _losses(model: nn.Module, batch: tuple[list[Tensor], list[Target]]) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = model(*batch)
    return losses


def _collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in items], [target for _, target in items]


@torch.no_grad()
def predict(network: nn.Module, source: CocoSource, settings: DetectionSettings, place: Place) -> list[Predictions]:
    """What a detector in evaluation mode finds in every image, in order and in the image's own pixels.

    Raises:
        ImageError: At an image that does not decode, or is not of the size that its json says.
    """
    batches, device = cut(range(len(source)), settings.batch_size), next(network.parameters()).device
    found: list[Predictions] = []
    for items in load_items(_views(source, settings), batches, place.engine.workers):
        for (view, _), result in zip(items, network([view.to(device) for view, _ in items]), strict=True):
            size = source.size(len(found))
            boxes = resize_boxes(result["boxes"], view.shape[1:], size).float().cpu()
            segments = None
            if source.masks:
                # (K, 1, h, w) probabilities, one image at a time: at full size they are large
                pasted = (interpolate(mask[None], size, mode="bilinear")[0, 0] >= 0.5 for mask in result["masks"])
                segments = [encode_mask(mask.cpu().numpy()) for mask in pasted]
            found.append(Predictions(boxes, result["labels"].cpu(), result["scores"].float().cpu(), segments))
    return found


def draw(source: CocoSource, found: list[Predictions], title: str, path: Path) -> None:
    """A picture of some images with what is annotated and what was found."""
    rows: dict[str, list[Tensor]] = {"annotated": [], f"found, score {SHOWN_SCORE} and more": []}
    for number in torch.linspace(0, len(source) - 1, min(SHOWN, len(source))).round().int().tolist():
        image, predictions = transforms.pil_to_tensor(source.load(number)), found[number]
        sure = (predictions.scores >= SHOWN_SCORE).nonzero()[:, 0]
        codes = predictions.segments and [predictions.segments[index] for index in sure.tolist()]
        surely = Predictions(predictions.boxes[sure], predictions.labels[sure], predictions.scores[sure], codes)
        both: tuple[Objects | Predictions, ...] = (source.objects(number), surely)
        for row, objects in zip(rows.values(), both, strict=True):
            row.append(_draw_objects(image, objects, source.classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    stacked = {label: torch.stack(images) for label, images in rows.items()}
    labelled_rows(stacked, title, source.reader.json, scale=1).save(path)


def _draw_objects(image: Tensor, objects: Objects | Predictions, classes: Sequence[str]) -> Tensor:
    """(3, H, W) uint8 -> (3, h, w) in [0, 1] of the picture's tiles, with boxes, names and masks."""
    size = image.shape[1], image.shape[2]
    fitted = fit_to_canvas(size, TILE)
    drawn: Tensor = transforms.resize(image, list(fitted), antialias=True)
    colours = [COLOURS[label % len(COLOURS)] for label in objects.labels.tolist()]
    if objects.segments:
        masks = decode_masks(objects.segments, *size)
        masks = transforms.resize(masks, list(fitted), InterpolationMode.NEAREST_EXACT)
        drawn = draw_segmentation_masks(drawn, masks.bool(), alpha=0.5, colors=colours)
    if colours:
        names = [classes[label - 1] for label in objects.labels.tolist()]
        drawn = draw_bounding_boxes(drawn, resize_boxes(objects.boxes, size, fitted), names, colours, width=2)
    return transforms.pad(drawn, [0, 0, TILE[1] - fitted[1], TILE[0] - fitted[0]], fill=255) / 255


def create_task(
    name: str, train: CocoSource, settings: DetectionSettings, mode: Mode
) -> tuple[Task, dict[str, Any], tuple[float, ...]]:
    """What is learned, facts that decide the result, and the strides of the pyramid.

    Raises:
        ValueError: If the model means nothing, or no detector stands on it at this size.
        FileNotFoundError: If its weights are missing.
    """
    extractor, _ = open_model(name, device="cpu", seed=settings.seed)
    weights = fingerprint_model(extractor)
    # the extractor lays convolutions' weights out channels-last, and no file of weights takes them so
    encoder = extractor.model.to(memory_format=torch.contiguous_format)
    with seeded(derive_seed(settings.seed, "detector")):
        network = build_detector(
            encoder, settings, classes=len(train.classes), masks=train.masks, frozen=mode == "frozen"
        )
    optimizer, recipe = create_optimizer(name, encoder, nn.ModuleList(_heads(network)), settings, mode)
    task = Task(network, optimizer, _views(train, settings), _losses, _collate)
    return task, recipe | {"weights": weights}, network.backbone.strides


def _heads(network: Any) -> list[nn.Module]:
    """All but the encoder."""
    return [network.backbone.pyramid, network.rpn, network.roi_heads]


def fingerprints(source: CocoSource) -> dict[str, str]:
    """Fingerprints of the images and of their annotations."""
    return {"train": fingerprint_data(source), "annotations": source.digest}


def learn_detector(
    name: str, train: CocoSource, settings: DetectionSettings, mode: Mode, place: Place
) -> tuple[nn.Module, dict[str, object], float]:
    """A trained detector, what there is to say about it, and the seconds of its training."""
    task, recipe, strides = create_task(name, train, settings, mode)
    network, detail, seconds = learn(task, recipe, fingerprints(train), settings, place)
    return network, {**detail, "strides": strides}, seconds


def score(source: CocoSource, found: list[Predictions], settings: DetectionSettings) -> dict[str, AveragePrecision]:
    """Average precision of boxes (`box`), and of masks (`mask`) where the source has them."""
    truth = [source.objects(index) for index in range(len(source))]
    kinds: tuple[tuple[Literal["bbox", "segm"], str], ...] = (("bbox", "box"), ("segm", "mask"))
    return {
        metric: average_precision(
            truth,
            found,
            source.classes,
            kind,
            max_detections=settings.max_detections,
            resamples=settings.resamples,
            seed=settings.seed,
        )
        for kind, metric in kinds[: 1 + source.masks]
    }


def open_detection(settings: DetectionSettings, groups: str | None = None) -> DenseData[CocoSource]:
    """Open the images and look at every one.

    Args:
        settings: Where they are, and whether their masks are wanted.
        groups: See `name_groups`; none may be in both splits.

    Raises:
        ValueError: If data or settings do not allow it.
        FileNotFoundError: If there are none.
        ImageError: At an image that does not decode.
    """
    data = settings.find_data()
    train, test = open_coco(data, masks=settings.masks)
    duplicates = refuse_copies(train, test, groups)
    for source in (train, test):
        source.look_at_all()
    everything = combine(*fingerprints(train).values(), *fingerprints(test).values())
    facts = {"name": data.name, "images": len(test), "fingerprint": everything}
    return DenseData(train=train, test=test, learned=fingerprints(train), facts=facts, duplicates=duplicates)


def run_detection(name: str, data: DenseData[CocoSource], settings: DetectionSettings, place: Place) -> Iterator[Row]:
    """Learn on `train`; judge once on `test`, or on `val` where there is no test split.

    Args:
        name: Of the encoder, see `training/evaluate/models.py`.
        data: Of `open_detection`.
        settings: How to learn.
        place: Where and how fast to run.

    Yields:
        For each way of using the encoder `box_ap` and `box_ap50`, and `mask_ap` and `mask_ap50` where there are masks:
        see `average_precision.py`. Intervals are over the test images; what other seeds give is not in them.

    Raises:
        ValueError: If model or settings do not allow it.
        FileNotFoundError: If weights are missing.
        ImageError: At an image that does not decode.
        RunError: If a loss is not finite.
    """
    train, test = data.train, data.test
    for mode in settings.encoder:
        network, detail, seconds = learn_detector(name, train, settings, mode, place)
        started = time.monotonic()
        found = predict(network, test, settings, place)
        picture = Path("pictures") / f"{Path(str(detail['run'])).name}.png"
        if PartialState().is_main_process:
            draw(test, found, f"{name}, {mode}", place.out / picture)
        detail |= {"picture": picture.as_posix(), "data": data.facts, "train_images": len(train)}
        detail |= {"test": test.reader.json, "duplicates": dataclasses.asdict(data.duplicates)}
        detail |= {"dropped_boxes": {"train": train.dropped, "test": test.dropped}}
        results = score(test, found, settings)
        seconds += time.monotonic() - started
        for metric, result in results.items():
            for ending, value in (("ap", result.ap), ("ap50", result.ap50)):
                yield Row(
                    protocol="detection",
                    setting=mode,
                    metric=f"{metric}_{ending}",
                    value=value,
                    seconds=seconds,
                    detail={**detail, "ap_by_class": result.by_class},
                )
