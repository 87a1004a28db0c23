"""What the cells found, as `RESULTS.md`, as chapters of a page, and as the table of the front page.

Everything in them is made of the cells' JSON files alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.evaluate.intervals import Interval
from training.miniature.alike import check_alike
from training.miniature.cards import describe_lead
from training.miniature.choice import (
    ARM_NAMED,
    FEATURES,
    Results,
    choose,
    find_default,
    find_sixth,
    plan,
    tried,
    tuning_figure,
)
from training.miniature.study import (
    ARMS,
    CLOCK,
    EVALUATIONS,
    MODEL,
    REMEDIES,
    TABLES,
    Part,
)
from training.miniature.tables import (
    COST,
    cells_of,
    differences,
    gather,
    judges_dense,
    judges_features,
    judges_images,
    list_costs,
    list_helped,
    list_untaught,
    tabulate,
)
from training.report.chapters import Chapter, write_chapter
from training.report.markdown import write_tables
from training.report.tables import Column, Entry, Figure, Figures, Table

CURVES, GRID = "curves.png", "../../docs/methods.jpg"
FRONT = (
    Column("knn", "k=20", "accuracy"),
    Column("linear", "", "accuracy"),
    Column("few_shot", "10", "accuracy"),
    Column("reconstruction", "hidden", "l1"),
    Column("reconstruction", "hidden, Lite0", "fd"),
)
"""What the front page of the repository shows of the study."""
FRONT_PARTS: tuple[Part, ...] = ("epochs", "long")
COMPARISONS: tuple[Part, ...] = ("epochs", "cause", "clock", "long")
PICTURES = (
    (
        "While learning",
        "k-NN against images seen and against time",
        CURVES,
        "Equal epochs. k-NN of val images among each other (they are fewer than the training images that the tables "
        "take, so figures are lower), to about ±1.5 points each.",
    ),
    (
        "The same masked photographs, rebuilt",
        "Rows of photographs: as they are, masked, and by each method",
        GRID,
        "None of the runs saw them. Drawn by `training/compare.py`, not by this report.",
    ),
)
"""Chapters of one picture each: title, caption, path from the report, and what it needs to be understood."""
NONE_YET = "No cell of it has run yet."
EPILOGUES: dict[Part, str] = {
    "cause": (
        "`l1_image` has neither of the perceptual terms, `ls_gan_p` both, `no_features` the adversary alone, "
        "`no_adversary` the features alone, of a discriminator that learns to judge but teaches nothing else. "
        "`labelled_phi` takes features of EfficientNet-Lite0, which has learned ImageNet's labels, and is no "
        "method: it shows what better features would give. Distances by that network say nothing of it."
    ),
}
"""What a comparison needs to be understood."""


def compare(found: Results, part: Part) -> Chapter:
    """A comparison: its tables, or that there is none yet."""
    table, cells = TABLES[part], cells_of(found, part)
    if all(result["cell"]["part"] != part for result in cells):
        return Chapter(title=table.title, notes=(NONE_YET,))
    notes = [
        f"Features are `{FEATURES}`; raw pixels have no class token. A row of several seeds is their mean with "
        "Student's 95 % interval. Intervals of a single seed, and of floors, are those of the test images (of "
        "few-shot, of the draws) and hold nothing of what another seed would give. Bold is the best of what can be "
        "compared in a column, floors aside.",
        *explain_helped(cells),
        *explain_untaught(cells),
    ]
    if part in EPILOGUES:
        notes.append(EPILOGUES[part])
    if part == "long" and (default := find_default(found)):
        notes.append(
            f"Best by the criterion, linear probe on the tuning images: `{default}`. {describe_lead(found, default)}"
        )
    tables = []
    for images in EVALUATIONS[part]:
        for shown in (judges_features, judges_images, judges_dense):
            figures = gather(found, part, images, shown)
            if any(column.protocol != COST for _, column in figures):
                tables.append((images, tabulate(figures)))
        if apart := differences(found, part, images, CLOCK):
            tables.append((f"{images}, difference to `{CLOCK}` seed by seed", tabulate(apart)))
    return Chapter(title=table.title, notes=tuple(notes), tables=tuple(tables))


def explain_helped(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Whose reconstructions do not compare with the others."""
    if helped := list_helped(cells):
        yield (
            f"Reconstructions of {', '.join(f'`{arm}`' for arm in helped)} take each patch's mean and contrast from "
            "the original, because its prediction has none: they are not to be compared with those of the others."
        )


def explain_untaught(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Whose reconstructions compare with the others in part."""
    helped = list_helped(cells)
    if untaught := [arm for arm in list_untaught(cells) if arm not in helped]:
        yield (
            f"{', '.join(f'`{arm}`' for arm in untaught)} never learned to rebuild what is visible, a quarter of each "
            "image: it compares with the others on hidden patches, not on whole images."
        )


def describe_tuning(found: Results) -> Chapter:
    """What was tried, on the training images held back, and what was taken."""
    notes = [
        f"{TABLES['tune'].epochs:g} epochs on nine tenths of the training images; linear probe on the last tenth, with "
        "its test's 95 % interval (one seed). The best is taken, the first of equals, by every adversarial method."
    ]
    rows = []
    for arm in ARMS:
        if tried(arm, found) is not None:
            chosen = choose(arm, found)
            for number, flags in enumerate(arm.trials):
                taken = " (taken)" if number == chosen else ""
                rows.append((f"{arm.name}, set {number + 1}{taken}", flags, found[f"tune-{arm.name}-{number}"]))
    if not rows:
        return Chapter(title=TABLES["tune"].title, notes=(*notes, "No method's trials are complete yet."))
    return Chapter(title=TABLES["tune"].title, notes=tuple(notes), tables=(("tuning", judge(rows)),))


def describe_remedies(found: Results) -> Chapter:
    """What was changed to help, on the training images held back."""
    notes = [
        f"As in the table of tuning: {TABLES['remedy'].epochs:g} epochs, linear probe on the tenth held back, with its "
        "test's 95 % interval (one seed)."
    ]
    names = [f"tune-ls_gan_p-{choose(ARM_NAMED['ls_gan_p'], found)}", *(f"remedy-{arm.name}-0" for arm in REMEDIES)]
    rows = [
        (found[name]["cell"]["arm"], tuple(found[name]["cell"]["flags"]), found[name])
        for name in names
        if name in found
    ]
    sixth = find_sixth(found)
    if sixth is not None:
        notes.append(
            f"`{sixth}` is above `ls_gan_p` and both controls, and becomes a sixth method."
            if sixth
            else "No remedy is above `ls_gan_p` and both controls: there is no sixth method."
        )
    if not rows:
        return Chapter(title=TABLES["remedy"].title, notes=(*notes, NONE_YET))
    return Chapter(title=TABLES["remedy"].title, notes=tuple(notes), tables=(("tuning", judge(rows)),))


def judge(rows: Sequence[tuple[str, Sequence[str], dict[str, Any]]]) -> Table:
    """Cells by the criterion, with what they cost.

    Args:
        rows: Names, flags and results.
    """
    figures: Figures = {}
    for name, flags, result in rows:
        entry = Entry(name, " ".join(flags) or "none")
        values = {Column("linear", "", "accuracy"): Interval(**tuning_figure(result))}
        for cost, amount in list_costs(result, 1):
            if cost in ("minutes", "GFLOP an image"):
                values[Column(COST, "", cost)] = Interval(amount, amount, amount)
        for column, value in values.items():
            figures[entry, column] = Figure(entry=entry, column=column, value=value, setting="")
    return tabulate(figures)


def describe_front(found: Results) -> str:
    """The table of the repository's front page: of equal epochs, and of long runs where there are any."""
    tables, cells = [], []
    for part in FRONT_PARTS:
        figures = gather(found, part, "imagenette", lambda column: column in FRONT)
        wanted = {key: figure for key, figure in figures.items() if key[1].metric not in ("epochs", "GFLOP an image")}
        if there := cells_of(found, part):
            tables.append((f"{TABLES[part].epochs:g} epochs", tabulate(wanted)))
            cells += there
    return "\n".join([write_tables(tables, "learned for"), *(f"{note}\n" for note in explain_helped(cells))])


def list_chapters(found: Results, folder: Path) -> list[Chapter]:
    """Everything but the findings.

    Args:
        found: Results by their cells' names.
        folder: Where the report lies; pictures are shown where they are.
    """
    chapters = [*(compare(found, part) for part in COMPARISONS), describe_tuning(found), describe_remedies(found)]
    for title, caption, path, note in PICTURES:
        if (folder / path).exists():
            chapters.append(Chapter(title=title, notes=(note,), pictures=((caption, path),)))
    return chapters


def describe_study(found: Results, folder: Path, findings: str = "") -> str:
    """`RESULTS.md`.

    Args:
        found: Results by their cells' names.
        folder: Where it will lie.
        findings: The chapter that somebody wrote.

    Raises:
        ValueError: If results do not belong together.
    """
    check_alike(found)
    chapters = list_chapters(found, folder)
    return "\n".join([*describe_state(found), *([findings] if findings else []), *map(write_chapter, chapters)])


def describe_state(found: Results) -> Iterator[str]:
    """What this is, how much of it there is, and where it ran."""
    yield "# The paper's table in miniature: results\n"
    yield (
        "Made by `python training/miniature/run.py --report-only` of the files in `results/`; "
        "[the protocol](README.md) says what they are.\n"
    )
    planned = [name for name, _ in plan(found)]
    missing = [name.partition("-")[0] for name in planned if name not in found]
    machines = dict.fromkeys(name_machine(result["machine"]) for result in found.values())
    state = f"{len(planned) - len(missing)} of {len(planned)} cells of `{MODEL}` have run"
    state += f", on: {'; '.join(machines)}." if machines else "."
    if missing:
        state += f" Missing: {', '.join(f'{missing.count(part)} of {part}' for part in dict.fromkeys(missing))}."
    yield f"{state}\n"


def name_machine(machine: dict[str, str]) -> str:
    """A processor, and which instructions it has: there are several of one name."""
    return f"{machine['processor']} ({machine['capability']})"


def list_evaluations(found: Results) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What `training/report` makes a page of: every cell's evaluations, without pictures, which no file here holds."""
    for name, result in found.items():
        for images, evaluation in result["evaluations"].items():
            rows = [
                {**row, "detail": {key: value for key, value in row["detail"].items() if key != "picture"}}
                for row in evaluation["results"]
            ]
            yield Path(name, images, "results.json"), {**evaluation, "results": rows}
