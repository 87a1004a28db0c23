"""What a recipe costs: counted figures against closed forms, and the dry run that prints them."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import benchmark, pretrain, scale
from training.benchmark import kinds_of_step
from training.cost import (
    _count_kept,
    compute_seconds,
    count_fp32_gflop,
    count_gflop,
    matmul_peak,
    measure_cost,
)
from training.recipes import METHODS, mae, stylegan2_ada_p
from training.scaling import Assumptions


def test_vit_base_costs_what_arithmetic_says() -> None:
    cost = measure_cost(mae("vit_base_patch16_pmae"))

    def block(tokens: int, dim: int) -> float:
        return 2 * tokens * 12 * dim**2 + 2 * 2 * tokens**2 * dim  # linear maps; attention

    forward = 12 * block(50, 768) + 8 * block(197, 512) + 2 * 49 * 768**2 + 2 * 50 * 768 * 512 + 2 * 196 * 512 * 768
    # the backward pass takes twice the forward one, but no gradient goes to the pixels
    assert cost.gflop_per_image == pytest.approx((3 * forward - 2 * 49 * 768**2) / 1e9, rel=2e-3)
    decoder = 768 * 512 + 512 + 512 + 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 512 * 768 + 768
    assert cost.parameters == {"encoder": 85_798_656, "decoder": decoder}
    assert cost.state_bytes == 16 * sum(cost.parameters.values())


def test_lazy_penalties_are_spread_over_their_interval() -> None:
    recipe = stylegan2_ada_p("vit_pico_patch8_pmae")
    often, rarely = (count_gflop(replace(recipe, r1_every=k, path_every=k)) for k in (2, 8))
    for name in ("r1", "path_length"):
        assert often[name] == pytest.approx(4 * rarely[name])
    assert often["autoencoder"] == pytest.approx(rarely["autoencoder"])


def test_float32_is_what_penalties_and_gram_matrices_run_in() -> None:
    def count(method: str, **changes: Any) -> tuple[dict[str, float], float]:
        recipe = replace(METHODS[method]("vit_pico_patch8_pmae"), **{"precision": "bf16", **changes})
        return count_gflop(recipe), count_fp32_gflop(recipe)

    for method in ("mae", "ls_gan_p", "stylegan2_ada_p"):
        gflop, float32 = count(method, precision="fp32")
        assert float32 == pytest.approx(sum(gflop.values()))
    assert count("mae")[1] == 0
    gflop, float32 = count("stylegan2_ada_p")
    assert 0.9 * (gflop["r1"] + gflop["path_length"]) < float32 < 0.3 * sum(gflop.values())
    assert count("ls_gan_p", style_weight=1.0)[1] > count("ls_gan_p", style_weight=0.0)[1]


def test_each_precision_takes_its_own_time() -> None:
    assert compute_seconds(300.0, 20.0, 280.0, 10.0) == pytest.approx(0.001 + 0.002)


def test_memory_grows_with_what_is_kept() -> None:
    costs = [measure_cost(METHODS[name]("vit_pico_patch8_pmae")) for name in ("mae", "ls_gan_p", "msg_gan_p")]
    kept = [cost.activation_bytes for cost in costs]
    assert 0 < kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("method", ["mae", "ls_gan_p"])
def test_memory_an_image_is_what_another_image_adds(method: str) -> None:
    recipe = replace(METHODS[method]("vit_pico_patch8_pmae"), precision="bf16")
    cost, kept = measure_cost(recipe), [_count_kept(recipe, samples) for samples in (16, 24)]
    assert kept[1] - kept[0] == pytest.approx(8 * cost.activation_bytes, rel=1e-3)
    assert kept[0] == pytest.approx(16 * cost.activation_bytes + cost.cast_bytes, rel=1e-3)
    assert kept[0] == _count_kept(recipe, 16)


def test_steps_before_the_discriminator_cost_what_the_autoencoder_does() -> None:
    recipe = METHODS["ls_gan_p"]("vit_pico_patch8_pmae")
    before = sum(count_gflop(recipe, before_start=True).values())
    assert before == pytest.approx(sum(count_gflop(METHODS["mae"]("vit_pico_patch8_pmae")).values()))
    assert before < 0.9 * sum(count_gflop(recipe).values())


@pytest.mark.parametrize("method", ["mae", "stylegan2_ada_p"])
def test_dry_run_derives_its_figures(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main([method, "--dry-run", "--model", "vit_large_patch16_pmae"])
    told = capsys.readouterr().out
    for expected in ("vit_large_patch16_pmae", "parameters", "GFLOP per image", "memory per device", "device hours"):
        assert expected in told
    hours = float(told.split("device hours")[1].split()[0])
    gflop, float32 = (float(number) for number in re.findall(r"  all +([\d.]+), ([\d.]+) of them in float32", told)[0])
    images = int(told.rsplit("steps  ", 1)[1].split()[0]) * 4096
    seconds = (gflop - float32) / 312e3 + float32 / 19.5e3  # of an image at both peaks
    assert hours == pytest.approx(seconds * images / 0.4 / 3600, rel=0.01)


def test_a_dry_run_heeds_what_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*flags: str) -> str:
        pretrain.main(["mae", "--dry-run", "--model", "vit_pico_patch8_pmae", "--images", "1280", *flags])
        return capsys.readouterr().out

    def memory(text: str) -> float:
        return float(text.split("images of ")[1].split()[0])

    assert memory(told("--grad-checkpointing")) < 0.5 * memory(told())
    assert "second pass" in told("--grad-checkpointing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory(told("--ema-decay", "0.9")) == memory(told())
    assert 0 < float(told().split("device hours")[1].split()[0]) < 0.01
    with pytest.raises(SystemExit, match=r"--warmup 0\.9: none of the 3 steps"):
        told("--steps", "3", "--warmup", "0.9")


def test_a_larger_run_is_not_estimated_without_asking(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mae", "--dry-run", "--model", "vit_pico_patch8_pmae", "--images", "1280", "--epochs", "10"]
    pretrain.main(arguments)
    assert "100 of 128 images; 1280 images an epoch" in capsys.readouterr().out


def test_a_dry_run_needs_no_run_folder_and_says_whose_batch_does_not_fit(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_photos = ["mae", "--dry-run", "--model", "vit_pico_patch8_pmae", "--data", str(photos)]
    with pytest.raises(SystemExit, match="--batch-size 128 is more than there are images, 24"):
        pretrain.main(on_photos)
    pretrain.main([*on_photos, "--batch-size", "20"])  # as the command itself, in one process
    told = capsys.readouterr().out
    assert "24 images an epoch" in told
    assert "+ 20 images of" in told
    assert "devices              1, with 1 pass(es) a step" in told
    with pytest.raises(SystemExit, match=r"multiple of 32 for 8 process.*--devices says how many processes are meant"):
        pretrain.main(["debug", "--dry-run"])
    pretrain.main(["debug", "--dry-run", "--devices", "1"])
    assert "GFLOP per image" in capsys.readouterr().out


def test_a_dry_run_says_what_it_leaves_out_and_guesses_nothing(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    arguments = ["ls_gan_p", "--dry-run", "--model", "vit_pico_patch8_pmae"]
    pretrain.main(arguments)
    assert "not counted" not in capsys.readouterr().out
    pretrain.main([*arguments, "--phi", "timm:vgg16.tv_in1k"])
    assert "not counted          phi" in capsys.readouterr().out
    stream = ["--data", f"hf-stream:imagefolder:{photos}"]
    with pytest.raises(SystemExit, match=r"--epochs counts epochs, and this stream does not know .* give --steps"):
        pretrain.main([*arguments, *stream])
    pretrain.main([*arguments, *stream, "--steps", "7"])
    assert "7 of 128 images\n" in capsys.readouterr().out


def test_matmul_peak_is_a_speed_of_this_machine() -> None:
    assert 1 < matmul_peak(torch.device("cpu"), "fp32", seconds=0.05) < 1e5


def test_kinds_of_step_cover_a_cycle() -> None:
    kinds = kinds_of_step(stylegan2_ada_p("vit_base_patch16_pmae"))
    assert kinds == {0: 1, 1: 12, 4: 3}
    assert kinds_of_step(mae("vit_base_patch16_pmae")) == {0: 1}


@pytest.mark.parametrize("model", ["vit_pico_patch8_pmae", "vit_base_patch16_pmae", "vit_large_patch16_pmae"])
def test_every_method_has_a_recipe_for_every_model(model: str) -> None:
    for name, method in METHODS.items():
        recipe = method(model)
        assert recipe.method == name
        assert recipe.model == (
            model if name != "debug" or model != "vit_base_patch16_pmae" else "vit_pico_patch8_pmae"
        )
        if model != "vit_pico_patch8_pmae" and name != "debug":
            assert (recipe.epochs, recipe.batch_size, recipe.blr, recipe.betas) == (300, 4096, 1.5e-4, (0.9, 0.95))
            assert (recipe.mask_ratio, recipe.decoder_dim, recipe.decoder_depth) == (0.75, 512, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("mea",)}, "--methods mea: there are mae, ms_ssim"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"processes": 2, "methods": ("mae", "ms_ssim")}, "--processes compares one method"),
        ({"processes": 2, "baseline": True}, "--processes compares one method"),
    ],
)
def test_what_cannot_be_timed_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        benchmark.main(benchmark.Options(**options))


def test_tables_that_cannot_be_read_or_placed_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"scale\.py: .*none\.md"):
        scale.main(Assumptions(), counted=tmp_path / "none.md")
    document = tmp_path / "document.md"
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        scale.main(Assumptions(), counted=Path(scale.__file__).with_name("SCALE.md"), into=document)
    assert document.read_text() == "no markers"


def test_a_small_benchmark_ends_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    options = {"model": "vit_pico_patch8_pmae", "batch_size": 4, "rounds": 1, "memory": False, "json": out}
    benchmark.main(benchmark.Options(methods=("mae", "ls_gan_p"), device="cpu", **options))
    found = json.loads(out.read_text())
    assert [result["method"] for result in found["results"]] == ["mae", "ls_gan_p"]
    assert all(result["seconds_per_image"] * 4 == result["seconds_per_step"] > 0 for result in found["results"])
    gflop = [result["gflop_per_image"] for result in found["results"]]
    assert gflop == [sum(count_gflop(METHODS[name](options["model"])).values()) for name in ("mae", "ls_gan_p")]
    assert "x mae" in capsys.readouterr().out
