"""A page of what evaluations found: one HTML file with tables, plots and pictures.

    python training/report.py evaluation/results.json more/results.json --out report.html

Results on the same images share their tables, those on other images get their own.
"""

from pathlib import Path
from typing import Annotated

import tyro

try:
    from training.evaluate.report import write_report
    from training.evaluate.results import read_results
except ModuleNotFoundError as error:
    raise SystemExit(f"report.py: {error}: pip install 'perceptual-mae-models[evaluate]'") from error


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


if __name__ == "__main__":
    tyro.cli(main)
