"""What a model card says of evaluations: the accuracies of some weights in a `results.json`."""

from collections.abc import Mapping
from typing import Any

from training.hub.card import LABELS

FEATURES = "cls+avg"
"""The representation whose figures cards show by default."""
SHOWN_K = "k=20"
"""The number of neighbours that cards show, where it was asked for; else the first."""


def list_accuracies(
    evaluation: Mapping[str, Any], images: str, fingerprints: set[str], features: str = FEATURES
) -> list[dict[str, Any]]:
    """The accuracies of some weights.

    Args:
        evaluation: What `training/evaluate.py` writes.
        images: What to call the images.
        fingerprints: Of the weights, any of them; what the models are called does not matter.
        features: The representation; figures of the whole model come with it.

    Raises:
        ValueError: If there are none.
    """
    models = [name for name, facts in evaluation.get("models", {}).items() if facts.get("weights") in fingerprints]
    if not models:
        raise ValueError(
            f"{images}: no figures of these weights, but of {', '.join(evaluation.get('models', {})) or 'none'}"
        )
    settings = [row["setting"] for row in evaluation["results"] if row["protocol"] == "knn"]
    shown_k = SHOWN_K if SHOWN_K in settings else next(iter(settings), None)
    rows = [
        {
            "images": f"{images} ({evaluation['data']['test']['images']:,} test images)",
            **{key: row[key] for key in ("protocol", "metric", "features", "value")},
            "setting": "" if row["protocol"] == "linear" else row["setting"],
        }
        for row in evaluation["results"]
        if row["model"] == models[0]
        and row["metric"] == "accuracy"
        and row["features"] in ("", features)
        and row["protocol"] in LABELS
        and (row["protocol"] != "knn" or row["setting"] == shown_k)
    ]
    if not rows:
        raise ValueError(f"{images}: no accuracies of {models[0]} with {features} features")
    return rows
