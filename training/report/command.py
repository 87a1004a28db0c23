"""The command `training/report.py`."""

from pathlib import Path
from typing import Annotated

import tyro

from training.report.page import write_report
from training.report.results import read_results


def main(results: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("report.html")) -> None:
    """Write a report.

    Args:
        results: results.json files that training/evaluate.py wrote.
        out: HTML file to write.
    """
    try:
        write_report([(path, read_results(path)) for path in results], out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from error
    print(out)
