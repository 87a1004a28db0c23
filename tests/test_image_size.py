"""Encoders pretrained at another image size than the registered one: nobody has to say it again."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from perceptual_mae_models import vision_transformer_pmae
from perceptual_mae_models.convert import convert_encoder, save_weights
from perceptual_mae_models.convert_sources import read_source
from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.weights import CheckpointError, trained_size
from training import compare, export, pretrain
from training.data.images import ImageSource
from training.evaluate.encoders import build_encoder
from training.evaluate.finetune import fine_tune
from training.evaluate.finetune_recipe import FineTuneSettings
from training.evaluate.models import describe_model, open_autoencoder
from training.evaluate.rows import Place
from training.evaluate.trainer import Engine
from training.losses.structural import ssim_l1
from training.recipes import Recipe

PICO = "vit_pico_patch8_pmae"
SMALL = (
    *("--model", PICO, "--decoder-dim", "16", "--decoder-depth", "1", "--decoder-heads", "2", "--batch-size", "8"),
    *("--grid-every", "0", "--workers", "0", "--device", "cpu", "--log-every", "1"),
)


def learn(photos: Path, out: Path, *arguments: object, method: str = "mae") -> Path:
    pretrain.main([str(a) for a in (method, "--data", photos, "--out", out, *SMALL, *arguments)])
    return out


@pytest.fixture(scope="module")
def watched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Flags that measure k-NN on the way, among photographs on their side."""
    held_out = tmp_path_factory.mktemp("held_out")
    for file in photos.glob("*/*.png"):
        (held_out / file.parent.name).mkdir(exist_ok=True)
        with Image.open(file) as photo:
            photo.transpose(Image.Transpose.ROTATE_90).save(held_out / file.parent.name / file.name)
    return "--knn-data", held_out, "--knn-every", 1


@pytest.fixture(scope="module")
def run(photos: Path, watched: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 96 x 96 pixels: 144 patches instead of 64."""
    out = tmp_path_factory.mktemp("size") / "run"
    return learn(photos, out, "--img-size", 96, "--steps", 2, "--checkpoint-every", 1, *watched)


def test_timm_builds_the_encoder_for_the_images_that_it_learned_from(run: Path) -> None:
    file = run / "encoder.safetensors"
    state = load_file(file)
    assert state["pos_embed"].shape == (1, 1 + 144, 192)
    for arguments in ({}, {"num_classes": 5}, {"global_pool": "avg"}, {"features_only": True}):
        built = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **arguments)
        assert torch.equal(getattr(built, "model", built).pos_embed, state["pos_embed"])
    assert timm.data.resolve_model_data_config(built)["input_size"] == (3, 96, 96)
    (checkpoint,) = run.glob("checkpoints/step_00000002/network.safetensors")
    halfway = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint)})
    assert halfway.patch_embed.img_size == (96, 96)


def test_what_a_call_says_stands_before_what_the_file_says(run: Path) -> None:
    overlay = {"file": str(run / "encoder.safetensors")}
    larger = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, img_size=128)
    cfg = timm.get_pretrained_cfg(PICO).to_dict() | overlay | {"input_size": (3, 128, 128)}
    assert timm.create_model(PICO, pretrained=True, pretrained_cfg=cfg).patch_embed.img_size == (128, 128)
    usual = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay | {"input_size": (3, 64, 64)})
    assert (larger.patch_embed.img_size, usual.patch_embed.img_size) == ((128, 128), (64, 64))
    any_size = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, dynamic_img_size=True).eval()
    with torch.inference_mode():
        assert any_size(torch.rand(1, 3, 40, 72)).shape == (1, 192)


def test_positions_are_resampled_from_the_grid_that_the_file_says(run: Path) -> None:
    """Of 12 x 12 patches to 6 x 24: as many, but others."""
    overlay, state = {"file": str(run / "encoder.safetensors")}, load_file(run / "encoder.safetensors")
    expected = resample_abs_pos_embed(state["pos_embed"], [6, 24], [12, 12])
    wide = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay | {"input_size": (3, 48, 192)})
    torch.testing.assert_close(wide.pos_embed, expected)
    assert torch.equal(
        timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(48, 192)).pos_embed,
        wide.pos_embed,
    )


def test_weights_of_a_hub_repository_say_it_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_transformer_pmae, "fetch_weights", lambda *_: run / "encoder.safetensors")
    built = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "acme/larger"})
    assert torch.equal(built.pos_embed, load_file(run / "encoder.safetensors")["pos_embed"])
    assert timm.data.resolve_model_data_config(built)["input_size"] == (3, 96, 96)
    assert not built.pretrained_cfg.get("file")


def test_a_conversion_keeps_it(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = run.glob("checkpoints/step_00000002/network.safetensors")
    for model in (None, PICO):
        conversion = convert_encoder(read_source(checkpoint), model)
        assert conversion.architecture == PICO
        assert not any("resampled" in note for note in conversion.notes)
        save_weights(tmp_path / "half.safetensors", conversion.encoder, conversion.metadata)
        assert trained_size(tmp_path / "half.safetensors") == (96, 96)
        torch.testing.assert_close(conversion.encoder, load_file(run / "encoder.safetensors"))


def test_files_that_say_nothing_mean_the_registered_size(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(load_file(run / "encoder.safetensors"), file)
    assert trained_size(file) is None
    plain = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert plain.patch_embed.img_size == (64, 64)  # resampled, as timm does
    file.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="the file is broken"):
        timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(file)})


def test_features_and_evaluation_take_the_runs_images(run: Path, photos: Path) -> None:
    extractor = FeatureExtractor(PICO, pool="tokens", checkpoint=run, device="cpu")
    assert extractor.metadata["image_size"] == "96x96"
    assert extractor(sorted(photos.glob("*/*.png"))[:2]).shape == (2, 1 + 144, 192)
    usual, larger = describe_model(f"{PICO}@random"), describe_model(f"{PICO}@{run}")
    assert float(larger["gflop"]) > 2 * float(usual["gflop"])
    network, recipe = open_autoencoder(f"{PICO}@{run}")
    assert (network.image_size, recipe.img_size) == ((96, 96), 96)


def test_what_is_fine_tuned_from_it_has_its_size_and_so_has_its_file(run: Path, photos: Path, tmp_path: Path) -> None:
    segmenter = build_encoder(f"{PICO}@{run}", num_classes=0, img_size=(96, 128))
    assert segmenter.pos_embed.shape[1] == 1 + 12 * 16
    encoder = build_encoder(f"{PICO}@{run}", num_classes=0)
    assert torch.equal(encoder.pos_embed, load_file(run / "encoder.safetensors")["pos_embed"])
    settings = FineTuneSettings(epochs=1 / 3, batch_size=8, mixup=0.0, cutmix=0.0)
    place = Place(out=tmp_path, engine=Engine(device="cpu"))
    tuned = fine_tune(f"{PICO}@{run}", ImageSource(photos), settings, 0, place)
    file = tmp_path / tuned.run / "classifier.safetensors"
    classifier = timm.create_model(
        PICO, pretrained=True, num_classes=3, global_pool="avg", pretrained_cfg_overlay={"file": str(file)}
    )
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(classifier.eval()(images), tuned.network(images))
    assert trained_size(file.with_name("encoder.safetensors")) == (96, 96)


def test_a_run_begins_with_weights_of_another_size(run: Path, photos: Path, tmp_path: Path) -> None:
    still = ("--steps", 1, "--blr", 1e-12, "--weight-decay", 0)
    for size, init in ((96, f"{PICO}.mae_imagenette"), (64, run)):
        out = learn(photos, tmp_path / str(size), *still, "--img-size", size, "--init", init)
        tag, file = (init, None) if init != run else (PICO, {"file": str(run / "encoder.safetensors")})
        given = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=file, img_size=size).state_dict()
        torch.testing.assert_close(load_file(out / "encoder.safetensors"), dict(given))


@pytest.mark.parametrize("method", ["ms_ssim", "ls_gan_p", "msg_gan_p", "stylegan2_ada_p"])
def test_every_method_learns_from_a_size_that_is_no_power_of_two(method: str, photos: Path, tmp_path: Path) -> None:
    width = {"ls_gan_p": ("--d-width", 8), "msg_gan_p": ("--d-width", 128), "stylegan2_ada_p": ("--d-width", 128)}
    out = learn(photos, tmp_path / "out", "--img-size", 40, "--steps", 1, *width.get(method, ()), method=method)
    assert trained_size(out / "encoder.safetensors") == (40, 40)
    compare.main((str(out),), data=photos, count=2, out=tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) >= 40


def test_a_repository_of_it_says_its_size_to_timm_alone(run: Path, tmp_path: Path) -> None:
    facts = {"license": "mit", "data_title": "24 images", "data_terms": "made for a test", "hardware": "a CPU"}
    name = f"{PICO}.mae_larger"
    export.main(str(run), name=name, to=tmp_path, repo="acme/larger", dtype="float32", **facts)  # type: ignore[arg-type]
    theirs = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
    ours = timm.create_model(
        PICO, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / name / "model.safetensors")}
    ).eval()
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, 96, 96)
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(theirs(images), ours(images))
    card = (tmp_path / name / "README.md").read_text()
    assert "96 x 96 images" in card
    assert "1 + 144" in card
    with pytest.raises(SystemExit, match=r"learned from 96 x 96 pixels, which .* does not say"):
        export.main(str(run), name=f"{PICO}.mae_imagenette", to=tmp_path, data_terms="none", hardware="none")


def test_sizes_that_cannot_be_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--img-size 100 is no multiple of 8"):
        learn(photos, tmp_path / "out", "--img-size", 100, "--steps", 1)
    with pytest.raises(ValueError, match="--img-size is 0: it must be above 0"):
        Recipe(method="mae", img_size=0)
    with pytest.raises(ValueError, match="at least 24 pixels a side"):
        ssim_l1(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))


def test_a_resumed_run_keeps_its_size(run: Path, photos: Path, watched: tuple[object, ...]) -> None:
    with pytest.raises(SystemExit, match=r"recipe\.img_size: was 96, now None"):
        learn(photos, run, "--steps", 2, "--resume", "auto", *watched)
    learn(photos, run, "--steps", 2, "--resume", "auto", "--img-size", 96, *watched)
    with safe_open(run / "decoder.safetensors", framework="pt") as opened:
        assert opened.metadata()["image_size"] == "96x96"
