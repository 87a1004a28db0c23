"""The protocols, each as rows of a table of results."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from training.evaluate.features import Features
from training.evaluate.few_shot import count_shots, few_shot
from training.evaluate.intervals import mean_interval, pack_bits, share_interval
from training.evaluate.knn import TEMPERATURE, knn_predict
from training.evaluate.linear import fit_probe, judge
from training.evaluate.rows import Row
from training.settings import at_least, refuse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the protocols are run with."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """k-NN: numbers of neighbours; of the default ones, those that there are training images for."""
    epochs: int = 100
    """Linear probe: passes over the features."""
    hold_back: float = 0.1
    """Linear probe: share of the training images to choose the learning rate on, in (0, 0.5]."""
    shots: tuple[str, ...] = ("1%", "2%", "5%", "10%", "20%")
    """Few-shot: images a class (5) or share of each class (5%)."""
    draws: int = 5
    """Few-shot: draws of training images; the interval is over them."""
    seed: int = 0
    """Decides draws, orders, what is held back, and the weights of random models."""

    def __post_init__(self) -> None:
        refuse(self, at_least(self, {"epochs": 1, "draws": 1}))

    def neighbours(self, images: int) -> tuple[int, ...]:
        """Numbers of neighbours among so many training images.

        Raises:
            ValueError: If there are none, or they are not so many.
        """
        fitting = tuple(k for k in self.k if 1 <= k <= images)
        if not fitting or (fitting != self.k and self.k != Settings.k):
            raise ValueError(f"--k is {self.k}: at least 1 and at most the {images} training images")
        return fitting


def run_knn(train: Features, test: Features, settings: Settings, device: str = "cpu") -> Iterator[Row]:
    """Weighted k-NN, DINO's protocol; on the CPU, whatever the device."""
    started = time.monotonic()
    predicted = knn_predict(train.rows, train.labels, test.rows, settings.neighbours(len(train)))
    seconds = time.monotonic() - started
    for k, labels in predicted.items():
        accuracy = share_interval(labels == test.labels)
        yield Row(
            protocol="knn",
            setting=f"k={k}",
            metric="accuracy",
            value=accuracy,
            seconds=seconds,
            detail={"temperature": TEMPERATURE},
        )


def run_linear(train: Features, test: Features, settings: Settings, device: str = "cpu") -> Iterator[Row]:
    """Linear probe, its heads trained on the device."""
    started = time.monotonic()
    fitted = fit_probe(train, epochs=settings.epochs, share=settings.hold_back, seed=settings.seed, device=device)
    right = judge(fitted.probe, test)[0][0]  # (N,)
    yield Row(
        protocol="linear",
        setting=f"lr={fitted.learning_rate:g}",
        metric="accuracy",
        value=share_interval(right),
        seconds=time.monotonic() - started,
        detail={
            "held_back_accuracy": {f"{rate:g}": value for rate, value in fitted.held_back_accuracy.items()},
            "right": pack_bits(right),
        },
    )


def run_few_shot(train: Features, test: Features, settings: Settings, device: str = "cpu") -> Iterator[Row]:
    """Logistic regression on few labels; on the CPU, whatever the device."""
    drawn: dict[tuple[int, ...], str] = {}
    for amount in settings.shots:
        counts = count_shots(train.labels, amount)
        if (earlier := drawn.setdefault(counts, amount)) != amount:
            print(f"few-shot {amount}: as many images of each class as {earlier}, left out", file=sys.stderr)
            continue
        started = time.monotonic()
        values = few_shot(train, test, amount, draws=settings.draws, seed=settings.seed)
        seconds = time.monotonic() - started
        yield Row(
            protocol="few_shot",
            setting=amount,
            metric="accuracy",
            value=mean_interval(values),
            seconds=seconds,
            detail={"accuracies": values},
        )


ON_FEATURES: dict[str, Callable[[Features, Features, Settings, str], Iterator[Row]]] = {
    "knn": run_knn,
    "linear": run_linear,
    "few_shot": run_few_shot,
}
