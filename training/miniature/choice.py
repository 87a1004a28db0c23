"""What earlier cells decide about later ones: the weights taken, and the epochs that fit into a time."""

from collections.abc import Iterator
from typing import Any

from training.evaluate.intervals import Interval, paired_interval, unpack_bits
from training.miniature.study import ARMS, CAUSES, CLOCK, FLOORS, REMEDIES, TABLES, Arm, Cell, Part

Results = dict[str, dict[str, Any]]
"""Results by their cells' names."""
FEATURES = "cls+avg"
"""The representation of every figure; of raw pixels, which have no class token, the only one there is."""
ARM_NAMED = {arm.name: arm for arm in ARMS}


def list_figures(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a cell's evaluations, each with the name of the evaluation as `images`."""
    for images, evaluation in result["evaluations"].items():
        able = any(row["features"] == FEATURES for row in evaluation["results"])
        for row in evaluation["results"]:
            if row["features"] in ("", FEATURES) or not able:
                yield {**row, "images": images}


def tuning_row(result: dict[str, Any]) -> dict[str, Any]:
    """The linear probe on the tuning images."""
    (row,) = (row for row in list_figures(result) if (row["images"], row["protocol"]) == ("tuning", "linear"))
    return row


def tuning_figure(result: dict[str, Any]) -> dict[str, float]:
    """The criterion: `mean`, `low` and `high` of the linear probe's accuracy on the tuning images, in [0, 1]."""
    figure: dict[str, float] = tuning_row(result)["value"]
    return figure


def tried(arm: Arm, found: Results) -> list[float] | None:
    """The criterion of every trial of an arm; None until all have run."""
    names = [f"tune-{arm.name}-{number}" for number in range(len(arm.trials))]
    return [tuning_figure(found[name])["mean"] for name in names] if all(name in found for name in names) else None


def choose(arm: Arm, found: Results) -> int | None:
    """The trial that is best on the tuning images, the first of equals; None until all have run."""
    if len(arm.trials) == 1:
        return 0
    accuracies = tried(ARM_NAMED[arm.tried_with] if arm.tried_with else arm, found)
    return None if accuracies is None else accuracies.index(max(accuracies))


def find_sixth(found: Results) -> str | None:
    """The best remedy if it is above both controls and what it was to help; "" if none is; None until all have run."""
    chosen = choose(ARM_NAMED["ls_gan_p"], found)
    names = {arm.name: f"remedy-{arm.name}-0" for arm in REMEDIES} | {"ls_gan_p": f"tune-ls_gan_p-{chosen}"}
    if any(name not in found for name in names.values()):
        return None
    accuracy = {arm: tuning_figure(found[name])["mean"] for arm, name in names.items()}
    remedies = [arm.name for arm in REMEDIES if not arm.control]
    best = max(remedies, key=lambda arm: accuracy[arm])
    return best if all(accuracy[best] > accuracy[arm] for arm in accuracy if arm not in remedies) else ""


def find_default(found: Results) -> str | None:
    """The method whose long run is best by the criterion, the first of equals; None until all have run."""
    results = {arm.name: found.get(f"long-{arm.name}-0") for arm in ARMS if not arm.control}
    accuracy = {name: tuning_figure(result)["mean"] for name, result in results.items() if result}
    return max(accuracy, key=lambda name: accuracy[name]) if len(accuracy) == len(results) else None


def lead(found: Results, default: str) -> dict[str, Interval]:
    """By how much the criterion of the default is above that of every other long run there is, image by image."""
    tests = {}
    for arm in ARMS:
        if result := found.get(f"long-{arm.name}-0"):
            images = result["evaluations"]["tuning"]["data"]["test"]["images"]
            tests[arm.name] = unpack_bits(tuning_row(result)["detail"]["right"], images)
    return {name: paired_interval(tests[default], right) for name, right in tests.items() if name != default}


def fit_epochs(arm: Arm, found: Results) -> float | None:
    """Epochs, to a tenth, that take as long as those of `CLOCK` in the table of equal epochs; None until both ran."""
    table = TABLES["epochs"]
    own, clock = (found.get(f"epochs-{name}-0") for name in (arm.name, CLOCK))
    if own is None or clock is None:
        return None
    return round(table.epochs * clock["cost"]["seconds"] / own["cost"]["seconds"], 1)


def plan(found: Results) -> Iterator[tuple[str, Cell | None]]:
    """Every cell of the study by name, in the order of work; None stands for one that waits for others.

    Args:
        found: Results so far.
    """
    for floor in FLOORS:
        yield f"floor-{floor}-0", Cell(part="floor", arm=floor, number=0)
    rounds: list[tuple[Part, int]] = [("tune", number) for number in range(TABLES["tune"].numbers)]
    rounds += [("remedy", 0), ("epochs", 0), ("cause", 0), ("clock", 0), ("long", 0)]
    rounds += [("epochs", number) for number in range(1, TABLES["epochs"].numbers)]
    rows: dict[Part, tuple[Arm, ...]] = {"remedy": REMEDIES, "cause": CAUSES}
    for part, number in rounds:
        for arm in rows.get(part, ARMS):
            if takes_part(arm, part, number):
                yield f"{part}-{arm.name}-{number}", _cell(part, arm, number, found)


def takes_part(arm: Arm, part: Part, number: int) -> bool:
    """Whether a table has such a cell of an arm."""
    if arm.control and not TABLES[part].controls:
        return False
    if part == "tune":
        return len(arm.trials) > 1 and not arm.tried_with and number < len(arm.trials)
    return part != "clock" or arm.name != CLOCK


def _cell(part: Part, arm: Arm, number: int, found: Results) -> Cell | None:
    trial = number if part == "tune" else choose(arm, found)
    epochs = fit_epochs(arm, found) if part == "clock" else TABLES[part].epochs
    if trial is None or epochs is None:
        return None
    flags = (*arm.trials[trial], *arm.flags)
    return Cell(part=part, arm=arm.name, number=number, method=arm.method, flags=flags, epochs=epochs)
