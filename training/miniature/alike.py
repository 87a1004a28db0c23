"""What the cells of a table must have in common, and what each must share with the plan."""

from typing import Any

from training.miniature.choice import Results, plan
from training.miniature.study import ON_TUNING_IMAGES, Part

TIMED: tuple[Part, ...] = ("epochs", "cause", "clock", "long")
"""Parts whose times are compared."""
SHARED = (
    *("model", "mask_ratio", "batch_size", "blr", "warmup", "weight_decay", "betas", "clip_grad", "ema_decay"),
    *("crop_scale", "decoder_dim", "decoder_heads"),
)
"""What the recipes of all methods have in common."""


def check_alike(found: Results) -> None:
    """Refuse to put figures into one table that do not belong together.

    Raises:
        ValueError: If a cell is not what the study plans, if two cells were judged on different images, by different
            settings or by different networks, or if two learned by recipes that differ in more than the method, with
            different versions or, where their times are compared, on different machines or in different precision.
    """
    check_planned(found)
    known: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, result in found.items():
        part, recipe = result["cell"]["part"], result.get("recipe", {})
        if part in TIMED:
            timed = result["machine"] | {"precision": recipe.get("precision")}
            _note(known, "long" if part == "long" else "epochs", name, timed)
        if recipe:
            _note(known, "recipes", name, {key: recipe[key] for key in SHARED})
            data = {f"data {key}": value for key, value in result["data"].items()}
            _note(known, "tune" if part in ON_TUNING_IMAGES else "pretraining", name, result["versions"] | data)
        for images, evaluation in result["evaluations"].items():
            facts = {f"{part} {key}": value for part in ("data", "settings") for key, value in evaluation[part].items()}
            facts |= {
                f"{row['metric']}'s network of {row['setting']}": row["detail"]["weights"]
                for row in evaluation["results"]
                if row["protocol"] == "reconstruction" and "weights" in row["detail"]
            }
            _note(known, images, name, facts)


def check_planned(found: Results) -> None:
    """Refuse cells of another study.

    Raises:
        ValueError: If a cell's flags, epochs or seed are not those that the plan has for it today.
    """
    planned = dict(plan(found))
    for name, result in found.items():
        cell, recipe = planned.get(name), result.get("recipe", {})
        if name not in planned:
            raise ValueError(f"{name} is no cell of this study: take its file away")
        if cell is None:
            raise ValueError(f"{name} has a result, but cells that decide what it is have none: `--list` names them")
        for what, value, expected in (
            ("flags", sorted(result["cell"]["flags"]), sorted(cell.flags)),
            ("epochs", result["cell"]["epochs"], cell.epochs),
            ("seed", recipe.get("seed", cell.seed), cell.seed),
        ):
            if value != expected:
                raise ValueError(f"{name}: {what} of its result are {value}, of the plan {expected}: run it again")


def _note(known: dict[tuple[str, str], tuple[str, Any]], group: str, name: str, facts: dict[str, Any]) -> None:
    """Note what a cell's figures rest on, or refuse it where another cell of the group differs."""
    for fact, value in facts.items():
        first, expected = known.setdefault((group, fact), (name, value))
        if value != expected:
            raise ValueError(f"{group}: {fact} of {name} is {value}, of {first} {expected}: run one of them again")
