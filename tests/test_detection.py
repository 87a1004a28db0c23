"""Detection: COCO's layout read right or refused, average precision by hand, a detector that learns simple shapes."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import tarfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torchvision.ops import masks_to_boxes

from perceptual_mae_models.images import ImageError
from training.data.boxes import DetectionViews, fit_to_canvas
from training.data.coco import Objects, open_coco
from training.data.sampler import ImageKey
from training.evaluate.average_precision import Predictions, average_precision
from training.evaluate.detection import (
    DetectionSettings,
    create_task,
    learn_detector,
    open_detection,
    predict,
    run_detection,
)
from training.evaluate.duplicates import find_duplicates
from training.evaluate.features import fingerprint_weights
from training.evaluate.models import open_model
from training.evaluate.rows import Place, Row
from training.evaluate.trainer import Engine
from training.networks.pyramid import Canvas, DetectorShape, PyramidBackbone, build_detector

MODEL = "vit_pico_patch8_pmae"
CATEGORIES = [{"id": 7, "name": "square"}, {"id": 90, "name": "disc"}]  # neither from 1 nor without gaps, as COCO's
SETTINGS = DetectionSettings(
    size=(64, 64),
    encoder=("frozen",),
    epochs=6,  # 72 steps
    batch_size=4,
    lr=3e-3,
    scale_jitter=(1.0, 1.0),
    scales=(2.0, 1.0),
    width=32,
    head_width=64,
    proposals=64,
    sampled_boxes=16,
    resamples=20,
)


def detect(name: str, settings: DetectionSettings, place: Place) -> Iterator[Row]:
    return run_detection(name, open_detection(settings), settings, place)


def shapes(seed: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A 64 x 64 image of noise with a red square and a green disc, and their annotations."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 90, (64, 64, 3), dtype=np.uint8))
    draw, annotations = ImageDraw.Draw(image), []
    for category, left in zip(rng.permutation([7, 90]).tolist(), (0, 32), strict=True):
        side = int(rng.integers(18, 30))
        x, y = left + int(rng.integers(0, 32 - side)), int(rng.integers(0, 64 - side))
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        outline = corners if category == 7 else 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], 1)
        polygon = (np.array([x, y]) + side * outline).flatten().tolist()
        draw.polygon(polygon, fill=(255, 60, 60) if category == 7 else (60, 255, 60))
        box = [float(x), float(y), float(side), float(side)]
        annotations.append({"category_id": category, "bbox": box, "area": side * side, "segmentation": [polygon]})
    return image, annotations


def write_split(root: Path, split: str, seeds: range) -> None:
    found: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        image, annotations = shapes(seed)
        image.save(root / split / f"{seed}.png")
        found["images"].append({"id": number, "file_name": f"{seed}.png", "width": 64, "height": 64})
        for annotation in annotations:
            # numbered from 0, which pycocotools alone would never match
            found["annotations"].append(
                {"id": len(found["annotations"]), "image_id": number, "iscrowd": 0, **annotation}
            )
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    write_split(root, "train", range(48))
    write_split(root, "test", range(100, 116))
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A set to spoil."""
    root = tmp_path / "small"
    write_split(root, "train", range(3))
    write_split(root, "val", range(10, 12))
    return root


def change(root: Path, split: str, how: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    found = json.loads(path.read_text())
    how(found)
    path.write_text(json.dumps(found))


# --- COCO's layout ---------------------------------------------------------------------------------------------------


def test_boxes_labels_and_masks_are_those_of_the_json(shapes_set: Path) -> None:
    train, test = open_coco(shapes_set)
    assert (len(train), len(test), train.classes, train.masks) == (48, 16, ["square", "disc"], True)
    objects = test.objects(0)
    _, annotations = shapes(100)
    assert test.name(0) == "test/100.png"
    assert objects.labels.tolist() == [{7: 1, 90: 2}[a["category_id"]] for a in annotations], "0 is the background"
    expected = torch.tensor([a["bbox"] for a in annotations])
    assert torch.equal(objects.boxes, torch.cat([expected[:, :2], expected[:, :2] + expected[:, 2:]], 1))
    masks = objects.masks(64, 64)
    assert torch.allclose(masks_to_boxes(masks).float(), objects.boxes, atol=1.5), "the outlines fill their boxes"
    filled = masks.flatten(1).sum(1) / objects.areas
    for label, share in zip(objects.labels.tolist(), filled.tolist(), strict=True):
        assert share == pytest.approx({1: 1.0, 2: math.pi / 4}[label], abs=0.08)
    # the pixels say the same
    pixels = torch.from_numpy(np.array(test.load(0)))
    assert (pixels[masks[0].bool()].max(1).values > 200).float().mean() > 0.9


def test_a_tar_is_its_folder(shapes_set: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shapes.tar", "w") as tar:
        tar.add(shapes_set, arcname=".")
    for plain, packed in zip(open_coco(shapes_set), open_coco(tmp_path / "shapes.tar"), strict=True):
        assert packed.digest == plain.digest
        assert [packed.reader.read(i) for i in range(3)] == [plain.reader.read(i) for i in range(3)]
        assert torch.equal(packed.objects(2).boxes, plain.objects(2).boxes)
        assert torch.equal(packed.objects(2).masks(64, 64), plain.objects(2).masks(64, 64))


def test_cocos_own_names_and_val_where_no_test_is_annotated(small: Path) -> None:
    for split in ("train", "val"):
        (small / split).rename(small / f"{split}2017")
        (small / "annotations" / f"instances_{split}.json").rename(
            small / "annotations" / f"instances_{split}2017.json"
        )
    train, test = open_coco(small)
    assert (train.name(0), test.name(0)) == ("train2017/0.png", "val2017/10.png")
    write_split(small, "test", range(20, 21))
    assert open_coco(small)[1].name(0) == "test/20.png"


def test_every_form_of_a_mask(small: Path) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[10:30, 5:20] = 1
    code = coco_mask.encode(np.asfortranarray(mask))
    runs = [len(list(run)) for run in np.split(mask.T.flatten(), np.flatnonzero(np.diff(mask.T.flatten())) + 1)]

    def rewrite(found: dict[str, Any]) -> None:
        segments = [
            {"size": [64, 64], "counts": runs},
            {"size": [64, 64], "counts": code["counts"].decode()},
            [[5, 10, 20, 10, 20, 30, 5, 30]],
            [[5, 10, 20, 10, 20, 20, 5, 20], [5, 20, 20, 20, 20, 30, 5, 30]],
        ]
        for annotation, segment in zip(found["annotations"], segments, strict=False):
            annotation["segmentation"] = segment

    change(small, "train", rewrite)
    train, _ = open_coco(small)
    for index in range(2):
        for read in train.objects(index).masks(64, 64):
            assert torch.equal(read, torch.from_numpy(mask))


def test_boxes_are_clipped_and_those_without_area_counted(small: Path) -> None:
    def outside(found: dict[str, Any]) -> None:
        found["annotations"] *= 5
        found["annotations"][0] = {**found["annotations"][0], "bbox": [-5.0, 50.0, 15.0, 30.0]}
        found["annotations"][1] = {**found["annotations"][1], "bbox": [10.0, 10.0, 0.0, 5.0]}

    change(small, "train", outside)
    train, test = open_coco(small)
    assert (train.dropped, test.dropped) == (1, 0)
    assert train.objects(0).boxes[0].tolist() == [0, 50, 10, 64]
    assert sum(len(train.objects(index).labels) for index in range(3)) == 29


def spoil_boxes(found: dict[str, Any]) -> None:
    for annotation in found["annotations"]:
        annotation["bbox"] = [100.0, 100.0, 5.0, 5.0]


def spoil_half_of_the_masks(found: dict[str, Any]) -> None:
    for annotation in found["annotations"][::2]:
        annotation["segmentation"] = []


@pytest.mark.parametrize(
    ("split", "spoil", "message"),
    [
        ("train", lambda f: f.pop("categories"), r"not COCO's json of instances: KeyError\('categories'\)"),
        ("train", lambda f: f["annotations"].clear(), "annotates nothing"),
        ("train", spoil_boxes, "annotates nothing that has an area"),
        ("train", lambda f: f["annotations"][0].update(bbox=[9.0, 9.0, 0.0, 0.0]), "1 of 6 boxes have no area"),
        ("train", lambda f: f["images"][0].update(file_name="gone.png"), r"1 of its 3 images are missing.*gone\.png"),
        ("train", lambda f: f["images"][0].update(file_name="1.png"), "occurs twice"),
        ("train", lambda f: f["images"][0].update(id=1), "occurs twice"),
        ("train", lambda f: f["annotations"][0].update(category_id=1), "annotation 0 is of an unknown"),
        ("train", lambda f: f["annotations"][0].update(image_id=77), "annotation 0 is of an unknown"),
        ("train", lambda f: f["categories"][0].update(name="disc"), "same id or name"),
        ("val", lambda f: f["categories"][0].update(name="cube"), "the categories differ"),
        ("train", lambda f: [a.update(category_id=7) for a in f["annotations"]], "has no box of disc, which"),
        ("train", spoil_half_of_the_masks, "3 annotations, such as 0, have no segmentation"),
    ],
)
def test_what_a_json_lacks_is_said(
    small: Path, split: str, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change(small, split, spoil)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_coco(small)


def test_images_of_both_splits_are_counted_and_broken_ones_are_found_before_training(small: Path) -> None:
    (small / "val" / "10.png").write_bytes((small / "train" / "2.png").read_bytes())
    train, test = open_coco(small)
    duplicates = find_duplicates(train, test)
    assert (duplicates.images, duplicates.first) == (1, ("val/10.png", "train/2.png"))
    test.look_at_all()
    (small / "val" / "10.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"10\.png"):
        open_coco(small)[1].look_at_all()


def test_images_that_were_looked_at_are_let_go(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, count = open_coco(small)[0], 40 * (os.cpu_count() or 1)
    most, image = [], source.load(0)
    alive: list[weakref.ref[Image.Image]] = []

    def load(index: int) -> Image.Image:
        copy = image.copy()
        alive.append(weakref.ref(copy))
        most.append(sum(reference() is not None for reference in alive))
        return copy

    monkeypatch.setattr(type(source), "__len__", lambda _: count)
    monkeypatch.setattr(source, "load", load)
    monkeypatch.setattr(source, "objects", lambda index: None)
    source.look_at_all()
    assert len(most) == count
    assert max(most) < count / 2, "all of COCO would not fit into memory"


def test_missing_splits_are_refused(small: Path, tmp_path: Path) -> None:
    (small / "annotations" / "instances_val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no annotations/instances_test\.json and none of val"):
        open_coco(small)
    (small / "annotations" / "instances_train.json").unlink()
    write_split(small, "val", range(10, 12))
    with pytest.raises(FileNotFoundError, match=r"holds no annotations/instances_train\.json"):
        open_coco(small)
    for nothing in (tmp_path / "no", small / "train" / "0.png"):
        with pytest.raises(FileNotFoundError, match=r"no such folder or uncompressed \.tar"):
            open_coco(nothing)


def test_categories_are_mapped_by_name(small: Path) -> None:
    before = open_coco(small)[1].objects(0).labels

    def renumber(found: dict[str, Any]) -> None:
        found["categories"] = [{"id": 3, "name": "disc"}, {"id": 4, "name": "square"}]
        for annotation in found["annotations"]:
            annotation["category_id"] = {7: 4, 90: 3}[annotation["category_id"]]

    change(small, "val", renumber)
    assert torch.equal(open_coco(small)[1].objects(0).labels, before)


def test_the_real_set(real_data: Path) -> None:
    train, test = open_coco(real_data / "bccd-320x240.tar")
    assert (len(train), len(test), train.masks) == (205, 72, False)
    assert train.classes == test.classes == ["RBC", "WBC", "Platelets"]
    assert sum(len(test.objects(index).labels) for index in range(72)) == 945


# --- views -----------------------------------------------------------------------------------------------------------


def test_images_are_letterboxed() -> None:
    assert fit_to_canvas((240, 320), (192, 192)) == (144, 192)
    assert fit_to_canvas((320, 240), (192, 192)) == (192, 144)
    assert fit_to_canvas((50, 100), (100, 100), 2.0) == (100, 200)


def test_views_are_drawn_from_the_seed_and_boxes_follow_their_objects(shapes_set: Path) -> None:
    train, _ = open_coco(shapes_set)
    views = DetectionViews(train, (96, 128), (0.5, 2.0), seed=3)
    images = [views[ImageKey(epoch, 5)] for epoch in range(12)]
    again = [views[ImageKey(epoch, 5)] for epoch in range(12)]
    shown = 0
    for (image, target), (image_again, _) in zip(images, again, strict=True):
        assert torch.equal(image, image_again)
        assert image.shape[1] <= 96
        assert image.shape[2] <= 128
        assert 0 <= image.min() <= image.max() <= 1
        assert target["boxes"].shape[0] == target["labels"].shape[0] == target["masks"].shape[0]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            assert torch.allclose(masks_to_boxes(mask[None]).float()[0], box, atol=4)
            red, green = image[0][mask.bool()].mean(), image[1][mask.bool()].mean()
            assert (red > green) == (label == 1), "what lies under a mask is its object"
            shown += 1
    assert shown > 12
    assert len({tuple(image.shape) for image, _ in images}) > 3
    plain, nothing = views[5]
    assert (tuple(plain.shape), nothing) == ((3, 96, 96), {})


def test_an_image_without_objects_is_a_view_too(small: Path) -> None:
    change(small, "train", lambda found: found.update(annotations=found["annotations"][2:]))
    train, _ = open_coco(small)
    _, target = DetectionViews(train, (32, 48), (1.0, 1.0), 0)[ImageKey(0, 0)]
    assert {name: tuple(values.shape) for name, values in target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 32, 32),
    }


def test_an_image_of_another_size_than_its_json_says_is_refused(small: Path) -> None:
    change(small, "train", lambda found: found["images"][0].update(width=65))
    train, _ = open_coco(small, masks=False)
    error = DetectionViews(train, (64, 64), (1.0, 1.0), 0)[0]
    assert isinstance(error, ImageError)
    assert str(error) == "train/0.png: is 64 x 64 (height, width), its json says 64 x 65"


# --- average precision -----------------------------------------------------------------------------------------------


def objects_of(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Objects:
    tensor = torch.tensor(boxes).reshape(-1, 4)
    areas = (tensor[:, 2] - tensor[:, 0]) * (tensor[:, 3] - tensor[:, 1])
    return Objects(tensor, torch.tensor(labels), torch.tensor(crowd or [False] * len(labels)), areas, None)


def predictions_of(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Predictions:
    return Predictions(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels).long(), torch.tensor(scores), None)


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [50.0, 50.0, 60.0, 60.0]


def test_average_precision_of_all_and_of_nothing() -> None:
    truth = [objects_of([A, B], [1, 2]), objects_of([B], [1]), objects_of([], [])]
    perfect = [predictions_of([A, B], [1, 2], [0.9, 0.8]), predictions_of([B], [1], [0.7]), predictions_of([], [], [])]
    found = average_precision(truth, perfect, ["a", "b"], "bbox")
    assert dataclasses.astuple(found.ap) == pytest.approx((1, 1, 1))
    assert dataclasses.astuple(found.ap50) == pytest.approx((1, 1, 1))
    assert found.by_class == pytest.approx({"a": 1, "b": 1})
    nothing = average_precision(truth, [predictions_of([], [], [])] * 3, ["a", "b"], "bbox")
    assert dataclasses.astuple(nothing.ap) == (0, 0, 0)
    with pytest.raises(ValueError, match="no annotated object"):
        average_precision([objects_of([], [])], perfect[:1], ["a", "b"], "bbox")
    broken = predictions_of([A], [1], [math.nan])
    with pytest.raises(ValueError, match="not finite"):
        average_precision(truth[:1], [broken], ["a", "b"], "bbox")
    with pytest.raises(ValueError, match="no masks"):
        average_precision(truth, perfect, ["a", "b"], "segm")


def test_average_precision_by_hand() -> None:
    # one of two objects at rank 1, a miss, the other at rank 3: precision 1 up to recall 0.5, then 2/3
    truth = [objects_of([A, B], [1, 1])]
    found = [predictions_of([A, FAR, B], [1, 1, 1], [0.9, 0.8, 0.7])]
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(truth, found, ["a"], "bbox", resamples=0).ap.mean == pytest.approx(expected)
    # an overlap of 10 x 8 of 10 x 10: right at 0.50 ... 0.80, wrong at the other three thresholds
    shorter = [predictions_of([[0.0, 0.0, 10.0, 8.0]], [1], [0.9])]
    result = average_precision([objects_of([A], [1])], shorter, ["a"], "bbox")
    assert (result.ap.mean, result.ap50.mean) == pytest.approx((0.7, 1.0))
    # what is found in a crowd is neither right nor wrong
    crowded = [objects_of([A, B], [1, 1], [False, True])]
    inside = [predictions_of([[22.0, 22.0, 30.0, 30.0], A], [1, 1], [0.9, 0.8])]
    assert average_precision(crowded, inside, ["a"], "bbox").ap.mean == pytest.approx(1)


def random_pair(images: int) -> tuple[list[Objects], list[Predictions]]:
    rng = torch.Generator().manual_seed(0)
    truth, found = [], []
    for _ in range(images):
        corners = torch.rand(4, 2, generator=rng) * 50
        boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(4, 2, generator=rng)], 1)
        labels = torch.randint(1, 3, (4,), generator=rng)
        truth.append(objects_of(boxes.tolist(), labels.tolist()))
        moved = boxes + 2 * torch.randn(4, 4, generator=rng)
        found.append(predictions_of(moved.tolist(), labels.tolist(), torch.rand(4, generator=rng).tolist()))
    return truth, found


def test_average_precision_is_pycocotools_and_its_interval_is_the_bootstraps() -> None:
    truth, found = random_pair(40)
    result = average_precision(truth, found, ["a", "b"], "bbox", resamples=100)
    assert 0.05 < result.ap.mean < 0.95
    assert result.ap.low < result.ap.mean < result.ap.high
    assert result == average_precision(truth, found, ["a", "b"], "bbox", resamples=100)

    def reference(numbers: list[int]) -> float:
        """The usual road through json-like lists, for images of which some come several times."""
        coco = COCO()
        coco.dataset = {
            "images": [{"id": place} for place in range(len(numbers))],
            "categories": [{"id": 1}, {"id": 2}],
            "annotations": [],
        }
        results = []
        for place, number in enumerate(numbers):
            for box, label in zip(truth[number].boxes, truth[number].labels, strict=True):
                x, y, right, bottom = box.tolist()
                entry = {"image_id": place, "category_id": int(label), "bbox": [x, y, right - x, bottom - y]}
                entry |= {"area": (right - x) * (bottom - y), "iscrowd": 0, "id": len(coco.dataset["annotations"]) + 1}
                coco.dataset["annotations"].append(entry)
            for box, label, score in zip(found[number].boxes, found[number].labels, found[number].scores, strict=True):
                x, y, right, bottom = box.tolist()
                entry = {"image_id": place, "category_id": int(label), "bbox": [x, y, right - x, bottom - y]}
                results.append({**entry, "score": float(score)})
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            judge = COCOeval(coco, coco.loadRes(results), "bbox")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        return float(judge.stats[0])

    assert result.ap.mean == pytest.approx(reference(list(range(40))), abs=1e-9)
    draws = np.random.default_rng(1).integers(0, 40, (50, 40))
    low, high = np.percentile([reference(draw.tolist()) for draw in draws], [2.5, 97.5])
    assert (result.ap.low, result.ap.high) == pytest.approx((low, high), abs=0.03)


# --- detectors -------------------------------------------------------------------------------------------------------


def detector(name: str = MODEL, *, frozen: bool = False, masks: bool = True, **shape: Any) -> Any:
    torch.manual_seed(0)
    values = {"size": (64, 96), "width": 16, "head_width": 32, "proposals": 32, "sampled_boxes": 16}
    encoder = open_model(name, device="cpu")[0].model
    return build_detector(encoder, DetectorShape(**{**values, **shape}), classes=2, masks=masks, frozen=frozen)


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[0, 10:40, 10:40] = 1
    full = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([2]), "masks": masks}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 48, 96)}
    return [torch.rand(3, 64, 80), torch.rand(3, 48, 96)], [full, empty]


@pytest.mark.parametrize(
    ("name", "scales", "strides"),
    [
        (MODEL, (4.0, 2.0, 1.0, 0.5), (2, 4, 8, 16, 32)),
        (MODEL, (2.0, 1.0), (4, 8, 16)),
        ("test_vit@random", (4.0, 2.0, 1.0, 0.5), (4, 8, 16, 32, 64)),
        ("resnet10t@random", (4.0, 2.0, 1.0, 0.5), (4, 8, 16, 32, 64)),
    ],
)
def test_levels_strides_and_anchors(name: str, scales: tuple[float, ...], strides: tuple[float, ...]) -> None:
    network = detector(name, scales=scales, size=(64, 96)).eval()
    assert network.backbone.strides == strides
    with torch.no_grad():
        levels = network.backbone(torch.rand(1, 3, 64, 96))
    assert list(levels) == [*map(str, range(len(strides) - 1)), "pool"]
    for level, stride in zip(levels.values(), strides, strict=True):
        assert level.shape == (1, 16, math.ceil(64 / stride), math.ceil(96 / stride))
    images, _ = network.transform([torch.rand(3, 50, 60)])
    anchors = network.rpn.anchor_generator(images, list(levels.values()))[0]
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    assert sorted({round(side / 8) for side in sides.tolist()}) == list(strides), "eight strides wide"
    last = anchors[-3 * levels["pool"].shape[2] * levels["pool"].shape[3] :].reshape(-1, 3, 4)  # (places, ratios, 4)
    centres = (last[:, 0, :2] + last[:, 0, 2:]) / 2
    assert centres.max() == strides[-1] * (levels["pool"].shape[3] - 1), "true strides, where sizes are no multiples"


def test_a_pyramid_knows_patches_of_14() -> None:
    encoder = timm.create_model("test_vit", img_size=28, patch_size=14)
    backbone = PyramidBackbone(encoder, (56, 84), width=8, scales=(4.0, 2.0, 1.0, 0.5), frozen=True)
    assert backbone.strides == (3.5, 7, 14, 28, 56)


def test_positions_are_resampled_from_the_weights() -> None:
    plain = open_model(MODEL, device="cpu")[0].model
    encoder = detector(size=(64, 96)).backbone.encoder
    expected = resample_abs_pos_embed(plain.pos_embed, [8, 12], num_prefix_tokens=1)
    assert encoder.pos_embed.shape == (1, 97, 192)
    assert torch.equal(encoder.pos_embed, expected)
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    image = torch.rand(1, 3, 64, 64)
    backbone = detector(size=(64, 64), scales=(1.0,)).backbone.eval()
    assert torch.equal(backbone.encoder.pos_embed, plain.pos_embed), "at its own size"
    tokens = plain.eval().forward_features(image)[:, 1:]
    expected = backbone.pyramid.levels[0](tokens.transpose(1, 2).reshape(1, 192, 8, 8))
    assert torch.allclose(backbone(image)["0"], expected, atol=1e-4), "the last map behind the final norm, no prefix"


def test_models_and_sizes_that_do_not_fit_are_refused() -> None:
    for arguments, message in (
        ({"size": (64, 72)}, "multiples of 16"),
        ({"size": (64, 72), "scales": (1.0,), "name": "test_vit@random"}, "multiples of 16"),
        ({"scales": (4.0, 1.0)}, "neighbours among"),
        ({"name": "hiera_tiny_224@random", "size": (192, 256)}, "cannot take images of 192 x 256"),
        ({"name": "pixels:16"}, "gives no feature maps"),
    ):
        with pytest.raises(ValueError, match=message):
            detector(**arguments)


def test_images_are_normalised_as_the_encoder_wants_and_never_rescaled() -> None:
    canvas = Canvas((64, 96), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    image = torch.rand(3, 50, 96)
    images, _ = canvas([image])
    expected = (image - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    assert images.tensors.shape == (1, 3, 64, 96)
    assert images.image_sizes == [(50, 96)]
    assert torch.allclose(images.tensors[0, :, :50], expected)
    assert (images.tensors[0, :, 50:] == 0).all(), "the mean colour"
    assert detector().transform.image_mean == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(ValueError, match="does not fit"):
        canvas([torch.rand(3, 65, 64)])


def test_a_fine_tuned_encoder_learns_and_a_frozen_one_stays(shapes_set: Path, tmp_path: Path) -> None:
    fine = detector().train()
    torch.stack(list(fine(*batch()).values())).sum().backward()
    assert all(p.grad is not None for p in fine.parameters() if p.requires_grad)
    assert fine.backbone.encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    frozen = detector("resnet10t@random", frozen=True).train()
    before = copy.deepcopy(frozen.backbone.encoder.state_dict())
    torch.stack(list(frozen(*batch()).values())).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in frozen.backbone.encoder.state_dict().items())
    assert all(p.grad is None for p in frozen.backbone.encoder.parameters())
    assert all(p.grad is not None for p in frozen.parameters() if p.requires_grad)

    train, _ = open_coco(shapes_set)
    settings = dataclasses.replace(SETTINGS, epochs=2 / 12, weight_decay=0.5)
    learned, _, _ = learn_detector(MODEL, train, settings, "frozen", Place(out=tmp_path, engine=Engine(device="cpu")))
    own = open_model(MODEL, device="cpu")[0].model
    assert fingerprint_weights(learned.backbone.encoder) == fingerprint_weights(own)


def test_a_detector_on_a_convolutional_encoder_is_kept(shapes_set: Path, tmp_path: Path) -> None:
    train, _ = open_coco(shapes_set)
    settings = dataclasses.replace(SETTINGS, epochs=1 / 12)
    place = Place(out=tmp_path, engine=Engine(device="cpu"))
    learned, detail, _ = learn_detector("resnet10t@random", train, settings, "fine_tuned", place)
    (file,) = (tmp_path / str(detail["run"])).rglob("network.safetensors")
    kept = load_file(file)
    assert kept.keys() == learned.state_dict().keys()
    assert all(torch.equal(value, kept[name]) for name, value in learned.state_dict().items())


def test_images_without_objects_leave_no_parameter_without_gradient() -> None:
    """Else several processes would wait for each other: one may have such images alone."""
    network = detector().train()
    images, targets = batch()
    losses = network(images[1:], targets[1:])
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_boxes_stay_float32_in_bf16() -> None:
    network = detector(size=(64, 96), masks=False, score_threshold=0.0).eval()
    images, _ = batch()
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network(images)
            losses = network.train()(*batch())
    assert rounded[0]["boxes"].dtype == rounded[0]["scores"].dtype == torch.float32
    assert len(exact[0]["boxes"]) > 0
    values = rounded[0]["boxes"].flatten()
    assert not torch.equal(values, values.bfloat16().float()), "more than eight bits"
    assert all(loss.isfinite() for loss in losses.values())


def test_layers_of_the_encoder_learn_more_slowly_unless_random(shapes_set: Path) -> None:
    train, _ = open_coco(shapes_set)
    for name, least in ((MODEL, 0.7**9), (f"{MODEL}@random", 1.0)):
        task, recipe, _ = create_task(name, train, SETTINGS, "fine_tuned")
        groups = task.optimizer.param_groups
        assert min(group.get("lr_scale", 1) for group in groups) == pytest.approx(least)
        learned = {id(parameter) for group in groups for parameter in group["params"]}
        assert learned == {id(parameter) for parameter in task.network.parameters() if parameter.requires_grad}
        assert recipe["layer_decay"] == (0.7 if least < 1 else 1.0)
    task, _, _ = create_task(MODEL, train, SETTINGS, "frozen")
    encoder = {id(parameter) for parameter in task.network.backbone.encoder.parameters()}
    assert encoder.isdisjoint(id(p) for group in task.optimizer.param_groups for p in group["params"])


def test_resumed_is_straight(shapes_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = open_coco(shapes_set)
    settings = dataclasses.replace(SETTINGS, epochs=4 / 12, scale_jitter=(0.8, 1.25))
    engine = Engine(device="cpu", checkpoint_every=2)
    straight, _, _ = learn_detector(
        MODEL, train, settings, "fine_tuned", Place(out=tmp_path / "straight", engine=engine)
    )
    load, seen = DetectionViews.__getitem__, []

    def fail_later(self: DetectionViews, key: ImageKey) -> Any:
        seen.append(key)
        if len(seen) == 3 * 4:
            raise KeyboardInterrupt
        return load(self, key)

    monkeypatch.setattr(DetectionViews, "__getitem__", fail_later)
    place = Place(out=tmp_path / "resumed", engine=engine)
    with pytest.raises(KeyboardInterrupt):
        learn_detector(MODEL, train, settings, "fine_tuned", place)
    resumed, _, _ = learn_detector(MODEL, train, settings, "fine_tuned", place)
    assert len(seen) == 3 * 4 + 2 * 4, "two steps are not taken again"
    for (name, one), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_shapes_are_found(shapes_set: Path, tmp_path: Path) -> None:
    place = Place(out=tmp_path, engine=Engine(device="cpu"))
    settings = dataclasses.replace(SETTINGS, data=shapes_set)
    rows = {row.metric: row for row in detect(MODEL, settings, place)}
    assert list(rows) == ["box_ap", "box_ap50", "mask_ap", "mask_ap50"]
    assert rows["box_ap50"].value.mean > 0.8
    assert rows["mask_ap50"].value.mean > 0.8
    for row in rows.values():
        assert (row.protocol, row.setting) == ("detection", "frozen")
        assert 0 <= row.value.low <= row.value.mean <= row.value.high <= 1
    detail = rows["box_ap"].detail
    assert detail["ap_by_class"].keys() == {"square", "disc"}  # type: ignore[attr-defined]
    assert detail["strides"] == (4, 8, 16)
    with Image.open(tmp_path / str(detail["picture"])) as picture:
        assert picture.width > 6 * 384
        assert picture.height > 2 * 288
    json.dumps([dataclasses.asdict(row) for row in rows.values()])

    again = list(detect(MODEL, settings, place))
    assert [row.value for row in again] == [row.value for row in rows.values()], "from the finished run"


def test_predictions_are_in_the_images_own_pixels(shapes_set: Path) -> None:
    _, test = open_coco(shapes_set)

    class Echo(torch.nn.Module):
        """Finds the left upper quarter of every view."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            found = []
            for image in images:
                height, width = image.shape[1] // 2, image.shape[2] // 2
                mask = torch.zeros(1, 1, *image.shape[1:])
                mask[..., :height, :width] = 1
                box = torch.tensor([[0.0, 0.0, width, height]])
                found.append({"boxes": box, "labels": torch.ones(1).long(), "scores": torch.ones(1), "masks": mask})
            return found

    for size in ((96, 128), (32, 32)):
        found = predict(Echo(), test, dataclasses.replace(SETTINGS, size=size), Place(out=Path()))
        assert len(found) == len(test)
        assert found[0].boxes.tolist() == [[0, 0, 32, 32]]
        assert found[0].segments is not None
        assert coco_mask.decode(found[0].segments[0])[:32, :32].all()
        assert coco_mask.area(found[0].segments[0]) == 32 * 32


def test_boxes_alone_and_wrong_settings(shapes_set: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, data=shapes_set, masks=False, epochs=1 / 12, encoder=("frozen",), resamples=0
    )
    rows = list(detect(f"{MODEL}@random", settings, Place(out=tmp_path, engine=Engine(device="cpu"))))
    assert [row.metric for row in rows] == ["box_ap", "box_ap50"]
    for changes, message in (
        ({"data": None}, "say on which images, by --detection.data"),
        ({"data": Path("no")}, "--detection.data no: no such folder or tar"),
        ({"encoder": ()}, r"--detection.encoder is \(\): it must be frozen, fine_tuned or both"),
        ({"scale_jitter": (2.0, 1.0)}, r"--detection.scale-jitter is \(2.0, 1.0\): it must be two ascending"),
        ({"epochs": 0}, "--detection.epochs is 0: it must be above 0"),
        ({"batch_size": 0}, "--detection.batch-size is 0: it must be at least 1"),
        ({"warmup": 1.0}, "--detection.warmup is 1.0: it must be at least 0 and below 1"),
        ({"score_threshold": 5.0}, "--detection.score-threshold is 5.0: it must be at least 0 and below 1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            list(detect(MODEL, dataclasses.replace(settings, **changes), Place(out=tmp_path)))  # type: ignore[arg-type]
