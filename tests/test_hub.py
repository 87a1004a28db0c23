"""Weights from a Hub: the real client against a server on 127.0.0.1 that also misbehaves."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import TOKEN, Hub, Repo
from safetensors.torch import load_file, save

from perceptual_mae_models import CheckpointError, WeightsUnavailableError, cli, hub
from perceptual_mae_models.hub import Publication

TAG, OTHER = "vit_tiny_patch16_pmae.ms_ssim_in1k", "vit_base_patch16_pmae.ls_gan_p_in1k"  # none in the package
NAME = f"perceptual-mae/{TAG}"


# Older clients remember in their sessions whether there is a network.
forget_sessions = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running Hub, which the client of this process talks to, with an empty cache."""
    running = Hub()
    forget_sessions()
    constants = huggingface_hub.constants
    template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name, value in (("ENDPOINT", running.endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
        if hasattr(huggingface_hub.file_download, name):  # older versions hold copies
            monkeypatch.setattr(huggingface_hub.file_download, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("PMAE_HUB_ORG", raising=False)
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(timm.create_model("vit_tiny_patch16_pmae").state_dict())


def as_files(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A repository's files: weights and their manifest."""
    weights = save(state)
    entry = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    manifest = json.dumps({"name": TAG, "files": {"model.safetensors": entry}}).encode()
    return {"model.safetensors": weights, "manifest.json": manifest}


@pytest.fixture
def published(server: Hub, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Repo:
    monkeypatch.setenv("PMAE_HUB_ORG", "perceptual-mae")
    repo = server.repos[NAME] = Repo()
    repo.commit(as_files(state))
    return repo


def assert_loaded(state: dict[str, torch.Tensor]) -> None:
    model = timm.create_model(TAG, pretrained=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def refused(kind: type[Exception], tag: str = TAG) -> str:
    with pytest.raises(kind) as caught:
        timm.create_model(tag, pretrained=True)
    return str(caught.value)


def test_weights_come_from_the_hub_and_then_from_the_cache(
    server: Hub, published: Repo, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_loaded(state)
    assert f"GET /{NAME}/resolve/main/model.safetensors" in server.requests
    downloads = sum(line.startswith("GET") for line in server.requests)
    assert_loaded(state)
    assert sum(line.startswith("GET") for line in server.requests) == downloads
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    asked = len(server.requests)
    assert_loaded(state)
    assert len(server.requests) == asked


def test_the_model_says_where_its_weights_are_from_not_where_the_cache_is(published: Repo) -> None:
    for kwargs in ({}, {"features_only": True}, {"num_classes": 5}):
        cfg = timm.create_model(TAG, pretrained=True, **kwargs).pretrained_cfg
        assert cfg["hf_hub_id"] == NAME
        assert not cfg.get("file")


def test_a_pinned_revision_is_loaded_whatever_came_later(
    published: Repo, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = hashlib.sha256(as_files(state)["manifest.json"]).hexdigest()
    monkeypatch.setitem(hub.PUBLISHED, TAG, Publication(published.branches["main"], manifest))
    published.commit(as_files({name: tensor + 1 for name, tensor in state.items()}))
    assert_loaded(state)


def test_a_manifest_that_is_not_the_pinned_one_is_refused(
    published: Repo, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = published.commit(as_files({name: tensor + 1 for name, tensor in state.items()}))
    manifest = hashlib.sha256(as_files(state)["manifest.json"]).hexdigest()
    monkeypatch.setitem(hub.PUBLISHED, TAG, Publication(other, manifest))
    assert "was changed" in refused(CheckpointError)


def test_a_published_repository_must_have_its_manifest(
    published: Repo, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = published.commits[published.branches["main"]]
    del bare["manifest.json"]
    monkeypatch.setitem(hub.PUBLISHED, TAG, Publication(published.branches["main"], "0" * 64))
    assert "manifest.json" in refused(WeightsUnavailableError)
    monkeypatch.delitem(hub.PUBLISHED, TAG)
    assert_loaded(state)  # somebody's own upload


def test_what_is_given_by_hand_stands_before_the_repository_unless_the_source_says_hub(
    server: Hub, published: Repo, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    other = tmp_path / "other.pth"
    torch.save({name: tensor + 1 for name, tensor in state.items()}, other)
    by_hand = ({"url": other.as_uri()}, {"file": str(other)}, {"url": other.as_uri(), "source": "timm"})
    for overlay in by_hand:
        model = timm.create_model(TAG, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache")
        assert torch.equal(model.norm.weight, state["norm.weight"] + 1), overlay
        assert model.pretrained_cfg["hf_hub_id"] == NAME
    assert not server.requests
    for overlay in ({"source": "timm"}, {"source": "hf-hub", "file": str(other)}):
        server.requests.clear()
        model = timm.create_model(TAG, pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.norm.weight, state["norm.weight"]), overlay
        assert any("manifest.json" in request for request in server.requests), overlay
    server.requests.clear()
    embedded = "vit_pico_patch8_pmae.mae_imagenette"  # whose own file would stand before anything
    ours = timm.create_model(embedded, pretrained=True).state_dict()
    torch.save({name: tensor + 1 for name, tensor in ours.items()}, other)
    model = timm.create_model(
        embedded, pretrained=True, pretrained_cfg_overlay={"url": other.as_uri()}, cache_dir=tmp_path / "pico"
    )
    assert torch.equal(model.norm.weight, ours["norm.weight"] + 1)
    assert not server.requests
    elsewhere = {"hf_hub_id": "me/finetuned"}
    with pytest.raises(WeightsUnavailableError, match="Hugging Face Hub repository me/finetuned") as caught:
        timm.create_model(embedded, pretrained=True, pretrained_cfg_overlay=elsewhere)
    assert "PMAE_HUB_ORG" not in str(caught.value)  # which stands in for our organisation alone
    assert server.requests
    with pytest.raises(WeightsUnavailableError, match=r"Hugging Face Hub repository .*mae_imagenette") as caught:
        timm.create_model(embedded, pretrained=True, pretrained_cfg_overlay={"source": "hf-hub"})
    assert "PMAE_HUB_ORG" in str(caught.value)


def test_a_revision_can_be_asked_for(published: Repo, state: dict[str, torch.Tensor]) -> None:
    first = published.branches["main"]
    published.commit(as_files({name: tensor + 1 for name, tensor in state.items()}))
    overlay = {"hf_hub_id": f"{NAME}@{first}"}
    model = timm.create_model(TAG, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.norm.weight, state["norm.weight"])
    overlay = {"hf_hub_id": f"{NAME}@nowhere"}
    with pytest.raises(WeightsUnavailableError, match="nowhere"):
        timm.create_model(TAG, pretrained=True, pretrained_cfg_overlay=overlay)


def test_who_took_our_name_before_us_is_not_asked(
    server: Hub, published: Repo, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PMAE_HUB_ORG")
    message = refused(WeightsUnavailableError)
    assert "before any upload of" in message
    assert "not published yet" in message
    assert not server.requests
    manifest = hashlib.sha256(as_files(state)["manifest.json"]).hexdigest()
    monkeypatch.setitem(hub.PUBLISHED, TAG, Publication(published.branches["main"], manifest))
    assert_loaded(state)
    monkeypatch.delitem(hub.PUBLISHED, TAG)
    monkeypatch.setenv("PMAE_HUB_ORG", "perceptual-mae")
    assert_loaded(state)
    monkeypatch.delenv("PMAE_HUB_ORG")
    assert_loaded(state)  # what is in the cache was asked for


def test_another_organisation_can_stand_in(
    server: Hub, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[f"acme/{TAG}"] = Repo()
    server.repos[f"acme/{TAG}"].commit(as_files(state))
    monkeypatch.setenv("PMAE_HUB_ORG", "acme")
    monkeypatch.setitem(hub.PUBLISHED, TAG, Publication("0" * 40, "0" * 64))  # of the other organisation
    assert_loaded(state)
    monkeypatch.setenv("PMAE_HUB_ORG", "nobody")
    assert f"nobody/{TAG}" in refused(WeightsUnavailableError)


def test_a_repository_without_safetensors_loads_and_what_is_none_names_no_source(
    server: Hub, state: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = io.BytesIO()
    torch.save(state, pickled)
    sized = {"num_classes": 0, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    config = {"architecture": "vit_tiny_patch16_pmae", **sized}
    server.repos["someone/old"] = Repo()
    files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": pickled.getvalue()}
    server.repos["someone/old"].commit(files)
    model = timm.create_model("hf-hub:someone/old", pretrained=True)
    assert torch.equal(model.norm.weight, state["norm.weight"])
    embedded = timm.create_model("vit_pico_patch8_pmae.mae_imagenette", pretrained=True).state_dict()
    for nothing in ({"hf_hub_id": None}, {"url": None}, {"url": ""}):
        again = timm.create_model(
            "vit_pico_patch8_pmae.mae_imagenette", pretrained=True, pretrained_cfg_overlay=nothing
        ).state_dict()
        assert torch.equal(again["norm.weight"], embedded["norm.weight"])
    server.repos[f"acme/{TAG}"] = Repo()
    server.repos[f"acme/{TAG}"].commit({"model.safetensors": as_files(state)["model.safetensors"]})
    monkeypatch.setenv("PMAE_HUB_ORG", "acme")
    assert_loaded(state)
    status, out, _ = run(capsys, "download", TAG)
    assert (status, out.split()[0]) == (0, "model.safetensors")


def test_tampered_weights_are_refused(published: Repo, state: dict[str, torch.Tensor]) -> None:
    files = published.commits[published.branches["main"]]
    files["model.safetensors"] = save({name: tensor + 1 for name, tensor in state.items()})
    message = refused(CheckpointError)
    assert "model.safetensors" in message
    assert "SHA-256" in message


def test_a_tampered_cache_is_refused(published: Repo, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert_loaded(state)
    (cached,) = (tmp_path / "cache").glob("**/snapshots/*/model.safetensors")
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(content)
    assert "Delete" in refused(CheckpointError)


def test_a_truncated_file_is_refused(published: Repo) -> None:
    published.truncated.add("model.safetensors")
    assert "model.safetensors" in refused(WeightsUnavailableError)


def test_a_transfer_that_breaks_off_is_taken_up_again(
    server: Hub, published: Repo, state: dict[str, torch.Tensor]
) -> None:
    published.drops["model.safetensors"] = 1
    try:
        assert_loaded(state)
    except WeightsUnavailableError:  # older clients leave the second try to the user
        assert_loaded(state)
    assert published.drops["model.safetensors"] == 0


def test_a_missing_repository_and_a_missing_file_are_told_apart(server: Hub, published: Repo) -> None:
    message = refused(WeightsUnavailableError, OTHER)
    first, *_ = message.splitlines()
    assert f"{OTHER} are not published yet. These can be had today: vit_base_patch16_pmae.fb_mae" in first
    assert "pretrain.py ls_gan_p --data" in message
    for files in published.commits.values():
        files.pop("model.safetensors")
    assert "model.safetensors" in refused(WeightsUnavailableError)


def test_a_gated_or_private_repository_names_the_login(published: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    published.gated = True
    message = refused(WeightsUnavailableError)
    assert "hf auth login" in message
    published.gated, published.private = False, True
    refused(WeightsUnavailableError)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    timm.create_model(TAG, pretrained=True)


def test_weights_of_another_architecture_are_refused(published: Repo) -> None:
    other = timm.create_model("vit_tiny_patch16_pmae", depth=2).state_dict()
    published.commit(as_files(dict(other)))
    assert "missing" in refused(CheckpointError)


def test_a_manifest_that_is_none_is_refused(published: Repo) -> None:
    for content in (b"<html>", b"{}", b'{"files": {"model.safetensors": {"bytes": 1}}}'):
        published.commit({"manifest.json": content})
        assert "not a manifest" in refused(CheckpointError)
    for name in ("/etc/passwd", "../up", "a/../../b", "c:\\x", "c:x", "..\\y", ".", ""):
        manifest = {"files": {name: {"bytes": 1, "sha256": "0"}}}
        published.commit({"manifest.json": json.dumps(manifest).encode()})
        assert f"{name!r}, which is no file of its own folder" in refused(CheckpointError)
    published.commit({"manifest.json": b'{"files": {}}'})
    assert "no line for model.safetensors" in refused(CheckpointError)


def test_a_hub_that_does_not_answer_is_told_or_the_cache_used(
    server: Hub, published: Repo, state: dict[str, torch.Tensor]
) -> None:
    assert_loaded(state)
    server.shutdown()
    server.server_close()
    assert_loaded(state)
    message = refused(WeightsUnavailableError, OTHER)
    assert "outgoing traffic has been disabled" not in message


def test_the_environment_names_the_mirror(server: Hub, published: Repo, tmp_path: Path) -> None:
    code = f"""
import timm, perceptual_mae_models
print(timm.create_model("{TAG}", pretrained=True).norm.weight.sum().item())
"""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 192


# --- the commands ----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_download_puts_every_file_into_a_folder_that_verify_accepts(
    published: Repo, state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "weights"
    status, out, err = run(capsys, "download", TAG, "--to", folder)
    assert (status, err) == (0, "")
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"model.safetensors", "manifest.json"}
    assert str(folder) in out
    assert torch.equal(load_file(folder / "model.safetensors")["cls_token"], state["cls_token"])
    assert run(capsys, "verify", folder)[:2] == (0, "model.safetensors  ok\n")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    status, out, err = run(capsys, "verify", folder)
    assert status == 1
    assert "bytes instead of" in err


def test_download_of_several_models_keeps_them_apart(
    published: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = "vit_pico_patch8_pmae.mae_imagenette"
    assert run(capsys, "download", TAG, embedded, "--to", tmp_path)[0] == 0
    assert {path.name for path in (tmp_path / TAG).iterdir()} >= {"model.safetensors", "manifest.json"}
    assert (tmp_path / f"{embedded}.safetensors").is_file()
    assert run(capsys, "download", embedded, "--to", tmp_path / "alone")[0] == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        f"{embedded}.{ending}" for ending in ("safetensors", "decoder.safetensors", "json")
    }


def test_verify_knows_what_is_in_the_cache_and_what_is_not(published: Repo, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "verify", TAG)
    assert status == 1
    assert f"pmae download {TAG}" in err
    assert run(capsys, "download", TAG)[0] == 0
    assert run(capsys, "verify", TAG)[:2] == (0, "model.safetensors  ok\n")


def test_embedded_weights_verify_and_need_no_download(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "verify", "vit_pico_patch8_pmae")
    assert status == 0
    assert "vit_pico_patch8_pmae.mae_imagenette.safetensors  ok" in out
    status, out, _ = run(capsys, "download", "vit_pico_patch8_pmae")
    assert status == 0
    assert "in the package" in out
    folder = tmp_path / "copy"
    assert run(capsys, "download", "vit_pico_patch8_pmae.mae_imagenette", "--to", folder)[0] == 0
    assert run(capsys, "verify", folder)[1].count("  ok\n") == 2  # encoder and decoder
    decoder = folder / "vit_pico_patch8_pmae.mae_imagenette.decoder.safetensors"
    decoder.write_bytes(decoder.read_bytes()[:-1])
    assert "bytes instead of" in run(capsys, "verify", folder)[2]
    assert not server.requests


def test_what_cannot_be_downloaded_or_verified_is_told(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "download", "vit_tiny_patch16_pmae.mae_in1k")
    assert status == 1
    assert "not published yet" in err
    status, _, err = run(capsys, "verify", tmp_path)
    assert status == 1
    assert f"{tmp_path} holds no manifest.json" in err
    for command in ("download", "verify"):
        status, _, err = run(capsys, command, "vit_no_such_model")
        assert (status, err) == (1, "pmae: error: vit_no_such_model is no model of ours; `pmae list` names all\n")
    status, _, err = run(capsys, "verify", tmp_path / "none")
    assert (status, err) == (1, f"pmae: error: there is no folder {tmp_path / 'none'}\n")
    status, _, err = run(capsys, "verify", "vit_base_patch16_pmae.fb_mae_in1k")
    assert status == 1
    assert "timm/vit_base_patch16_224.mae is not a repository of ours and has no manifest to verify against" in err
