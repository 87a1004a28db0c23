"""Trained classifiers as `shift.py` judges them: images in, logits out."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perceptual_mae_models.features import FeatureExtractor
from training.data.images import ImageSource
from training.evaluate.corruptions import CorruptedSource
from training.evaluate.features import Features, extract, fingerprint_model
from training.evaluate.linear import Probe, fit_probe
from training.evaluate.rows import Place


@dataclass(frozen=True, kw_only=True)
class Classifiers:
    """Trained classifiers that share a pass over the images.

    Of a fine-tuned network there is one: `logits` reads the source through the network's own transform.
    """

    kind: str
    """How they were trained, such as linear."""
    classes: tuple[str, ...]
    """Names, by column of the logits."""
    logits: Callable[[ImageSource], Mapping[str, Tensor]]
    """Images -> (N, C) float32 on the CPU of each classifier, by its name."""
    fingerprint: str
    """Changes with whatever decides the logits of an image."""
    facts: Mapping[str, dict[str, object]]
    """What to note of each, by its name; of all of them, if only {}."""


def linear_classifiers(
    extractor: FeatureExtractor,
    train: Features,
    representations: Mapping[str, slice],
    place: Place,
    *,
    epochs: int = 100,
    share: float = 0.1,
    seed: int = 0,
) -> Classifiers:
    """A linear probe on each representation, as the protocol `linear` trains them.

    Args:
        extractor: Of the features.
        train: Features to learn from, with the columns of every representation.
        representations: The columns of each.
        place: Features of undamaged sets are kept below it, and shared with the other protocols.
        epochs: Passes over the features.
        share: Of `train` to hold back to choose the learning rate on.
        seed: Decides what is held back, and orders.

    Raises:
        ValueError: If nothing can be held back.
    """
    digest = hashlib.sha256(repr((fingerprint_model(extractor), dict(representations))).encode())
    probes: dict[str, Probe] = {}
    facts: dict[str, dict[str, object]] = {}
    for name, columns in representations.items():
        fitted = fit_probe(train.columns(columns), epochs=epochs, share=share, seed=seed, device=place.device)
        probes[name], facts[name] = fitted.probe, {"learning_rate": fitted.learning_rate}
        standardise = fitted.probe.standardise
        for tensor in (standardise.mean, standardise.deviation, fitted.probe.weight, fitted.probe.bias):
            digest.update(tensor.contiguous().numpy().tobytes())

    def logits(source: ImageSource) -> dict[str, Tensor]:
        cache = None if isinstance(source, CorruptedSource) else place.out / "features"
        workers = place.engine.workers
        rows = extract(extractor, source, batch_size=place.batch_size, workers=workers, cache=cache)  # (N, D)
        return {
            name: torch.cat([probe.logits(part)[:, 0] for part in rows[:, representations[name]].split(8192)])
            for name, probe in probes.items()
        }

    fingerprint = digest.hexdigest()[:16]
    return Classifiers(kind="linear", classes=train.classes, logits=logits, fingerprint=fingerprint, facts=facts)
