"""Loading is whole or an error: wrapped, partial, foreign and unreachable weights."""

import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from timm_suite import seed_hub_cache

import perceptual_mae_models
from perceptual_mae_models import CheckpointError, WeightsUnavailableError
from perceptual_mae_models.weights import checkpoint_filter_fn

PICO = "vit_pico_patch8_pmae"
EMBEDDED = Path(perceptual_mae_models.__file__).parent / "pretrained" / f"{PICO}.mae_imagenette.safetensors"
NUM_CLASSES = pytest.mark.parametrize("num_classes", [0, 5])


def random_state(seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
    """Tensors that no initialisation gives: every one is normal noise."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in timm.create_model(PICO, **kwargs).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(checkpoint, tmp_path: Path, overlay: dict | None = None, **kwargs):
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path)
    overlay = {"file": str(path), **(overlay or {})}
    return timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def assert_encoder_equals(model, state: dict[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    different = [name for name, tensor in state.items() if not torch.equal(loaded[name], tensor)]
    assert different == []


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# --- every wrapping loads exactly ------------------------------------------------------------------------------------


def impostors(state: dict) -> dict:
    """Decoder, discriminator and training state as wide as the encoder and named like it: easy to load by mistake."""
    other = {name: torch.full_like(tensor, 7.0) for name, tensor in state.items()}
    return {
        **prefixed("decoder.", other),
        **prefixed("generator.decoder.", other),
        **prefixed("discriminator.", other),
        "mask_token": torch.zeros(1, 1, 192),
        "decoder_pos_embed": torch.zeros(1, 65, 128),
        "decoder_blocks.0.norm1.weight": torch.zeros(128),
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-3}]},
    }


WRAPPINGS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model_ema": lambda s: {"model_ema": s},
    "ema": lambda s: {"ema": prefixed("module.", s)},
    "module.": lambda s: prefixed("module.", s),
    "_orig_mod.": lambda s: prefixed("_orig_mod.", s),
    "encoder.": lambda s: prefixed("encoder.", s),
    "generator.encoder.": lambda s: prefixed("generator.encoder.", s),
    "module._orig_mod.encoder.": lambda s: prefixed("module._orig_mod.encoder.", s),
    "_orig_mod.module.generator.encoder.": lambda s: prefixed("_orig_mod.module.generator.encoder.", s),
    "encoder in a container": lambda s: {"encoder": s},
    "generator in a container": lambda s: {"generator": {"encoder": s}, "discriminator": s},
    "state_dict of model of module.": lambda s: {"state_dict": {"model": prefixed("module.encoder.", s)}},
    "with impostors": lambda s: {**prefixed("encoder.", s), **impostors(s)},
    "bare with impostors": lambda s: {**s, **impostors(s)},
    "model with impostors": lambda s: {"model": {**prefixed("module.generator.encoder.", s), **impostors(s)}},
}


@NUM_CLASSES
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_checkpoints_load_exactly(wrapping, num_classes, tmp_path):
    state = random_state()
    model = load(WRAPPINGS[wrapping](state), tmp_path, num_classes=num_classes)
    assert_encoder_equals(model, state)


@NUM_CLASSES
def test_averaged_weights_are_preferred(num_classes, tmp_path):
    state, averaged = random_state(0), random_state(1)
    model = load({"model": state, "model_ema": averaged}, tmp_path, num_classes=num_classes)
    assert_encoder_equals(model, averaged)
    # from a file timm itself takes "model" and leaves "ema", from memory everything reaches us
    overlay = {"state_dict": {"model": state, "ema": prefixed("module.", averaged)}}
    model = timm.create_model(PICO, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    assert_encoder_equals(model, averaged)


@NUM_CLASSES
def test_state_dict_in_memory_and_half_precision_on_disk(num_classes, tmp_path):
    state = random_state()
    wrapped = prefixed("module.encoder.", state)
    overlay = {"state_dict": wrapped}
    model = timm.create_model(PICO, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    assert_encoder_equals(model, state)
    half = {name: tensor.half() for name, tensor in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    overlay = {"file": str(tmp_path / "half.safetensors")}
    model = timm.create_model(PICO, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    assert_encoder_equals(model, {name: tensor.float() for name, tensor in half.items()})


@NUM_CLASSES
def test_features_only_loads_the_encoder(num_classes, tmp_path):
    state = random_state()
    getter = load(prefixed("encoder.", state), tmp_path, features_only=True, num_classes=num_classes)
    assert_encoder_equals(getter.model, {k: v for k, v in state.items() if not k.startswith("norm.")})


def test_checkpoint_path_takes_a_native_state(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "native.pt")
    assert_encoder_equals(timm.create_model(PICO, checkpoint_path=tmp_path / "native.pt"), state)


# --- what is not a whole encoder raises ------------------------------------------------------------------------------


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


NOT_AN_ENCODER = {
    "empty": lambda s: {},
    "empty container": lambda s: {"model": {}},
    "junk names": lambda s: {f"layer{i}.weight": tensor for i, tensor in enumerate(s.values())},
    "unknown prefix": lambda s: prefixed("backbone.trunk.", s),
    "only a decoder": lambda s: prefixed("decoder.", s),
    "only a discriminator": lambda s: {"discriminator": s},
    "no tensors": lambda s: {"state_dict": {"epoch": 3}},
    "one tensor missing": lambda s: without(s, "blocks.7.mlp.fc2.bias"),
    "no positions": lambda s: prefixed("encoder.", without(s, "pos_embed")),
    "no final norm": lambda s: without(s, "norm.weight"),
    "half of the blocks": lambda s: {k: v for k, v in s.items() if not k.startswith(("blocks.4", "blocks.6"))},
}


@NUM_CLASSES
@pytest.mark.parametrize("kind", NOT_AN_ENCODER)
def test_partial_and_junk_checkpoints_raise(kind, num_classes, tmp_path):
    checkpoint = NOT_AN_ENCODER[kind](random_state())
    with pytest.raises(CheckpointError, match=rf"complete encoder of {PICO}.*missing.*Found \d+ tensors"):
        load(checkpoint, tmp_path, num_classes=num_classes)


def test_the_error_says_what_is_missing_and_what_was_found(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 of its 102 tensors are missing \(norm\.bias\).*encoder\.cls_token"):
        load(prefixed("encoder.", without(random_state(), "norm.bias")), tmp_path, num_classes=5)


@NUM_CLASSES
def test_other_models_raise(num_classes, tmp_path):
    with pytest.raises(CheckpointError, match=r"no place for \(blocks\.8\."):
        load(random_state(depth=10), tmp_path, num_classes=num_classes)
    with pytest.raises(CheckpointError, match=r"cls_token is \(1, 1, 96\), the model needs \(1, 1, 192\)"):
        load(random_state(embed_dim=96), tmp_path, num_classes=num_classes)
    with pytest.raises(CheckpointError, match=r"complete encoder .*blocks\.0\.ls1\.gamma"):
        load(random_state(), tmp_path, num_classes=num_classes, init_values=1e-5)


@NUM_CLASSES
def test_two_encoders_raise(num_classes, tmp_path):
    checkpoint = {**prefixed("encoder.", random_state(0)), **prefixed("generator.encoder.", random_state(1))}
    with pytest.raises(CheckpointError, match=r"more than one encoder .*, at encoder, generator\.encoder"):
        load(checkpoint, tmp_path, num_classes=num_classes)


@NUM_CLASSES
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_broken_safetensors_raise(content, num_classes, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{PICO}.*{path.name}.*broken"):
        timm.create_model(PICO, True, num_classes=num_classes, pretrained_cfg_overlay={"file": str(path)})


@NUM_CLASSES
def test_files_that_are_no_checkpoint_are_named_and_never_unpickled(num_classes, tmp_path):
    path = tmp_path / "weights.pth"
    for content, message in (
        (b"<!DOCTYPE html><html>Not found</html>", r"weights\.pth is no checkpoint: it begins with b'<!DOCTYPE html>"),
        (b"some text", r"weights\.pth is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"weights\.pth is a Git LFS pointer"),
        (b"", r"weights\.pth, but the file is broken"),
        (pickle.dumps(Mock), r"weights\.pth is broken, or holds objects besides tensors.* `pmae convert` says"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            timm.create_model(PICO, True, num_classes=num_classes, pretrained_cfg_overlay={"file": str(path)})
        assert "weights_only" not in str(caught.value)


@NUM_CLASSES
def test_files_that_are_read_and_are_no_checkpoint_are_named(num_classes, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(random_state(), path)
    whole = path.read_bytes()
    for content in (pickle.dumps({1: [2, 3]}, 2), whole[: len(whole) // 2], b"\x80\x02" + bytes(range(20))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="weights"):
            timm.create_model(PICO, True, num_classes=num_classes, pretrained_cfg_overlay={"file": str(path)})
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="weights"):
        timm.create_model(PICO, True, num_classes=num_classes, pretrained_cfg_overlay={"file": str(path)})
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(PICO, True, no_such_argument=1)


def test_damaged_and_quantised_values_are_refused(tmp_path):
    for value in (torch.nan, torch.inf):
        state = random_state()
        state["blocks.3.mlp.fc1.bias"][7] = value
        with pytest.raises(CheckpointError, match=r"blocks\.3\.mlp\.fc1\.bias holds values that are not finite"):
            load(state, tmp_path)
    state = random_state()
    state["norm.weight"] = torch.ones(192, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"norm\.weight is of torch\.int8: a quantised"):
        load(state, tmp_path)


def test_an_argument_of_other_models_is_refused_by_name():
    with pytest.raises(ValueError, match="use_naflex"):
        timm.create_model(PICO, use_naflex=True)
    timm.create_model(PICO, use_naflex=False)


def test_positions_that_fit_two_grids_are_told(tmp_path):
    state = random_state(img_size=(32, 128))
    with pytest.warns(UserWarning, match="64 patches are taken for 8 x 8 of them, .* not for 4 x 16"):
        load(state, tmp_path, img_size=(32, 128))
    model = load(state, tmp_path, overlay={"input_size": (3, 32, 128)}, img_size=(32, 128))
    assert_encoder_equals(model, state)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_fitting_head_loads_and_any_other_keeps_its_start(tmp_path):
    state = random_state(num_classes=5)
    assert_encoder_equals(load(prefixed("module.", state), tmp_path, num_classes=5), state)
    body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    other = load(state, tmp_path, num_classes=7)
    assert_encoder_equals(other, body)
    assert other.head.weight.std() < 0.05
    assert other.head.bias.abs().max() == 0
    assert_encoder_equals(load(state, tmp_path, num_classes=0), body)


def test_a_declared_head_is_required(tmp_path):
    state = random_state(num_classes=5)
    assert_encoder_equals(load(state, tmp_path, overlay={"num_classes": 5}), state)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        load(random_state(), tmp_path, overlay={"num_classes": 5})


def test_pooling_heads(tmp_path):
    state = random_state()
    assert_encoder_equals(load(state, tmp_path, global_pool="avg"), state)
    classifier = load(state, tmp_path, global_pool="avg", num_classes=5)
    assert torch.equal(classifier.fc_norm.weight, torch.ones(192))
    assert_encoder_equals(classifier, {k: v for k, v in state.items() if not k.startswith("norm.")})
    load(state, tmp_path, global_pool="map", num_classes=5)
    with pytest.raises(RuntimeError, match=r"attn_pool\.latent"):
        load(state, tmp_path, global_pool="map")
    with pytest.raises(CheckpointError, match=r"trained on another pooling: .*fc_norm\.weight"):
        load(random_state(num_classes=5), tmp_path, global_pool="avg", num_classes=5)
    with pytest.raises(CheckpointError, match=r"trained on another pooling: .*attn_pool\."):
        load(random_state(num_classes=5), tmp_path, global_pool="map", num_classes=5)
    finetuned = random_state(global_pool="avg", num_classes=5)
    assert_encoder_equals(load(finetuned, tmp_path, global_pool="avg", overlay={"num_classes": 5}), finetuned)
    with pytest.raises(CheckpointError, match=r"norm\.weight.*whose norm stands behind the pooling.*global_pool='avg'"):
        load(finetuned, tmp_path, num_classes=5)


# --- fitting to the model's arguments --------------------------------------------------------------------------------


@NUM_CLASSES
@pytest.mark.parametrize("img_size", [(128, 128), (32, 64), (32, 128)])
def test_position_embedding_is_resampled(img_size, num_classes, tmp_path):
    # (32, 128) has as many patches as (64, 64): only the grid tells them apart
    state = random_state()
    ambiguous = img_size == (32, 128)  # as many patches as the square one has
    with pytest.warns(UserWarning, match="8 x 8") if ambiguous else nullcontext():
        model = load(prefixed("encoder.", state), tmp_path, img_size=img_size, num_classes=num_classes)
    grid = [img_size[0] // 8, img_size[1] // 8]
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=grid, old_size=[8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert_encoder_equals(model, without(state, "pos_embed"))


@NUM_CLASSES
def test_patch_embedding_is_resampled(num_classes, tmp_path):
    state = random_state()
    model = load(state, tmp_path, patch_size=16, num_classes=num_classes)
    expected = resample_patch_embed(state["patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(model.patch_embed.proj.weight.data, expected)
    assert model.pos_embed.shape == (1, 17, 192)


def test_a_checkpoint_of_another_image_size(tmp_path):
    state = random_state(img_size=128)
    model = load(state, tmp_path)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[8, 8], old_size=[16, 16], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.data, expected)
    oblong = random_state(img_size=(32, 64))
    assert_encoder_equals(load(oblong, tmp_path, overlay={"input_size": (3, 32, 64)}), oblong)
    assert_encoder_equals(load(oblong, tmp_path, img_size=(32, 64)), oblong)
    with pytest.raises(CheckpointError, match=r"33 tokens.*input_size=\(3, height, width\)"):
        load(oblong, tmp_path)


@NUM_CLASSES
def test_without_class_token_or_positions(num_classes, tmp_path):
    state = random_state()
    model = load(state, tmp_path, class_token=False, global_pool="avg", num_classes=num_classes)
    assert torch.equal(model.pos_embed.data, state["pos_embed"][:, 1:])
    model = load(state, tmp_path, pos_embed="none", num_classes=num_classes)
    assert_encoder_equals(model, without(state, "pos_embed"))


@NUM_CLASSES
def test_register_tokens(num_classes, tmp_path, caplog):
    state = random_state()
    model = load(state, tmp_path, reg_tokens=4, num_classes=num_classes)
    assert "no register tokens" in caplog.text
    pos_embed = model.pos_embed.data
    assert torch.equal(pos_embed[:, :1], state["pos_embed"][:, :1])
    assert torch.equal(pos_embed[:, 1:5], torch.zeros(1, 4, 192))
    assert torch.equal(pos_embed[:, 5:], state["pos_embed"][:, 1:])
    assert model.reg_token.abs().max() < 1e-4
    with_registers = random_state(reg_tokens=4)
    model = load(with_registers, tmp_path, reg_tokens=4, num_classes=num_classes)
    assert_encoder_equals(model, with_registers)
    assert_encoder_equals(
        load(with_registers, tmp_path, num_classes=num_classes),
        without(without(with_registers, "pos_embed"), "reg_token"),
    )


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_without_positions_compute_the_same(registers, tmp_path):
    state = {name: 0.05 * tensor for name, tensor in random_state(reg_tokens=registers).items()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = load(state, tmp_path, reg_tokens=registers).eval()(images)
        folded = load(state, tmp_path, reg_tokens=registers, no_embed_class=True).eval()
        assert folded.pos_embed.shape == (1, 64, 192)
        torch.testing.assert_close(folded(images), expected)
        unfolded = load(folded.state_dict(), tmp_path, reg_tokens=registers).eval()
        torch.testing.assert_close(unfolded(images), expected)


@NUM_CLASSES
@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels_are_adapted_by_timm(in_chans, num_classes, tmp_path):
    state = random_state()
    model = load(prefixed("encoder.", state), tmp_path, in_chans=in_chans, num_classes=num_classes)
    expected = adapt_input_conv(in_chans, state["patch_embed.proj.weight"].clone())
    torch.testing.assert_close(model.patch_embed.proj.weight.data, expected)
    assert_encoder_equals(model, without(state, "patch_embed.proj.weight"))


@NUM_CLASSES
def test_a_checkpoint_of_four_channels_is_loaded_or_refused(num_classes, tmp_path):
    # old timm would leave the patch embedding random here
    state = random_state(in_chans=4)
    with pytest.raises(CheckpointError, match=r"4 channels.*input_size=\(4, height, width\)"):
        load(state, tmp_path, num_classes=num_classes)
    try:
        model = load(state, tmp_path, in_chans=4, overlay={"input_size": (4, 64, 64)}, num_classes=num_classes)
    except CheckpointError:
        assert tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 31)
    else:
        assert_encoder_equals(model, state)


@NUM_CLASSES
def test_other_arguments_keep_the_weights(num_classes, tmp_path):
    state = random_state()
    arguments = {"dynamic_img_size": True, "drop_path_rate": 0.1, "drop_rate": 0.1, "patch_drop_rate": 0.5}
    assert_encoder_equals(load(state, tmp_path, num_classes=num_classes, **arguments), state)
    assert_encoder_equals(load(state, tmp_path, num_classes=num_classes, weight_init="skip"), state)


def test_the_filter_alone_needs_no_pretrained_cfg():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=8, num_heads=3, num_classes=0
    )
    state = random_state()
    model.load_state_dict(checkpoint_filter_fn(prefixed("module.encoder.", state), model))
    assert_encoder_equals(model, state)


# --- weights that cannot be reached ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no such entry"),
        RepositoryNotFoundError("401 no such repository", response=Mock()),
        GatedRepoError("403 gated", response=Mock()),
        ConnectionError("connection refused"),
        HfHubHTTPError.__mro__[1]("the proxy is down"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_errors_are_explained(error, monkeypatch):
    monkeypatch.setenv("PMAE_HUB_ORG", "perceptual-mae")
    monkeypatch.setattr("perceptual_mae_models.hub.hf_hub_download", Mock(side_effect=error))
    with pytest.raises(WeightsUnavailableError) as caught:
        timm.create_model("vit_tiny_patch16_pmae", pretrained=True, num_classes=5)
    assert caught.value.__cause__ is error
    message = str(caught.value)
    assert str(error) in message
    for hint in (
        "vit_tiny_patch16_pmae.stylegan2_ada_p_in1k",
        "repository perceptual-mae/vit_tiny_patch16_pmae.stylegan2_ada_p_in1k",
        "file model.safetensors",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE=1",
        "pretrained_cfg_overlay=dict(file=",
        "python training/pretrain.py",
        "vit_pico_patch8_pmae.mae_imagenette",
        "vit_base_patch16_pmae.fb_mae_in1k",
        "vit_large_patch16_pmae.fb_mae_in1k",
        "vit_huge_patch14_pmae.fb_mae_in1k",
    ):
        assert hint in message


def test_a_published_tag_is_not_called_unpublished(monkeypatch):
    monkeypatch.setattr("perceptual_mae_models.hub.hf_hub_download", Mock(side_effect=ConnectionError("cut")))
    with pytest.raises(WeightsUnavailableError, match=r"repository timm/vit_base_patch16_224\.mae") as caught:
        timm.create_model("vit_base_patch16_pmae.fb_mae_in1k", pretrained=True)
    assert "not published" not in str(caught.value)


@NUM_CLASSES
def test_a_missing_file_is_explained(num_classes, tmp_path):
    overlay = {"file": str(tmp_path / "absent.safetensors")}
    with pytest.raises(WeightsUnavailableError, match=r"vit_pico_patch8_pmae\.mae_imagenette .*absent\.safetensors"):
        timm.create_model(PICO, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)


_OFFLINE_PROBE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the network is cut")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import timm, torch
import perceptual_mae_models
from safetensors.torch import load_file

hub_tag = dict(pretrained=True, pretrained_cfg_overlay=dict(file=None), cache_dir=sys.argv[1])
cached = timm.create_model("vit_pico_patch8_pmae.mae_imagenette", **hub_tag)
for name, tensor in load_file(sys.argv[2]).items():
    assert torch.equal(cached.state_dict()[name], tensor.float()), name
try:
    timm.create_model("vit_base_patch16_pmae", pretrained=True)
except perceptual_mae_models.WeightsUnavailableError as error:
    print(error)
"""


def test_a_process_without_network_uses_its_cache_or_explains(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(random_state(), weights)
    seed_hub_cache(tmp_path / "cache", f"perceptual-mae/{PICO}.mae_imagenette", weights)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", _OFFLINE_PROBE, str(tmp_path / "cache"), str(weights)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "perceptual-mae/vit_base_patch16_pmae.stylegan2_ada_p_in1k" in done.stdout
    assert "pretrained_cfg_overlay=dict(file=" in done.stdout


# --- the weights inside the package ----------------------------------------------------------------------------------


def test_embedded_weights_load_without_the_hub(monkeypatch):
    assert EMBEDDED.is_file(), f"the embedded weights are missing: {EMBEDDED}"
    monkeypatch.setattr("perceptual_mae_models.hub.hf_hub_download", Mock(side_effect=AssertionError("asked the Hub")))
    state = load_file(EMBEDDED)
    assert EMBEDDED.stat().st_size < 8_000_000
    assert set(state) == set(timm.create_model(PICO).state_dict())
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    expected = {name: tensor.float() for name, tensor in state.items()}
    for arguments in ({}, {"num_classes": 5}, {"features_only": True}):
        model = timm.create_model(PICO, pretrained=True, **arguments)
        model = getattr(model, "model", model)
        assert_encoder_equals(model, {k: v for k, v in expected.items() if k in model.state_dict()})
