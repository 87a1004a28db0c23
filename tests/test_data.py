"""Order and content of the batches depend on the seed and on the step, and on nothing else."""

import errno
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceptual_mae_models.images import ImageError
from training.data import images, readers
from training.data.images import ImageSource, RandomView, RandomViews, create_loader, evenly, evenly_by_class
from training.data.readers import StorageError
from training.data.sampler import DeterministicBatchSampler, ImageKey


def sampled(steps: range, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> list[list[ImageKey]]:
    return list(DeterministicBatchSampler(10, 4, steps, seed, rank=rank, world_size=world_size))


def test_every_image_is_seen_once_an_epoch_across_batch_borders() -> None:
    keys = [key for batch in sampled(range(5)) for key in batch]
    for epoch in (0, 1):
        assert sorted(key.image for key in keys if key.epoch == epoch) == list(range(10))
    first, second = ([key.image for key in keys if key.epoch == epoch] for epoch in (0, 1))
    assert first != second


def test_a_late_start_reads_what_the_straight_run_reads() -> None:
    assert sampled(range(3, 9)) == sampled(range(9))[3:]


def test_shares_joined_in_rank_order_are_the_single_process_batch() -> None:
    shares = [sampled(range(6), rank=rank, world_size=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == sampled(range(6))


def test_another_seed_is_another_order() -> None:
    assert sampled(range(3)) != sampled(range(3), seed=1)


@pytest.mark.parametrize(("total", "count"), [(10, 4), (7, 7), (3, 8), (24, 20), (1000, 1)])
def test_some_are_evenly_spaced(total: int, count: int) -> None:
    numbers = evenly(total, count)
    assert len(numbers) == min(total, count)
    assert numbers[0] == 0
    steps = [later - earlier for earlier, later in zip(numbers, [*numbers[1:], total], strict=True)]
    assert max(steps) - min(steps) <= 1
    labels = torch.arange(total) % 3
    kept = evenly_by_class(labels, count)
    assert kept.tolist() == sorted(set(kept.tolist()))
    in_order = sorted(range(total), key=lambda index: (index % 3, index))
    assert set(kept.tolist()) == {in_order[number] for number in numbers}


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 4 cannot be shared equally by 3"):
        sampled(range(1), world_size=3)


def batches(root: Path, *, workers: int = 0, steps: range = range(4)) -> list[torch.Tensor]:
    source = ImageSource(root)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    loader = create_loader(views, DeterministicBatchSampler(len(source), 6, steps, 0), workers=workers)
    return [batch.images for batch in loader]


def test_views_are_crops_of_the_asked_area_and_half_of_them_are_flipped() -> None:
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    view = RandomView((64, 64), (0.3, 0.5))
    shown = torch.stack([view(image, seed) for seed in range(300)]).float()
    rising = shown[:, 0, 32, -1] - shown[:, 0, 32, 0]  # pixels between the first and last column
    height = shown[:, 1, -1, 32] - shown[:, 1, 0, 32]
    area = rising.abs() * height / 256**2 * (64 / 63) ** 2  # between pixels' middles
    assert area.min() > 0.28
    assert area.max() < 0.52
    assert area.max() - area.min() > 0.15
    assert (rising < 0).float().mean().item() == pytest.approx(0.5, abs=0.09)
    assert (height > 0).all()


def test_workers_change_nothing(photos: Path) -> None:
    assert all(map(torch.equal, batches(photos), batches(photos, workers=2)))


def test_caching_changes_nothing_and_decodes_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ImageSource(photos, cache=True)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    first = [views[ImageKey(0, i)][0] for i in range(24)]
    plain = RandomViews(ImageSource(photos), (32, 32), (0.2, 1.0), seed=0)
    assert all(map(torch.equal, first, (plain[ImageKey(0, i)][0] for i in range(24))))
    monkeypatch.setattr(images, "open_image", None)  # whatever is not kept fails
    again = [views[ImageKey(0, i)][0] for i in range(24)]
    assert all(map(torch.equal, first, again))


def test_views_ignore_and_keep_the_global_generator(photos: Path) -> None:
    views = RandomViews(ImageSource(photos), (32, 32), (0.2, 1.0), seed=0)
    torch.manual_seed(1)
    view, _ = views[ImageKey(0, 3)]
    drawn_after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn_after, torch.rand(1))
    assert torch.equal(view, views[ImageKey(0, 3)][0])
    assert not torch.equal(view, views[ImageKey(1, 3)][0]), "another epoch is another crop"
    assert view.dtype == torch.uint8
    assert view.shape == (3, 32, 32)


@pytest.fixture
def tarred(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(photos, arcname=".")
    return path


def test_tar_and_folder_are_the_same_source(photos: Path, tarred: Path) -> None:
    folder, tar = ImageSource(photos), ImageSource(tarred)
    assert folder.classes == tar.classes == ["class0", "class1", "class2"]
    by_name = {Path(tar.name(i)).name: (tar.load(i), tar.labels[i]) for i in range(len(tar))}
    assert len(folder) == len(by_name) == 24
    for i, label in enumerate(folder.labels):
        image, tar_label = by_name[Path(folder.name(i)).name]
        assert image == folder.load(i)
        assert label == tar_label == int(Path(folder.name(i)).stem) % 3


def test_tar_read_before_and_inside_workers(tarred: Path) -> None:
    """Forked workers that shared one open tar would move each other's file position and read garbage."""
    source = ImageSource(tarred)
    source.load(0)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    loader = create_loader(views, DeterministicBatchSampler(24, 6, range(20), 0), workers=2)
    loaded = list(loader)
    assert not [name for batch in loaded for name in batch.broken]
    assert all(map(torch.equal, (batch.images for batch in loaded), batches(tarred, steps=range(20))))


def test_a_broken_image_is_named_and_replaced_by_the_next(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "some"
    root.mkdir()
    for number in (0, 3):
        (root / f"{number}.png").write_bytes((photos / "class0" / f"{number:02d}.png").read_bytes())
    (root / "1.png").write_bytes(b"no image")
    source = ImageSource(root)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    broken = next(i for i in range(3) if source.name(i) == "1.png")
    view, skipped = views[ImageKey(0, broken)]
    assert skipped == ["1.png: not an image"]
    assert view.shape == (3, 32, 32)
    with pytest.raises(ImageError, match=r"1\.png"):
        source.load(broken)


def test_storage_that_fails_is_asked_again_and_no_broken_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ImageSource(photos)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    expected, read, pauses = views[ImageKey(0, 3)][0], source.reader.read, []

    def fail(times: int, number: int) -> None:
        answers = iter([True] * times)

        def reading(index: int) -> bytes:
            if next(answers, False):
                raise OSError(number, "no answer")
            return read(index)

        monkeypatch.setattr(source.reader, "read", reading)

    monkeypatch.setattr(readers.time, "sleep", pauses.append)
    fail(3, errno.EIO)
    view, broken = views[ImageKey(0, 3)]
    assert torch.equal(view, expected)
    assert (broken, pauses) == ([], [1, 5, 20])
    fail(4, errno.ESTALE)
    with pytest.raises(StorageError, match=rf"{source.name(3)}: .*no answer, 4 times; --resume auto"):
        views[ImageKey(0, 3)]
    fail(1, errno.EACCES)
    assert [name.split(":")[0] for name in views[ImageKey(0, 3)][1]] == [source.name(3)]


def test_very_many_broken_images_in_a_row_end_the_search(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BROKEN_RUN", 5)
    source, tried = ImageSource(photos), []

    def reading(index: int) -> bytes:
        tried.append(index)
        return b""

    monkeypatch.setattr(source.reader, "read", reading)
    with pytest.raises(ImageError, match=rf"from {source.name(22)} on, none of 5 images decodes: .*: empty"):
        RandomViews(source, (32, 32), (0.2, 1.0), seed=0)[ImageKey(0, 22)]
    assert tried == [22, 23, 0, 1, 2]


def test_broken_neighbours_are_named_once_an_epoch(photos: Path, tmp_path: Path) -> None:
    for number in range(8):
        content = (photos / "class0" / "00.png").read_bytes() if number in (0, 6, 7) else b""
        (tmp_path / f"{number}.png").write_bytes(content)
    source = ImageSource(tmp_path)
    views = RandomViews(source, (32, 32), (0.2, 1.0), seed=0)
    skipped = [name for image in range(8) for name in views[ImageKey(0, image)][1]]
    assert skipped == [f"{number}.png: empty" for number in range(1, 6)]


def test_hidden_files_beside_images_are_no_images(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = ["00.png", "03.png"]
    for name in names:
        (tmp_path / "data" / name).write_bytes((photos / "class0" / name).read_bytes())
        (tmp_path / "data" / f"._{name}").write_bytes(b"of macOS")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    for spec, folder in ((tmp_path / "data", ""), (tmp_path / "data.tar", "data/")):
        source = ImageSource(spec)
        assert [source.name(index) for index in range(len(source))] == [folder + name for name in names]


def test_a_folder_tells_of_photographs_that_nothing_reads(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("class0/a.heic", "b.DNG", ".c.heic", "d.txt"):
        (tmp_path / "photos" / name).touch()
    with pytest.warns(UserWarning, match=r"^2 photograph\(s\) are left out"):
        source = ImageSource(tmp_path / "photos")
    assert len(source) == 24


def test_hidden_folders_hold_no_images_and_links_in_a_circle_are_refused(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a/1.png", "b/2.png", ".ipynb_checkpoints/3.png", "a/.hidden/4.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes((photos / "class0" / "00.png").read_bytes())
    (data / "c").symlink_to("b")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name in ("a", "b", ".ipynb_checkpoints"):
            tar.add(data / name, f"./{name}")
    folder, tar_of_it = ImageSource(data), ImageSource(tmp_path / "data.tar")
    assert [folder.name(index) for index in range(len(folder))] == ["a/1.png", "b/2.png", "c/2.png"]
    assert (folder.classes, folder.labels) == (["a", "b", "c"], [0, 1, 2])
    assert (tar_of_it.classes, tar_of_it.labels) == (["a", "b"], [0, 1])
    assert folder.load(1).size == tar_of_it.load(1).size
    for link, target in (("a/latest", ".."), ("a/latest", ".")):
        (data / link).symlink_to(target)
        with pytest.raises(ValueError, match="latest leads back to a folder that it lies in"):
            ImageSource(data)
        (data / link).unlink()


def test_too_large_an_image_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"large\.png: Image size \(4096 pixels\) exceeds limit"):
        ImageSource(tmp_path).load(0)


def test_sources_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or tar"):
        ImageSource(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image found"):
        ImageSource(tmp_path)
    empty = tmp_path / "empty.tar"
    tarfile.open(empty, "w").close()
    with pytest.raises(FileNotFoundError, match="no image found"):
        ImageSource(empty)
    (tmp_path / "photos.zip").touch()
    with pytest.raises(ValueError, match=r"a folder of images or a \.tar"):
        ImageSource(tmp_path / "photos.zip")
