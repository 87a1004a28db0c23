"""`training/evaluate.py` as a whole: what it refuses at once, what it keeps, and protocols on data of their own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from training.evaluate.command import evaluate
from training.evaluate.detection import DetectionSettings
from training.evaluate.options import Options
from training.evaluate.protocols import Settings
from training.evaluate.segmentation import SegmentationSettings
from training.report.results import read_results

PICO = "vit_pico_patch8_pmae"


def colours(root: Path, *names: str) -> str:
    """A set of two images of each class, each class of a grey of its own."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (16, 16), (70 * number + copy, 90, 90)).save(root / name / f"{root.name}{copy}.png")
    return str(root)


def options(tmp_path: Path, **changes: Any) -> Options:
    chosen = {"models": ("pixels:4",), "out": tmp_path / "out", "settings": Settings(k=(1,), shots=("1",), draws=2)}
    return Options(**{**chosen, **changes})


@pytest.mark.parametrize("protocols", [("finetune",), ("finetune", "shift"), ("linear",)])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("a", "b", "c"), ("b", "c"), r"only in --train \['a'\]"),
        (("a", "b"), ("a", "c"), r"only in --train \['b'\], only in --test \['c'\]"),
        (("a",), ("a",), "--train has one class"),
    ],
)
def test_sets_that_do_not_belong_together_are_refused_before_anything_is_computed(
    protocols: Any, train: tuple[str, ...], test: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    chosen = options(
        tmp_path,
        models=(PICO,),
        protocols=protocols,
        train=colours(tmp_path / "train", *train),
        test=colours(tmp_path / "test", *test),
    )
    with pytest.raises(ValueError, match=message):
        evaluate(chosen)
    assert not chosen.out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("pixels:4", "vit_pica")}, "unknown model 'vit_pica'"),
        ({"models": ("pixels:4", "pixels:x")}, "side of the image"),
        ({"models": (f"{PICO}@no.safetensors",)}, "no such file"),
        ({"settings": Settings(k=(1,), shots=("3",))}, "class 0 has 2 training images"),
        ({"protocols": ("segmentation",)}, "say on which images, by --segmentation.data"),
        ({"protocols": ("reconstruction",)}, "has no decoder"),
        ({"groups": "(a"}, "no regular expression"),
    ],
)
def test_what_would_fail_later_fails_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sets = {name: colours(tmp_path / name, "a", "b") for name in ("train", "test")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(options(tmp_path, **{**sets, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_second_command_adds_to_what_the_first_one_found(tmp_path: Path) -> None:
    sets = {name: colours(tmp_path / name, "a", "b") for name in ("train", "test")}
    evaluate(options(tmp_path, **sets, protocols=("knn",)))
    evaluate(options(tmp_path, **sets, protocols=("few_shot",), models=("pixels:2", "pixels:4")))
    found = read_results(tmp_path / "out" / "results.json")
    rows = sorted((row["model"], row["protocol"]) for row in found["results"])
    assert rows == [("pixels:2", "few_shot"), ("pixels:4", "few_shot"), ("pixels:4", "knn")]
    assert set(found["models"]) == {"pixels:2", "pixels:4"}
    other = colours(tmp_path / "other", "a", "b")
    with pytest.raises(ValueError, match=r"figures of other data .*give another --out"):
        evaluate(options(tmp_path, train=other, test=sets["test"]))
    with pytest.raises(ValueError, match="figures of other settings"):
        evaluate(options(tmp_path, **sets, settings=Settings(k=(2,), shots=("1",), draws=2)))
    assert read_results(tmp_path / "out" / "results.json") == found


def squares(root: Path) -> None:
    """Images with a square each, as masks and as boxes."""
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (root / "masks" / split / kind).mkdir(parents=True)
        (root / "boxes" / split).mkdir(parents=True)
        (root / "boxes" / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(2):
            left = 10 + 10 * number + 5 * (split == "test")
            image, mask = Image.new("RGB", (64, 48), (90, 90, 90)), Image.new("L", (64, 48))
            for canvas, colour in ((image, (250, 0, 0)), (mask, 1)):
                ImageDraw.Draw(canvas).rectangle((left, 8, left + 19, 27), fill=colour)
            image.save(root / "masks" / split / "images" / f"{number}.png")
            mask.save(root / "masks" / split / "masks" / f"{number}.png")
            image.save(root / "boxes" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [left, 8, 20, 20]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (root / "boxes" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_dense_protocols_go_from_the_command_to_the_page(tmp_path: Path) -> None:
    squares(tmp_path)
    segmentation = SegmentationSettings(
        data=tmp_path / "masks", size=(64, 64), width=16, encoder=("frozen",), epochs=1, batch_size=2, resamples=10
    )
    detection = DetectionSettings(
        data=tmp_path / "boxes",
        size=(48, 64),
        encoder=("frozen",),
        epochs=1,
        batch_size=2,
        width=16,
        head_width=16,
        proposals=20,
        sampled_boxes=8,
        resamples=10,
    )
    chosen = Options(
        models=("pixels:4", PICO),
        protocols=("segmentation", "detection"),
        segmentation=segmentation,
        detection=detection,
        out=tmp_path / "out",
    )
    evaluate(chosen)
    found = read_results(tmp_path / "out" / "results.json")
    metrics = {(row["model"], row["protocol"], row["metric"]) for row in found["results"]}
    assert metrics == {
        (PICO, "segmentation", "miou"),
        (PICO, "segmentation", "pixel_accuracy"),
        (PICO, "detection", "box_ap"),
        (PICO, "detection", "box_ap50"),
    }
    assert {part: facts["images"] for part, facts in found["data"].items()} == {"segmentation": 2, "detection": 2}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/") >= 2, "pictures of both"
    seeded = evaluate(dataclasses.replace(chosen, settings=Settings(seed=1), out=tmp_path / "seed"))
    runs = [row["detail"]["run"] for row in (*found["results"], *seeded["results"])]
    assert len(set(runs)) == 4, "--seed decides these runs too"
