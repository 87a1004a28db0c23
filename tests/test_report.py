"""The report: every figure in its place, nothing from elsewhere, nothing lost, the same bytes from the same results."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from PIL import Image

from training.evaluate.intervals import Interval
from training.report.command import main
from training.report.markdown import markdown_report
from training.report.page import write_report
from training.report.plots import draw_swatch
from training.report.results import read_results
from training.report.tables import Entry, rank

ROOT = Path(__file__).parents[1]
OURS, RANDOM = "vit_pico_patch8_pmae", "vit_pico_patch8_pmae@random"
LARGE = 'hf-hub:timm/"large" & <script>alert(1)</script>'
VOID = {"meta", "img", "br", "link", "use"}


# --- results, made up ------------------------------------------------------------------------------------------------


def result(
    model: str,
    protocol: str,
    setting: str,
    mean: float,
    *,
    metric: str = "accuracy",
    features: str = "",
    half: float = 0.02,
    **detail: object,
) -> dict[str, Any]:
    value = {"mean": mean, "low": mean - half, "high": mean + half}
    row = {"model": model, "features": features, "protocol": protocol, "setting": setting, "metric": metric}
    return {**row, "value": value, "seconds": 1.5, "detail": detail, "fingerprint": f"print of {model}"}


def content(results: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    return {
        "data": {
            "train": {"name": "shapes-train", "images": 1600, "fingerprint": "aaaa"},
            "test": {"name": "shapes-val", "images": 400, "fingerprint": "bbbb"},
        },
        "settings": {"k": [10, 20], "seed": 0},
        "versions": {"torch": "2.15.0"},
        "results": results,
        **more,
    }


def frozen(model: str, base: float) -> list[dict[str, Any]]:
    """Every protocol on features, with figures that are all different."""
    found = []
    for shift, features in enumerate(("cls", "avg")):
        start = base + shift / 100
        found += [result(model, "knn", f"k={k}", start + k / 1e4, features=features) for k in (10, 20)]
        found.append(result(model, "linear", f"lr={shift + 1}", start + 0.2, features=features, held_back={"1": 0.5}))
        for place, amount in enumerate(("1%", "10%", "5", "50")):
            mean = start + 0.01 + place / 20
            found.append(result(model, "few_shot", amount, mean, features=features, accuracies=[mean, mean]))
        found.append(result(model, "shift", "clean", start + 0.2, features=features))
        for name in ("fog", "noise", "blur"):
            for severity in range(1, 6):
                mean = start + 0.2 - severity / 50 - len(name) / 1000
                found.append(result(model, "shift", f"{name}/{severity}", mean, features=features))
        found.append(result(model, "shift", "corruptions/mean", start + 0.14, features=features))
    return found


def whole(model: str, base: float) -> list[dict[str, Any]]:
    """Every other protocol."""
    found = [result(model, "finetune", "30 epochs", base + 0.3)]
    for place, metric in enumerate(("l1", "psnr", "ssim", "ms_ssim")):
        found.append(result(model, "reconstruction", "hidden", base + place, metric=metric))
        found.append(result(model, "reconstruction", "image", base + place + 0.5, metric=metric))
    for mode, more in (("frozen", 0.0), ("fine_tuned", 0.1)):
        found += [result(model, "segmentation", mode, base + more, metric=name) for name in ("miou", "pixel_accuracy")]
        found += [result(model, "detection", mode, base + more + 0.01, metric=name) for name in ("box_ap", "box_ap50")]
    found.append(result(model, "tomorrow's", "any", base, metric="loss of <b>something</b>"))
    return found


def everything() -> dict[str, Any]:
    """A results.json of every protocol."""
    made = content([row for n, name in enumerate((OURS, LARGE)) for row in frozen(name, 0.3 + n / 7)])
    made["results"] += [row for n, name in enumerate((OURS, LARGE)) for row in whole(name, 0.4 + n / 9)]
    made["data"] |= {"segmentation": {"name": "roads.tar"}, "detection": {"name": "cells.tar"}}
    made["models"] = {name: {"parameters": 5_400_000 * n, "gflop": 0.35 * n} for n, name in enumerate((OURS, LARGE), 1)}
    return made


# --- reading the page ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that elements nest, and keeps tags, text and tables.

    Args:
        path: The HTML file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[dict[str, str]]]] = {}
        self.table, self.cell = "", dict[str, str]()
        self.feed(self.source)
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {key: value or "" for key, value in attrs}
        self.tags.append((tag, facts))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = facts["aria-labelledby"]
            assert self.table not in self.tables
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.cell = {"text": "", "class": "", **facts}
            self.tables[self.table][-1].append(self.cell)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell["text"] = " ".join(self.cell["text"].split())
            self.cell = {}

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.cell:
            self.cell["text"] += data

    def grid(self, name: str) -> dict[tuple[str, str, str], dict[str, str]]:
        """Filled cells by heading of rows, row and column, laid out as browsers do."""
        rows, placed = self.tables[name], dict[tuple[int, int], str]()
        depth = int(rows[0][0].get("rowspan", 1))
        for y, row in enumerate(rows[:depth]):
            for cell in row:
                x = next(x for x in range(1000) if (y, x) not in placed)
                height, width = int(cell.get("rowspan", 1)), int(cell.get("colspan", 1))
                placed |= {(y + dy, x + dx): cell["text"] for dy in range(height) for dx in range(width)}
        width, group, found = len({x for _, x in placed}), "", {}
        for row in rows[depth:]:
            if row[0]["scope"] == "rowgroup":
                group = row[0]["text"]
                assert int(row[0]["colspan"]) == width
                continue
            assert len(row) == width
            for x, cell in enumerate(row[1:], start=1):
                column = " | ".join(dict.fromkeys(placed[y, x] for y in range(depth)))
                assert (group, row[0]["text"], column) not in found
                found[group, row[0]["text"], column] = cell
        return {key: cell for key, cell in found.items() if cell["class"] != "none"}

    def shown(self, name: str) -> dict[tuple[str, str, str], str]:
        """The same, as text."""
        return {key: cell["text"] for key, cell in self.grid(name).items()}


def write(folder: Path, *contents: dict[str, Any]) -> Page:
    """The report of some results, which stand in folders of their own."""
    paths = []
    for number, made in enumerate(contents):
        paths.append(folder / str(number) / "results.json")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(json.dumps(made))
    write_report([(path, read_results(path)) for path in paths], folder / "report.html")
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write(tmp_path_factory.mktemp("report"), everything())


# --- tables ----------------------------------------------------------------------------------------------------------


def test_headlines_are_in_their_cells(page: Page) -> None:
    shown = page.shown("summary-1")
    assert shown[OURS, "cls", "k-NN k=20 accuracy, %"] == "30.2 [28.2, 32.2]"
    assert shown[OURS, "avg", "linear accuracy, %"] == "51.0 [49.0, 53.0]"
    assert shown[LARGE, "cls", "few-shot accuracy, % | 1%"] == "45.3 [43.3, 47.3]"
    assert shown[LARGE, "avg", "few-shot accuracy, % | 50"] == "61.3 [59.3, 63.3]"
    assert shown[LARGE, "whole model", "fine-tuning 30 epochs accuracy, %"] == "81.1 [79.1, 83.1]"
    assert shown[OURS, "whole model", "reconstruction hidden | PSNR, dB"] == "1.40 [1.38, 1.42]"
    assert shown[OURS, "whole model", "reconstruction hidden | L1 ↓"] == "0.400 [0.380, 0.420]"
    assert shown[OURS, "cls", "shifted images accuracy, % | corruptions/mean"] == "44.0 [42.0, 46.0]"
    assert shown[LARGE, "whole model", "tomorrow's any loss of <b>something</b>"] == "0.511 [0.491, 0.531]"
    columns = {column for _, _, column in shown}
    assert len(columns) == 12, "k = 20 alone, no single corruption, L1 and PSNR of what was hidden"
    # what has images of its own stands apart, with a row a model
    assert page.shown("summary-3")["", OURS, "detection box AP, % | frozen"] == "41.0 [39.0, 43.0]"
    assert page.shown("summary-2")["", LARGE, "segmentation mIoU, % | fine_tuned"] == "61.1 [59.1, 63.1]"


def test_every_figure_is_in_one_cell_of_its_protocol(page: Page) -> None:
    names = [name for name in page.tables if re.fullmatch(r"protocol-\d+-\d+", name)]
    shown = sorted(re.sub(r" lr=\d$", "", text) for name in names for text in page.shown(name).values())
    scales = {"psnr": (1, 2), **dict.fromkeys(("l1", "ssim", "ms_ssim", "loss of <b>something</b>"), (1, 3))}
    expected = []
    for row in everything()["results"]:
        scale, digits = scales.get(row["metric"], (100, 1))
        mean, low, high = (f"{scale * row['value'][key]:.{digits}f}" for key in ("mean", "low", "high"))
        expected.append(f"{mean} [{low}, {high}]")
    assert shown == sorted(expected)
    everywhere = {key: text for name in names for key, text in page.shown(name).items()}
    assert everywhere[OURS, "avg", "linear accuracy, %"] == "51.0 [49.0, 53.0] lr=2"
    assert everywhere[OURS, "cls", "k-NN accuracy, % | k=10"] == "30.1 [28.1, 32.1]"
    assert everywhere["", OURS, "reconstruction | image · SSIM"] == "2.900 [2.880, 2.920]"
    assert everywhere["noise", "3", f"{LARGE} | avg"] == "58.8 [56.8, 60.8]", "many columns have become rows"


def test_what_borrows_from_the_original_leads_no_column(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    rows = [
        result(model, "reconstruction", "hidden", mean, metric="l1", half=0.001, norm_pix_loss=helped)
        for model, mean, helped in ((OURS, 0.1, True), (RANDOM, 0.2, False), (LARGE, 0.3, False))
    ]
    file.write_text(json.dumps(content(rows)))
    text = markdown_report([(file, read_results(file))])
    assert "**0.200**" in text
    assert "**0.100**" not in text
    assert "0.100" in text


def test_the_best_and_what_overlaps_it(tmp_path: Path) -> None:
    rows = [result(name, "knn", "k=20", mean, features="avg") for name, mean in (("a", 0.5), ("b", 0.53), ("c", 0.6))]
    rows += [result(name, "knn", "k=10", mean, features="avg") for name, mean in (("a", 0.5), ("b", 0.47), ("c", 0.44))]
    rows += [result(name, "reconstruction", "hidden", mean, metric="l1") for name, mean in (("a", 0.3), ("b", 0.2))]
    rows += [result(name, "new", "x", mean, metric="strange") for name, mean in (("a", 0.3), ("b", 0.2))]
    rows += [result(n, "few_shot", "5", mean, half=h) for n, mean, h in (("a", 0.3, 0.0), ("b", 0.2, 0.5))]
    rows += [result("a", "finetune", "1 epochs", 0.9)]
    page = write(tmp_path, content(rows))
    marks = {
        key: cell["class"]
        for name in page.tables
        if "costs" not in name and name != "models"
        for key, cell in page.grid(name).items()
    }
    knn = {key[1]: mark for key, mark in marks.items() if key[2].endswith("k=20")}
    assert knn == {"a · avg": "", "b · avg": "", "c · avg": "best"}
    assert [mark for key, mark in marks.items() if key[2].endswith("k=10")] == ["best", "close", ""]
    assert [mark for key, mark in marks.items() if "L1" in key[2] and not key[0]] == ["", "best"], "less is better"
    assert {mark for key, mark in marks.items() if "strange" in key[2]} == {""}, "nobody knows which way is better"
    assert [mark for key, mark in marks.items() if "few-shot" in key[2] and not key[0]] == ["best", ""]
    assert {mark for key, mark in marks.items() if "fine-tuning" in key[2]} == {""}, "best of one"
    assert "30.0 no interval" in page.shown("summary-1").values()


def test_many_settings_become_rows(tmp_path: Path) -> None:
    settings = [f"fog/{n}" for n in range(1, 13)] + ["hidden, hf-hub:timm/some"]
    page = write(tmp_path, content([result("a", "shift", setting, 0.3) for setting in settings]))
    shown = page.shown("protocol-1-1")
    assert [key[:2] for key in shown] == [("", settings[-1]), *(("fog", str(n)) for n in range(1, 13))]
    assert {column for _, _, column in shown} == {"a | whole model"}
    assert page.tables["protocol-1-1"][0][0]["text"] == "accuracy, %"


def test_rank_agrees_with_the_definition() -> None:
    entries = [Entry(name, "") for name in "abcd"]
    intervals = Interval(5, 4, 6), Interval(7, 6, 8), Interval(3, 2, 5.9), Interval(7, 7, 7)
    values = dict(zip(entries, intervals, strict=True))
    assert list(rank(values, "higher").values()) == ["close", "best", "", "best"]
    assert list(rank(values, "lower").values()) == ["close", "", "best", ""]


# --- several files ---------------------------------------------------------------------------------------------------


def test_files_on_the_same_images_share_tables(tmp_path: Path) -> None:
    a = content([result(OURS, "knn", "k=20", 0.4, features="avg")])
    b = content([result(RANDOM, "knn", "k=20", 0.2, features="avg"), *a["results"]])
    rebuilt = content([result(OURS, "reconstruction", "hidden", 0.1, metric="l1")])
    del rebuilt["data"]["train"]
    other = content([result(OURS, "knn", "k=20", 0.9, features="avg")])
    other["data"]["test"] = {"name": "elsewhere", "images": 12345, "fingerprint": "cccc"}
    page = write(tmp_path, a, b, rebuilt, other)
    assert sorted(page.tables) == sorted(
        {"models", "summary-1", "summary-2"}
        | {f"protocol-{n}{costs}" for n in ("1-1", "1-2", "2-1") for costs in ("", "-costs")}
    )
    shown = page.shown("summary-1")
    assert shown == {
        (OURS, "avg", "k-NN k=20 accuracy, %"): "40.0 [38.0, 42.0]",
        (OURS, "whole model", "reconstruction hidden L1 ↓"): "0.100 [0.080, 0.120]",
        (RANDOM, "avg", "k-NN k=20 accuracy, %"): "20.0 [18.0, 22.0]",
    }
    assert page.shown("summary-2") == {("", f"{OURS} · avg", "k-NN k=20 accuracy, %"): "90.0 [88.0, 92.0]"}
    assert "elsewhere, 12,345 images" in page.text
    assert "shapes-train, 1,600 images · fingerprint aaaa" in page.text
    assert "may not be comparable" not in page.text


def test_other_weights_or_figures_by_the_same_name_stay_apart(tmp_path: Path) -> None:
    a, b = (content([result(OURS, "knn", "k=20", mean, features="avg")]) for mean in (0.4, 0.5))
    page = write(tmp_path, a, b)
    rows = [row for _, row, _ in page.shown("summary-1")]
    assert rows == [f"{OURS} ({tmp_path / str(n) / 'results.json'}) · avg" for n in (0, 1)]
    b = copy.deepcopy(a)
    b["results"][0]["fingerprint"] = "of other weights"
    assert len(write(tmp_path, a, b).shown("summary-1")) == 2
    assert len(write(tmp_path, a, copy.deepcopy(a)).shown("summary-1")) == 1
    for file, weights in ((a, "aaaa"), (b, "bbbb")):
        file["results"] = [result(OURS, "finetune", f"{weights} epochs", 0.4)]  # of which only the file says whose
        del file["results"][0]["fingerprint"]
        file["models"] = {OURS: {"weights": weights}}
    assert len(write(tmp_path, a, b).shown("summary-1")) == 2
    b["models"][OURS]["weights"], a["results"] = "aaaa", [result(OURS, "segmentation", "", 0.4, metric="miou")]
    assert {row for _, row, _ in write(tmp_path, a, b).shown("summary-1")} == {OURS}


def test_other_settings_are_told(tmp_path: Path) -> None:
    a, b = content([result("a", "linear", "lr=1", 0.4)]), content([result("b", "linear", "lr=1", 0.5)])
    b["settings"]["epochs"], a["settings"]["epochs"] = 20, 100
    page = write(tmp_path, a, b)
    assert "may not be comparable" in page.text
    assert f"epochs: 100 in {tmp_path / '0/results.json'}; 20 in {tmp_path / '1/results.json'}" in page.text


def test_one_file_does_not_say_two_things(tmp_path: Path) -> None:
    rows = [result("a", "knn", "k=20", mean) for mean in (0.4, 0.5)]
    with pytest.raises(ValueError, match=r"results.json says two things about a, knn k=20 accuracy"):
        write(tmp_path, content(rows))
    assert len(write(tmp_path, content([rows[0], rows[0]])).shown("summary-1")) == 1


def test_duplicates_are_told(tmp_path: Path) -> None:
    rows = [result("a", "knn", "k=20", 0.4)]
    found = {"images": 3, "first": ["val/x.png", "train/y.png"], "compared": [10, 20]}
    text = write(tmp_path, content(rows, duplicates=found)).text
    told = "3 of 10 test images that were compared with 20 training images are, byte for byte, among these, such as"
    assert f"{told} val/x.png and train/y.png." in text
    assert "byte for byte" not in write(tmp_path, content(rows, duplicates={**found, "images": 0})).text


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_runs_nothing(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", page.source)


def test_names_are_text(page: Page) -> None:
    assert "<script" not in page.source
    assert "<b>something" not in page.source
    assert LARGE in page.text
    assert str(escape(LARGE)) in page.source


def test_the_page_can_be_read_by_everybody(page: Page) -> None:
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert "width=device-width" in page.source
    assert page.text.startswith("Evaluation of 2 models on")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes["scope"] in ("row", "col", "rowgroup", "colgroup")
        if tag == "svg":
            assert attributes.get("aria-label") or attributes["aria-hidden"] == "true"
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#")[1:] in ("", *identifiers)
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in identifiers


def test_the_same_results_give_the_same_bytes(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(everything()))
    write_report([(path, everything())], tmp_path / "a.html")
    # a process of its own: no state of this one, another hash seed
    command = [sys.executable, str(ROOT / "training/report.py"), str(path), "--out", str(tmp_path / "new/b.html")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "new/b.html").read_bytes()
    assert len(page.source) < 1_000_000


def test_names_that_are_no_utf8_stop_no_page(tmp_path: Path) -> None:
    found = content(frozen("a", 0.3), duplicates={"images": 1, "first": ["caf\udce9.jpg", "x.jpg"], "compared": [9, 9]})
    write_report([(tmp_path / "results.json", found)], tmp_path / "page.html")
    assert "caf?.jpg" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_plots_of_what_is_there(page: Page, tmp_path: Path) -> None:
    for heading in ("labels", "images a class", "severity"):
        assert page.text.count(f"Accuracy against {heading}") == 1
    assert page.text.count("Quality against compute") == 1, "dense protocols see images of another size"
    plots = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    starts = [label.partition(";")[0] for label in plots]
    for features in ("cls", "avg"):
        assert f"accuracy, % against share of the training labels, {features}" in starts
        assert f"accuracy, % against severity, {features}" in starts
        assert f"accuracy, % against GFLOP an image, {features}" in starts
    assert len(starts) == len(set(starts)) == 9
    assert len({draw_swatch(number) for number in range(64)}) == 64, "no two models look alike"
    bare = write(tmp_path, content([result("a", "linear", "lr=1", 0.4)]))
    assert not [tag for tag, _ in bare.tags if tag == "svg"], "a single point is no curve"


def test_compute_is_in_seconds_where_gflop_are_unknown(tmp_path: Path) -> None:
    rows = [{**result(name, "linear", "lr=1", 0.4), "extraction_seconds": 20.0} for name in ("a", "b")]
    assert "seconds an image, as measured" in write(tmp_path, content(rows)).source
    models = {name: {"parameters": 0, "gflop": gflop} for name, gflop in (("a", 0), ("b", 1), ("c", 2))}
    rows.append(result("c", "linear", "lr=1", 0.4))
    page = write(tmp_path, content(rows, models=models))
    assert "seconds an image, as measured" not in page.source
    assert "Not drawn, as their cost is nothing or not known: a." in page.text
    assert [text for (_, name, _), text in page.shown("models").items() if name == "c"] == ["0.00", "2", "print of c"]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    rows = [result(n, "reconstruction", s, 0.4, picture="pictures/a.png") for n in ("a", "b") for s in ("x", "y")]
    (tmp_path / "0/pictures").mkdir(parents=True)
    Image.new("RGB", (3200, 100), "red").save(tmp_path / "0/pictures/a.png")
    page = write(tmp_path, content(rows))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1, "one file, however many figures speak of it"
    assert (images[0]["width"], images[0]["height"]) == ("1600", "50")
    assert images[0]["alt"] == "Picture of reconstruction: a, b"
    assert images[0]["src"].startswith("data:image/webp;base64,")


@pytest.mark.parametrize(
    ("picture", "problem"),
    [
        ("pictures/gone.png", "pictures/gone.png is missing"),
        ("results.json", "results.json cannot be read"),
        ("../secret.png", "../secret.png lies outside the folder of results.json"),
        ("program.png", "program.png cannot be read: is PostScript"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_told(tmp_path: Path, picture: str, problem: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "0").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "0" / "program.png", "EPS")
    page = write(tmp_path, content([result("a", "shift", "clean", 0.4, picture=picture)]))
    assert f"Picture not shown: {problem}" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("nothing", "is not JSON"),
        ("[]", "is not a results.json of training/evaluate.py"),
        ('{"accuracy_percent": 3}', "no 'results'"),
        (json.dumps(content([])), "holds no results"),
        (json.dumps(content([result("a", "knn", "k=20", float("nan"))])), "accuracy not finite"),
        (json.dumps({**content([result("a", "knn", "k=20", 0.5)]), "data": {}}), "on which images knn was"),
        (json.dumps(content([{"model": "a"}])), "no 'features'"),
        (json.dumps(content([{**result("a", "knn", "k=20", 0.5), "model": 5}])), "model is 5"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_the_main_figures_of_several_data_sets_are_one_markdown_table(tmp_path: Path) -> None:
    files = []
    for number, name in enumerate(("shapes", "digits")):
        pixels = [result("pixels:4", "knn", "k=20", 0.1, features="avg", half=0.0)]
        results = [*frozen(OURS, 0.5 + number / 10), *pixels]
        found = content(results)
        found["data"]["test"]["fingerprint"] = name
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "results.json")
        files[-1].write_text(json.dumps(found))
    out = tmp_path / "table.md"
    main(tuple(files), out, "avg")
    head, rule, *rows = [line[2:-2].split(" | ") for line in out.read_text().splitlines()]
    assert head[:4] == ["images", "model", "k-NN k=20 accuracy, %", "linear accuracy, %"]
    assert set(rule) == {"---"}
    assert len({len(row) for row in (head, rule, *rows)}) == 1
    assert [row[:2] for row in rows] == [
        ["shapes", f"`{OURS}` avg"],
        ["", "`pixels:4` avg"],
        ["digits", f"`{OURS}` avg"],
        ["", "`pixels:4` avg"],
    ]
    # 0.5 + 0.01 for avg + k / 10,000; the class token's figures are left out
    assert [row[2] for row in rows] == ["**51.2** [49.2, 53.2]", "10.0", "**61.2** [59.2, 63.2]", "10.0"]
    assert [row[3] for row in rows[::2]] == ["71.0 [69.0, 73.0]", "81.0 [79.0, 83.0]"]
    assert rows[1][3:] == [""] * (len(head) - 3)
    with pytest.raises(SystemExit, match="--features chooses rows of a table"):
        main(tuple(files), tmp_path / "report.html", "avg")
    with pytest.raises(SystemExit, match="--features mean: no model has these; there are avg, cls"):
        main(tuple(files), out, "mean")


def test_no_data_set_takes_the_place_of_another_of_the_same_folder_name(tmp_path: Path) -> None:
    files = []
    for name in ("cifar", "flowers"):
        found = content([result(OURS, "knn", "k=20", 0.5, features="avg"), result(OURS, "segmentation", "", 0.4)])
        found["data"] |= {"test": {"name": name, "images": 9, "fingerprint": name}}
        found["data"] |= {"segmentation": {"name": f"{name} masks", "images": 9, "fingerprint": f"{name} masks"}}
        files.append(tmp_path / name / "evaluation" / "results.json")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_text(json.dumps(found))
    main(tuple(files), tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    titles = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if OURS in line]
    assert sorted(titles) == [
        "evaluation: cifar masks",
        "evaluation: flowers masks",
        "evaluation: shapes-train → cifar",
        "evaluation: shapes-train → flowers",
    ]


def test_the_front_page_shows_the_committed_results() -> None:
    files = sorted((ROOT / "docs" / "evaluation").glob("*/results.json"))
    assert [file.parent.name for file in files] == ["cifar10", "fashion-mnist", "imagenette"]
    table = markdown_report([(file, read_results(file)) for file in files], "cls+avg")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^report.py: .*no.json: no such file") as caught:
        main((tmp_path / "no.json",), tmp_path / "report.html")
    assert caught.value.code not in (0, None)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_phone_does_not_scroll_sideways(page: Page, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<iframe width="390" height="800" style="border: 0" srcdoc="{html.escape(page.source)}"></iframe>
        <p id="said"></p>
        <script>document.querySelector("iframe").onload = ({{target}}) => {{
          const inner = target.contentDocument;
          inner.querySelectorAll("details").forEach((one) => {{ one.open = true; }});
          const {{scrollWidth, clientWidth}} = inner.scrollingElement;
          document.querySelector("#said").textContent = `${{scrollWidth}} of ${{clientWidth}}`;
        }}</script>"""
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,900", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert '<p id="said">390 of 390</p>' in done.stdout
