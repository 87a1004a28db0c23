"""Segmentation: known shapes are learned, figures agree with torchmetrics, and no odd data set passes unnoticed."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torchmetrics.classification import MulticlassJaccardIndex

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import ImageError
from training.data.masks import VOID, open_masks
from training.data.sampler import ImageKey
from training.evaluate import trainer
from training.evaluate.encoders import build_encoder
from training.evaluate.iou import bootstrap, count_pixels, score
from training.evaluate.rows import Place, Row
from training.evaluate.segmentation import (
    SegmentationSettings,
    SegmentationViews,
    create_task,
    open_segmentation,
    pixel_loss,
    run_segmentation,
)
from training.evaluate.trainer import Engine, Schedule, fit
from training.networks.segmenter import Segmenter

SIZE = 64


def segment(name: str, settings: SegmentationSettings, place: Place) -> Iterator[Row]:
    return run_segmentation(name, open_segmentation(settings), settings, place)


def shapes(number: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A red square (class 1) and a blue disk (class 2) on grey noise; a corner is void."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(96, 160, (SIZE, SIZE, 3), dtype=np.uint8))
    mask = Image.new("L", image.size)
    left, top, right, bottom, side, width = rng.integers((0, 4, 32, 4, 24, 24), (6, 36, 36, 36, 28, 28))
    for canvas, (square, disk, corner) in ((image, ("#d02020", "#2020d0", "black")), (mask, (1, 2, 255))):
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((left, top, left + side, top + side), square)
        draw.ellipse((right, bottom, right + width, bottom + width), disk)
        draw.rectangle((0, 0, 7, 3), corner)
    return image, np.asarray(mask)


def write(path: Path, mask: NDArray[Any] | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)


def make_set(root: Path, counts: dict[str, int]) -> Path:
    first = 0
    for split, count in counts.items():
        for number in range(first, first + count):
            image, mask = shapes(number)
            write(root / split / "images" / f"{number}.bmp", image)
            write(root / split / "masks" / f"{number}.png", mask)
        first += count
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("shapes"), {"train": 24, "val": 2, "test": 8})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """To be damaged."""
    return make_set(tmp_path / "small", {"train": 2, "test": 2})


def settings(data: Path | None, **changes: Any) -> SegmentationSettings:
    chosen = {"size": (SIZE, SIZE), "width": 32, "encoder": ("frozen",), "resamples": 50, **changes}
    return SegmentationSettings(data=data, **chosen)


def place(out: Path) -> Place:
    return Place(out=out, engine=Engine(device="cpu"))


# --- learning --------------------------------------------------------------------------------------------------------


def test_known_shapes_are_learned_and_a_second_call_learns_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(data, epochs=30, batch_size=8, lr=3e-3, crop_scale=(0.5, 1.0), encoder=("fine_tuned",))

    def run() -> list[Row]:
        return list(segment("test_vit@random", chosen, place(tmp_path)))

    rows = run()
    assert [(row.setting, row.metric) for row in rows] == [("fine_tuned", "miou"), ("fine_tuned", "pixel_accuracy")]
    miou = rows[0].value
    assert miou.mean > 0.9
    assert 0 < miou.low < miou.mean < miou.high < 1
    detail: Any = json.loads(json.dumps(rows[0].detail, allow_nan=False))
    assert np.mean(detail["iou_by_class"]) == pytest.approx(miou.mean)
    assert detail["test"].endswith(": test"), "not val"
    assert detail["recipe"]["layer_decay"] == 1, "random weights have nothing to protect"
    with Image.open(tmp_path / detail["picture"]) as picture:
        assert picture.width > 6 * SIZE
    assert (tmp_path / detail["run"] / "metrics.jsonl").is_file()

    def fail(*_: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(trainer, "_optimise", fail)
    assert [row.value for row in run()] == [row.value for row in rows]


@pytest.mark.parametrize("name", ["test_vit@random", "test_efficientnet@random"])
def test_a_frozen_encoder_stays_and_a_tuned_one_learns(name: str, data: Path, tmp_path: Path) -> None:
    train, _, _ = open_masks(data)
    before = build_encoder(name, num_classes=0, img_size=(SIZE, SIZE)).state_dict()
    for mode in ("frozen", "fine_tuned"):
        task, _ = create_task(name, train, settings(data), mode)  # type: ignore[arg-type]
        network: Any = task.network
        network.train()
        sum(pixel_loss(network, _batch(task.dataset)).values()).backward()  # type: ignore[union-attr]
        have = [parameter.grad is not None for parameter in network.encoder.parameters()]
        assert have == [mode == "fine_tuned"] * len(have)
        assert have == [parameter.requires_grad for parameter in network.encoder.parameters()]
        assert all(parameter.grad is not None for parameter in network.decoding.parameters())
        fitted, _ = fit(task, SCHEDULE, {"recipe": {}, "data": {}}, tmp_path / mode, Engine(device="cpu"))
        encoder: Any = fitted.encoder
        learnable = {key for key, parameter in encoder.named_parameters()}
        same = {key: torch.equal(value, before[key]) for key, value in encoder.state_dict().items()}
        assert len(learnable) > 10
        assert all(same.values()) if mode == "frozen" else not any(same[key] for key in learnable)


SCHEDULE = Schedule(steps=4, warmup_steps=1, batch_size=4)


def _batch(views: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.utils.data.default_collate([views[ImageKey(0, index)] for index in range(2)])


def test_a_resumed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(data, epochs=1, batch_size=6, encoder=("fine_tuned",))  # 4 steps
    straight = list(segment("test_vit@random", chosen, place(tmp_path / "straight")))

    class Stop(trainer.StopRequest):
        asked = 0

        def agreed(self) -> str | None:
            Stop.asked += 1
            return "SIGTERM" if Stop.asked == 2 else None

    monkeypatch.setattr(trainer, "StopRequest", Stop)
    with pytest.raises(trainer.Interrupted):
        list(segment("test_vit@random", chosen, place(tmp_path / "resumed")))
    resumed = list(segment("test_vit@random", chosen, place(tmp_path / "resumed")))
    assert Stop.asked == 4
    assert [row.value for row in resumed] == [row.value for row in straight]
    last = [
        next((tmp_path / folder).rglob("step_00000004")) / "network.safetensors" for folder in ("straight", "resumed")
    ]
    assert last[0].read_bytes() == last[1].read_bytes()


# --- networks --------------------------------------------------------------------------------------------------------


def test_the_encoder_is_the_one_that_the_name_means(data: Path, tmp_path: Path) -> None:
    """At its own size, its maps are those of the published weights, or of a file's."""
    train, _, _ = open_masks(data)
    own = FeatureExtractor("vit_pico_patch8_pmae", device="cpu").model
    other = {key: value * 1.5 for key, value in own.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    images, found = torch.rand(1, 3, SIZE, SIZE), []
    for name in ("vit_pico_patch8_pmae", f"vit_pico_patch8_pmae@{tmp_path / 'other.safetensors'}"):
        network: Any = create_task(name, train, settings(data), "frozen")[0].network
        found.append(network.encoder.state_dict())
    kept = {key: value for key, value in own.state_dict().items() if key in found[0]}
    assert {key for key in own.state_dict() if key not in kept} == {"norm.weight", "norm.bias"}, "behind the last map"
    assert all(
        torch.equal(value, found[0][key]) and torch.equal(other[key], found[1][key]) for key, value in kept.items()
    )
    seen: list[torch.Tensor] = []
    network = create_task("vit_pico_patch8_pmae", train, settings(data), "frozen")[0].network
    network.encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(images)
    expected = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", (64, 96)), ("vit_pico_patch8_pmae", (32, 64)), ("test_convnext", (64, 32)), ("test_vit3", (64, 64))],
)
def test_logits_have_the_images_size(name: str, size: tuple[int, int]) -> None:
    encoder = build_encoder(f"{name}@random", num_classes=0, img_size=size)
    network = Segmenter(encoder, size, classes=5, width=32, frozen=False).eval()
    assert network(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_sizes_and_encoders_that_cannot_be_are_refused() -> None:
    for name, size, message in (
        ("vit_pico_patch8_pmae", (64, 72), "64 72: both must be multiples of 32"),
        ("test_efficientnet", (64, 48), "multiples of 32"),
    ):
        encoder = build_encoder(f"{name}@random", num_classes=0, img_size=size)
        with pytest.raises(ValueError, match=message):
            Segmenter(encoder, size, classes=2, width=32, frozen=True)
    with pytest.raises(ValueError, match="gives no feature maps"):
        Segmenter(torch.nn.Linear(2, 2), (64, 64), classes=2, width=32, frozen=True)


# --- views -----------------------------------------------------------------------------------------------------------


def test_image_and_mask_stay_together_and_draws_are_the_keys(data: Path) -> None:
    train, _, _ = open_masks(data)
    views = SegmentationViews(train, settings(data, size=(96, 64)))
    wrong, moved = [], []
    for epoch in range(40):
        image, mask = views[ImageKey(epoch, 1)]  # type: ignore[misc]
        assert image.shape == (3, 96, 64)
        assert mask.shape == (96, 64)
        assert set(mask.unique().tolist()) <= {VOID, 0, 1, 2}
        disk = (image[2] > image[0] + 0.3).long()[2:-2, 2:-2]
        wrong.append((disk != (mask == 2)[2:-2, 2:-2]).float().mean())
        moved.append(
            [(disk != (mask.roll(way, axis) == 2)[2:-2, 2:-2]).float().mean() for way in (1, -1) for axis in (0, 1)]
        )
    assert torch.stack(wrong).mean() < 0.012
    ways = torch.tensor(moved).mean(dim=0).view(2, 2)
    torch.testing.assert_close(ways[0], ways[1], rtol=0.25, atol=0.0, msg="no half pixel to one side")
    first, again, other = (views[ImageKey(epoch, 1)] for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0])  # type: ignore[index]
    assert torch.equal(first[1], again[1])  # type: ignore[index]
    assert not torch.equal(first[0], other[0])  # type: ignore[index]
    whole, mask = views[1]  # type: ignore[misc]
    assert (whole.shape, mask.shape) == ((3, 96, 64), (SIZE, SIZE)), "judged at the mask's own size"


def test_void_teaches_nothing() -> None:
    network, images = torch.nn.Conv2d(3, 4, 1), torch.rand(2, 3, 8, 8)
    mask = torch.full((2, 8, 8), VOID)
    pixel_loss(network, (images, mask))["cross_entropy"].backward()
    assert network.weight.grad is not None
    assert not network.weight.grad.any(), "and it is not NaN"
    mask[0, 0, 0] = 3
    expected = torch.nn.functional.cross_entropy(network(images)[:1, :, 0, 0], torch.tensor([3])) / 128
    torch.testing.assert_close(pixel_loss(network, (images, mask))["cross_entropy"], expected)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_mean_iou_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (6, 20, 30), generator=generator)  # classes 5 and 6 of 7 never occur
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth.clamp(min=0), 3)
    predicted[0, :5] = 5  # claimed, never true: an IoU of 0
    counts = torch.stack([count_pixels(t, p, 7) for t, p in zip(truth, predicted, strict=True)])
    miou, accuracy, by_class = score(counts.sum(dim=0))
    oracle = {
        average: MulticlassJaccardIndex(7, average=average, ignore_index=VOID)(predicted, truth)
        for average in ("macro", "none")
    }
    assert miou.item() == pytest.approx(oracle["macro"].item(), abs=1e-6)
    torch.testing.assert_close(by_class[:6].float(), oracle["none"][:6])
    assert by_class[5] == 0
    assert by_class[6].isnan()
    assert accuracy.item() == pytest.approx((predicted == truth)[truth != VOID].float().mean().item(), abs=1e-6)


def test_a_known_iou() -> None:
    truth = torch.tensor([[0, 0, 1, 1, VOID]])
    counts = count_pixels(truth, torch.tensor([[0, 1, 1, 1, 0]]), 2)
    assert counts.tolist() == [[1, 2], [2, 2], [1, 3]]
    miou, accuracy, _ = score(counts)
    assert miou.item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert accuracy.item() == 3 / 4


def test_the_bootstrap_covers_what_another_test_set_gives() -> None:
    generator, covered = torch.Generator().manual_seed(0), []
    for trial in range(150):
        right = 100 * torch.rand(60, 2, generator=generator)  # of 100 pixels a class an image; the rest is the other's
        claimed = right + (100 - right).flip(1)
        counts = torch.stack([right, torch.full((60, 2), 100.0), claimed], dim=1)
        miou, accuracy = bootstrap(counts, 200, seed=trial)
        covered.append([miou.low <= 1 / 3 <= miou.high, accuracy.low <= 0.5 <= accuracy.high])
    assert torch.tensor(covered).float().mean(dim=0).tolist() == pytest.approx([0.95, 0.95], abs=0.05)
    one = bootstrap(counts[:1], 10, seed=0)[0]
    assert one.low == one.mean == one.high
    assert bootstrap(counts, 10, 0) == bootstrap(counts, 10, 0) != bootstrap(counts, 10, 1)


# --- data sets -------------------------------------------------------------------------------------------------------


def test_a_tar_is_the_folder(data: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shapes.tar", "w") as tar:
        for path in sorted(data.rglob("*.*"), reverse=True):
            tar.add(path, Path("some/shapes", path.relative_to(data)))
        litter = tarfile.TarInfo("some/shapes/train/images/._0.bmp")  # as macOS packs
        tar.addfile(litter)
    folder, tar_of_it = open_masks(data), open_masks(tmp_path / "shapes.tar")
    for one, other in zip(folder[:2], tar_of_it[:2], strict=True):
        assert len(one) == len(other)
        assert one.classes == other.classes == ["0", "1", "2"]
        for index in range(len(one)):
            assert one.load(index).tobytes() == other.load(index).tobytes()
            assert torch.equal(one.mask(index), other.mask(index))
    assert len(folder[1]) == 8, "test, not val"
    for split in ("train", "test"):
        assert torch.equal(folder[2][split].pixels, tar_of_it[2][split].pixels)
    image, mask = shapes(2)
    number = next(i for i in range(24) if folder[0].name(i) == "train/images/2.bmp")
    assert folder[0].load(number).tobytes() == image.tobytes()
    assert torch.equal(
        folder[0].mask(number), torch.from_numpy(mask.astype(np.int64)).where(torch.from_numpy(mask != 255), VOID)
    )


def test_val_is_judged_by_where_no_test_has_masks(tmp_path: Path) -> None:
    make_set(tmp_path, {"train": 2, "val": 3})
    write(tmp_path / "test" / "images" / "hidden.png", shapes(7)[0])
    assert len(open_masks(tmp_path)[1]) == 3


def test_ade20k_counts_from_one(tmp_path: Path) -> None:
    for number, split in enumerate(("training", "validation")):
        image, mask = shapes(number)
        write(tmp_path / "ADE" / "images" / split / "a.jpg", image)
        write(tmp_path / "ADE" / "annotations" / split / "a.png", np.where(mask == 255, 0, mask + 1).astype(np.uint8))
    train, test, census = open_masks(tmp_path)
    assert train.name(0) == "ADE/images/training/a.jpg"
    assert test.num_classes == 3
    expected = torch.from_numpy(shapes(0)[1].astype(np.int64))
    assert torch.equal(train.mask(0), expected.where(expected != 255, VOID))
    assert census["train"].pixels.tolist() == expected[expected != 255].bincount().tolist()


def test_masks_of_every_kind_of_file(small: Path) -> None:
    expected = torch.from_numpy(shapes(0)[1].astype(np.int64))
    values = np.where(expected.numpy() == 255, 3, expected.numpy()).astype(np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette([200, 30, 7, 1, 2, 3, 90, 80, 70, 4, 5, 6])
    for kind, file in {
        "grey": png(Image.fromarray(values)),
        "palette": png(palette),
        "sixteen bits": png(Image.fromarray(values.astype(np.uint16))),
        "two bits": grey_png(values, 2),
        "four bits": grey_png(values, 4),
    }.items():
        (small / "train" / "masks" / "0.png").write_bytes(file)
        train, _, _ = open_masks(small, void=(3, 255), num_classes=3)
        assert torch.equal(train.mask(0), expected.where(expected != 255, VOID)), kind


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def grey_png(values: NDArray[np.uint8], bits: int) -> bytes:
    """Of less than eight bits, which Pillow does not write and reads as multiples of 85 or 17."""
    lanes = values.reshape(len(values), -1, 8 // bits)  # (H, bytes, values a byte)
    packed = (lanes << np.arange(8 - bits, -1, -bits, dtype=np.uint8)).sum(axis=2).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def colour(root: Path) -> None:
    write(root / "test" / "masks" / "3.png", shapes(3)[0])


def jpeg(root: Path) -> None:
    (root / "test" / "masks" / "3.png").unlink()
    write(root / "test" / "masks" / "3.jpg", shapes(3)[1])


def too_small(root: Path) -> None:
    write(root / "test" / "masks" / "3.png", shapes(3)[1][:-1])


def all_void(root: Path) -> None:
    for path in (root / "test" / "masks").iterdir():
        write(path, np.full((SIZE, SIZE), 255, np.uint8))


def new_class(root: Path) -> None:
    write(root / "test" / "masks" / "3.png", np.full((SIZE, SIZE), 3, np.uint8))


def hole(root: Path) -> None:
    """Class 2 is number 4 in training, so 3 is unknown there."""
    for path in (root / "train" / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        write(path, np.where(mask == 2, 4, mask).astype(np.uint8))


def black_and_white(root: Path) -> None:
    for path in root.glob("*/masks/*"):
        write(path, np.where(shapes(0)[1] == 1, 255, 0).astype(np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "train" / "masks" / "1.png").unlink(),
            r"1 of 2 files have no mask .*train/images/1\.bmp",
        ),
        (lambda root: (root / "test" / "images" / "3.bmp").unlink(), r"1 of 2 files have no image .*test/masks/3\.png"),
        (lambda root: shutil.rmtree(root / "test"), "holds no masks of test or val"),
        (lambda root: shutil.rmtree(root / "train" / "masks"), "holds no masks of train"),
        (lambda root: (root / "train").rename(root / "learn"), "holds no masks of train"),
        (lambda root: (root / "test").rename(root / "more"), "holds no masks of test"),
        (
            lambda root: write(root / "train" / "images" / "1.png", shapes(1)[0]),
            "1.bmp and .*1.png differ by their ending",
        ),
        (lambda root: make_set(root / "again", {"train": 1}), "holds more than one data set: , again/"),
        (lambda root: (root / "test" / "images" / "3.bmp").write_bytes(b"no"), "test/images/3.bmp: not an image"),
        (lambda root: (root / "test" / "masks" / "3.png").write_bytes(b"no"), "test/masks/3.png: "),
        (colour, r"test/masks/3\.png: a mask of mode RGB"),
        (jpeg, r"test/masks/3\.jpg: a mask as JPEG"),
        (too_small, r"test/masks/3\.png: is 64 x 63 \(width, height\), its image 64 x 64"),
        (all_void, "all pixels of its 2 masks are void"),
        (new_class, r"test/masks/3\.png: holds the value 3, class 3 of 3 \(counted from 0\): name it by --segm"),
        (hole, "no pixel is of class 2, which .*test asks for"),
        (black_and_white, r"one class beside void \(255\)\. Where 255 is a class"),
    ],
)
def test_data_sets_that_would_mislead_are_refused(damage: Callable[[Path], object], message: str, small: Path) -> None:
    open_masks(small)
    damage(small)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_masks(small)


def test_other_places_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give train/images with train/masks .* it holds class0/00\.png"):
        open_masks(photos)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or \.tar"):
        open_masks(tmp_path / "nowhere")


def test_declared_classes_are_a_limit(small: Path) -> None:
    assert open_masks(small, num_classes=5)[0].classes == list("01234")
    with pytest.raises(ImageError, match=r"train/masks/0\.png: holds the value 2, class 2 of 2"):
        open_masks(small, num_classes=2)


def test_test_images_that_are_training_images_are_counted_and_nothing_else_is_no_test(
    small: Path, tmp_path: Path
) -> None:
    shutil.copy(small / "train" / "images" / "0.bmp", small / "test" / "images" / "2.bmp")
    rows = list(segment("test_vit@random", settings(small, epochs=1, encoder=("frozen",)), place(tmp_path)))
    duplicates: Any = rows[0].detail["duplicates"]
    assert (duplicates["images"], duplicates["first"]) == (1, ("test/images/2.bmp", "train/images/0.bmp"))
    for file in (small / "test" / "images").iterdir():
        shutil.copy(small / "train" / "images" / "0.bmp", file)
    with pytest.raises(ValueError, match=r"all test images of .* are training images"):
        list(segment("test_vit@random", settings(small), place(tmp_path)))


def test_settings_that_mean_nothing_are_refused(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"data": None}, "say on which images, by --segmentation.data"),
        ({"encoder": ()}, r"--segmentation.encoder is \(\): it must be frozen, fine_tuned or both"),
        ({"crop_scale": (0.5, 1.5)}, r"--segmentation.crop-scale is \(0.5, 1.5\): it must be two ascending"),
        ({"epochs": 0}, "--segmentation.epochs is 0: it must be above 0"),
        ({"resamples": 0}, "--segmentation.resamples is 0: it must be at least 1"),
        ({"width": 4}, "--segmentation.width is 4: it must be at least 8"),
        ({"num_classes": 1}, "--segmentation.num-classes is 1: it must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            list(segment("test_vit@random", settings(**{"data": data, **changes}), place(tmp_path)))


def test_camvid(real_data: Path) -> None:
    train, test, census = open_masks(real_data / "camvid-240x180.tar", void=(11,))
    assert (len(train), len(test), train.num_classes) == (367, 233, 11)
    assert (census["train"].pixels > 0).all()
