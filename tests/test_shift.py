"""Corruptions damage as their table says, alike for every size; shifted accuracies are those worked out by hand."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource, decode
from training.evaluate import corruptions as module
from training.evaluate import linear
from training.evaluate.classifiers import Classifiers, linear_classifiers
from training.evaluate.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSource, corrupt, draw_examples
from training.evaluate.features import Features, extract, fingerprint_data
from training.evaluate.intervals import share_interval
from training.evaluate.linear import fit_probe, judge
from training.evaluate.models import open_model
from training.evaluate.rows import Place, Row
from training.evaluate.shift import ShiftSettings, match_labels, predict, run_shift

NAMES = tuple(CORRUPTIONS)


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise whose amplitude falls as 1 / frequency, as that of photographs does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) + 1 / max(width, height)
    waves = np.fft.fft2(rng.standard_normal((3, height, width)))
    pixels = np.fft.ifft2(waves / frequency).real
    pixels += 1.5 * pixels.mean(axis=0)  # colours go together
    pixels = (pixels - pixels.mean()) / max(pixels.std(), 1e-6)
    return Image.fromarray((pixels * 50 + 115).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def damage(images: list[Image.Image], name: str, severity: int) -> float:
    """Mean L1 in [0, 1]."""
    changed = (corrupt(image, name, severity, number=number) for number, image in enumerate(images))
    return float(np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(images, changed, strict=True)]))


# --- corruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_higher_severity_damages_more_and_all_sizes_alike(name: str) -> None:
    worst = []
    for side in (32, 160):
        images = [natural(side, side, seed) for seed in range(4)]
        found = [damage(images, name, severity) for severity in (0, *SEVERITIES)]
        assert found[0] == 0
        assert found == sorted(found)
        assert found[1] > 0.002, "severity 1 does something"
        worst.append(found[-1])
    assert 0.4 < worst[0] / worst[1] < 2.5


def test_higher_severity_damages_real_photographs_more(real_data: Path) -> None:
    source = ImageSource(real_data / "imagenette-128-val.tar")
    images = [source.load(number) for number in range(0, len(source), len(source) // 6)]
    for name in NAMES:
        found = [damage(images, name, severity) for severity in (0, *SEVERITIES)]
        assert found == sorted(found)
        assert 0.003 < found[1] < found[-1] < 0.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(8, 5), (5, 8), (1, 9), (1, 1), (33, 47)])
def test_any_size_is_kept_and_the_image_is_not_touched(name: str, size: tuple[int, int]) -> None:
    image = natural(*size)
    before = image.tobytes()
    for severity in (1, 5):
        changed = corrupt(image, name, severity)
        assert (changed.size, changed.mode) == (size, "RGB")
    assert image.tobytes() == before
    assert corrupt(image, name, 0) is image


@pytest.mark.parametrize("name", NAMES)
def test_black_white_and_grey_images_stay_what_they_can_be(name: str) -> None:
    ramp = np.linspace(0, 255, 24 * 20).reshape(20, 24, 1).repeat(3, axis=2).astype(np.uint8)
    for array in (np.zeros_like(ramp), np.full_like(ramp, 255), ramp):
        changed = pixels(corrupt(Image.fromarray(array), name, 5))
        if CORRUPTIONS[name].family != "noise":
            assert np.ptp(changed, axis=2).max() <= 2 / 255, "grey stays grey"
    if name == "brightness":
        assert pixels(corrupt(Image.new("RGB", (4, 4)), name, 5)) == pytest.approx(0.5, abs=1 / 255)


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_number_decide_the_draws(name: str) -> None:
    image = natural(40, 30)
    made = corrupt(image, name, 3, seed=1, number=2).tobytes()
    torch.manual_seed(123)
    assert corrupt(image, name, 3, seed=1, number=2).tobytes() == made
    drawn = CORRUPTIONS[name].family == "noise" or name in ("motion_blur", "fog")
    for other in ({"seed": 2, "number": 2}, {"seed": 1, "number": 3}):
        assert (corrupt(image, name, 3, **other).tobytes() != made) == drawn


def test_what_is_impossible_is_refused() -> None:
    image = natural(8, 8)
    with pytest.raises(ValueError, match="snow: no such corruption; there are gaussian_noise"):
        corrupt(image, "snow", 1)
    for severity in (-1, 6):
        with pytest.raises(ValueError, match=f"severity {severity}: give 1 to 5"):
            corrupt(image, "fog", severity)
    with pytest.raises(ValueError, match="not for mode L"):
        corrupt(image.convert("L"), "fog", 1)
    with pytest.raises(TypeError):
        CORRUPTIONS["fog"] = CORRUPTIONS["jpeg"]  # type: ignore[index]


def test_noise_has_the_strength_of_the_table() -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    level = 128 / 255
    gaussian = pixels(corrupt(grey, "gaussian_noise", 2))
    assert gaussian.std() == pytest.approx(0.12, rel=0.02)
    assert gaussian.mean() == pytest.approx(level, abs=0.002)
    shot = pixels(corrupt(grey, "shot_noise", 1))
    assert shot.mean() == pytest.approx(level, abs=0.002)
    assert shot.var() == pytest.approx(level / 60, rel=0.05)
    impulse = pixels(corrupt(grey, "impulse_noise", 5))
    assert [(impulse == value).mean() for value in (0, 1)] == pytest.approx([0.135, 0.135], abs=0.005)


def test_blurs_are_those_of_scipy() -> None:
    image = natural(112, 150)
    deviation = 6 * 112 / 224
    expected = ndimage.gaussian_filter(pixels(image), (deviation, deviation, 0), mode="nearest")
    assert np.abs(pixels(corrupt(image, "gaussian_blur", 5)) - expected).mean() < 0.004
    rows, columns = np.mgrid[-5:6, -5:6]
    disk = (10 * 112 / 224 + 0.5 - np.hypot(rows, columns)).clip(0, 1)
    expected = ndimage.convolve(pixels(image), (disk / disk.sum())[:, :, None], mode="nearest")
    assert np.abs(pixels(corrupt(image, "defocus_blur", 5)) - expected).max() < 1 / 255


def test_a_moved_point_is_a_line_of_the_tables_length() -> None:
    image = Image.new("RGB", (224, 224))
    image.putpixel((112, 112), (255, 255, 255))
    spread = []
    for number in range(6):
        streak = pixels(corrupt(image, "motion_blur", 5, number=number))[..., 0]
        assert streak.sum() == pytest.approx(1, abs=0.1)
        places = np.argwhere(streak > 0)
        values = np.linalg.eigvalsh(np.cov(places.T, aweights=streak[streak > 0]))
        assert np.sqrt(12 * values[1]) == pytest.approx(20, abs=2.5), "a uniform line's deviation is length / 12^(1/2)"
        assert values[0] < 1, "and it is thin"
        spread.append(places.std(axis=0)[0])
    assert max(spread) > 2 * min(spread), "in all directions"


def test_jpeg_is_a_jpeg_file(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[bytes] = []

    def listen(data: bytes, name: str) -> Image.Image:
        files.append(data)
        return decode(data, name)

    monkeypatch.setattr(module, "decode", listen)
    image = natural(45, 31)
    changed = corrupt(image, "jpeg", 5)
    opened = Image.open(io.BytesIO(files[0]))
    assert opened.format == "JPEG"
    assert np.array_equal(pixels(changed), pixels(opened))
    assert len(files[0]) < 31 * 45


def test_pixelated_images_have_so_many_blocks() -> None:
    changed = pixels(corrupt(natural(224, 112), "pixelate", 5))  # blocks of 4 * 112 / 224
    assert np.array_equal(changed[::2, ::2], changed[1::2, 1::2])
    assert len(np.unique(changed[0, ::2], axis=0)) > 60


def test_the_picture_has_a_row_a_corruption() -> None:
    small, large = (draw_examples(natural(*size), ("fog", "jpeg"), "note") for size in ((64, 48), (640, 480)))
    assert small.size[0] > 6 * 128
    assert large.size[0] > 6 * 160
    rows = draw_examples(natural(64, 48), NAMES, "note").size[1], small.size[1]
    assert rows[0] - rows[1] == (len(NAMES) - 2) * (48 * 2 + 14)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_corrupted_source_is_a_part_of_its_source(photos: Path, tmp_path: Path) -> None:
    source = ImageSource(photos)
    some = CorruptedSource(source, [3, 17], "fog", 2, seed=5)
    assert len(some) == 2
    assert some.labels == [source.labels[3], source.labels[17]]
    assert some.classes == source.classes
    expected = corrupt(source.load(17), "fog", 2, seed=5, number=17)
    assert some.load(1).tobytes() == expected.tobytes()
    whole = CorruptedSource(source, range(len(source)), "fog", 2, seed=5)
    assert whole.load(17).tobytes() == expected.tobytes(), "the others do not matter"
    others = [("fog", 1, 5), ("fog", 2, 6), ("jpeg", 2, 5), ("fog", 0, 5)]
    prints = {fingerprint_data(CorruptedSource(source, [3, 17], *which)) for which in others}
    assert len(prints | {fingerprint_data(some), fingerprint_data(whole), fingerprint_data(source)}) == 7
    (tmp_path / "broken.png").write_bytes(b"nothing")
    broken = CorruptedSource(ImageSource(tmp_path), [0], "fog", 2, seed=5)
    with pytest.raises(ImageError, match=r"broken\.png"):
        broken.load(0)


def test_labels_are_matched_by_name_or_by_number() -> None:
    wnids = ("n01", "n02", "n03")
    assert match_labels(["n03", "n01"], [0, 1, 1], wnids, "r").tolist() == [2, 0, 0]
    assert match_labels(["0", "002"], [1, 0], wnids, "v2").tolist() == [2, 0]
    assert match_labels(["7", "3"], [0, 1], ("3", "5", "7"), "digits").tolist() == [2, 0], "numbers that are names"
    assert match_labels(["n02", "dog"], [0, 0], wnids, "hf").tolist() == [1, 1], "dog has no image"
    for names, labels, classes, message in (
        (["n02", "dog", "cat"], [0, 1, 2], wnids, "set: 2 of its classes were not learned, such as dog, cat"),
        (["0", "3"], [0, 1], wnids, "such as 3"),
        (["0", "1"], [0, 1], ("3", "5"), "such as 0, 1"),
        (["0", "dog"], [0, 1], wnids, "such as 0, dog"),
        ([""], [0], wnids, "images in no folder"),
        (["n01"], [0, -1], wnids, "negative labels"),
    ):
        with pytest.raises(ValueError, match=message):
            match_labels(names, labels, classes, "set")


# --- accuracies ------------------------------------------------------------------------------------------------------


def folders(root: Path, counts: dict[str, int]) -> str:
    """So many images a class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            natural(12, 9, number).save(root / name / f"{number}.png")
    return str(root)


def classifiers(classes: str, decide: Callable[[ImageSource], Tensor]) -> Classifiers:
    return Classifiers(
        kind="hand",
        classes=tuple(classes),
        logits=lambda source: {"": decide(source)},
        fingerprint=classes,
        facts={"": {"made": "by hand"}},
    )


def by_setting(rows: list[tuple[str, Row]]) -> dict[str, Row]:
    found = {row.setting: row for _, row in rows}
    assert len(found) == len(rows)
    assert all((row.protocol, row.metric) == ("shift", "accuracy") for row in found.values())
    return found


def test_a_constant_classifier_has_its_classes_share_everywhere(tmp_path: Path) -> None:
    test = ImageSource(folders(tmp_path / "val", {"a": 3, "b": 5, "c": 2}))
    constant = classifiers("abc", lambda source: torch.tensor([0.0, 3.0, 1.0]).repeat(len(source), 1))
    data = (
        folders(tmp_path / "ac", {"a": 1, "c": 3}),
        folders(tmp_path / "bc", {"b": 1, "c": 3}),
        folders(tmp_path / "b", {"b": 4}),
        folders(tmp_path / "other" / "v2", {"0": 1, "2": 2}),
    )
    settings = ShiftSettings(data=data, corruptions=("fog", "jpeg"), severities=(1, 5))
    rows = by_setting(list(run_shift(constant, test, settings, Place(out=tmp_path / "out"))))
    assert {name: row.value.mean for name, row in rows.items()} == pytest.approx(
        {
            "clean": 0.5,
            "ac": 3 / 4,  # b is no choice; c comes next
            "bc": 1 / 4,
            "b": 1,  # one class: all are a choice
            "v2": 2 / 3,
            **{f"{name}/{severity}": 0.5 for name in ("fog", "jpeg") for severity in (1, 5, "mean")},
            "corruptions/mean": 0.5,
        }
    )
    assert rows["clean"].value == rows["fog/5"].value == share_interval(torch.arange(10) < 5)
    assert [rows[name].detail["among"] for name in ("ac", "b", "v2")] == [2, 3, 2]
    assert rows["ac"].detail["clean"] == pytest.approx(2 / 5), "of three a and two c, between a and c"
    assert rows["b"].detail["clean"] == 1
    assert rows["corruptions/mean"].detail["clean"] == 0.5
    assert all(row.detail["classifier"] == "hand" and row.detail["made"] == "by hand" for row in rows.values())
    assert Image.open(tmp_path / "out" / str(rows["corruptions/mean"].detail["picture"])).size[0] > 6 * 120


def test_means_are_over_the_same_images(tmp_path: Path) -> None:
    """Right on all at severity 1, on a half at 3, on none at 5; the interval is over images."""
    test = ImageSource(folders(tmp_path / "val", {"a": 40, "b": 40}))

    def decide(source: ImageSource) -> Tensor:
        right = torch.tensor(source.labels)
        if isinstance(source, CorruptedSource):
            wrong = {1: torch.tensor(False), 3: torch.arange(len(right)) % 2 == 0, 5: torch.tensor(True)}
            right = torch.where(wrong[source.severity], 1 - right, right)
        return torch.nn.functional.one_hot(right, 2).float()

    settings = ShiftSettings(corruptions=("jpeg", "pixelate"), severities=(1, 3, 5), images=20)
    rows = by_setting(list(run_shift(classifiers("ab", decide), test, settings, Place(out=tmp_path / "out"))))
    assert list(rows)[:2] == ["clean", "clean subset"]
    assert rows["clean subset"].detail["images"] == 20
    assert [rows[f"jpeg/{severity}"].value.mean for severity in (1, 3, 5, "mean")] == [1, 0.5, 0, 0.5]
    # an image is right once or twice in three: deviation 1/6 · (20/19)^(1/2)
    half = 1.959964 * (1 / 6) * (20 / 19) ** 0.5 / 20**0.5
    for name in ("jpeg/mean", "corruptions/mean"):
        value = rows[name].value
        assert (value.low, value.mean, value.high) == pytest.approx((0.5 - half, 0.5, 0.5 + half))


def test_impossible_settings_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    test = ImageSource(folders(tmp_path / "val", {"a": 2, "b": 2}))
    foreign = folders(tmp_path / "foreign", {"a": 1, "dog": 1})
    nothing = classifiers("ab", lambda _: pytest.fail("computed"))
    for changes, message in (
        ({"corruptions": ("snow",)}, r"--shift.corruptions is \('snow',\): it must be some of gaussian_noise, .*"),
        ({"corruptions": ("fog", "fog")}, "none twice"),
        ({"severities": (0, 1)}, r"--shift.severities is \(0, 1\): it must be some of 1 to 5"),
        ({"severities": ()}, "some of 1 to 5"),
        ({"severities": (1, 1)}, r"\(1, 1\): it must be some of 1 to 5, none twice"),
        ({"data": (foreign, foreign)}, "sets of which none is given twice"),
        ({"images": 5}, "--shift.images is 5: it must be 1 to 4, which the test set has"),
        ({"images": 0}, "1 to 4"),
        ({"data": (foreign,)}, "foreign: 1 of its classes were not learned, such as dog"),
    ):
        with pytest.raises(ValueError, match=message):
            next(run_shift(nothing, test, ShiftSettings(**changes), Place(out=tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        next(run_shift(nothing, test, ShiftSettings(data=(str(tmp_path / "no"),)), Place(out=tmp_path)))
    with pytest.raises(ValueError, match="not finite"):
        predict(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))


def test_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    test = ImageSource(folders(tmp_path / "val", {"a": 1, "b": 1}))
    data = tuple(folders(tmp_path / name, {"a": 1, "b": 1}) for name in ("one/val", "two/val", "clean"))
    constant = classifiers("ab", lambda source: torch.tensor([1.0, 0.0]).repeat(len(source), 1))
    settings = ShiftSettings(data=data, corruptions=())
    rows = by_setting(list(run_shift(constant, test, settings, Place(out=tmp_path / "out"))))
    assert set(rows) == {"clean", *data}


# --- linear probes ---------------------------------------------------------------------------------------------------


def test_linear_probes_are_those_of_the_protocol_and_an_interrupted_evaluation_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, _ = open_model("pixels:8")
    parts = {"even": slice(0, None, 2), "all": slice(None)}
    source, encode, calls = ImageSource(photos), extractor.encode, []
    train = Features(extract(extractor, source), torch.tensor(source.labels), tuple(source.classes))
    settings = ShiftSettings(data=(str(photos),), corruptions=("fog", "gaussian_noise"), severities=(1, 5), images=12)
    place = Place(out=tmp_path, batch_size=24)

    def count(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(images)

    def run() -> list[tuple[str, Row]]:
        return list(run_shift(linear_classifiers(extractor, train, parts, place, epochs=2), source, settings, place))

    monkeypatch.setattr(linear, "LEAST_STEPS", 20)
    monkeypatch.setattr(extractor, "encode", count)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [24, 12, 12, 12], "the whole set, which is the shifted one too, and three damaged halves"
    rows = run()
    assert calls[4:] == [12, 12], "what was finished is not computed again"
    again = run()
    assert len(calls) == 6
    kept = [row for row in rows if "/" in row[1].setting]
    assert [row for row in again if "/" in row[1].setting] == kept, "seconds included"
    assert [dataclasses.replace(row, seconds=0) for _, row in again] == [
        dataclasses.replace(row, seconds=0) for _, row in rows
    ]
    assert {key for key, _ in rows} == set(parts)

    fitted = fit_probe(train, epochs=2)
    clean = next(row for key, row in rows if key == "all" and row.setting == "clean")
    assert clean.value == share_interval(judge(fitted.probe, train)[0][0])
    assert clean.detail["learning_rate"] == fitted.learning_rate
    noisy = CorruptedSource(source, range(0, 24, 2), "gaussian_noise", 5, seed=0)
    features = extract(extractor, noisy)
    labels = fitted.probe.logits(features)[:, 0].argmax(dim=1)
    row = next(row for key, row in rows if key == "all" and row.setting == "gaussian_noise/5")
    assert row.value == share_interval(labels == torch.tensor(noisy.labels))
