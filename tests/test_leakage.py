"""What is chosen never sees a test image: sealed, spoiled and doubled test sets, and cuts along groups."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from training.data.images import ImageSource
from training.evaluate import features as module
from training.evaluate import few_shot as few_shot_module
from training.evaluate import linear, protocols
from training.evaluate.command import evaluate
from training.evaluate.duplicates import find_duplicates
from training.evaluate.features import Features, fingerprint_data, scan_data
from training.evaluate.linear import fit_probe
from training.evaluate.options import Options
from training.evaluate.protocols import ON_FEATURES, Settings
from training.evaluate.split import check_pair, hold_back

SETTINGS = Settings(k=(1, 5), epochs=3, shots=("2", "20%"), draws=3)


def clouds(n: int, *, seed: int) -> Features:
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % 3
    rows = centres[labels] + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return Features(rows, labels, ("a", "b", "c"))


class Sealed(Features):
    """Test images that note when somebody looks at their labels."""

    def __init__(self, features: Features, events: list[str]) -> None:
        self.__dict__.update(rows=features.rows, classes=features.classes, groups=None, sealed=features.labels)
        self.__dict__["events"] = events

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        self.__dict__["events"].append("labels")
        return self.__dict__["sealed"]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether anything leaks does not depend on how long a probe learns."""
    monkeypatch.setattr(linear, "LEAST_STEPS", 1)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Everything that protocols on features learn or draw, in the order in which they do."""
    events: list[tuple[str, Any]] = []
    train_probe, draw_shots, fit = linear.train_probe, few_shot_module.draw_shots, LogisticRegression.fit

    def note_probe(*arguments: Any, **named: Any) -> Any:
        probe = train_probe(*arguments, **named)
        kept = (probe.weight, probe.bias, probe.standardise.mean, probe.standardise.deviation)
        events.append(("probe", [tensor.tolist() for tensor in kept]))
        return probe

    def note_shots(*arguments: Any) -> Tensor:
        shots = draw_shots(*arguments)
        events.append(("shots", shots.tolist()))
        return shots

    def note_fit(self: LogisticRegression, *arguments: Any) -> LogisticRegression:
        fit(self, *arguments)
        events.append(("regression", [self.coef_.tolist(), self.intercept_.tolist()]))
        return self

    monkeypatch.setattr(linear, "train_probe", note_probe)
    monkeypatch.setattr(few_shot_module, "draw_shots", note_shots)
    monkeypatch.setattr(LogisticRegression, "fit", note_fit)
    return events


# --- hyper-parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "kinds"), [("linear", {"probe"}), ("few_shot", {"shots", "regression"})])
def test_whatever_is_learned_is_the_same_for_a_spoiled_test_set(
    protocol: str, kinds: set[str], learned: list[tuple[str, Any]]
) -> None:
    train, test = clouds(300, seed=0), clouds(90, seed=1)
    spoiled = (
        test,
        Features(test.rows, test.labels.flip(0), test.classes),
        Features(torch.zeros_like(test.rows), torch.zeros_like(test.labels), test.classes),
        test.take(torch.arange(4)),
    )
    found, settings = [], []
    for other in spoiled:
        learned.clear()
        settings.append([row.setting for row in ON_FEATURES[protocol](train, other, SETTINGS)])
        found.append(list(learned))
    assert {kind for kind, _ in found[0]} == kinds
    assert all(other == found[0] for other in found[1:]), "to the last bit"
    assert all(other == settings[0] for other in settings[1:]), "the learning rate too"


def test_spoiled_training_labels_do_change_what_is_learned(learned: list[tuple[str, Any]]) -> None:
    """The test above would see a difference if there was one."""
    train = clouds(300, seed=0)
    fit_probe(train, epochs=3)
    straight = list(learned)
    learned.clear()
    fit_probe(Features(train.rows, train.labels.flip(0), train.classes), epochs=3)
    assert learned != straight


def test_labels_of_the_test_set_stay_sealed_until_everything_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    train_probe, choose = linear.train_probe, linear.choose

    def note_probe(*arguments: Any, **named: Any) -> Any:
        events.append("learn")
        return train_probe(*arguments, **named)

    def note_choice(*arguments: Any) -> int:
        events.append("choose")
        return choose(*arguments)

    monkeypatch.setattr(linear, "train_probe", note_probe)
    monkeypatch.setattr(linear, "choose", note_choice)
    train, test = clouds(300, seed=0), Sealed(clouds(90, seed=1), events)
    list(ON_FEATURES["linear"](train, test, SETTINGS))
    assert events[:3] == ["learn", "choose", "learn"]
    assert set(events[3:]) == {"labels"}


def test_neighbours_vote_before_the_labels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    predict = protocols.knn_predict

    def note(*arguments: Any, **named: Any) -> Any:
        found = predict(*arguments, **named)
        events.append("predicted")
        return found

    monkeypatch.setattr(protocols, "knn_predict", note)
    rows = list(ON_FEATURES["knn"](clouds(60, seed=0), Sealed(clouds(30, seed=1), events), SETTINGS))
    assert len(rows) == 2
    assert events[0] == "predicted"
    assert set(events[1:]) == {"labels"}


def test_columns_of_a_representation_are_standardised_by_training_images_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes: list[linear.Probe] = []

    def note(probe: linear.Probe, features: Features) -> Any:
        probes.append(probe)
        return linear.judge(probe, features)

    monkeypatch.setattr(protocols, "judge", note)
    train, test = clouds(300, seed=0), clouds(90, seed=1)
    far = Features(test.rows * 1e6 + 1e6, test.labels, test.classes)
    for other in (test, far):
        list(ON_FEATURES["linear"](train, other, SETTINGS))
    mean, deviation = train.rows.mean(dim=0), train.rows.std(dim=0, unbiased=False)
    assert len(probes) == 2
    for probe in probes:
        torch.testing.assert_close(probe.standardise.mean, mean)
        by_hand = (far.rows - mean) / deviation @ probe.weight + probe.bias
        torch.testing.assert_close(probe.logits(far.rows).flatten(1), by_hand, rtol=1e-2, atol=1e-3)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_no_grouping_is_cut_through() -> None:
    """Random sizes of groups, of classes and of what is held back; or a refusal, never a group in both."""
    cut, refused = 0, 0
    for seed in range(50):
        rng = random.Random(seed)
        count, groups, classes = rng.randint(12, 150), rng.choice((1, 2, 4, 20, 40)), rng.randint(2, 4)
        labels = torch.tensor([*range(classes), *range(classes), *(rng.randrange(classes) for _ in range(count))])
        weights = [rng.random() ** 3 for _ in range(groups)]  # some groups are large
        names = tuple(str(group) for group in rng.choices(range(groups), weights, k=len(labels)))
        features = Features(torch.zeros(len(labels), 1), labels, tuple("abcd"[:classes]), names)
        try:
            fit, held = hold_back(features, rng.choice((0.05, 0.1, 0.2, 0.5)), seed)
        except ValueError as error:
            assert "group" in str(error)  # noqa: PT017  (which of the two happens depends on the grouping)
            refused += 1
            continue
        cut += 1
        one, other = features.take(fit), features.take(held)
        assert set(one.groups or ()).isdisjoint(other.groups or ())
        assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(labels)))
        assert set(one.labels.tolist()) == set(labels.tolist()), "every class can be learned"
        with pytest.raises(ValueError, match="groups"):
            check_pair(features, Features(features.rows, labels, features.classes, names))
    assert cut > 25
    assert refused > 0


def test_any_shared_group_is_refused_and_none_passes() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        train, test = clouds(30, seed=0), clouds(30, seed=1)
        names = [tuple(str(rng.randrange(start, start + 12)) for _ in range(30)) for start in (0, rng.randrange(20))]
        pair = [Features(it.rows, it.labels, it.classes, own) for it, own in zip((train, test), names, strict=True)]
        if set(names[0]) & set(names[1]):
            with pytest.raises(ValueError, match="their images would leak"):
                check_pair(*pair)
        else:
            check_pair(*pair)


def test_a_probe_chooses_its_rate_on_groups_it_did_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = clouds(300, seed=0), []
    grouped = Features(train.rows, train.labels, train.classes, tuple(str(number // 10) for number in range(300)))
    train_probe, judge = linear.train_probe, linear.judge
    monkeypatch.setattr(linear, "train_probe", lambda *a, **b: seen.append(a[0].groups) or train_probe(*a, **b))
    monkeypatch.setattr(linear, "judge", lambda *a, **b: seen.append(a[1].groups) or judge(*a, **b))
    fit_probe(grouped, epochs=3)
    learned, judged = set(seen[0]), set(seen[1])
    assert learned
    assert judged
    assert learned.isdisjoint(judged)


# --- the same image twice --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twenty training and eight test images; two test files are training files under other names."""
    root, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(3)
    for split, count in (("train", 20), ("test", 8)):
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    shutil.copy(root / "train/class0/06.png", root / "test/class1/05.png")  # as another class, even
    shutil.copy(root / "train/class1/17.png", root / "test/class1/07.png")
    return root / "train", root / "test"


def test_doubles_across_the_cut_are_counted_and_named(pair: tuple[Path, Path]) -> None:
    train, test = map(ImageSource, pair)
    found = find_duplicates(train, test)
    assert found.images == 2
    assert found.first == ("class1/05.png", "class0/06.png")
    assert found.compared == (8, 20)
    assert str(found).startswith("2 of 8 test images are among 20 training images")
    alone = find_duplicates(ImageSource(pair[0] / "class0"), ImageSource(pair[1] / "class0"))
    assert (alone.images, alone.first) == (0, None)


def test_files_are_read_once_for_fingerprint_and_doubles(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = map(ImageSource, pair)
    reads: list[int] = []
    for source in (train, test):
        read = source.reader.read
        monkeypatch.setattr(source.reader, "read", lambda index, read=read: reads.append(index) or read(index))
    fingerprint_data(train)
    find_duplicates(train, test)
    fingerprint_data(test)
    find_duplicates(train, test)
    assert len(reads) == 28


def test_of_huge_sets_some_are_compared_and_how_many_is_said(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint_data(ImageSource(pair[0]))
    monkeypatch.setattr(module, "IMAGES_READ", 10)
    train, test = map(ImageSource, pair)
    assert list(scan_data(train).digests) == list(range(0, 20, 2))
    assert find_duplicates(train, test).compared == (8, 10)
    assert fingerprint_data(train) != whole
    monkeypatch.setattr(module, "IMAGES_READ", 20)
    assert fingerprint_data(ImageSource(pair[0])) == whole, "no image more than may be read is none left out"


def test_the_command_records_and_prints_doubles(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(
        models=("pixels:4",), train=str(pair[0]), test=str(pair[1]), protocols=("knn",), out=tmp_path, settings=SETTINGS
    )
    evaluate(options)
    found = json.loads((tmp_path / "results.json").read_text())["duplicates"]
    assert found == {"images": 2, "first": ["class1/05.png", "class0/06.png"], "compared": [8, 20]}
    said = capsys.readouterr()
    assert "2 of 8 test images are among 20 training images" in said.out + said.err
