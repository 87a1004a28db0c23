"""The figures that stand for each protocol as one Markdown table, for a README."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.report.results import group_sources, parse, place_figures
from training.report.tables import Cell, Figures, Table, build_table, list_headlines


def markdown_report(found: Sequence[tuple[Path, Any]], features: str = "") -> str:
    """Every data set's summary in one Markdown table, each called as the folder of its results.json.

    Where several have a folder of that name, or one file is about several, the images' names follow.

    Args:
        found: Every `results.json`'s path and content.
        features: The representation to show, of models that have it. Empty: all.

    Raises:
        ValueError: If a file is not what `training/evaluate.py` writes, or contradicts itself, or no model has the
            features.
    """
    groups = group_sources([source for path, content in found for source in parse(path, content)])
    folders = [", ".join(dict.fromkeys(source.path.resolve().parent.name for source in group)) for group in groups]
    placed = [place_figures(group) for group in groups]
    known = {entry.features for figures in placed for entry, _ in figures} - {""}
    if features and features not in known:
        raise ValueError(f"--features {features}: no model has these; there are {', '.join(sorted(known)) or 'none'}")
    tables = []
    for group, folder, figures in zip(groups, folders, placed, strict=True):
        kept = keep_features(figures, features)
        columns = list_headlines(dict.fromkeys(column for _, column in kept))
        title = folder if folders.count(folder) == 1 else f"{folder}: {group[0].title}"
        tables.append((title, build_table(kept, columns, on_side=False)))
    return write_tables(tables, "images")


def keep_features(figures: Figures, features: str) -> Figures:
    """Leave out other representations of the models that have a given one."""
    able = {entry.name for entry, _ in figures if entry.features == features}
    return {
        (entry, column): figure
        for (entry, column), figure in figures.items()
        if entry.features in ("", features) or entry.name not in able
    }


def write_tables(tables: Sequence[tuple[str, Table]], corner: str) -> str:
    """Tables below each other; in one, as long as their columns are the same.

    Args:
        tables: Each with what stands before its first row.
        corner: Heading of these names.
    """
    parts = []
    for _, same in itertools.groupby(tables, key=lambda item: item[1].heads):
        rows = list(same)
        names = [corner, rows[0][1].corner, *_column_names(rows[0][1])]
        lines = [_row(names), _row(["---"] * len(names))]
        for title, table in rows:
            lines += [_row([title if not number else "", *cells]) for number, cells in enumerate(_cells(table))]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _column_names(table: Table) -> Iterator[str]:
    """The heads of all columns, those that span several before each of theirs."""
    lower = iter(table.heads[1] if len(table.heads) > 1 else ())
    for head in table.heads[0]:
        above = " ".join(filter(None, (head.text, *head.notes)))
        if len(table.heads) == 1 or head.rows == 2:
            yield above
        else:
            for _ in range(head.columns):
                below = next(lower)
                yield " ".join(filter(None, (above, below.text, *below.notes)))


def _cells(table: Table) -> Iterator[list[str]]:
    for name, lines in table.groups:
        for line in lines:
            model, _, features = (name, "", line.label) if name else line.label.partition(" · ")
            yield [f"`{model}` {features}".strip(), *map(_write, line.cells)]


def _write(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mean = f"**{cell.mean}**" if cell.mark == "best" else cell.mean
    return f"{mean} {cell.interval}".strip()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
