"""COCO's average precision, by pycocotools, with an interval over the test images.

AP is the mean over classes, over the thresholds 0.50, 0.55, ..., 0.95 of intersection over union, and over 101 recalls;
AP50 is that at the first threshold alone (Lin et al. 2014). Crowd regions count neither way.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from training.data.coco import Json, Objects
from training.evaluate.intervals import Interval, percentile_interval
from training.run.seeding import generator


@dataclass(frozen=True)
class Predictions:
    """What a detector finds in one image, in the image's own pixels."""

    boxes: Tensor
    """(K, 4) float32: left, top, right, bottom."""
    labels: Tensor
    """(K,) int64 from 1."""
    scores: Tensor
    """(K,) float32 in [0, 1]."""
    segments: list[Json] | None
    """Run-length codes."""


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision over all test images."""

    ap: Interval
    """In [0, 1], with the percentile bootstrap's interval (Efron 1979) over test images."""
    ap50: Interval
    by_class: dict[str, float]
    """AP of every class that the test images hold."""


def average_precision(
    truth: Sequence[Objects],
    found: Sequence[Predictions],
    classes: Sequence[str],
    kind: Literal["bbox", "segm"],
    *,
    max_detections: int = 100,
    resamples: int = 200,
    seed: int = 0,
) -> AveragePrecision:
    """Judge predictions.

    Args:
        truth: What is annotated, an image each.
        found: What was predicted, in the same order.
        classes: Names, by label - 1.
        kind: By boxes or by masks.
        max_detections: Most predictions an image that count, of every class, best first.
        resamples: Draws of test images for the interval; 0: none, and the interval has no width.
        seed: Decides them.

    Raises:
        ValueError: If a prediction is not finite, or nothing is annotated.
    """
    if any(not (p.boxes.isfinite().all() and p.scores.isfinite().all()) for p in found):
        raise ValueError("predictions are not finite: training diverged, or the weights are damaged")
    # numbered from 1: pycocotools takes an annotation 0 for no match
    annotated = [entry for image, objects in enumerate(truth) for entry in _entries(image, objects, kind)]
    predicted = [entry for image, objects in enumerate(found) for entry in _entries(image, objects, kind)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        judge = COCOeval(*(_index(len(truth), classes, entries) for entries in (annotated, predicted)), kind)
        judge.params.maxDets = [max_detections]
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], ["all"]
        judge.evaluate()
        of_images = np.array(judge.evalImgs, dtype=object).reshape(len(classes), len(truth))
        whole = _accumulate(judge, of_images)
        if not (whole > -1).any():
            raise ValueError("the test images hold no annotated object to judge by")
        n, draws = len(truth), (generator(seed, "bootstrap", index) for index in range(resamples))
        others = [_accumulate(judge, of_images[:, torch.randint(n, (n,), generator=it).numpy()]) for it in draws]
    return AveragePrecision(
        ap=percentile_interval(_mean(whole), [_mean(other) for other in others]),
        ap50=percentile_interval(_mean(whole[:1]), [_mean(other[:1]) for other in others]),
        by_class={name: _mean(whole[:, :, c]) for c, name in enumerate(classes) if (whole[:, :, c] > -1).any()},
    )


def _accumulate(judge: Any, of_images: NDArray[Any]) -> NDArray[np.float64]:
    """(T, R, C) precision by threshold, recall and class; -1 where no object of the class is annotated."""
    judge.evalImgs = of_images.flatten().tolist()
    judge.accumulate()
    precision: NDArray[np.float64] = judge.eval["precision"][..., 0, 0]
    return precision


def _mean(precision: NDArray[np.float64]) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def _entries(image: int, objects: Objects | Predictions, kind: str) -> list[Json]:
    if kind == "segm" and objects.segments is None:
        raise ValueError("there are no masks to judge")
    entries = []
    for index, (box, label) in enumerate(zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)):
        left, top, right, bottom = box
        entry: Json = {
            "image_id": image,
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
        }
        if isinstance(objects, Objects):
            entry |= {"area": objects.areas[index].item(), "iscrowd": int(objects.crowd[index])}
        else:
            entry |= {"score": objects.scores[index].item()}
        if objects.segments is not None:
            entry |= {"segmentation": objects.segments[index]}
        entries.append(entry)
    return entries


def _index(images: int, classes: Sequence[str], entries: list[Json]) -> COCO:
    coco = COCO()
    coco.dataset = {
        # masks are run-length codes, which carry their own size: it is asked for here and not used
        "images": [{"id": image, "height": 0, "width": 0} for image in range(images)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
    }
    coco.createIndex()
    return coco
