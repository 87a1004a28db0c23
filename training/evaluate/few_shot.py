"""Few labels: logistic regression on frozen features of a few images a class, over several draws of them.

Features are standardised with the statistics of all training images, whose labels stay unseen. The regularisation is
scikit-learn's default and is not tuned: so few labels leave nothing to tune it with.
"""

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from training.evaluate.features import Features
from training.evaluate.linear import Standardise


def count_shots(labels: Tensor, amount: str) -> tuple[int, ...]:
    """How many images of each class an amount is.

    Args:
        labels: (N,) int64.
        amount: Images a class, "5", or a share of each class, "10%", of which at least one is taken.

    Raises:
        ValueError: If a class has too few images, or the amount is none.
    """
    try:
        number = float(amount.removesuffix("%"))
    except ValueError:
        number = 0.0
    if number <= 0 or (amount.endswith("%") and number > 100) or (not amount.endswith("%") and number % 1):
        raise ValueError(f"few-shot amount {amount!r}: give images a class, such as 5, or a share, such as 10%")
    counts = []
    for label, members in zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True):
        counts.append(max(1, round(number / 100 * members)) if amount.endswith("%") else int(number))
        if counts[-1] > members:
            raise ValueError(f"few-shot amount {amount}: class {label} has {members} training images")
    return tuple(counts)


def draw_shots(labels: Tensor, amount: str, generator: torch.Generator) -> Tensor:
    """Numbers of a few images of each class, drawn; see `count_shots`."""
    chosen = []
    for label, count in zip(labels.unique(), count_shots(labels, amount), strict=True):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def few_shot(train: Features, test: Features, amount: str, *, draws: int = 5, seed: int = 0) -> list[float]:
    """Test accuracies, in [0, 1], of as many draws of a few training images; of one where they are all there are.

    Args:
        train: Where the images are drawn from.
        test: What they are tested on.
        amount: See `draw_shots`.
        draws: How many.
        seed: Decides them.

    Raises:
        ValueError: See `draw_shots`.
    """
    if draws < 1:
        raise ValueError(f"--draws is {draws}: it must be at least 1")
    standardise, generator = Standardise.of(train.rows), torch.Generator().manual_seed(seed)
    known, tested = standardise(train.rows), standardise(test.rows).numpy()
    accuracies = []
    for _ in range(draws):
        shots = draw_shots(train.labels, amount, generator)
        # of many classes each has small gradients from the first step on, which scikit-learn's own tolerance takes for
        # convergence; of ten it is the same
        classifier = LogisticRegression(max_iter=1000, tol=1e-3 / len(train.classes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # separable: the last digits do not decide
            classifier.fit(known[shots].numpy(), train.labels[shots].numpy())
        accuracies.append(float(classifier.score(tested, test.labels.numpy())))
        if len(shots) == len(known):  # all there is: every draw would be the same
            break
    return accuracies
