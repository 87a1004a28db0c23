"""Intersection over union of semantic segmentations, with an interval over the test images."""

import torch
from torch import Tensor

from training.data.masks import VOID
from training.evaluate.intervals import Interval, percentile_interval
from training.run.seeding import generator


def count_pixels(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Pixels of every class: those rightly predicted, those that are its own, and those predicted as it.

    Args:
        truth: Any shape, `VOID` where nothing counts.
        predicted: The same shape.
        classes: C.

    Returns:
        (3, C) int64.
    """
    counted = truth != VOID
    truth, predicted = truth[counted], predicted[counted]
    return torch.stack([part.bincount(minlength=classes) for part in (truth[truth == predicted], truth, predicted)])


def score(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean IoU, the pixel accuracy and the IoU of every class.

    The intersection over union of a class (Jaccard index; Everingham et al. 2010, "The PASCAL Visual Object Classes
    Challenge") is over all pixels of all images; a class without a pixel in truth and prediction has none and is left
    out of the mean.

    Args:
        counts: (…, 3, C), see `count_pixels`.

    Returns:
        (…), (…) and (…, C) float64 in [0, 1]; NaN for a class that has none.
    """
    right, own, claimed = counts.double().unbind(dim=-2)
    iou = right / (own + claimed - right)
    return iou.nanmean(dim=-1), right.sum(dim=-1) / own.sum(dim=-1), iou


def bootstrap(counts: Tensor, resamples: int, seed: int) -> tuple[Interval, Interval]:
    """The mean IoU and the pixel accuracy with the percentile bootstrap's interval (Efron 1979) over images.

    Images count as independent: frames of one film are less than that, and the interval is too narrow for them. What
    another training run would give is not in it.

    Args:
        counts: (N, 3, C) of every image.
        resamples: Draws of N images.
        seed: Decides them.
    """
    drawn = torch.randint(len(counts), (resamples, len(counts)), generator=generator(seed, "bootstrap"))
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    totals = times @ counts.flatten(1).double()  # (R, N) @ (N, 3 * C)
    drawn_scores = score(totals.unflatten(1, counts.shape[1:]))  # (R, 3, C)
    intervals = []
    for mean, values in zip(score(counts.sum(dim=0))[:2], drawn_scores[:2], strict=True):
        intervals.append(percentile_interval(mean.item(), values.tolist()))
    return intervals[0], intervals[1]
