"""A page of what evaluations found: one HTML file with tables, plots and pictures.

    python training/report.py evaluation/results.json more/results.json --out report.html
    python training/report.py */results.json --features cls+avg --out table.md   # the main figures, for a README

Results on the same images share their tables, those on other images get their own.
"""

import tyro

try:
    from training.report.command import main
except ModuleNotFoundError as error:
    raise SystemExit(f"report.py: {error}: pip install -e '.[evaluate]'") from error

if __name__ == "__main__":
    tyro.cli(main)
