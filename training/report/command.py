"""The command `training/report.py`."""

from pathlib import Path
from typing import Annotated

import tyro

from training.report.markdown import markdown_report
from training.report.page import write_report
from training.report.results import read_results


def main(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("report.html"), features: str = ""
) -> None:
    """Write a report.

    Args:
        results: results.json files that training/evaluate.py wrote.
        out: File to write: all figures as .html, or those that stand for each protocol as a table in .md.
        features: Representation that the table shows (avg, cls, cls+avg) of models that have it; by default all.
    """
    try:
        found = [(path, read_results(path)) for path in results]
        if out.suffix == ".md":
            out.write_text(markdown_report(found, features), encoding="utf-8")
        elif features:
            raise ValueError("--features chooses rows of a table: give --out a name that ends in .md")
        else:
            write_report(found, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from error
    print(out)
