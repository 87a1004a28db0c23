"""From a run or the package to a repository, its card, the Hub, and back into an encoder."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, Hub, Repo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_hub import server  # noqa: F401  (a fixture)

import perceptual_mae_models  # noqa: F401  (registers the encoders)
from perceptual_mae_models.hub import IntegrityError
from perceptual_mae_models.vision_transformer_pmae import facts_of
from training import export, hub_configs, pretrain, publish
from training.evaluate.models import describe_model
from training.hub.card import describe_protocol, describe_results
from training.hub.repository import (
    TIMM_TWINS,
    build_config,
    describe_files,
    open_embedded_weights,
    registered_tags,
    write_repository,
)
from training.hub.results import list_accuracies

EMBEDDED = "vit_pico_patch8_pmae.mae_imagenette"
REPOSITORY = f"perceptual-mae/{EMBEDDED}"
OWN = "vit_pico_patch8_pmae.smooth_in1k"
OWN_FACTS: dict[str, Any] = {
    "repo": "acme/pico_smooth",
    "license": "mit",
    "data_title": "24 smooth images",
    "data_terms": "made for a test",
    "hardware": "two cores",
}
EVALUATION = Path(__file__).parents[1] / "docs" / "evaluation"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_repository(facts_of(EMBEDDED), open_embedded_weights(EMBEDDED), tmp_path / EMBEDDED)
    return tmp_path / EMBEDDED


@pytest.fixture
def account(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:  # noqa: F811
    """A Hub that knows who we are."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return server


# --- what is written -------------------------------------------------------------------------------------------------


def test_hub_configs_are_what_the_code_says() -> None:
    assert hub_configs.find_drift(hub_configs.HERE) == [], "run `python training/hub_configs.py` and commit"


def test_drift_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_configs, "registered_tags", lambda: [EMBEDDED, "vit_tiny_patch16_pmae.mae_in1k"])
    hub_configs.main(tmp_path)
    hub_configs.main(tmp_path, check=True)
    (tmp_path / EMBEDDED / "config.json").write_text("{}")
    (tmp_path / "vit_tiny_patch16_pmae.mae_in1k" / "README.md").unlink()
    (tmp_path / "surplus").mkdir()
    (tmp_path / "surplus" / "README.md").touch()
    with pytest.raises(SystemExit) as caught:
        hub_configs.main(tmp_path, check=True)
    for name in (f"{EMBEDDED}/config.json", "vit_tiny_patch16_pmae.mae_in1k/README.md", "surplus/README.md"):
        assert name in str(caught.value)
    with pytest.raises(SystemExit, match="holds surplus, no registered tags: take them away"):
        hub_configs.main(tmp_path)  # a folder given by mistake is not emptied
    shutil.rmtree(tmp_path / "surplus")
    hub_configs.main(tmp_path)
    assert hub_configs.find_drift(tmp_path) == []


def test_every_tag_of_ours_has_a_description_and_no_other() -> None:
    tags = registered_tags()
    assert len(tags) == 5 * len(TIMM_TWINS)
    assert not any("fb_mae" in tag for tag in tags)


@pytest.mark.parametrize("architecture", TIMM_TWINS)
def test_timms_own_architecture_is_ours(architecture: str) -> None:
    (tag, *_) = (tag for tag in registered_tags() if tag.startswith(f"{architecture}."))
    config = build_config(facts_of(tag))
    with torch.device("meta"):
        theirs = timm.create_model(config["architecture"], num_classes=0, **config.get("model_args", {}))
        ours = timm.create_model(architecture)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert str(theirs) == str(ours)
    cfg = facts_of(tag)
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size"):
        assert json.dumps(config["pretrained_cfg"][key]) == json.dumps(getattr(cfg, key))


def test_a_repository_loads_in_timm_by_its_own_config(repository: Path) -> None:
    theirs = timm.create_model(f"local-dir:{repository}", pretrained=True).eval()
    ours = timm.create_model(EMBEDDED, pretrained=True).eval()
    assert theirs.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(theirs(images), ours(images))
    theirs_data, ours_data = (timm.data.resolve_model_data_config(model) for model in (theirs, ours))
    assert json.dumps(theirs_data) == json.dumps(ours_data)  # lists and tuples


def test_the_card_tells_the_figures_of_the_run_and_no_others(repository: Path) -> None:
    card = (repository / "README.md").read_text()
    provenance = json.loads((repository / "recipe.json").read_text())
    results = json.loads((repository / "results.json").read_text())["results"]
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "timm"
    values = [metric["value"] for group in metadata["model-index"][0]["results"] for metric in group["metrics"]]
    assert values == [round(100 * row["value"]["mean"], 2) for row in results]
    for row in results:
        assert f"{100 * row['value']['mean']:.1f} [{100 * row['value']['low']:.1f}" in card
    assert f"{provenance['data']['images']:,} images" in card
    assert f"{provenance['cost']['steps']:,} steps" in card
    assert "Recipe only" not in card


def test_a_card_shows_twenty_neighbours_or_the_first_number_there_is() -> None:
    results = json.loads((EVALUATION / "cifar10" / "results.json").read_text())
    prints = {results["models"]["vit_pico_patch8_pmae"]["weights"]}

    def shown() -> list[str]:
        rows = list_accuracies(results, "photos", prints)
        assert {row["protocol"] for row in rows} > {"knn"}
        return [row["setting"] for row in rows if row["protocol"] == "knn"]

    assert shown() == ["k=20"]
    results["results"] = [row for row in results["results"] if row["setting"] != "k=20"]
    assert shown() == ["k=10"]


def test_figures_in_the_card_are_those_of_the_evaluation() -> None:
    weights = open_embedded_weights(EMBEDDED)
    assert weights is not None
    files = [EVALUATION / name / "results.json" for name in ("imagenette", "cifar10", "fashion-mnist")]
    prints = {export.fingerprint_of(weights.encoder, EMBEDDED)}
    rows = [row for file in files for row in export.read_results(file, prints, "cls+avg")]
    assert weights.provenance["results"] == rows
    assert len(rows) == 9


def test_figures_are_found_by_the_weights_whatever_they_were_called(run: Path, tmp_path: Path) -> None:
    results = json.loads((EVALUATION / "cifar10" / "results.json").read_text())
    file = tmp_path / "photos" / "results.json"
    file.parent.mkdir()
    file.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=r"photos/results\.json: photos: no figures of these weights, but of vit_pico"):
        export.main(str(run), name=OWN, to=tmp_path, results=(file,), **OWN_FACTS)
    mine = f"vit_pico_patch8_pmae@{run}/encoder.safetensors"
    results["models"][mine] = describe_model(mine)
    row = next(row for row in results["results"] if (row["protocol"], row["features"]) == ("linear", "cls+avg"))
    results["results"].append({**row, "model": mine, "value": {"mean": 0.123, "low": 0.1, "high": 0.2}})
    file.write_text(json.dumps(results))
    export.main(str(run), name=OWN, to=tmp_path, results=(file,), **OWN_FACTS)
    recorded = json.loads((tmp_path / OWN / "results.json").read_text())["results"]
    assert [row["value"]["mean"] for row in recorded] == [0.123]
    assert "12.3 [10.0, 20.0]" in (tmp_path / OWN / "README.md").read_text()


def test_a_run_on_a_stream_has_a_card_too() -> None:
    weights = open_embedded_weights(EMBEDDED)
    assert weights is not None
    data = {**weights.provenance["data"], "images": None}
    streamed = replace(weights, provenance={**weights.provenance, "data": data})
    files = describe_files(facts_of(EMBEDDED), streamed)
    assert "- Data: a stream of images, " in files["README.md"]


def test_few_labels_are_named_as_what_they_are() -> None:
    row = {"protocol": "few_shot", "setting": "5%"}
    assert describe_protocol(row) == "logistic regression on 5% of the labels, accuracy"
    assert describe_protocol({**row, "setting": "10"}) == "logistic regression on 10 images a class, accuracy"


def test_a_tag_without_weights_says_so_and_claims_nothing() -> None:
    files = describe_files(facts_of("vit_base_patch16_pmae.msg_gan_p_in1k"), None)
    assert files.keys() == {"config.json", "README.md"}
    card = files["README.md"]
    assert "**Recipe only.**" in card
    assert "## Results" not in card
    assert "model-index" not in card


def test_snippets_of_the_card_run(repository: Path, account: Hub) -> None:
    publish.main(repository)
    account.repos[REPOSITORY].private = False
    snippets = re.findall(r"```python\n(.+?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        namespace: dict[str, object] = {}
        exec(snippet, namespace)
        if "tokens" in namespace:
            assert namespace["features"].shape == (1, 192)  # type: ignore[attr-defined]
            assert namespace["tokens"].shape == (1, 65, 192)  # type: ignore[attr-defined]


# --- a run is exported -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pico"
    flags = ["--steps", "2", "--batch-size", "8", "--workers", "0", "--grid-every", "0", "--precision", "fp32"]
    command = [sys.executable, pretrain.__file__, "mae", "--model", "vit_pico_patch8_pmae", "--data", str(photos)]
    subprocess.run([*command, "--out", str(out), *flags], check=True, capture_output=True)
    return out


def test_a_run_becomes_a_repository(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--data-terms"):
        export.main(str(run), name=OWN, to=tmp_path)
    export.main(str(run), name=OWN, to=tmp_path, **OWN_FACTS)
    folder = tmp_path / OWN
    publish.check_repository(folder)
    assert {path.name for path in tmp_path.iterdir()} == {OWN}
    original, exported = load_file(run / "encoder.safetensors"), load_file(folder / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[key].half(), exported[key]) for key in original)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert json.loads((folder / "recipe.json").read_text())["cost"]["steps"] == 2


def test_the_card_of_a_tag_of_ones_own_says_what_was_given(run: Path, tmp_path: Path, account: Hub) -> None:
    export.main(str(run), name=OWN, to=tmp_path, **OWN_FACTS)
    card = (tmp_path / OWN / "README.md").read_text()
    assert "pretrained without labels on 24 smooth images as a masked autoencoder: it hides patches" in card
    assert "24 images, made for a test" in card
    assert "Imagenette" not in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata.get("datasets")) == ("mit", None)
    with pytest.raises(SystemExit, match="written for acme/pico_smooth, not for acme/other: write the folder again"):
        publish.main(tmp_path / OWN, repo="acme/other")
    publish.main(tmp_path / OWN)
    for snippet in re.findall(r"```python\n(.+?)```", card, re.DOTALL):
        namespace: dict[str, Any] = {}
        exec(snippet, namespace)
    assert namespace["extractor"]([Image.new("RGB", (80, 64))]).shape == (1, 192)


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("vit_tiny_patch16_pmae.mine", {}, "whose encoder is a vit_pico_patch8_pmae"),
        (
            "vit_pico_patch8_pmae.mine",
            {"repo": None},
            "a tag of your own, which needs --repo, --license and --data-title",
        ),
        ("vit_pico_patch8_pmae.a.b", {}, "is not <architecture>.<tag>"),
        (EMBEDDED, {}, "--license and --data-title are for tags of your own"),
        (EMBEDDED, {"license": None, "data_title": None}, r"Imagenette's 9469 images, but .* is mae on 24 of photos"),
        (
            "vit_pico_patch8_pmae.ms_ssim_imagenette",
            {"license": None, "data_title": None},
            "choose a tag of your own, such as vit_pico_patch8_pmae.mae_mine",
        ),
    ],
)
def test_no_card_says_what_is_not_true_of_the_run(
    name: str, facts: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        export.main(str(run), name=name, to=tmp_path, **{**OWN_FACTS, **facts})
    assert not list(tmp_path.iterdir())


def test_a_run_on_images_that_nobody_counted_is_not_exported_under_a_registered_tag(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    description = json.loads((copy / "recipe.json").read_text())
    description["data"]["images"] = None
    (copy / "recipe.json").write_text(json.dumps(description))
    facts = {**OWN_FACTS, "license": None, "data_title": None}
    with pytest.raises(SystemExit, match=r"is mae on an unknown number of images of photos.*a tag of your own"):
        export.main(str(copy), name=EMBEDDED, to=tmp_path / "to", **facts)


def change_recipe(run: Path, folder: Path, **changes: object) -> Path:
    copy = shutil.copytree(run, folder)
    description = json.loads((copy / "recipe.json").read_text())
    description["recipe"] |= changes
    (copy / "recipe.json").write_text(json.dumps(description))
    return copy


def test_a_card_says_of_the_recipe_what_was_run(run: Path, tmp_path: Path) -> None:
    def card(number: int, **changes: object) -> str:
        changed = change_recipe(run, tmp_path / f"run{number}", **changes)
        export.main(str(changed), name=OWN, to=tmp_path / f"to{number}", **OWN_FACTS)
        return (tmp_path / f"to{number}" / OWN / "README.md").read_text()

    assert "2 steps (0.667 times all images), batch 8" in card(0)
    assert "3.5 epochs, batch 8" in card(1, steps=None, epochs=3.5)
    for number, changes in enumerate(({"reconstruction": "l1"}, {"loss_on": "image"}, {"norm_pix_loss": False}), 2):
        text = card(number, **changes)
        assert "a masked autoencoder, trained by a variant of the method `mae`" in text
        assert "squared error" not in text
    adversarial = {"method": "ls_gan_p", "reconstruction": "l1", "loss_on": "image", "norm_pix_loss": False}
    adversarial |= {"phi": "discriminator", "feature_weight": 1.0, "adversarial_weight": 0.1}
    assert "under L1, the features of a discriminator" in card(5, **adversarial)
    assert "a variant of the method `ls_gan_p`" in card(6, **{**adversarial, "feature_weight": 0})
    begun = card(7, init="/home/somebody/theirs.safetensors")
    assert "The encoder began with the weights of `theirs.safetensors`, whose terms go with these." in begun
    assert "somebody" not in begun
    assert "Nothing was filtered" not in begun


def test_weights_that_began_with_others_have_no_registered_tag(run: Path, tmp_path: Path) -> None:
    copy = change_recipe(run, tmp_path / "run", init=EMBEDDED)
    description = json.loads((copy / "recipe.json").read_text())
    description["data"]["images"] = 9469
    (copy / "recipe.json").write_text(json.dumps(description))
    facts = {**OWN_FACTS, "license": None, "data_title": None}
    with pytest.raises(SystemExit, match=f"began with {EMBEDDED}, which {EMBEDDED} does not say"):
        export.main(str(copy), name=EMBEDDED, to=tmp_path / "to", **facts)


def test_figures_without_an_interval_have_none(run: Path, tmp_path: Path) -> None:
    export.main(str(run), name=OWN, to=tmp_path, **OWN_FACTS)
    provenance = json.loads((tmp_path / OWN / "recipe.json").read_text())
    value = {"mean": 0.7, "low": 0.7, "high": 0.7}
    row = {"images": "mine (10 test images)", "protocol": "few_shot", "setting": "5", "features": "cls+avg"}
    text = "\n".join(describe_results({**provenance, "results": [{**row, "metric": "accuracy", "value": value}]}))
    assert "| 70.0 |" in text


def test_a_run_becomes_files_of_the_package(run: Path, tmp_path: Path) -> None:
    export.main(str(run), name=OWN, to=tmp_path, layout="package", dtype="float32", **OWN_FACTS)
    provenance = json.loads((tmp_path / f"{OWN}.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {*provenance["files"], f"{OWN}.json"}
    for file, entry in provenance["files"].items():
        content = (tmp_path / file).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry["dtype"] == "float32"


def test_an_export_that_fails_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    for layout in ("package", "repository"):
        export.main(str(run), name=OWN, to=tmp_path, layout=layout, **OWN_FACTS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    results = (EVALUATION / "cifar10" / "results.json",)  # of other weights
    for layout in ("package", "repository"):
        with pytest.raises(SystemExit, match="no figures of these weights"):
            export.main(str(run), name=OWN, to=tmp_path, layout=layout, dtype="float32", results=results, **OWN_FACTS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_card_says_the_size_that_timm_resizes_to() -> None:
    for name in (EMBEDDED, "vit_base_patch16_pmae.mae_in1k"):
        card = (hub_configs.HERE / name / "README.md").read_text()
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=facts_of(name).to_dict()))
        assert f"Images are resized to {transform.transforms[0].size} pixels" in card


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="neither a run folder nor a tag"):
        export.main("vit_base_patch16_pmae.mae_in1k", to=tmp_path)
    results = (EVALUATION / "cifar10" / "results.json",)
    with pytest.raises(SystemExit, match="no accuracies of vit_pico_patch8_pmae with nothing features"):
        export.main(EMBEDDED, to=tmp_path, results=results, features="nothing")
    with pytest.raises(SystemExit, match="No such file"):
        export.main(str(tmp_path), name=EMBEDDED, to=tmp_path, data_terms="ours", hardware="here")
    (tmp_path / "results.json").write_text('{"figures": 3}')
    with pytest.raises(SystemExit, match=r"results\.json"):
        export.main(EMBEDDED, to=tmp_path / "new", results=(tmp_path / "results.json",))
    assert not (tmp_path / "new").exists()
    export.main(EMBEDDED, to=tmp_path / "new" / "folder", layout="package")
    assert (tmp_path / "new" / "folder" / f"{EMBEDDED}.json").exists()


def test_a_run_that_has_not_ended_is_not_exported(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "encoder.safetensors").unlink()
    with pytest.raises(SystemExit, match="a run writes it at its end"):
        export.main(str(copy), name=OWN, to=tmp_path / "to", **OWN_FACTS)


# --- and published ---------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_every_file_and_sends_nothing(
    repository: Path, account: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    publish.main(repository, dry_run=True)
    out = capsys.readouterr().out
    assert f"{REPOSITORY}, branch main, on {account.endpoint}" in out
    for path in repository.iterdir():
        assert f"{path.stat().st_size:,}  " in out
        assert f"  {path.name}\n" in out
    assert not account.requests


def test_an_upload_is_what_was_exported_and_loads_again(
    repository: Path, account: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "notes.txt").write_text("not in the manifest")
    publish.main(repository, private=True)
    repo = account.repos[REPOSITORY]
    assert repo.private
    sent = repo.commits[repo.branches["main"]]
    assert sent.keys() - {".gitattributes"} == {path.name for path in repository.iterdir()} - {"notes.txt"}
    assert all(content == (repository / name).read_bytes() for name, content in sent.items() if name[0] != ".")
    assert any(line.startswith("PUT /lfs/") for line in account.requests), "the weights went by Git LFS"
    out = capsys.readouterr().out
    assert f'"{EMBEDDED}": Publication("{repo.branches["main"]}", "' in out
    monkeypatch.setenv("PMAE_HUB_ORG", "perceptual-mae")
    overlay = {"file": None, "hf_hub_id": REPOSITORY}
    pulled = timm.create_model(EMBEDDED, pretrained=True, pretrained_cfg_overlay=overlay)
    embedded = timm.create_model(EMBEDDED, pretrained=True).state_dict()
    assert all(torch.equal(tensor, embedded[name]) for name, tensor in pulled.state_dict().items())


def test_a_branch_a_pull_request_and_another_organisation(
    repository: Path, account: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.main(repository)
    publish.main(repository, revision="next")
    repo = account.repos[REPOSITORY]
    assert repo.branches.keys() == {"main", "next"}
    publish.main(repository, pull_request=True)
    assert "/discussions/1" in capsys.readouterr().out
    assert "refs/pr/1" in repo.branches
    monkeypatch.setenv("PMAE_HUB_ORG", "acme")
    for repo in (None, "acme/pico"):
        export.main(EMBEDDED, to=tmp_path / "again", repo=repo)
        publish.main(tmp_path / "again" / EMBEDDED)
        said = capsys.readouterr().out
        assert "PUBLISHED" not in said
        assert f'timm.create_model("hf-hub:{repo or f"acme/{EMBEDDED}"}", pretrained=True)' in said
    assert {f"acme/{EMBEDDED}", "acme/pico"} <= account.repos.keys()


def test_nothing_wrong_is_published(
    repository: Path, account: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"manifest\.json"):
        publish.main(tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(repository, bare)
    (bare / "decoder.safetensors").unlink()
    with pytest.raises(SystemExit, match="missing: write the folder"):
        publish.main(bare)
    with (repository / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError, match="bytes instead of"):
        publish.check_repository(repository)
    with pytest.raises(SystemExit, match=r"publish\.py: "):
        publish.main(repository)
    assert not account.repos


def test_a_stranger_is_refused(repository: Path, account: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    account.repos["perceptual-mae/other"] = Repo()
    with pytest.raises(SystemExit, match="401"):
        publish.main(repository)
    assert REPOSITORY not in account.repos
