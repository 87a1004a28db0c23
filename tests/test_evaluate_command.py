"""`training/evaluate.py` as a whole: what it refuses at once, what it keeps, and protocols on data of their own."""

import dataclasses
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from training.data.images import ImageSource, keep_some
from training.evaluate.command import add_results, describe_settings, evaluate, main
from training.evaluate.detection import DetectionSettings
from training.evaluate.finetune_recipe import FineTuneSettings
from training.evaluate.intervals import share_interval
from training.evaluate.models import describe_model, open_model
from training.evaluate.options import Options
from training.evaluate.protocols import Settings
from training.evaluate.segmentation import SegmentationSettings
from training.evaluate.shift import ShiftSettings
from training.report.results import read_results
from training.run.signals import EXIT_INTERRUPTED

PICO, ROOT = "vit_pico_patch8_pmae", Path(__file__).parents[1]


def colours(root: Path, *names: str) -> str:
    """A set of two images of each class, each class of a grey of its own."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for copy in range(2):
            colour = (70 * number + copy, 90, 90 + len(root.name))  # no image is another one's copy
            Image.new("RGB", (16, 16), colour).save(root / name / f"{root.name}{copy}.png")
    return str(root)


def options(tmp_path: Path, **changes: Any) -> Options:
    chosen = {"models": ("pixels:4",), "out": tmp_path / "out", "settings": Settings(k=(1,), shots=("1",), draws=2)}
    return Options(**{**chosen, **changes})


def test_what_was_learned_is_judged_on_the_test_images_and_under_shift(tmp_path: Path) -> None:
    train, test = colours(tmp_path / "train", "a", "b"), colours(tmp_path / "test", "a", "b")
    for number in range(3):  # in which b is mostly a: who learned well is mostly wrong
        Image.new("RGB", (16, 16), (2 + number, 90, 94)).save(tmp_path / "test" / "b" / f"more{number}.png")
    chosen = options(
        tmp_path,
        models=(PICO,),
        train=train,
        test=test,
        protocols=("linear", "finetune", "shift"),
        finetune=FineTuneSettings(epochs=12, batch_size=4, mixup=0, cutmix=0, augment="", random_erase=0, smoothing=0),
        shift=ShiftSettings(corruptions=("brightness",), severities=(1,)),
        settings=Settings(hold_back=0.5),
    )
    rows = evaluate(chosen)["results"]
    linear = {row["features"]: row["value"] for row in rows if row["protocol"] == "linear"}
    (tuned,) = (row["value"] for row in rows if row["protocol"] == "finetune")
    clean = {row["features"]: row["value"] for row in rows if row["setting"] == "clean" and row["metric"] == "accuracy"}
    assert linear | {"": tuned} == clean
    four_of_seven = dataclasses.asdict(share_interval(torch.tensor([True] * 4 + [False] * 3)))
    assert [*linear.values(), tuned] == [four_of_seven] * 4
    damaged = [row["value"] for row in rows if row["setting"] == "brightness/1" and row["metric"] == "accuracy"]
    assert len(damaged) == 4
    assert all(value["mean"] * 7 == pytest.approx(round(value["mean"] * 7)) for value in damaged)


@pytest.mark.parametrize("protocols", [("finetune",), ("finetune", "shift"), ("linear",)])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("a", "b", "c"), ("b", "c"), "only in --train: a; only in --test: none"),
        (("a", "b"), ("a", "c"), "only in --train: b; only in --test: c"),
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
        ({"models": (PICO,), "protocols": ("segmentation",)}, "say on which images, by --segmentation.data"),
        ({"protocols": ("reconstruction",)}, "has no decoder"),
        ({"groups": "(a"}, "no regular expression"),
        ({"models": ()}, "name a model"),
        ({"models": ("pixels:4", "pixels:4")}, "given twice"),
        ({"protocols": ("finetune",)}, "pixels have no weights to train"),
        ({"settings": Settings(k=(), shots=("1",))}, r"--k is \(\): at least 1"),
        ({"models": (PICO,), "protocols": ("knn", "finetune")}, "more than the 4 training images"),
        (
            {"models": (PICO,), "protocols": ("segmentation",), "segmentation": SegmentationSettings(data=Path("no"))},
            "no such folder or tar",
        ),
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


def test_figures_take_the_place_of_their_own_kind_and_only_when_they_are_all() -> None:
    def shift(classifier: str, setting: str) -> dict[str, Any]:
        return {"model": "a", "protocol": "shift", "setting": setting, "detail": {"classifier": classifier}}

    tuned = [shift("fine-tuned", "clean"), shift("fine-tuned", "fog")]
    found = {"results": [shift("linear", "old"), *tuned]}
    add_results(found, [shift("linear", "clean")], ended=False)
    assert found["results"] == [shift("linear", "old"), *tuned]
    add_results(found, [shift("linear", "clean")], ended=True)
    assert found["results"] == [*tuned, shift("linear", "clean")]
    add_results(found, [{**shift("linear", "clean"), "model": "b"}], ended=False)
    assert len(found["results"]) == 4


def test_settings_are_those_of_the_protocols_that_run(tmp_path: Path) -> None:
    common = {"seed", "dtype", "groups"}
    expected = {
        ("knn",): {"k"},
        ("linear",): {"epochs", "hold_back"},
        ("few_shot", "knn"): {"k", "shots", "draws"},
        ("finetune",): {"finetune"},
        ("shift",): {"shift", "epochs", "hold_back"},
    }
    for protocols, names in expected.items():
        options = Options(models=("pixels:4",), protocols=protocols, out=tmp_path)
        assert describe_settings(options).keys() == common | names, protocols


def test_a_test_of_copies_is_refused(tmp_path: Path) -> None:
    train = colours(tmp_path / "train", "a", "b")
    for path in sorted(Path(train).rglob("*.png")):
        copy = tmp_path / "test" / path.parent.name / f"copy_of_{path.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"all test images of .* are training images"):
        evaluate(options(tmp_path, train=train, test=str(tmp_path / "test"), protocols=("knn",)))


@pytest.mark.parametrize(("flag", "value"), [("batch_size", 0), ("workers", -1)])
def test_impossible_options_are_refused(flag: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} is {value}"):
        options(tmp_path, **{flag: value})
    with pytest.raises(ValueError, match="--epochs is -5: it must be at least 1"):
        Settings(epochs=-5)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--epochs", "-5", "--epochs is -5: it must be at least 1"),
        ("--detection.epochs", "0", "--detection.epochs is 0.0: it must be above 0"),
    ],
)
def test_impossible_flags_are_refused_in_a_line(
    flag: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "pixels:4", flag, value])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "training" / "evaluate.py"), run_name="__main__")
    assert message in f"{refused.value.code}{capsys.readouterr().err}"


def test_other_weights_under_the_same_name_do_not_join_a_table(tmp_path: Path) -> None:
    sets = {name: colours(tmp_path / name, "a", "b") for name in ("train", "test")}
    file = tmp_path / "encoder.safetensors"
    for seed in (0, 1):
        extractor, _ = open_model(f"{PICO}@random", device="cpu", seed=seed)
        save_file(extractor.model.state_dict(), file)
        chosen = options(tmp_path, **sets, models=(f"{PICO}@{file}",), protocols=("knn", "few_shot")[seed : seed + 1])
        if seed:
            with pytest.raises(ValueError, match=r"figures of another vit_pico.*give another --out"):
                evaluate(chosen)
        else:
            evaluate(chosen)


def test_what_was_found_survives_an_interruption_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {name: colours(tmp_path / name, "a", "b") for name in ("train", "test")}
    chosen = options(tmp_path, **sets, models=("pixels:2", "pixels:4"), protocols=("knn", "few_shot"))
    straight = evaluate(dataclasses.replace(chosen, out=tmp_path / "straight"))

    def stop(*arguments: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    def rows() -> list[tuple[str, str]]:
        found = json.loads((chosen.out / "results.json").read_text())["results"]
        return [(row["model"], row["protocol"]) for row in found]

    with monkeypatch.context() as patched:
        patched.setattr("training.evaluate.protocols.few_shot", stop)
        with pytest.raises(SystemExit) as stopped:
            main(chosen)
        assert stopped.value.code == EXIT_INTERRUPTED
        assert rows() == [("pixels:2", "knn")], "the first model's first figure"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    evaluate(chosen)
    assert rows() == [(row["model"], row["protocol"]) for row in straight["results"]]
    with monkeypatch.context() as patched:  # of a second run, too, nothing is lost that it did not make anew
        patched.setattr("training.evaluate.protocols.knn_predict", stop)
        with pytest.raises(SystemExit):
            main(chosen)
        assert sorted(rows()) == sorted((row["model"], row["protocol"]) for row in straight["results"])
    values = {(row["model"], row["protocol"]): row["value"] for row in evaluate(chosen)["results"]}
    assert values == {(row["model"], row["protocol"]): row["value"] for row in straight["results"]}


def test_what_features_cost_is_that_of_their_extraction_also_from_the_cache(tmp_path: Path) -> None:
    sets = {name: colours(tmp_path / name, "a", "b") for name in ("train", "test")}
    first, second = (
        evaluate(options(tmp_path, **sets, models=(f"{PICO}@random",), protocols=("knn",)))["results"][0]
        for _ in range(2)
    )
    assert first["extraction_seconds"] == second["extraction_seconds"] > 0


def test_costs_count_attention() -> None:
    encoder, tokens, width = describe_model(f"{PICO}@random"), 65, 192
    layer = tokens * 12 * width * width + 2 * tokens * tokens * width  # four projections' worth and the MLP; attention
    patches = 64 * 8 * 8 * 3 * width
    assert encoder["gflop"] == pytest.approx(2 * (8 * layer + patches) / 1e9, rel=1e-3)
    assert encoder["fingerprint"] != describe_model(f"{PICO}@random", seed=1)["fingerprint"]


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
    image = tmp_path / "masks" / "test" / "images" / "0.png"
    Image.new("RGB", (64, 48), "red").save(image)
    other = dataclasses.replace(chosen, models=(f"{PICO}@random",), protocols=("segmentation",))
    runs_before = sorted((tmp_path / "out" / "runs").iterdir())
    with pytest.raises(ValueError, match="figures of other data"):
        evaluate(other)
    assert sorted((tmp_path / "out" / "runs").iterdir()) == runs_before, "told before anything is trained"
    for protocol in ("segmentation", "detection"):
        grouped = dataclasses.replace(chosen, protocols=(protocol,), groups=r"(\d)\.png", out=tmp_path / "groups")
        with pytest.raises(ValueError, match="share 2 groups, such as 0"):
            evaluate(grouped)


def test_some_images_are_evenly_spaced_over_every_class(tmp_path: Path) -> None:
    sets = {name: colours(tmp_path / name, *"abcd") for name in ("train", "test")}
    whole = ImageSource(sets["test"])
    part = keep_some(whole, 4)
    assert part.labels == [0, 1, 2, 3]
    assert [part.name(index) for index in range(4)] == [whole.name(index) for index in (0, 2, 4, 6)]
    assert part.load(1).tobytes() == whole.load(2).tobytes()
    assert keep_some(whole, 8) is keep_some(whole, None) is whole
    found = evaluate(options(tmp_path, **sets, protocols=("knn",), train_images=4, test_images=6))
    assert {split: facts["images"] for split, facts in found["data"].items()} == {"train": 4, "test": 6}
    with pytest.raises(ValueError, match="figures of other data"):
        evaluate(options(tmp_path, **sets, protocols=("knn",)))
    with pytest.raises(ValueError, match="--test-images is 0"):
        options(tmp_path, test_images=0)
