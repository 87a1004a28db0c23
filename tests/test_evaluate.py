"""Protocols on frozen features: against scikit-learn, closed forms and simulation; nothing leaks, nothing is lost."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import ImageError
from perceptual_mae_models.reconstruction import middle
from training.data.images import ImageSource
from training.evaluate import features as cached
from training.evaluate.command import evaluate, main
from training.evaluate.features import Features, extract, fingerprint_data, fingerprint_model, load_items
from training.evaluate.few_shot import draw_shots, few_shot
from training.evaluate.intervals import mean_interval, sample_interval, share_interval, unpack_bits
from training.evaluate.linear import Standardise, choose, fit_probe, judge, train_probe
from training.evaluate.models import open_autoencoder, open_model
from training.evaluate.options import Options
from training.evaluate.protocols import Settings, run_few_shot, run_linear
from training.evaluate.reconstruction import METRICS, compare_images, measure_reconstruction, rebuild_all
from training.evaluate.split import check_pair, hold_back, name_groups
from training.losses.structural import ms_ssim_each

ROOT = Path(__file__).parents[1]


def clouds(n: int, *, seed: int = 0, distance: float = 1.0, dim: int = 8, classes: int = 4) -> Features:
    """Overlapping normal clouds, one a class, whose columns differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) * distance
    labels = torch.arange(n) % classes
    rows = (centres[labels] + torch.randn(n, dim, generator=generator)) * torch.logspace(-2, 2, dim) + 5
    return Features(rows, labels, tuple(f"class {number}" for number in range(classes)))


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor("vit_pico_patch8_pmae", "avg")


def test_features_of_a_source_are_those_of_its_files(photos: Path, extractor: FeatureExtractor) -> None:
    source = ImageSource(photos)
    expected = extractor([photos / source.name(index) for index in range(len(source))])
    torch.testing.assert_close(extract(extractor, source, batch_size=7, workers=1), expected, atol=1e-5, rtol=1e-5)


def test_an_interrupted_extraction_goes_on(
    photos: Path, extractor: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, encode, calls = ImageSource(photos), extractor.encode, []
    straight = extract(extractor, source)
    monkeypatch.setattr(cached, "IMAGES_A_FILE", 10)

    def fail_later(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(extractor, "encode", fail_later)
    with pytest.raises(KeyboardInterrupt):
        extract(extractor, source, cache=tmp_path)
    torch.testing.assert_close(extract(extractor, source, cache=tmp_path), straight, atol=1e-5, rtol=1e-5)
    assert calls == [10, 10, 10, 4], "the first ten are not computed again"
    extract(extractor, source, cache=tmp_path)
    assert len(calls) == 4


def test_the_cache_belongs_to_weights_transform_and_images(photos: Path, tmp_path: Path) -> None:
    names = ("vit_pico_patch8_pmae", "vit_pico_patch8_pmae@random", "pixels:8", "pixels:16")
    models = [fingerprint_model(open_model(name)[0]) for name in names]
    assert len(set(models)) == 4
    assert models[1] == fingerprint_model(open_model("vit_pico_patch8_pmae@random")[0]), "the seed decides the weights"
    assert models[1] != fingerprint_model(open_model("vit_pico_patch8_pmae@random", seed=1)[0])
    smooth, sharp = (FeatureExtractor(timm.create_model("test_vit", act_layer=act)) for act in ("gelu", "relu"))
    sharp.model.load_state_dict(smooth.model.state_dict())
    assert fingerprint_model(smooth) != fingerprint_model(sharp), "equal weights, other arithmetic"
    whole = fingerprint_data(ImageSource(photos))
    for path in photos.rglob("*.png"):
        copy = tmp_path / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert fingerprint_data(ImageSource(tmp_path)) == whole
    next(tmp_path.rglob("*.png")).unlink()
    assert fingerprint_data(ImageSource(tmp_path)) != whole


def test_a_broken_image_stops_by_name(photos: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for workers in (0, 1):
        with pytest.raises(ImageError, match=r"broken\.png"):
            extract(extractor, ImageSource(tmp_path), workers=workers)


class Stuck(Dataset[int]):
    """Its items come too late."""

    def __getitem__(self, index: int) -> int:
        time.sleep(3)
        return index


def test_a_loader_that_gives_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "LOADER_PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match="timed out"):
        next(load_items(Stuck(), [[0]], workers=1))


def test_models_by_every_kind_of_name(tmp_path: Path) -> None:
    own, representations = open_model("vit_pico_patch8_pmae")
    assert representations == {"cls": slice(0, 192), "avg": slice(192, None), "cls+avg": slice(None)}
    save_file(own.model.state_dict(), tmp_path / "own.safetensors")
    from_file, _ = open_model(f"vit_pico_patch8_pmae@{tmp_path / 'own.safetensors'}")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(own.encode(images), from_file.encode(images))
    assert list(open_model("resnet18@random")[1]) == ["avg"]
    pixels, _ = open_model("pixels:4")
    assert pixels.input_size == (4, 4)
    assert torch.equal(pixels.encode(images[:, :, :4, :4]), images[:, :, :4, :4].flatten(1))
    for name, message in (
        ("pixels:x", "pixels:16"),
        ("vit_nano", "unknown model"),
        ("vit_pico_patch8_pmae@no", "no such"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_model(name)


# --- splits ----------------------------------------------------------------------------------------------------------


def test_what_is_held_back_is_in_proportion_and_apart() -> None:
    features = clouds(403)
    fit, held = hold_back(features, 0.1, seed=3)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(403))
    assert features.labels[held].bincount().tolist() == pytest.approx([10, 10, 10, 10], abs=1)
    assert hold_back(features, 0.1, seed=3)[1].tolist() == held.tolist()
    assert hold_back(features, 0.1, seed=4)[1].tolist() != held.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_groups_never_straddle(seed: int) -> None:
    plain = clouds(400)
    groups = tuple(str(index // 16) for index in range(400))  # four images of each class
    features = Features(plain.rows, plain.labels, plain.classes, groups)
    fit, held = hold_back(features, 0.2, seed)
    assert set(features.take(fit).groups or ()).isdisjoint(features.take(held).groups or ())
    assert 0.1 < len(held) / 400 < 0.3
    assert len(fit) + len(held) == 400


def test_one_large_group_is_not_what_is_held_back() -> None:
    plain = clouds(1000)
    groups = tuple("large" if index < 500 else str(index // 17) for index in range(1000))
    for seed in range(3):
        _, held = hold_back(Features(plain.rows, plain.labels, plain.classes, groups), 0.1, seed)
        assert 40 < len(held) < 140
    alone = tuple("its own" if label == 3 else str(index // 17) for index, label in enumerate(plain.labels.tolist()))
    for seed in range(3):
        fit, _ = hold_back(Features(plain.rows, plain.labels, plain.classes, alone), 0.1, seed)
        assert plain.labels[fit].unique().tolist() == [0, 1, 2, 3], "no class is held back entirely"
    halves = tuple(str(label % 2) for label in plain.labels.tolist())
    with pytest.raises(ValueError, match="too few groups"):
        hold_back(Features(plain.rows, plain.labels, plain.classes, halves), 0.5, 0)


def test_features_that_are_not_finite_are_refused(photos: Path, extractor: FeatureExtractor, tmp_path: Path) -> None:
    encode = extractor.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "encode", lambda pixels: encode(pixels) * torch.nan)
        with pytest.raises(ValueError, match="not finite for 24 images"):
            extract(extractor, ImageSource(photos), cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_groups_come_from_names(photos: Path) -> None:
    source = ImageSource(photos)
    groups = name_groups(source, r"(\d)\.png$")
    assert [group == Path(source.name(i)).stem[-1] for i, group in enumerate(groups)] == [True] * 24
    with pytest.raises(ValueError, match="one pair of parentheses"):
        name_groups(source, r"\d")
    with pytest.raises(ValueError, match="does not match the image class"):
        name_groups(source, "film(.)")


def test_pairs_that_say_nothing_are_refused() -> None:
    good = clouds(40)

    def altered(**changes: object) -> Features:
        return Features(**{"rows": good.rows, "labels": good.labels, "classes": good.classes, **changes})  # type: ignore[arg-type]

    check_pair(good, good)
    with pytest.raises(ValueError, match=r"only in --train: .*class 3; only in --test: .*x"):
        check_pair(good, altered(classes=("a", "b", "c", "x")))
    one = altered(classes=("a",), labels=torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match="one class, a"):
        check_pair(one, one)
    with pytest.raises(ValueError, match="no image of class 3"):
        check_pair(altered(labels=good.labels.clamp(max=2)), good)
    with pytest.raises(ValueError, match="negative labels"):
        check_pair(good, altered(labels=good.labels - 1))
    with pytest.raises(ValueError, match="share 1 groups, such as film 7"):
        check_pair(altered(groups=("film 7",) * 40), altered(groups=("film 7",) * 20 + ("film 8",) * 20))
    with pytest.raises(ValueError, match="a single image"):
        hold_back(clouds(4), 0.1, 0)


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_the_linear_probe_finds_scikit_learns_optimum() -> None:
    train, test = clouds(2000), clouds(8000, seed=1)
    right = judge(fit_probe(train, seed=0).probe, test)[0][0]
    standardise = Standardise.of(train.rows)
    oracle = LogisticRegression(C=1e6, max_iter=5000).fit(standardise(train.rows).numpy(), train.labels.numpy())
    expected = oracle.score(standardise(test.rows).numpy(), test.labels.numpy())
    assert 0.6 < expected < 0.97, "a problem that is neither trivial nor hopeless"
    assert right.double().mean().item() == pytest.approx(expected, abs=0.003)


def test_heads_side_by_side_are_those_trained_alone() -> None:
    features = clouds(300)
    together = train_probe(features, (0.01, 0.3), epochs=5, batch_size=64)
    logits = together.logits(features.rows)
    for head, rate in enumerate((0.01, 0.3)):
        alone = train_probe(features, (rate,), epochs=5, batch_size=64).logits(features.rows)
        torch.testing.assert_close(logits[:, head], alone[:, 0], atol=1e-4, rtol=1e-4)


def test_a_diverged_head_is_never_chosen() -> None:
    features = clouds(200)
    probe = train_probe(features, (3e38, 0.1), epochs=3)
    right, losses = judge(probe, features)
    accuracies = right.double().mean(dim=1)
    assert accuracies[0] == 0
    assert losses[0].isinf().all()
    assert accuracies[1] > 0.5
    assert fit_probe(features, rates=(3e38, 0.1), epochs=3).learning_rate == 0.1


def test_the_rate_is_chosen_by_loss_where_accuracies_cannot_tell() -> None:
    right = torch.zeros(3, 100, dtype=torch.bool)
    right[0, :90], right[1, :88], right[2, :80] = True, True, True  # a standard error of the best is 3
    losses = torch.tensor([[0.4], [0.3], [0.1]]).expand(3, 100)
    assert choose(right, losses) == 1
    assert choose(right[[0, 2]], losses[[0, 2]]) == 0


def test_the_test_split_decides_nothing() -> None:
    """With shuffled test labels the rate, the head and so the predictions stay the same."""
    train, test = clouds(400), clouds(400, seed=1)
    wrong = Features(test.rows, (test.labels + 1) % 4, test.classes)
    rows = [row for labels in (test, wrong) for row in run_linear(train, labels, Settings(epochs=10))]
    assert rows[0].setting == rows[1].setting, "the rate"
    assert rows[0].detail["held_back_accuracy"] == rows[1].detail["held_back_accuracy"]
    right, wrongly = (unpack_bits(str(row.detail["right"]), 400) for row in rows)
    assert right.any()
    assert not (right & wrongly).any()


# --- few labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amount", "counts"), [("3", [3, 3]), ("10%", [9, 1]), ("1%", [1, 1]), ("100%", [90, 10])])
def test_shots_a_class(amount: str, counts: list[int]) -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    shots = draw_shots(labels, amount, torch.Generator().manual_seed(0))
    assert labels[shots].bincount().tolist() == counts
    assert len(set(shots.tolist())) == sum(counts)


@pytest.mark.parametrize("amount", ["0", "-1", "2.5", "200%", "many", "11"])
def test_impossible_shots_are_refused(amount: str) -> None:
    with pytest.raises(ValueError, match="few-shot amount"):
        draw_shots(torch.tensor([0] * 90 + [1] * 10), amount, torch.Generator())


def test_shares_that_are_the_same_images_are_judged_once(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = clouds(40), clouds(40, seed=1)
    rows = list(run_few_shot(train, test, Settings(shots=("1%", "2%", "1", "30%"), draws=2)))
    assert [row.setting for row in rows] == ["1%", "30%"]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"few-shot {amount}: as many images of each class as 1%, left out" for amount in ("2%", "1")]


def test_default_neighbours_are_those_that_a_small_set_has() -> None:
    assert Settings().neighbours(1000) == (10, 20, 100, 200)
    assert Settings().neighbours(24) == (10, 20)
    assert Settings(k=(24,)).neighbours(24) == (24,)
    impossible = (Settings(), 9), (Settings(k=(10, 25)), 24), (Settings(k=()), 24), (Settings(k=(0, 5)), 24)
    for settings, images in impossible:
        with pytest.raises(ValueError, match=rf"--k is .* at most the {images} training images"):
            settings.neighbours(images)


def test_more_labels_are_worth_more_and_draws_differ() -> None:
    train, test = clouds(800), clouds(2000, seed=1)
    few, many = (few_shot(train, test, amount, draws=6) for amount in ("1", "50%"))
    assert len(set(few)) > 1
    assert mean_interval(few).high < mean_interval(many).low
    assert few == few_shot(train, test, "1", draws=6)
    assert few != few_shot(train, test, "1", draws=6, seed=1)


def test_few_shot_accuracy_is_scikit_learns_on_test_images_in_units_of_the_training_images() -> None:
    train, near = clouds(60), clouds(500, seed=1)
    test = Features(near.rows + 0.7 * near.rows.std(dim=0), near.labels, near.classes)
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train.rows, train.labels)
    expected = judge.score(test.rows, test.labels)
    own = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(test.rows, test.labels)
    assert min(judge.score(train.rows, train.labels), own.score(test.rows, test.labels)) > expected + 0.05
    assert few_shot(train, test, "100%") == pytest.approx([expected], abs=0.01)  # one draw: all are the same


def test_few_labels_of_many_classes_are_learned_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    train = clouds(2000, distance=0.3, dim=96, classes=200)
    fitted: list[LogisticRegression] = []

    class Kept(LogisticRegression):  # type: ignore[misc]
        def score(self, *arguments: Any) -> float:
            fitted.append(self)
            return float(super().score(*arguments))

    monkeypatch.setattr("training.evaluate.few_shot.LogisticRegression", Kept)
    few_shot(train, train, "100%")
    rows = Standardise.of(train.rows)(train.rows).numpy()
    best = LogisticRegression(max_iter=1000, tol=1e-8).fit(rows, train.labels).coef_
    by_default = LogisticRegression(max_iter=1000).fit(rows, train.labels).coef_
    away = [np.abs(found - best).max() / np.abs(best).max() for found in (fitted[0].coef_, by_default)]
    assert 3 * away[0] < away[1] > 0.02, "scikit-learn's own tolerance stops early where classes are many"


def test_few_shot_intervals_cover_the_mean_over_all_draws_in_simulation() -> None:
    train, test = clouds(300), clouds(300, seed=1)
    truth = float(torch.tensor(few_shot(train, test, "2", draws=600, seed=1000)).mean())
    intervals = [mean_interval(few_shot(train, test, "2", draws=5, seed=seed)) for seed in range(120)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals) / len(intervals)
    assert 0.89 <= covered <= 1.0


def test_intervals_of_draws_cover_their_mean_in_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    trials = (torch.randn(2000, 5, generator=generator) * 0.1 + 0.7).tolist()
    intervals = [mean_interval(trial) for trial in trials]
    covered = sum(interval.low <= 0.7 <= interval.high for interval in intervals) / 2000
    assert covered == pytest.approx(0.95, abs=0.015)
    assert mean_interval([0.5]).low == mean_interval([0.5]).high == 0.5


def test_intervals_of_samples_cover_their_mean_in_simulation() -> None:
    samples = torch.rand(2000, 60, generator=torch.Generator().manual_seed(0))
    intervals = [sample_interval(sample) for sample in samples]
    assert sum(it.low <= 0.5 <= it.high for it in intervals) / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (4, 4), (7, 10), (3000, 4000)])
def test_intervals_of_shares_are_wilsons(right: int, n: int) -> None:
    interval = share_interval(torch.arange(n) < right)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert interval.mean == right / n
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1


@pytest.fixture(scope="module")
def others(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the photos: a test set whose images have themselves for neighbours."""
    root = tmp_path_factory.mktemp("others")
    for path in sorted(photos.rglob("*.png"))[::2]:
        (root / path.parent.name).mkdir(exist_ok=True)
        Image.open(path).save(root / path.parent.name / path.name, compress_level=1)  # the same file would be refused
    return root


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_command_fills_the_table_and_a_second_one_reads_the_cache(
    photos: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [sys.executable, ROOT / "training/evaluate.py", "pixels:8"]
    arguments += ["--train", photos, "--test", others, "--out", tmp_path, "--k", "1", "5", "--shots", "2", "50%"]
    finished = subprocess.run([*map(str, arguments), "--draws", "2"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["model"], row["features"], row["protocol"], row["setting"]): row for row in written["results"]}
    assert len(rows) == len(written["results"]) == 5
    assert rows["pixels:8", "avg", "knn", "k=1"]["value"]["mean"] == 1, "the images find themselves"
    assert all(0 <= row["value"]["low"] <= row["value"]["mean"] <= 1 for row in rows.values())
    assert written["data"]["train"]["fingerprint"] == fingerprint_data(ImageSource(photos))
    assert {"torch", "scikit-learn"} <= written["versions"].keys()

    monkeypatch.setattr(FeatureExtractor, "encode", None)  # would fail if anything were computed anew
    options = Options(
        models=("pixels:8",),
        train=str(photos),
        test=str(others),
        out=tmp_path,
        settings=Settings(k=(1, 5), shots=("2", "50%"), draws=2),
    )
    again = evaluate(options)["results"]
    assert [row["value"] for row in again] == [row["value"] for key, row in rows.items() if key[0] == "pixels:8"]


def test_wrong_inputs_are_explained(photos: Path, others: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({}, "give --data DIR .*missing: train"),
        ({"protocols": ("reconstruction",)}, "missing: test"),
        ({"data": tmp_path}, "holds no train"),
        ({"train": str(photos / "class0"), "test": str(others / "class0")}, "one class"),
        ({"train": str(photos), "test": str(photos / "class0")}, "the classes differ"),
        ({"train": str(photos), "test": str(others), "groups": r"/(\d+)"}, "share 12 groups"),
        ({"train": str(photos), "test": str(photos)}, "are the same images"),
        ({"data": tmp_path, "test": str(photos)}, "give either --data or"),
        ({"train": str(photos), "test": str(others), "protocols": ("reconstruction",)}, "pixels:4 cannot rebuild"),
        (
            {"train": str(photos), "test": str(others), "settings": Settings(k=(1, 25))},
            r"--k is .* at most the 24 training images",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(Options(**{"models": ("pixels:4",), "out": tmp_path / "out", "settings": Settings(k=(1,)), **changes}))  # type: ignore[arg-type]


def test_images_of_mixed_modes_are_what_they_show(photos: Path, tmp_path: Path) -> None:
    grey = Image.open(photos / "class0" / "00.png").convert("L")
    variants = {"l": grey, "rgb": grey.convert("RGB"), "p": grey.convert("P"), "rgba": grey.convert("RGBA")}
    for name, image in variants.items():
        image.save(tmp_path / f"{name}.png")
    features = extract(
        FeatureExtractor(timm.create_model("vit_pico_patch8_pmae", pretrained=True)), ImageSource(tmp_path)
    )
    for row in features[1:]:
        torch.testing.assert_close(row, features[0], atol=1e-5, rtol=1e-5)


def test_splits_are_found_in_a_folder(photos: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(photos)
    (tmp_path / "test").symlink_to(others)
    options = Options(
        models=("vit_pico_patch8_pmae@random",),
        data=tmp_path,
        out=tmp_path / "out",
        protocols=("knn",),
        settings=Settings(k=(1,)),
    )
    found = evaluate(options)
    assert found["data"]["test"]["images"] == 12
    assert [row["features"] for row in found["results"]] == ["cls", "avg", "cls+avg"]


# --- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstructions_are_measured_as_torchmetrics_does() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(3, 3, 64, 64, generator=generator)
    made = (original + 0.2 * torch.randn(original.shape, generator=generator)).clamp(0, 1)
    found = compare_images(made, original, torch.ones(3, 1, 64, 64))
    for index, (one, other) in enumerate(zip(made[:, None], original[:, None], strict=True)):
        assert found["l1"][index].item() == pytest.approx((one - other).abs().mean().item(), rel=1e-5)
        psnr = peak_signal_noise_ratio(one, other, data_range=1.0)
        assert found["psnr"][index].item() == pytest.approx(psnr.item(), rel=1e-5)
        ssim = structural_similarity_index_measure(one, other, data_range=1.0)
        assert found["ssim"][index].item() == pytest.approx(ssim.item(), abs=2e-3), "its borders are padded"


def test_only_what_counts_is_measured() -> None:
    original, made = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    made[..., :32] = 0.5
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    assert compare_images(made, original, left)["l1"].item() == pytest.approx(0.5)
    assert compare_images(made, original, left)["psnr"].item() == pytest.approx(-10 * math.log10(0.25))
    assert compare_images(made, original, 1 - left)["l1"].item() == 0
    far = torch.zeros(1, 1, 64, 64)
    far[..., 40:] = 1
    assert compare_images(made, original, far)["ssim"].item() == pytest.approx(1)


def test_the_embedded_autoencoder_rebuilds_and_its_masks_are_the_seeds(photos: Path) -> None:
    network, recipe = open_autoencoder("vit_pico_patch8_pmae")
    source = ImageSource(photos)
    found = measure_reconstruction(network, recipe, source, batch_size=7)
    assert found.keys() == {(place, metric) for place in ("hidden", "image") for metric in METRICS}
    assert all(len(values) == 24 and values.isfinite().all() for values in found.values())
    again = measure_reconstruction(network, recipe, source, batch_size=24)
    other = measure_reconstruction(network, recipe, source, seed=1)
    for key, values in found.items():
        torch.testing.assert_close(again[key], values, atol=1e-4, rtol=1e-4)
        assert not torch.equal(other[key], values)
    grey = torch.cat([(middle(source.load(i), (64, 64)) - 0.5).abs().mean().view(1) for i in range(24)])
    assert found["hidden", "l1"].mean() < 0.5 * grey.mean()
    ((images, views),) = rebuild_all(network, recipe, source)
    predicted = (views.rebuilt - images).abs().mean(dim=(1, 2, 3))  # visible patches, too, as predicted
    torch.testing.assert_close(found["image", "l1"], predicted, atol=1e-4, rtol=1e-4)
    for place, made in (("hidden", views.pasted), ("image", views.rebuilt)):
        expected = ms_ssim_each(made, images)
        torch.testing.assert_close(found[place, "ms_ssim"], expected, atol=1e-4, rtol=1e-4)


def test_reconstruction_by_the_command_needs_a_decoder_and_no_labels(photos: Path, tmp_path: Path) -> None:
    options = Options(
        models=("vit_pico_patch8_pmae",), test=str(photos / "class0"), protocols=("reconstruction",), out=tmp_path
    )
    results = evaluate(options)["results"]
    assert len(results) == 8
    assert all(row["value"]["low"] < row["value"]["mean"] < row["value"]["high"] for row in results)
    for name in ("resnet18", "vit_pico_patch8_pmae@random", f"vit_pico_patch8_pmae@{tmp_path / 'encoder.safetensors'}"):
        with pytest.raises(ValueError, match="cannot rebuild images, because it has no decoder"):
            open_autoencoder(name)
