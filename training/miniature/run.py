"""Run the study, go on with it, or write its report: see `README.md` beside this file.

    python training/miniature/run.py --data DIR --fashion-mnist DIR          # every cell that has no result yet
    python training/miniature/run.py --data DIR --fashion-mnist DIR --only 'epochs-mae-*' --hours 2
    python training/miniature/run.py --report-only --html report.html         # RESULTS.md of the results there are
    python training/miniature/run.py --list

`--data` holds imagenette-128-{train,val}.tar, cifar10-{train,test}.tar.gz, camvid-240x180.tar and bccd-320x240.tar.
"""

import fnmatch
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import tyro

from perceptual_mae_models.files import replace_text
from training.hub_configs import HERE as HUB_CONFIGS
from training.hub_configs import generate as generate_hub_configs
from training.miniature.alike import check_alike
from training.miniature.cards import fill_cards
from training.miniature.cells import CellError, Place, run_cell
from training.miniature.choice import Results, plan
from training.miniature.curves import draw_curves
from training.miniature.report import CURVES, describe_front, describe_study, list_chapters, list_evaluations
from training.miniature.study import Cell
from training.report.page import write_report as write_page

HERE = Path(__file__).resolve().parent
FINDINGS = "findings.md"
"""What the figures say, by hand; beside results/."""
FRONT_PAGE = HERE.parents[1] / "README.md"
FRONT_TABLE = re.compile(r"(?<=<!-- study -->\n).*?(?=<!-- /study -->)", re.DOTALL)


def read_cells(folder: Path) -> Results:
    """The results in a folder, by cell.

    Raises:
        ValueError: If a file is not a cell's.
    """
    found = {}
    for file in sorted(folder.glob("[!.]*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            name = f"{result['cell']['part']}-{result['cell']['arm']}-{result['cell']['number']}"
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not the result of a cell: {error!r}") from error
        if name != file.stem:
            raise ValueError(f"{file} holds the result of {name}")
        found[name] = result
    return found


def next_cell(found: Results, only: str) -> Cell | None:
    """The first cell of the plan that has no result, waits for none and is asked for."""
    return next(
        (cell for name, cell in plan(found) if cell and name not in found and fnmatch.fnmatch(name, only)), None
    )


def write_report(found: Results, folder: Path) -> Path:
    """Write `RESULTS.md` and its picture into a folder, where somebody's findings may lie; returns the former."""
    if any(result.get("curve") for result in found.values()):
        draw_curves(found, folder / CURVES)
    path, findings = folder / "RESULTS.md", folder / FINDINGS
    said = findings.read_text(encoding="utf-8") if findings.exists() else ""
    path.write_text(describe_study(found, folder, said), encoding="utf-8")
    return path


def write_front(found: Results, page: Path = FRONT_PAGE) -> None:
    """Write the study's table into the front page, between its marks."""
    text = page.read_text(encoding="utf-8")
    page.write_text(FRONT_TABLE.sub(lambda _: describe_front(found), text), encoding="utf-8")


def write_cards(found: Results) -> None:
    """Write what the package and hub_configs/ say of the weights that long runs made."""
    for card in fill_cards(found):
        print(card)
    generate_hub_configs(HUB_CONFIGS)


def list_cells(found: Results) -> Iterator[str]:
    """A line for each cell of the plan."""
    for name, cell in plan(found):
        state = "done" if name in found else "to do" if cell else "waits for others"
        yield f"{name:<28} {state}"


def run_cells(found: Results, place: Place, out: Path, *, only: str, until: float) -> None:
    """Run what is asked for and has no result, writing each result and the report as soon as there is one.

    Args:
        found: Results so far, which grow.
        place: Where the study runs.
        out: Where results/ and the report go.
        only: A pattern of names.
        until: Begin no cell after this time of the monotonic clock.

    Raises:
        CellError: If a command fails.
        ValueError: If the results so far do not belong together.
    """
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    check_alike(found)
    while time.monotonic() < until and (cell := next_cell(found, only)):
        found[cell.name] = run_cell(cell, place)
        replace_text(results / f"{cell.name}.json", json.dumps(found[cell.name], indent=1) + "\n")
        write_report(found, out)


def main(
    data: Path | None = None,
    fashion_mnist: Path | None = None,
    work: Path = Path("runs/miniature"),
    out: Path = HERE,
    processes: int = 2,
    only: str = "*",
    hours: float = float("inf"),
    report_only: bool = False,
    html: Path | None = None,
    list: bool = False,
    shorten: tuple[str, ...] = (),
) -> None:
    """Run the cells that have no result yet, each where it was stopped, and write the report.

    Args:
        data: Folder of the archives of images.
        fashion_mnist: Folder of Fashion-MNIST's four idx files.
        work: Folder for runs, features and weights.
        out: Where results/, RESULTS.md and the picture go.
        processes: Of a pretraining run; a result depends on it by rounding.
        only: Cells to run, as a pattern of their names.
        hours: Begin no cell after so many.
        report_only: Write the report of the results there are.
        html: Write all figures of all cells as a page too.
        list: List the cells and stop.
        shorten: Further flags of every pretraining run, to try the study itself.
    """
    started = time.monotonic()
    try:
        found = read_cells(out / "results")
        if list:
            print("\n".join(list_cells(found)))
            return
        if not report_only:
            if data is None or fashion_mnist is None:
                raise ValueError("give --data and --fashion-mnist, or --report-only, or --list")
            if shorten and out.resolve() == HERE:
                raise ValueError("--shorten is a try, whose results are none of the study's: give another --out")
            place = Place(
                data=data.resolve(),
                fashion=fashion_mnist.resolve(),
                work=work.resolve(),
                processes=processes,
                shorten=shorten,
            )
            run_cells(found, place, out, only=only, until=started + 3600 * hours)
        print(write_report(found, out))
        if out.resolve() == HERE:
            write_front(found)
            write_cards(found)
        if html:
            write_page([*list_evaluations(found)], html, list_chapters(found, out), out)
            print(html)
    except (ValueError, OSError, CellError) as error:
        raise SystemExit(f"run.py: {error}") from error


if __name__ == "__main__":
    tyro.cli(main)
