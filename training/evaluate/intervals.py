"""95 % confidence intervals, for each kind of figure."""

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

_Z = 1.959964  # of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % confidence interval of what it estimates."""

    mean: float
    low: float
    high: float


def mean_interval(values: list[float]) -> Interval:
    """Student's interval of the mean accuracy over draws of training images; without width for a single one.

    The test images are the same in all: what another test set would give is not in it.
    """
    interval = student_interval(values)
    return Interval(interval.mean, max(0.0, interval.low), min(1.0, interval.high))


def student_interval(values: list[float]) -> Interval:
    """Student's interval of the mean of a few independent values; without width for a single one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, mean, mean)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def percentile_interval(value: float, draws: list[float]) -> Interval:
    """The percentile bootstrap's interval (Efron 1979), which holds the value itself.

    Args:
        value: Of the sample.
        draws: The same of resamples; those that are no number, because a draw missed what is measured, do not count.
    """
    drawn = [draw for draw in draws if not math.isnan(draw)]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if drawn else (value, value)
    return Interval(value, min(value, low), max(value, high))


def share_interval(right: Tensor) -> Interval:
    """Wilson's interval of an accuracy measured on independent test images.

    Args:
        right: (N,) bool.
    """
    n, p = len(right), right.double().mean().item()
    z = _Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # rounding would leave an accuracy of 1 outside
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def paired_interval(right: Tensor, other: Tensor) -> Interval:
    """The normal interval of the difference of two accuracies on the same independent images.

    Where two classifiers fail on the same images it is narrower than the intervals of both accuracies tell.

    Args:
        right: (N,) bool.
        other: (N,) bool, of which the accuracy is taken off.
    """
    return sample_interval(right.double() - other.double())


def pack_bits(right: Tensor) -> str:
    """Bools (N,) as hexadecimal digits, for `unpack_bits`."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def unpack_bits(text: str, count: int) -> Tensor:
    """The bools (count,) that `pack_bits` wrote."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))


def sample_interval(values: Tensor) -> Interval:
    """The normal interval of a mean over many independent images.

    Args:
        values: (N,).
    """
    mean = values.double().mean().item()
    half = _Z * values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)
