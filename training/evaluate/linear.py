"""Linear probe: how far a hyperplane a class gets on frozen features (He et al. 2022, appendix A.1).

As in MAE, features pass a batch normalisation without affine part; they do not change here, so its statistics are
those of the whole training set. As in DINOv2, heads with many learning rates are trained side by side; the best one on
a held-back part of the training images is trained anew on all of them and meets the test images once.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.evaluate.features import Features
from training.evaluate.split import hold_back

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Peak rates of batches of 256 images; other batches learn in proportion to their size."""
LEAST_STEPS = 1000
"""Few images need as many steps as many do."""


@dataclass(frozen=True)
class Standardise:
    """Brings every column to zero mean and unit variance."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Standardise":
        """With the statistics of (N, D) rows; constant columns become zero."""
        return cls(rows.mean(dim=0), (rows.var(dim=0, unbiased=False) + 1e-6).sqrt())

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (rows - self.mean) / self.deviation


@dataclass(frozen=True)
class Probe:
    """Heads side by side, one a learning rate."""

    standardise: Standardise
    weight: Tensor
    """(D, R * C)."""
    bias: Tensor
    """(R * C,)."""
    num_heads: int

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, R, C)."""
        return (self.standardise(rows) @ self.weight + self.bias).unflatten(1, (self.num_heads, -1))


def train_probe(
    features: Features,
    rates: tuple[float, ...],
    *,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "cpu",
) -> Probe:
    """Train a head for each learning rate: cross-entropy, SGD with momentum 0.9, half-cosine, no weight decay.

    Args:
        features: What to learn from.
        rates: Peak learning rates of 256 images a step.
        epochs: Passes over the features; more where they would take less than `LEAST_STEPS`.
        batch_size: Rows a step; the rates grow with it.
        seed: Decides the order; the heads start at zero.
        device: Where the heads are; features stay where they are, batches go there.
    """
    standardise, classes = Standardise.of(features.rows), len(features.classes)
    rows = standardise(features.rows)
    batch_size = min(batch_size, len(rows))
    head = nn.Linear(rows.shape[1], len(rates) * classes)  # all heads, one below the other
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.to(device)
    steps_an_epoch = len(rows) // batch_size
    epochs = max(epochs, math.ceil(LEAST_STEPS / steps_an_epoch))
    # a head's rate is a factor of its loss, and one optimiser with rate 1 serves all
    factors = (torch.tensor(rates) * batch_size / 256).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_an_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator)
        for batch in order.split(batch_size)[:steps_an_epoch]:
            logits = head(rows[batch].to(device)).view(-1, classes)  # (n * R, C)
            target = features.labels[batch].to(device).repeat_interleave(len(rates))  # (n * R,)
            losses = F.cross_entropy(logits, target, reduction="none").view(-1, len(rates)).mean(dim=0)  # (R,)
            optimizer.zero_grad(set_to_none=True)
            (losses * factors).sum().backward()
            optimizer.step()
            scheduler.step()
    head.cpu()
    return Probe(standardise, head.weight.detach().T.contiguous(), head.bias.detach(), len(rates))


def judge(probe: Probe, features: Features, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """(R, N) whether each head is right, and (R, N) its cross-entropies; wrong and infinite for logits not finite."""
    right, losses = [], []
    for rows, labels in zip(features.rows.split(chunk), features.labels.split(chunk), strict=True):
        logits = probe.logits(rows)
        finite = logits.isfinite().all(dim=2)
        right.append((logits.argmax(dim=2) == labels[:, None]) & finite)
        loss = F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand_as(finite), reduction="none")
        losses.append(loss.masked_fill(~finite, torch.inf))
    return torch.cat(right).T, torch.cat(losses).T


def choose(right: Tensor, losses: Tensor) -> int:
    """The head of the lowest cross-entropy among those whose accuracy is within a standard error of the best.

    A few hundred images held back cannot tell accuracies apart by less.

    Args:
        right: (R, N), as `judge` gives it.
        losses: (R, N).
    """
    accuracies = right.double().mean(dim=1)
    best = accuracies.max()
    error = (best * (1 - best) / right.shape[1]).sqrt()
    return int(losses.double().mean(dim=1).masked_fill(accuracies < best - error, torch.inf).argmin())


@dataclass(frozen=True)
class FittedProbe:
    """A head whose learning rate was chosen."""

    probe: Probe
    """That one head."""
    learning_rate: float
    held_back_accuracy: dict[float, float]
    """In [0, 1], by learning rate; see `choose` for how one is chosen."""


def fit_probe(
    train: Features,
    *,
    rates: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 100,
    share: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
) -> FittedProbe:
    """Choose a learning rate on a held-back part of `train`, train on all of it.

    Args:
        train: Features to learn from.
        rates: To choose from.
        epochs: Passes over the features.
        share: Of `train` to hold back.
        seed: Decides what is held back, and orders.
        device: Where heads are trained.

    Raises:
        ValueError: If nothing can be held back.
    """
    fit, held = hold_back(train, share, seed)
    sweep = train_probe(train.take(fit), rates, epochs=epochs, seed=seed, device=device)
    right, losses = judge(sweep, train.take(held))
    best = rates[choose(right, losses)]
    probe = train_probe(train, (best,), epochs=epochs, seed=seed, device=device)
    by_rate = dict(zip(rates, right.double().mean(dim=1).tolist(), strict=True))
    return FittedProbe(probe, best, by_rate)
