"""The feature extractor against timm's own forward pass, on small random encoders."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from perceptual_mae_models.building import check_model_name, name_origin
from perceptual_mae_models.features import (
    POOLS,
    FeatureExtractor,
    Pool,
    Precision,
    UnknownModelError,
    default_device,
)
from perceptual_mae_models.images import ImageError, find_images
from perceptual_mae_models.loading import load_in_workers
from perceptual_mae_models.version import __version__

PICO = "vit_pico_patch8_pmae"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def pico() -> nn.Module:
    """Two blocks of the pico encoder, with weights that spread the features as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model(PICO, pretrained=False, depth=2).eval()
    for parameter in model.parameters():
        if parameter.ndim in (2, 4):  # not the position embedding
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def extractor(pico: nn.Module) -> FeatureExtractor:
    return FeatureExtractor(pico)


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Path]:
    return find_images([photos])


def transformed(file: Path) -> Tensor:
    """64 x 64, crop 0.9, bicubic, ImageNet statistics: the configuration's words, done by hand."""
    with Image.open(file) as image:
        width, height = image.size
        scale = 71 / min(width, height)
        resized = image.convert("RGB").resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 64) / 2), round((resized.height - 64) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 64, top + 64)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_features_are_those_of_timm(pico: nn.Module, files: list[Path], pool: Pool) -> None:
    with torch.no_grad():
        tokens = pico.forward_features(torch.stack([transformed(file) for file in files]))
    expected = {
        "avg": tokens[:, 1:].mean(1),
        "cls": tokens[:, 0],
        "cls+avg": torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1),
        "tokens": tokens,
        "map": tokens[:, 1:].reshape(-1, 8, 8, 192).permute(0, 3, 1, 2),
    }[pool]
    extractor = FeatureExtractor(pico, pool)
    features = extractor(files, batch_size=7)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert extractor.feature_shape == tuple(expected.shape[1:])


def test_file_pillow_image_and_array_agree(extractor: FeatureExtractor, files: list[Path]) -> None:
    expected = extractor(files[:4])
    opened = [Image.open(file) for file in files[:4]]
    arrays = np.stack([np.asarray(image) for image in opened])
    for images in (opened, list(arrays), arrays, list(arrays / 255), [str(file) for file in files[:4]]):
        torch.testing.assert_close(extractor(images), expected, atol=0, rtol=0)
    for single in (files[0], str(files[0]), opened[0], arrays[0]):
        torch.testing.assert_close(extractor(single), expected[:1], atol=1e-5, rtol=1e-5)


def test_batch_size_and_workers_do_not_matter(extractor: FeatureExtractor, files: list[Path]) -> None:
    expected = extractor(files, batch_size=64)
    for batch_size in (1, 3):
        torch.testing.assert_close(extractor(files, batch_size=batch_size), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor(files, batch_size=5, workers=2), expected, atol=1e-5, rtol=0)


def similarity(first: Tensor, second: Tensor) -> float:
    return torch.cosine_similarity(first, second).item()


def test_modes_of_one_photograph(extractor: FeatureExtractor, files: list[Path], tmp_path: Path) -> None:
    with Image.open(files[0]) as opened:
        photo = opened.convert("RGB")
    grey = photo.convert("L")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    photo.save(tmp_path / "photo.png")
    photo.convert("RGBA").save(tmp_path / "rgba.png")
    photo.rotate(90, expand=True).save(tmp_path / "rotated.png", exif=rotated)
    photo.quantize(256).save(tmp_path / "palette.png")
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98, subsampling=0)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256).save(tmp_path / "grey16.png")

    features = {file.stem: extractor(file) for file in find_images([tmp_path])}
    other = similarity(extractor(files[1]), features["photo"])
    for name in ("rgba", "rotated"):
        torch.testing.assert_close(features[name], features["photo"], atol=0, rtol=0)
    assert similarity(features["grey16"], features["grey"]) > 0.999
    assert other < 0.9
    for name in ("palette", "cmyk"):
        assert similarity(features[name], features["photo"]) > 0.95, name


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_reported_or_stop(
    extractor: FeatureExtractor, files: list[Path], tmp_path: Path, workers: int
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    mixed = [files[0], broken, files[1], broken, broken, files[2]]
    batches = list(extractor.stream(mixed, batch_size=2, workers=workers, skip_broken=True))
    assert [batch.names for batch in batches] == [(str(files[0]),), (str(files[1]),), (str(files[2]),)]
    assert [len(batch.broken) for batch in batches] == [1, 1, 1]
    assert batches[0].broken[0].name == str(broken)
    rows = torch.cat([batch.features for batch in batches])
    torch.testing.assert_close(rows, extractor(files[:3]), atol=1e-5, rtol=0)

    (only_broken,) = extractor.stream([broken, broken], workers=workers, skip_broken=True)
    assert only_broken.features.shape == (0, 192)
    with pytest.raises(ImageError, match=r"broken\.jpg: not an image"):
        extractor(mixed, workers=workers)


def test_names_and_generators(extractor: FeatureExtractor, files: list[Path]) -> None:
    arrays = (np.asarray(Image.open(file)) for file in files[:5])
    batches = list(extractor.stream(arrays, batch_size=2))
    assert sum((batch.names for batch in batches), ()) == tuple(f"array #{index}" for index in range(5))
    read = []
    paths = (read.append(file) or file for file in files)
    stream = extractor.stream(paths, batch_size=2, workers=1)
    first = next(stream)
    assert len(read) < len(files), "no more than is needed, and what is asked for ahead"
    found = torch.cat([first.features, *(batch.features for batch in stream)])
    torch.testing.assert_close(found, extractor(files, batch_size=2))
    expected = extractor(files[:3])
    names = [str(file) for file in files[:3]]
    for several in (np.array(names), np.array(files[:3], dtype=object), dict.fromkeys(names)):
        for workers in (0, 1):
            torch.testing.assert_close(extractor(several, workers=workers), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp"])
def test_opened_images_are_shared_with_workers(extractor: FeatureExtractor, tmp_path: Path, suffix: str) -> None:
    generator = np.random.default_rng(0)
    files = [tmp_path / f"{index}.{suffix}" for index in range(4)]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (300, 300, 3), np.uint8)).save(file)
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:2000])
    opened = [Image.open(file) for file in files]
    expected = extractor(files)
    for images in (opened, opened):  # the workers of the first call have read on in the files of the second
        torch.testing.assert_close(extractor(images, batch_size=1, workers=2), expected, atol=1e-5, rtol=0)
    broken = Image.open(tmp_path / "cut.png")
    batches = list(extractor.stream([opened[0], broken, opened[1]], 1, workers=1, skip_broken=True))
    assert [len(batch.broken) for batch in batches] == [0, 1, 0]


def test_strips_are_broken_images(extractor: FeatureExtractor, tmp_path: Path) -> None:
    Image.new("L", (1, 3_000_000)).save(tmp_path / "strip.png")
    with pytest.raises(ImageError, match=r"strip\.png: 1 x 3000000 is a strip"):
        extractor(tmp_path / "strip.png")
    assert extractor(Image.new("L", (200, 1))).shape == (1, 192)


MEASURE_MEMORY = """
import sys
from pathlib import Path

import numpy as np
import timm

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.writers import FeatureWriter

extractor = FeatureExtractor(timm.create_model("vit_pico_patch8_pmae", depth=1), "tokens", device="cpu")
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

def own_megabytes():  # files, libraries among them, come and go as the system likes
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 2**10

def peak(count):
    highest = 0.0
    with FeatureWriter(Path(sys.argv[1], f"{count}.npz")) as writer:
        for batch in extractor.stream((noise.copy() for _ in range(count)), batch_size=20):
            writer.write(batch.names, batch.features)
            highest = max(highest, own_megabytes())
    return max(highest, own_megabytes())

peak(200)  # what stays for the next time is there before anything is compared
print(-peak(200) + peak(2000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc: what is freed, at once
    command = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path)]
    growth = float(subprocess.run(command, env=os.environ | gives_back, check=True, capture_output=True).stdout)
    # The rows alone are 2000 * 65 * 192 * 4 bytes = 95 MiB.
    assert (tmp_path / "2000.npz").stat().st_size > 95 * 2**20
    assert growth < 15


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_is_near(pico: nn.Module, files: list[Path], dtype: Precision) -> None:
    full, reduced = FeatureExtractor(pico)(files), FeatureExtractor(pico, dtype=dtype)(files)
    assert reduced.dtype == torch.float32
    assert next(pico.parameters()).dtype == torch.float32
    assert torch.cosine_similarity(full, reduced).min() > 0.999
    assert not torch.equal(full, reduced)


def test_checkpoint(tmp_path: Path, files: list[Path]) -> None:
    source = timm.create_model(PICO, pretrained=False)
    save_file({name: 0.5 * value for name, value in source.state_dict().items()}, tmp_path / "half.safetensors")
    extractor = FeatureExtractor(PICO, checkpoint=tmp_path / "half.safetensors", pretrained=False, device="cpu")
    for name, value in extractor.model.state_dict().items():
        torch.testing.assert_close(value, 0.5 * source.state_dict()[name], atol=0, rtol=0)
    assert extractor(files[:2]).shape == (2, 192)
    assert extractor.metadata == {
        "model": PICO,
        "tag": "",
        "weights": "half.safetensors",
        "pool": "avg",
        "image_size": "64x64",
        "dtype": "float32",
        "perceptual_mae_models": __version__,
    }
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        FeatureExtractor(PICO, checkpoint=tmp_path / "none.safetensors")


@pytest.mark.parametrize("place", ["hf-hub", "local-dir"])
def test_a_checkpoint_stands_before_the_place_that_an_id_names(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    states = {}
    for name in ("model", "other"):
        model = timm.create_model("test_vit", num_classes=0)
        states[name] = model.state_dict()
        save_file(states[name], folder / f"{name}.safetensors")
    cfg = {"input_size": [3, 160, 160], "mean": MEAN, "std": STD, "num_classes": 0}
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    other = (folder / "other.safetensors").rename(tmp_path / "other.safetensors")
    name = f"local-dir:{folder}"
    if place == "hf-hub":
        name = "hf-hub:acme/thing"
        monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda _, filename, **__: str(folder / filename))
    extractor = FeatureExtractor(name, checkpoint=other, device="cpu")
    assert torch.equal(extractor.model.state_dict()["cls_token"], states["other"]["cls_token"])
    assert (extractor.metadata["tag"], extractor.metadata["weights"]) == ("", "other.safetensors")


@pytest.mark.parametrize("model", [PICO, "test_vit"])
def test_a_foreign_checkpoint_never_leaves_random_weights(tmp_path: Path, model: str) -> None:
    save_file({"other.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RuntimeError):
        FeatureExtractor(model, checkpoint=tmp_path / "foreign.safetensors")


def test_a_model_built_for_another_size(files: list[Path]) -> None:
    extractor = FeatureExtractor(timm.create_model(PICO, depth=1, img_size=(32, 48)), "map")
    assert extractor.input_size == (32, 48)
    assert extractor(files[:1]).shape == (1, 192, 4, 6)
    dynamic = FeatureExtractor(timm.create_model(PICO, depth=1, dynamic_img_size=True), "map")
    assert dynamic(files[:1]).shape == (1, 192, 8, 8)


def test_models_that_normalise_after_pooling(files: list[Path]) -> None:
    model = timm.create_model("test_vit", img_size=64, global_pool="avg", num_classes=0).eval()
    extractor = FeatureExtractor(model)
    assert not isinstance(model.fc_norm, nn.Identity)
    nn.init.normal_(model.fc_norm.weight)
    pixels = torch.stack([extractor.transform(Image.open(file)) for file in files[:3]])
    torch.testing.assert_close(extractor(files[:3]), model(pixels).detach())


def test_patches_lie_where_the_model_says_or_it_is_refused(files: list[Path]) -> None:
    hybrid = FeatureExtractor(timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "map")
    tokens = FeatureExtractor(hybrid.model, "tokens")(files[:1])
    assert torch.equal(hybrid(files[:1]), tokens[:, 1:].transpose(1, 2).reshape(1, -1, 7, 7))
    volo = timm.create_model("volo_d1_224")
    for pool in ("avg", "map", "cls+avg"):
        with pytest.raises(ValueError, match="volo_d1_224 does not say which of its tokens are patches"):
            FeatureExtractor(volo, pool)
    assert FeatureExtractor(volo, "cls")(files[:1]).shape == (1, volo.num_features)
    mixer = FeatureExtractor(timm.create_model("mixer_s32_224"), "map")
    with pytest.raises(ValueError, match="does not say how its tokens lie"):
        mixer(files[:1])


def test_a_classifier_learns_on_features(extractor: FeatureExtractor, files: list[Path]) -> None:
    (batch,) = extractor.stream(files[:4])
    probe = nn.Linear(192, 2)
    probe(batch.features).sum().backward()
    assert probe.weight.grad is not None
    assert extractor.model.cls_token.grad is None


def test_weights_of_others_are_credited_to_no_tag(tmp_path: Path) -> None:
    model = timm.create_model(PICO, pretrained=True)
    torch.nn.init.zeros_(model.norm.weight)
    timm.models.save_for_hf(model, tmp_path / "zeros")
    facts = FeatureExtractor(f"local-dir:{tmp_path / 'zeros'}", device="cpu").metadata
    assert (facts["model"], facts["tag"], facts["weights"]) == (PICO, "", "local-dir:zeros")
    assert name_origin("local-dir:zeros", None, pretrained=True) == "local-dir:zeros"
    save_file(model.state_dict(), tmp_path / "encoder.safetensors")
    of_run = FeatureExtractor(PICO, checkpoint=tmp_path, device="cpu")  # a run's folder
    assert of_run.metadata["weights"] == "encoder.safetensors"
    assert not of_run.model.norm.weight.any()
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*zeros.encoder\.safetensors"):
        FeatureExtractor(PICO, checkpoint=tmp_path / "zeros")


def test_modules_as_timm_builds_them(pico: nn.Module, files: list[Path]) -> None:
    expected = FeatureExtractor(pico)(files[:2])
    assert torch.equal(FeatureExtractor(torch.compile(pico))(files[:2]), expected)  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16):
        extractor = FeatureExtractor(copy.deepcopy(pico).to(dtype))
        assert extractor.metadata["dtype"] == str(dtype).removeprefix("torch.")
        features = extractor(files[:2])
        assert features.dtype == torch.float32
        assert torch.cosine_similarity(features, expected).min() > 0.99
    with pytest.raises(ValueError, match="images of 1 channels"):
        FeatureExtractor(timm.create_model(PICO, pretrained=False, in_chans=1))
    with pytest.raises(ValueError, match="no forward_features"):
        FeatureExtractor(timm.create_model(PICO, pretrained=False, features_only=True))


def test_a_module_is_credited_to_no_tag() -> None:
    assert FeatureExtractor(timm.create_model(PICO, pretrained=False)).metadata["tag"] == ""
    assert FeatureExtractor(PICO, device="cpu").metadata["tag"] == "mae_imagenette"


@pytest.mark.parametrize(
    "name", ["test_convnext", "hiera_tiny_224", "caformer_s18"]
)  # a norm of maps, and one of vectors
def test_models_whose_head_normalises_after_pooling(files: list[Path], name: str) -> None:
    model = timm.create_model(name, num_classes=0).eval()
    nn.init.normal_(model.head.norm.weight)
    extractor = FeatureExtractor(model)
    pixels = torch.stack([extractor.transform(Image.open(file)) for file in files[:2]])
    torch.testing.assert_close(extractor(files[:2]), model(pixels).detach())


def test_a_norm_between_the_layers_of_a_head_is_none_of_the_features(files: list[Path]) -> None:
    model = timm.create_model("inception_next_atto").eval()
    assert isinstance(model.head.norm, nn.LayerNorm)
    extractor = FeatureExtractor(model)
    torch.testing.assert_close(extractor(files[:2]), FeatureExtractor(model, "map")(files[:2]).mean((2, 3)))


def test_models_of_several_sets_of_features_are_refused(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="coat_tiny gives several sets of features"):
        FeatureExtractor("coat_tiny", pretrained=False)(files[:1])


def test_convolutional_models(files: list[Path]) -> None:
    for name in ("test_resnet", "test_mambaout"):  # channels first and last
        model = timm.create_model(name).eval()
        pixels = torch.stack([FeatureExtractor(model).transform(Image.open(file)) for file in files[:2]])
        with torch.no_grad():
            maps = model.forward_features(pixels)
        maps = maps.permute(0, 3, 1, 2) if name == "test_mambaout" else maps
        torch.testing.assert_close(FeatureExtractor(model, "map")(files[:2]), maps)
        norm = model.head.norm if name == "test_mambaout" else nn.Identity()
        torch.testing.assert_close(FeatureExtractor(model)(files[:2]), norm(maps.mean((2, 3))).detach())
        assert FeatureExtractor(model, "tokens")(files[:2]).shape == (2, maps[0, 0].numel(), maps.shape[1])
        with pytest.raises(ValueError, match="no class token"):
            FeatureExtractor(model, "cls")


def test_the_layout_of_convolutions_is_ours_only_where_the_network_is_and_changes_no_value() -> None:
    own = FeatureExtractor("test_resnet", device="cpu", pretrained=False)
    weights = [weight for weight in own.model.parameters() if weight.ndim == 4 and weight.shape[2] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    given = timm.create_model("test_resnet", pretrained=False).eval()
    given.load_state_dict(own.model.state_dict())
    as_it_is = FeatureExtractor(given)
    assert all(weight.is_contiguous() for weight in given.parameters())
    pixels = torch.randn(2, 3, *own.input_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(own.encode(pixels), as_it_is.encode(pixels))
    assert all(parameter.is_contiguous() for parameter in FeatureExtractor(PICO, pretrained=False).model.parameters())


def test_what_workers_send_takes_no_shared_memory(files: list[Path], extractor: FeatureExtractor) -> None:
    """Containers have 64 MB of it; torch's tensors would take it, and wait without end for more."""
    (loaded,) = load_in_workers(files[:2], 2, extractor.transform, workers=1)
    assert isinstance(loaded.pixels, np.ndarray)
    assert loaded.pixels.shape == (2, 3, *extractor.input_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_modules_whose_norm_comes_after_pooling(dtype: torch.dtype, files: list[Path]) -> None:
    model = timm.create_model(PICO, pretrained=True, num_classes=5, global_pool="avg")
    expected = FeatureExtractor(model)(files[:2])
    found = FeatureExtractor(copy.deepcopy(model).to(dtype))(files[:2])
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999


def test_wrong_arguments(pico: nn.Module, extractor: FeatureExtractor, files: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"pool is one of avg, cls, cls\+avg, tokens, map, not 'max'"):
        FeatureExtractor(pico, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is one of"):
        FeatureExtractor(pico, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is one of"):
        FeatureExtractor(pico, dtype=torch.int8)
    assert FeatureExtractor(pico, dtype=torch.bfloat16).metadata["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="no pretrained_cfg"):
        FeatureExtractor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="goes with a model's name"):
        FeatureExtractor(pico, checkpoint="weights.safetensors")
    with pytest.raises(ValueError, match="no device 'nonsense': "):
        FeatureExtractor(PICO, device="nonsense")
    with pytest.raises(ValueError, match="no images"):
        extractor([])
    with pytest.raises(ValueError, match="batch_size"):
        extractor.stream(files, batch_size=0)


def test_model_names() -> None:
    for name in (PICO, f"{PICO}.mae_imagenette", "resnet18", "hf-hub:someone/something"):
        check_model_name(name)
    with pytest.raises(UnknownModelError, match=PICO):
        check_model_name("vit_pico_pacth8_pmae")
    with pytest.raises(UnknownModelError, match=r"no tag 'mae_in22k'; there are .*vit_base_patch16_pmae\.mae_in1k"):
        check_model_name("vit_base_patch16_pmae.mae_in22k")
    with pytest.raises(UnknownModelError, match="pmae list"):
        FeatureExtractor("qqqqqqqqqqqqqq")


def test_default_device() -> None:
    assert default_device() == ("cuda" if torch.cuda.is_available() else "cpu")
