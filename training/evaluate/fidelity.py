"""How like photographs reconstructions are as a set: Frechet and kernel distances, and a score of their classes.

| with Inception (`--reconstruction.inception`) | with any timm network (`--reconstruction.networks`) | |
|---|---|---|
| `fid` | `fd` | Frechet distance of normal distributions fitted to the features (Heusel et al. 2017, 1706.08500) |
| `kid` | `kd` | squared maximum mean discrepancy, polynomial kernel (Binkowski et al. 2018, 1801.01401) |
| `inception_score` | `score` | exp of what an image tells of its class (Salimans et al. 2016, 1606.03498) |

The statistics are torch-fidelity's. FID, KID and Inception Score mean one network with one set of weights; figures of
another one are called otherwise, carry its name, and compare with figures of that same network alone.

What to keep in mind: Frechet distances fall with the number of images, most below the width of the features, so only
those over equally many images compare; they have no interval here, as resampled images would raise them. Originals and
reconstructions are pairs, for which kernel distances are a little too low, and below 0 at perfection. Scores see no
original: that of the originals is the one to compare with.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor

from perceptual_mae_models.reconstruction import Views
from training.data.images import ImageSource
from training.evaluate.feature_networks import FeatureNetwork, check_installed, open_inception, open_network
from training.evaluate.features import fingerprint_data, fingerprint_weights
from training.evaluate.intervals import Interval, sample_interval
from training.evaluate.models import open_autoencoder
from training.evaluate.reconstruction import draw_reconstructions, measure_reconstruction, spread
from training.evaluate.rows import Place, Row
from training.evaluate.trainer import run_name
from training.run.seeding import derive_seed

LEAST_IMAGES = 20
SPLITS = 10
"""Parts that a score is the mean of, as in Salimans et al."""
SUBSETS, SUBSET_IMAGES = 100, 1000
"""Draws that a kernel distance is the mean of, and the most images of each."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
    """Which images to rebuild, and by which networks to judge them as a set."""

    networks: tuple[str, ...] = ()
    """timm networks, named as models are, for Frechet and kernel distances (fd, kd) and, with a classifier, scores."""
    inception: str | None = None
    """For FID, KID and Inception Score: weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or download."""
    images: int | None = None
    """Rebuild so many of the test images, evenly spaced over them. None: all."""


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means and covariances.

    Args:
        one: (N, D).
        other: (M, D).
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    one, other = one.double(), other.double()
    if len(one) + len(other) < one.shape[1]:
        # turned into the span of both sets, which changes no distance and makes the matrices small
        basis = torch.linalg.qr(torch.cat([one, other]).T).Q  # (D, N + M)
        one, other = one @ basis, other @ basis
    statistics = (fid_features_to_statistics(features) for features in (one, other))
    distance: float = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    return distance


def kernel_distance(one: Tensor, other: Tensor, *, subset: int, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x y / D + 1)^3, the mean of draws of so many images.

    Args:
        one: (N, D).
        other: (M, D).
        subset: Images a draw, at most N and M.
        seed: Decides the draws.

    Returns:
        The mean over the draws, and the standard deviation of a draw; draws overlap, so no interval follows from it.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        one.double(), other.double(), kid_subsets=SUBSETS, kid_subset_size=subset, rng_seed=_seed(seed), verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def class_score(logits: Tensor, *, seed: int = 0) -> Interval:
    """The exponential of the mean divergence of an image's classes from the mean image's, in ten parts of a set.

    Args:
        logits: (N, C).
        seed: Decides the parts.

    Returns:
        The mean over the parts, with Student's interval.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=_seed(seed))
    # its deviation is the biased one
    half = float(student.ppf(0.975, SPLITS - 1)) * found[KEY_METRIC_ISC_STD] / math.sqrt(SPLITS - 1)
    mean = found[KEY_METRIC_ISC_MEAN]
    return Interval(mean, mean - half, mean + half)


def _seed(seed: int) -> int:
    return derive_seed(seed, "fidelity") % 2**32  # NumPy's limit


class Responses:
    """What a network says of sets of images that come batch by batch; of an image its features and logits are kept."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.features: dict[str, list[Tensor]] = {}
        self.logits: dict[str, list[Tensor]] = {}
        self.seconds = 0.0
        """Spent so far."""

    def add(self, batches: Mapping[str, Tensor]) -> None:
        """Look at images.

        Args:
            batches: (N, 3, H, W) in [0, 1] by the name of the set; rounded to 8 bits as files are.

        Raises:
            ValueError: If features or logits are not finite.
        """
        started = time.monotonic()
        for name, images in batches.items():
            said = self.network.respond((images * 255).round().to(torch.uint8))
            for values, kept in zip(said, (self.features, self.logits), strict=True):
                if values is None:
                    continue
                if not values.isfinite().all():
                    label = self.network.name or "Inception"
                    raise ValueError(f"{label} gives features or logits that are not finite: damaged weights")
                kept.setdefault(name, []).append(values.float().cpu())
        self.seconds += time.monotonic() - started

    def watch(self, images: Tensor, views: Views) -> None:
        """Look at originals and reconstructions."""
        self.add({"original": images, "hidden": views.pasted, "image": views.rebuilt})

    def rows(self, *, seed: int = 0) -> list[Row]:
        """Distances of every other set from `original`, and the score of each.

        Args:
            seed: Decides draws and parts.
        """
        started = time.monotonic()
        frechet, kernel, score = self.network.metrics
        features = {name: torch.cat(kept) for name, kept in self.features.items()}
        original = features.pop("original")
        images, width = original.shape
        subset, part = min(SUBSET_IMAGES, images // 2), images // SPLITS
        found: list[tuple[str, str, Interval, dict[str, object]]] = []
        without = {} if self.logits else {score: "left out: the network has no classifier"}
        parts = {"interval": f"Student's, over {SPLITS} parts of {part} images"}
        for place, made in features.items():
            distance = frechet_distance(original, made)
            found.append((place, frechet, Interval(distance, distance, distance), {"interval": "none", **without}))
            value, deviation = kernel_distance(made, original, subset=subset, seed=seed)
            draws = {"interval": "none", "draws": f"{SUBSETS} of {subset} images", "deviation_of_a_draw": deviation}
            found.append((place, kernel, Interval(value, value, value), draws))
        for place, logits in self.logits.items():
            found.append((place, score, class_score(torch.cat(logits), seed=seed), dict(parts)))
        common = {"images": images, "width": width, "weights": fingerprint_weights(self.network.module)}
        suffix = f", {self.network.name}" if self.network.name else ""
        self.seconds += time.monotonic() - started
        return [
            Row(
                protocol="reconstruction",
                setting=place + suffix,
                metric=metric,
                value=value,
                seconds=self.seconds,
                detail={**common, **detail},
            )
            for place, metric, value, detail in found
        ]


def open_judges(settings: ReconstructionSettings, images: int, seed: int, device: str) -> list[Responses]:
    """The networks that settings ask for.

    Args:
        settings: The settings.
        images: How many there are.
        seed: Decides random weights.
        device: Where they run.

    Raises:
        ValueError: If a name means nothing, weights are of something else or images are too few.
        FileNotFoundError: If weights are missing.
        RuntimeError: If torch-fidelity is not installed.
    """
    if not settings.networks and settings.inception is None:
        return []
    check_installed()
    count = len(spread(images, settings.images))
    if count < LEAST_IMAGES:
        raise ValueError(f"sets of {count} images say nothing: --reconstruction.networks needs {LEAST_IMAGES}")
    networks = [open_network(name, device=device, seed=seed) for name in settings.networks]
    if settings.inception is not None:
        networks.append(open_inception(settings.inception, device=device))
    return [Responses(network) for network in networks]


def run_reconstruction(
    name: str, images: ImageSource, settings: ReconstructionSettings, seed: int, place: Place
) -> Iterator[Row]:
    """Reconstructions of the test images: each against its original, and all of them as a set.

    Args:
        name: A model with a decoder, see `open_autoencoder`.
        images: What to rebuild.
        settings: See there.
        seed: Decides masks, draws and random weights.
        place: Where the picture goes.

    Raises:
        ValueError: If there is no decoder, settings do not fit the images, or something is not finite.
        FileNotFoundError: If weights are missing.
        RuntimeError: If torch-fidelity is asked for and not installed.
        ImageError: At an image that does not decode.
    """
    network, recipe = open_autoencoder(name)
    network.to(place.device)
    judges = open_judges(settings, len(images), seed, place.device)
    started = time.monotonic()
    measured = measure_reconstruction(
        network,
        recipe,
        images,
        numbers=spread(len(images), settings.images),
        seed=seed,
        batch_size=place.batch_size,
        workers=place.engine.workers,
        watchers=[judge.watch for judge in judges],
    )
    seconds = time.monotonic() - started - sum(judge.seconds for judge in judges)
    drawn = {"recipe": {"model": name, "seed": seed}, "data": fingerprint_data(images)}
    picture = Path("pictures") / f"{run_name('reconstruction', drawn)}.png"
    (place.out / picture).parent.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(name, network, recipe, images, seed=seed).save(place.out / picture)
    detail: dict[str, object] = {
        "images": len(next(iter(measured.values()))),
        "mask_ratio": network.mask_ratio,
        "norm_pix_loss": recipe.norm_pix_loss,
        "picture": str(picture),
    }
    for (where, metric), values in measured.items():
        value = sample_interval(values)
        yield Row(protocol="reconstruction", setting=where, metric=metric, value=value, seconds=seconds, detail=detail)
    for judge in judges:
        for row in judge.rows(seed=seed):
            yield replace(row, detail={**row.detail, "norm_pix_loss": recipe.norm_pix_loss})
