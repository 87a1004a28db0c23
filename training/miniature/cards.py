"""The study on the cards of the package's weights: figures of the long runs that made them, and the choice of one."""

import json
from pathlib import Path
from typing import Any

from perceptual_mae_models.files import replace_text
from perceptual_mae_models.vision_transformer_pmae import EMBEDDED
from training.evaluate.intervals import Interval
from training.hub.repository import as_json
from training.hub.results import list_accuracies
from training.miniature.choice import ARM_NAMED, Results, find_default, lead, tuning_figure
from training.miniature.study import ARMS, MODEL

IMAGES = ("imagenette", "cifar10", "fashion-mnist")
"""Evaluations of long runs that cards show; `finetune` has a line of its own on Imagenette's."""


def fill_cards(found: Results, folder: Path = EMBEDDED) -> list[Path]:
    """Write the figures of long runs into the provenance of the weights that they made.

    Args:
        found: Results by their cells' names.
        folder: Where weights lie with their provenance; those of other runs are left as they are.

    Returns:
        The files written.
    """
    written = []
    for arm in ARMS:
        result, file = found.get(f"long-{arm.name}-0"), folder / f"{MODEL}.{arm.name}_imagenette.json"
        if result is None or not file.exists():
            continue
        provenance = json.loads(file.read_text(encoding="utf-8"))
        if provenance.get("weights") not in weights_of(result):
            continue
        evaluations = {name: result["evaluations"][name] for name in (*IMAGES, "finetune")}
        prints = {provenance["weights"]}
        titles = {**{name: name for name in IMAGES}, "finetune": "imagenette"}
        provenance["results"] = [
            row for name, title in titles.items() for row in list_accuracies(evaluations[name], title, prints)
        ]
        provenance["note"] = describe_choice(found, arm.name)
        replace_text(file, as_json(provenance))
        written.append(file)
    return written


def weights_of(result: dict[str, Any]) -> set[str]:
    """Fingerprints of the weights that a cell's evaluations judged."""
    return {
        facts["weights"]
        for evaluation in result["evaluations"].values()
        for facts in evaluation["models"].values()
        if "weights" in facts
    }


def describe_choice(found: Results, arm: str) -> str:
    """What the criterion says of a long run, and whether it tells it from the default."""
    value = Interval(**tuning_figure(found[f"long-{arm}-0"]))
    said = (
        "By linear probe on the tenth of Imagenette's training images that the study chooses by (without their labels"
        f" they were pretrained on): {write(value)}."
    )
    default = find_default(found)
    if default is None:
        return said
    best = Interval(**tuning_figure(found[f"long-{default}-0"]))
    if arm != default:
        return f"{said} The default, `{default}_imagenette`, has {write(best)}."
    return f"{said} {describe_lead(found, default)}"


def describe_lead(found: Results, default: str) -> str:
    """How far the default is above the other methods by the criterion, and whether that is more than chance."""
    ahead = {ARM_NAMED[name]: value for name, value in lead(found, default).items() if not ARM_NAMED[name].control}
    close = [f"`{arm.name}` (by {write(value, 'points')})" for arm, value in ahead.items() if value.low <= 0]
    return "That is the most of the five methods, which makes it the default" + (
        f"; but over the same images its lead is less than its interval over {', '.join(close)}." if close else "."
    )


def write(value: Interval, unit: str = "%") -> str:
    """A share with its interval, in per cent."""
    mean, low, high = (f"{100 * number:.1f}" for number in (value.mean, value.low, value.high))
    return f"{mean} {unit} [{low}, {high}]"
