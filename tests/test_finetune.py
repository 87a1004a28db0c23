"""Fine-tuning and the engine of supervised runs: MAE's values, exact resume, the same result however it is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.images import ImageError
from training.data.images import ImageSource
from training.data.sampler import ImageKey
from training.evaluate import trainer
from training.evaluate.encoders import build_encoder
from training.evaluate.finetune import (
    FineTuned,
    LabelledViews,
    Mix,
    classify,
    create_augmentation,
    create_task,
    fine_tune,
    posterize,
    run_finetune,
)
from training.evaluate.finetune_recipe import FineTuneRecipe, FineTuneSettings, resolve_recipe
from training.evaluate.rows import Place
from training.evaluate.trainer import Engine
from training.run import record
from training.run.folder import RunError, own_run_folder

ROOT = Path(__file__).parents[1]
PICO = "vit_pico_patch8_pmae"
SHORT = FineTuneSettings(epochs=2, batch_size=8, mixup=0.0, cutmix=0.0)
"""Six steps over the 24 photographs."""


def tune(photos: Path, out: Path, settings: FineTuneSettings = SHORT, name: str = PICO, **engine: int) -> FineTuned:
    place = Place(out=out, engine=Engine(device="cpu", log_every=1, checkpoint_every=2, **engine))
    return fine_tune(name, ImageSource(photos), settings, 0, place)


def weights(tuned: FineTuned) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tuned.network.state_dict().items()}


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("straight")
    tuned = tune(photos, out)
    return out / tuned.run, weights(tuned)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epochs", "blr", "layer_decay", "drop_path"),
    [
        ("vit_base_patch16_pmae.fb_mae_in1k", 100, 5e-4, 0.65, 0.1),
        ("vit_large_patch16_pmae", 50, 1e-3, 0.75, 0.2),
        ("vit_huge_patch14_pmae", 50, 1e-3, 0.75, 0.3),
    ],
)
def test_recipes_are_those_that_mae_published(
    name: str, epochs: float, blr: float, layer_decay: float, drop_path: float
) -> None:
    recipe = resolve_recipe(name, FineTuneSettings(), 0)
    assert (recipe.epochs, recipe.blr, recipe.layer_decay, recipe.drop_path) == (epochs, blr, layer_decay, drop_path)
    assert (recipe.batch_size, recipe.weight_decay, recipe.mixup, recipe.cutmix) == (1024, 0.05, 0.8, 1.0)
    assert recipe.warmup_epochs == 5
    assert (recipe.smoothing, recipe.random_erase, recipe.augment) == (0.1, 0.25, "rand-m9-mstd0.5-inc1")


def test_what_the_user_sets_goes_before_the_recipe_and_random_encoders_learn_at_one_rate() -> None:
    recipe = resolve_recipe(f"{PICO}@random", FineTuneSettings(epochs=3, mixup=0.0), 7)
    assert (recipe.epochs, recipe.mixup, recipe.layer_decay, recipe.seed) == (3, 0.0, 1.0, 7)
    assert resolve_recipe(f"{PICO}@random", FineTuneSettings(layer_decay=0.5), 0).layer_decay == 0.5


def test_layers_learn_at_decaying_rates(photos: Path) -> None:
    task = create_task(PICO, ImageSource(photos), FineTuneRecipe(layer_decay=0.5, batch_size=256, blr=1e-3))
    names = {parameter: name for name, parameter in task.network.named_parameters()}
    scales = {names[p]: g["lr_scale"] for g in task.optimizer.param_groups for p in g["params"]}
    depth = len(task.network.blocks)  # type: ignore[arg-type]
    assert scales["head.weight"] == 1
    assert scales["patch_embed.proj.weight"] == pytest.approx(0.5 ** (depth + 1))
    assert scales["blocks.1.attn.qkv.weight"] / scales["blocks.0.attn.qkv.weight"] == pytest.approx(2)
    decays = {names[p]: g["weight_decay"] for g in task.optimizer.param_groups for p in g["params"]}
    assert decays["blocks.0.attn.qkv.weight"] == 0.05
    assert decays["blocks.0.attn.qkv.bias"] == decays["cls_token"] == decays["pos_embed"] == 0


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Twenty photographs of each of two classes: stripes along and across."""
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        wave = ((torch.arange(64) + number) / (2 + number % 3)).sin() * 60 + 128 + torch.randn(64, generator=generator)
        pixels = wave[:, None].expand(64, 64) if number % 2 else wave[None].expand(64, 64)
        folder = tmp_path / "stripes" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy()).save(folder / f"{number:02d}.png")
    return tmp_path / "stripes"


def test_it_learns_and_its_files_load(stripes: Path, tmp_path: Path) -> None:
    settings = FineTuneSettings(epochs=4, batch_size=10, blr=1.6e-2, mixup=0.0, cutmix=0.0)
    tuned, source = tune(stripes, tmp_path, settings), ImageSource(stripes)
    (row,) = run_finetune(tuned, source, Place(out=tmp_path, engine=Engine(device="cpu")))
    assert row.value.mean > 0.9
    folder = tmp_path / tuned.run
    encoder = FeatureExtractor(PICO, checkpoint=folder / "encoder.safetensors").model
    torch.testing.assert_close(encoder.norm.weight, tuned.network.fc_norm.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(encoder.blocks[3].mlp.fc1.weight, tuned.network.blocks[3].mlp.fc1.weight)  # type: ignore[index,union-attr]
    classifier = timm.create_model(PICO, num_classes=2, global_pool="avg")
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    place = Place(out=tmp_path, engine=Engine(device="cpu"))
    torch.testing.assert_close(classify(classifier.eval(), source, place), classify(tuned.network, source, place))


def test_an_encoder_is_built_with_its_weights_and_never_random() -> None:
    trained = timm.create_model(PICO, pretrained=True)
    larger = build_encoder(PICO, img_size=(96, 64), num_classes=5, global_pool="avg", drop_path_rate=0.1)
    assert larger.pos_embed.shape == (1, 1 + 12 * 8, 192)  # type: ignore[union-attr]
    torch.testing.assert_close(larger.fc_norm.weight, trained.norm.weight)  # type: ignore[union-attr]
    for name, parameter in larger.blocks.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(parameter, trained.blocks.get_parameter(name))
    convolutional = build_encoder("resnet10t@random", num_classes=5, drop_path_rate=0.1)
    again = build_encoder("resnet10t@random", num_classes=7)
    torch.testing.assert_close(convolutional.conv1[0].weight, again.conv1[0].weight)  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="pixels:8 has no weights"):
        build_encoder("pixels:8")


def test_an_average_of_the_weights_is_what_comes_out(
    photos: Path, tmp_path: Path, straight: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    settings = FineTuneSettings(epochs=2, batch_size=8, mixup=0.0, cutmix=0.0, ema_decay=0.9)
    averaged = weights(tune(photos, tmp_path, settings))
    start = build_encoder(PICO, seed=0, num_classes=3, global_pool="avg").state_dict()
    key = "blocks.7.mlp.fc2.weight"
    moved, whole = (averaged[key] - start[key]).norm(), (straight[1][key] - start[key]).norm()
    assert 0 < moved < 0.7 * whole


# --- draws -----------------------------------------------------------------------------------------------------------


def test_a_view_is_decided_by_seed_epoch_and_image(photos: Path) -> None:
    task = create_task(PICO, ImageSource(photos), FineTuneRecipe())
    views = task.dataset
    assert isinstance(views, LabelledViews)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = views[ImageKey(0, 3)][1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(views[ImageKey(0, 3)][1], first)  # type: ignore[index]
    assert not torch.equal(views[ImageKey(1, 3)][1], first)  # type: ignore[index]


def test_mixing_keeps_shares_of_labels_and_depends_on_the_batch_alone() -> None:
    items = [(ImageKey(0, index), torch.full((3, 8, 8), float(index)), index % 3) for index in range(4)]
    mix = Mix(FineTuneRecipe(mixup=0.8, cutmix=0.0, smoothing=0.0), 3)
    images, targets = mix(items)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    share = images[0, 0, 0, 0] / 3  # images 0 and 3 are mixed: 3 * (1 - lambda)
    torch.testing.assert_close(targets[1], torch.tensor([0.0, 1 - share, share]), atol=1e-6, rtol=0)
    assert torch.equal(mix(items)[0], images)
    assert not torch.equal(mix([(ImageKey(1, i), x, y) for (_, i), x, y in items])[0], images)
    plain = Mix(FineTuneRecipe(mixup=0.0, cutmix=0.0), 3)(items)[1]
    assert plain.tolist() == [0, 1, 2, 0]


# --- however it is cut -----------------------------------------------------------------------------------------------


EVERYTHING = FineTuneSettings(
    epochs=5 / 3, batch_size=8, mixup=0.8, cutmix=1.0, drop_path=0.3, ema_decay=0.5, precision="bf16"
)
"""Five steps in which everything is drawn that can be."""


def test_a_run_that_was_killed_ends_with_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(tune(photos, tmp_path / "straight", EVERYTHING))
    after_step = record.RunRecord.after_step

    def fail_later(self: record.RunRecord, *rest: object) -> None:
        after_step(self, *rest)  # type: ignore[arg-type]
        if self.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.RunRecord, "after_step", fail_later)
    with pytest.raises(KeyboardInterrupt):
        tune(photos, tmp_path, EVERYTHING)
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = tune(photos, tmp_path, EVERYTHING, workers=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert len((tmp_path / resumed.run / "metrics.jsonl").read_text().splitlines()) == 5
    monkeypatch.setattr(trainer, "_optimise", None)
    tune(photos, tmp_path, EVERYTHING)  # a finished run is read, not run
    with pytest.raises(TypeError):  # and another cut of the passes is another run
        tune(photos, tmp_path, EVERYTHING, micro_batches=2)


def test_the_recipe_reaches_the_transform(photos: Path) -> None:
    views = create_task(PICO, ImageSource(photos), FineTuneRecipe()).dataset
    assert isinstance(views, LabelledViews)
    steps = " ".join(map(str, views.transform.transforms))
    for word in ("RandomResizedCrop", "bicubic", "RandAugment", "m=9, mstd=0.5", "RandomErasing", "p=0.25"):
        assert word.lower() in steps.lower(), f"{word} is not in {steps}"


@pytest.mark.parametrize("augment", ["rand-m10-n9-inc1", "original-mstd0.5", "augmix-m10-w5"])
def test_policies_at_full_strength_posterise_to_black(augment: str) -> None:
    transform = create_augmentation(
        {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}, FineTuneRecipe(augment=augment)
    )
    image = Image.radial_gradient("L").convert("RGB")
    for _ in range(100):  # Pillow 13 raises at 0 bits, which such a policy draws every few images
        transform(image)
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize(image, 1).getextrema() == ((0, 128),) * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--finetune.epochs is 0: it must be above 0"),
        ({"ema_decay": 1.0}, "--finetune.ema-decay"),
        ({"mixup": -1.0}, "--finetune.mixup"),
        ({"batch_size": 25}, "more than the 24 training images"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, float], message: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tune(photos, tmp_path, FineTuneSettings(**changes))  # type: ignore[arg-type]


def test_models_without_drop_path_can_learn_without_it() -> None:
    build_encoder("densenet121@random", num_classes=2, drop_path_rate=0.0)
    with pytest.raises(ValueError, match="cannot build densenet121"):
        build_encoder("densenet121@random", num_classes=2, drop_path_rate=0.1)


def test_micro_batches_change_rounding_only(
    photos: Path, tmp_path: Path, straight: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    for name, tensor in weights(tune(photos, tmp_path, micro_batches=2)).items():
        torch.testing.assert_close(tensor, straight[1][name], atol=2e-5, rtol=1e-3, msg=name)


def test_two_processes_make_what_one_makes(
    photos: Path, tmp_path: Path, straight: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--protocols", "finetune", "--finetune.epochs", "2", "--finetune.batch-size", "8", "--device", "cpu"]
    flags += ["--finetune.mixup", "0", "--finetune.cutmix", "0", "--train", str(photos), "--test", str(tmp_path / "t")]
    (tmp_path / "t").mkdir()
    for number in range(3):
        (tmp_path / "t" / f"class{number}").mkdir()
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(tmp_path / "t" / f"class{number}" / "x.png")
    script = str(ROOT / "training" / "evaluate.py")
    done = subprocess.run(
        [sys.executable, *launcher, script, PICO, *flags, "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetune") == 1, "one of them speaks"
    (file,) = (tmp_path / "runs").glob("*/classifier.safetensors")
    for name, tensor in load_file(file).items():
        torch.testing.assert_close(tensor, straight[1][name], atol=2e-5, rtol=1e-3, msg=name)
    assert (tmp_path / "results.json").exists()


def test_one_process_takes_what_several_have_learned_and_names_what_they_have_begun(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = FineTuneSettings(epochs=1, batch_size=8)
    own = tmp_path / tune(photos, tmp_path, settings).run
    several, told = own.with_name("finetune-of-two"), json.loads((own / "recipe.json").read_text())
    assert told["recipe"]["processes"] == 1
    own.rename(several)
    told["recipe"]["processes"] = 2
    (several / "recipe.json").write_text(json.dumps(told))
    assert tmp_path / tune(photos, tmp_path, settings).run == several
    assert not own.exists(), "nothing is learned again"
    (several / "classifier.safetensors").unlink()
    assert tmp_path / tune(photos, tmp_path, settings).run == own
    assert "finetune-of-two was begun with 2 processes, 1 micro batches" in capsys.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------------


def test_batches_that_cannot_be_cut_and_broken_images_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches of 9 images must be a multiple of 2"):
        tune(photos, tmp_path, FineTuneSettings(epochs=1, batch_size=9))
    folder = tmp_path / "broken"
    for number in range(2):
        (folder / f"class{number}").mkdir(parents=True)
        (folder / f"class{number}" / "bad.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(ImageError, match=r"bad\.png"):
            tune(folder, tmp_path / str(workers), FineTuneSettings(epochs=1, batch_size=2), workers=workers)


def test_a_folder_in_which_a_run_goes_on_is_refused(
    straight: tuple[Path, dict[str, torch.Tensor]], photos: Path
) -> None:
    run, _ = straight
    with own_run_folder(run), pytest.raises(RunError, match="belongs to a run that is going on"):
        tune(photos, run.parents[1])


def test_a_loss_that_is_not_finite_stops_the_run(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="non-finite"):
        tune(photos, tmp_path, FineTuneSettings(epochs=0.5, batch_size=4, blr=1e12, mixup=0.0, cutmix=0.0))
