"""Other people's checkpoints compute the same after conversion, and what cannot be converted says why."""

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from perceptual_mae_models import CheckpointError, cli, convert
from perceptual_mae_models.convert import Conversion, EncoderShape, convert_encoder, registered_shapes
from perceptual_mae_models.convert_decoder import convert_decoder
from perceptual_mae_models.convert_sources import Source, read_source
from perceptual_mae_models.features import FeatureExtractor
from perceptual_mae_models.pos_embed import build_2d_sincos_pos_embed
from training.weights import load_autoencoder

PICO = "vit_pico_patch8_pmae"
DIM, DEPTH, HEADS, PATCH, SIDE = 192, 8, 3, 8, 8
DECODER_DIM, DECODER_DEPTH, DECODER_HEADS = 64, 2, 4
CLOSE = {"rtol": 1e-5, "atol": 5e-6}  # float32 rounding of differently ordered sums
# What another epsilon in the norms may change: Hugging Face's default is 1e-12, MAE's and ours 1e-6.
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # progress bars of transformers
        try:
            status = cli.main(["convert", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter but the decoder's fixed positions away from what any initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "decoder_pos_embed" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@cache
def cached_state(**kwargs: object) -> dict[str, Tensor]:
    return dict(perturb(timm.create_model(PICO, **kwargs)).state_dict())


def encoder_state(**kwargs: object) -> dict[str, Tensor]:
    return dict(cached_state(**kwargs))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def write(checkpoint: object, tmp_path: Path, name: str = "checkpoint.pth") -> Path:
    path = tmp_path / name
    torch.save(checkpoint, path)
    return path


def convert_tree(checkpoint: object, tmp_path: Path, **options: object) -> Conversion:
    return convert_encoder(read_source(write(checkpoint, tmp_path)), **options)


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensors[name], tensor)] == []


def open_converted(file: Path, **kwargs: object) -> nn.Module:
    return timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs).eval()


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def huggingface_config(**changes: object) -> ViTMAEConfig:
    values = {
        "hidden_size": DIM,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * DIM,
        "image_size": 64,
        "patch_size": PATCH,
        "decoder_hidden_size": DECODER_DIM,
        "decoder_num_hidden_layers": DECODER_DEPTH,
        "decoder_num_attention_heads": DECODER_HEADS,
        "decoder_intermediate_size": 4 * DECODER_DIM,
        "norm_pix_loss": True,
    }
    return ViTMAEConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def pretraining_model() -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(huggingface_config())
    model.decoder.initialize_weights(
        SIDE * SIDE
    )  # a new model's decoder has zeros for positions, published ones do not
    return perturb(model)


def save_as(naming: str, model: nn.Module, folder: Path) -> Path:
    """A folder as each generation of transformers leaves it."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    if naming == "in memory":
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    elif naming == "before 5":
        save_file({k.replace("decoder_encoder.layer", "decoder_layers"): v for k, v in state.items()}, path)
    elif naming == "bin":
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(state, path)
    return path


@pytest.mark.parametrize("naming", ["on disk", "in memory", "before 5", "bin"])
def test_huggingface_pretraining_model(naming, pretraining_model, images, run, tmp_path):
    path = save_as(naming, pretraining_model, tmp_path)
    encoder_file, decoder_file = tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"
    status, out, err = run(path, "-o", encoder_file, "--decoder", decoder_file)
    assert (status, err) == (0, "")
    network, recipe = load_autoencoder(open_converted(encoder_file), decoder_file)
    assert (recipe.norm_pix_loss, recipe.decoder_heads, recipe.mask_ratio) == (True, DECODER_HEADS, 0.75)
    noise = torch.rand(2, SIDE * SIDE, generator=torch.Generator().manual_seed(1))
    pixels = network.standardise(images)
    with torch.no_grad():
        expected = pretraining_model(pixels, noise=noise)
        found = network.eval()(images, noise)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.pred, expected.logits, **NEAR)
    layers = DEPTH * 16 + 6
    assert f"encoder      {layers} tensors, at vit\n" in out
    assert f"not encoder  decoder: {DECODER_DEPTH * 16 + 8} tensors, decoder" in out
    assert "epsilon 1e-12, this model with 1e-06" in out


@pytest.mark.parametrize("naming", ["on disk", "in memory", "bin"])
def test_huggingface_encoder_sees_the_same(naming, images, tmp_path):
    torch.manual_seed(1)
    model = perturb(ViTMAEModel(huggingface_config(mask_ratio=0.0, layer_norm_eps=1e-6)))
    conversion = convert_encoder(read_source(save_as(naming, model, tmp_path)))
    assert (conversion.dropped, conversion.notes, conversion.mapped) == ((), (), DEPTH * 16 + 6)
    encoder = timm.create_model(PICO).eval()
    encoder.load_state_dict(conversion.encoder)
    with torch.no_grad():
        in_order = torch.arange(SIDE * SIDE, dtype=torch.float32).expand(2, -1)
        expected = model(images, noise=in_order).last_hidden_state
        found = encoder.forward_features(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **CLOSE)


def test_plain_huggingface_vit(images, tmp_path):
    torch.manual_seed(2)
    shared = {k: v for k, v in huggingface_config().to_dict().items() if k in ("hidden_size", "num_hidden_layers")}
    config = ViTConfig(**shared, num_attention_heads=HEADS, intermediate_size=4 * DIM, image_size=64, patch_size=PATCH)
    model = perturb(ViTModel(config))
    model.save_pretrained(tmp_path)
    conversion = convert_encoder(read_source(tmp_path / "model.safetensors"))
    encoder = timm.create_model(PICO).eval()
    encoder.load_state_dict(conversion.encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(images), model(images).last_hidden_state, **NEAR)
    assert [(group.prefix, group.count, group.reason) for group in conversion.dropped] == [("pooler", 2, "class head")]
    assert any("a vit, whose preprocessing may differ" in note for note in conversion.notes)


def test_huggingface_without_config_says_what_it_assumes(pretraining_model, tmp_path):
    path = save_as("on disk", pretraining_model, tmp_path)
    (tmp_path / "config.json").unlink()
    source = read_source(path)
    conversion = convert_encoder(source)
    assert conversion.notes == (
        "no config.json beside the file: 3 attention heads and exact GELU are taken for granted",
    )
    with pytest.raises(ValueError, match="a decoder 64 wide may have any number of attention heads"):
        convert_decoder(source, conversion)
    with pytest.raises(ValueError, match="does not say whether its decoder predicts standardised patches"):
        convert_decoder(source, conversion, heads=4)
    with pytest.raises(ValueError, match="64 wide cannot have 5 attention heads"):
        convert_decoder(source, conversion, heads=5)
    recipe = json.loads(convert_decoder(source, conversion, heads=4, norm_pix_loss=False)[1]["recipe"])
    assert (recipe["norm_pix_loss"], recipe["decoder_heads"]) == (False, 4)


def test_huggingface_configurations_that_compute_something_else(pretraining_model, tmp_path):
    path = save_as("on disk", pretraining_model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"num_attention_heads": 6}, "num_attention_heads 6, not 3"),
        ({"hidden_act": "relu"}, "hidden_act relu, not gelu"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=f"config.json: {message}: this model would compute other features"):
            convert_encoder(read_source(path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json, which describes the checkpoint, is broken"):
        read_source(path)


def test_huggingface_parts_that_do_not_fit(pretraining_model, tmp_path):
    state = load_file(save_as("on disk", pretraining_model, tmp_path))
    key = "vit.encoder.layer.3.attention.attention.key.weight"
    partial = {name: tensor for name, tensor in state.items() if name != key}
    with pytest.raises(CheckpointError, match=r"layer\.3\.attention\.attention\.\w+\.weight is there without its key"):
        read_source(write(partial, tmp_path))
    twice = {**state, "vit.layers.3.attention.k_proj.weight": state[key]}
    with pytest.raises(CheckpointError, match="two names of the same tensor"):
        read_source(write(twice, tmp_path))
    two = {**state, "other.embeddings.patch_embeddings.projection.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="more than one Hugging Face encoder, at vit, other"):
        read_source(write(two, tmp_path))
    scaled = {**state, "vit.encoder.layer.0.layer_scale1.lambda1": torch.ones(DIM)}
    with pytest.raises(CheckpointError, match=r"no place in .*layer_scale1\.lambda1 \(1 in all\).*--drop PREFIX"):
        convert_tree(scaled, tmp_path)


# --- facebookresearch/mae --------------------------------------------------------------------------------------------


class ReferenceBlock(nn.Module):
    """A pre-norm transformer block under MAE's names, written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(n, length, dim))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ReferenceMAE(nn.Module):
    """MAE under the names of facebookresearch/mae."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, DIM, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE * SIDE + 1, DIM))
        self.blocks = nn.ModuleList(ReferenceBlock(DIM, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.decoder_embed = nn.Linear(DIM, DECODER_DIM)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_DIM))
        code = build_2d_sincos_pos_embed(DECODER_DIM, (SIDE, SIDE))
        self.decoder_pos_embed = nn.Parameter(torch.cat([torch.zeros(1, 1, DECODER_DIM), code], dim=1))
        self.decoder_blocks = nn.ModuleList(ReferenceBlock(DECODER_DIM, DECODER_HEADS) for _ in range(DECODER_DEPTH))
        self.decoder_norm = nn.LayerNorm(DECODER_DIM, eps=1e-6)
        self.decoder_pred = nn.Linear(DECODER_DIM, PATCH * PATCH * 3)

    def forward(self, pixels: Tensor, visible: list[int]) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(pixels), -1, -1)
        x = torch.cat([first, patches[:, visible]], dim=1)
        for block in self.blocks:
            x = block(x)
        latent = self.norm(x)
        embedded = self.decoder_embed(latent)
        y = self.mask_token.repeat(len(pixels), SIDE * SIDE + 1, 1)
        y[:, [0, *(place + 1 for place in visible)]] = embedded
        y = y + self.decoder_pos_embed
        for block in self.decoder_blocks:
            y = block(y)
        return latent, self.decoder_pred(self.decoder_norm(y))[:, 1:]


@pytest.fixture(scope="module")
def reference() -> ReferenceMAE:
    torch.manual_seed(3)
    return perturb(ReferenceMAE())


def test_facebook_full_file(reference, images, run, tmp_path):
    arguments = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.5, model="mae_vit_pico")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    tree = {"model": reference.state_dict(), "optimizer": optimizer, "epoch": 3, "args": arguments}
    path, output, decoder = write(tree, tmp_path), tmp_path / "out.safetensors", tmp_path / "decoder.safetensors"
    status, out, err = run(path, "-o", output, "--decoder", decoder, "--decoder-heads", DECODER_HEADS)
    assert (status, err) == (0, "")
    assert "format       facebookresearch/mae\n" in out
    assert "encoder      102 tensors, at model\n" in out
    assert "not encoder  model.decoder_blocks: 24 tensors, decoder\n" in out
    assert "not encoder  optimizer: 1 tensor, training state\n" in out
    assert "licence      weights that facebookresearch/mae publishes are under CC BY-NC 4.0\n" in out

    network, recipe = load_autoencoder(open_converted(output), decoder)
    assert (recipe.norm_pix_loss, recipe.mask_ratio, recipe.model) == (False, 0.5, PICO)
    noise = torch.rand(1, SIDE * SIDE, generator=torch.Generator().manual_seed(4)).expand(2, -1)
    visible = noise[0].argsort()[: SIDE * SIDE // 2].tolist()
    with torch.no_grad():
        found = network.eval()(images, noise)
        latent, pred = reference(network.standardise(images), visible)
    torch.testing.assert_close(found.latent, latent, **CLOSE)
    torch.testing.assert_close(found.pred, pred, **CLOSE)


def test_facebook_encoder_only_file_and_its_metadata(run, tmp_path):
    state = encoder_state()
    path, output = write({"model": state}, tmp_path), tmp_path / "out.safetensors"
    status, out, err = run(path, "-o", output)
    assert (status, err) == (0, "")
    assert "not encoder" not in out
    assert_same(load_file(output), state)
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["architecture"] == PICO
    assert metadata["source_format"] == "facebookresearch/mae"
    assert metadata["source_file"] == "checkpoint.pth"
    assert metadata["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "CC BY-NC 4.0" in metadata["licence_note"]
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pth", "out.safetensors"}


def test_decoders_that_are_not_ours(reference, tmp_path):
    state = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    options = {"heads": DECODER_HEADS, "norm_pix_loss": True}

    def decode(changed: dict[str, Tensor]) -> None:
        source = read_source(write({"model": changed}, tmp_path))
        convert_decoder(source, convert_encoder(source), **options)

    decode(state)
    with pytest.raises(CheckpointError, match="not MAE's fixed sine-cosine code of a 64-patch square grid"):
        decode({**state, "decoder_pos_embed": state["decoder_pos_embed"] + 0.01})
    with pytest.raises(CheckpointError, match=r"no plain MAE one: it also holds model\.decoder_skips\.0\.weight"):
        decode({**state, "decoder_skips.0.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"does not go behind vit_pico_patch8_pmae: norm\.bias is missing"):
        decode({name: tensor for name, tensor in state.items() if name != "decoder_norm.bias"})
    with pytest.raises(
        CheckpointError, match=r"no plain MAE decoder beside the encoder at model .*leave --decoder away"
    ):
        decode(encoder_state())


# --- the Perceptual MAE release, and Lightning in general ------------------------------------------------------------


def release_state(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The names, made up with other values, that the release's modules have: copies, losses, discriminators."""
    patch = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name.startswith("patch_embed")}
    other = {name: torch.full_like(tensor, 7.0) for name, tensor in state.items()}
    root = encoder.removesuffix("encoder.")
    return {
        **prefixed(encoder, state),
        **patch,
        **prefixed(root, patch),
        **prefixed(f"{root}decoder.", {**patch, "mask_token": torch.zeros(1, 1, 64)}),
        f"{root}decoder.decoder_embed.weight": torch.zeros(64, DIM),
        f"{root}decoder.compression_layers.1.weight": torch.zeros(64, 128),
        **prefixed("discriminator.", {"blocks.0.weight": torch.zeros(3), "head.weight": torch.zeros(3)}),
        **prefixed("loss_fnc.", patch),
        **prefixed("loss_fnc.disc_model.", {"head.weight": torch.zeros(3)}),
        **prefixed("loss_fnc.gan_loss.criterion.G_mapping.", other),
    }


@pytest.mark.parametrize("encoder", ["encoder.", "generator.encoder."])
def test_release_checkpoint(encoder, run, tmp_path):
    state = encoder_state()
    tree = {
        "state_dict": release_state(state, encoder),
        "pytorch-lightning_version": "1.5.0",
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }
    path, output = write(tree, tmp_path, "epoch=3.ckpt"), tmp_path / "out.safetensors"
    status, out, err = run(path, "-o", output)
    assert (status, err) == (0, "")
    assert_same(load_file(output), state)
    root = f"state_dict.{encoder.removesuffix('encoder.')}"
    for line in (
        "format       the Perceptual MAE release (PyTorch Lightning)",
        f"encoder      102 tensors, at {root}encoder",
        f"not encoder  {root}decoder: 5 tensors, decoder",
        f"not encoder  {root}patch_embed: 2 tensors, a copy outside the encoder that was taken",
        "not encoder  state_dict.discriminator: 2 tensors, discriminator",
        "not encoder  state_dict.loss_fnc: 105 tensors, loss",
        "not encoder  optimizer_states: 1 tensor, training state",
        "note         the release computes norms with epsilon 1e-5 unless configured otherwise, this model with 1e-06:"
        " features may differ slightly",
        "licence      the Perceptual MAE release is under CC BY-NC-SA 4.0",
    ):
        assert line in out.splitlines()
    status, _, err = run(path, "-o", output, "--decoder", tmp_path / "decoder.safetensors")
    assert status == 1
    assert f"no plain MAE one: it also holds {root}decoder.compression_layers.1.weight" in err


def test_release_plain_decoder(reference, images, tmp_path):
    state = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}
    decoder = {name: tensor for name, tensor in state.items() if name not in encoder}
    patch = {name: tensor for name, tensor in state.items() if name.startswith("patch_embed")}
    names = {**prefixed("encoder.", encoder), **prefixed("decoder.", {**decoder, **patch}), **patch}
    source = read_source(write({"state_dict": names, "pytorch-lightning_version": "1.5.0"}, tmp_path))
    assert source.format == "lightning"
    tensors, _ = convert_decoder(source, convert_encoder(source), heads=DECODER_HEADS, norm_pix_loss=False)
    assert torch.equal(tensors["pred.weight"], state["decoder_pred.weight"])


class HyperParameters:
    """What weights_only refuses to unpickle."""


@pytest.mark.parametrize("objects", [HyperParameters(), SimpleNamespace(lr=1)])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_never_unpickled(objects, zipped, run, tmp_path):
    path = tmp_path / "hparams.ckpt"
    torch.save(
        {"state_dict": encoder_state(), "hyper_parameters": objects}, path, _use_new_zipfile_serialization=zipped
    )
    status, _, err = run(path, "-o", tmp_path / "out.safetensors")
    assert status == 1
    assert f"holds objects besides tensors ({type(objects).__module__}.{type(objects).__qualname__})" in err
    assert "If you trust its source, keep only the tensors:\n    python -c " in err
    command = err[err.index('"import torch') + 1 : err.index('"\n(with')]
    # As the message says, in a folder of the test's own.
    exec(command.replace("'tensors.pth'", repr(str(tmp_path / "tensors.pth"))))
    status, _, err = run(tmp_path / "tensors.pth", "-o", tmp_path / "out.safetensors")
    assert (status, err) == (0, "")


# --- timm and its wrappers -------------------------------------------------------------------------------------------


WRAPPINGS = {
    "bare": ("", lambda s: s),
    "DDP": ("module.", lambda s: prefixed("module.", s)),
    "compiled": ("_orig_mod.", lambda s: prefixed("_orig_mod.", s)),
    "timm train.py": (
        "state_dict_ema.",
        lambda s: {"state_dict": {name: tensor + 1 for name, tensor in s.items()}, "state_dict_ema": s, "epoch": 1},
    ),
    "averaged": ("ema.module.", lambda s: {"ema": {"n_averaged": torch.tensor(3), **prefixed("module.", s)}}),
    "everything": (
        "model.module._orig_mod.encoder.",
        lambda s: {"model": {**prefixed("module._orig_mod.encoder.", s), "module.discriminator.w": torch.zeros(1)}},
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(wrapping, tmp_path):
    place, wrap = WRAPPINGS[wrapping]
    state = encoder_state()
    conversion = convert_tree(wrap(state), tmp_path)
    assert (conversion.architecture, conversion.place, conversion.mapped) == (PICO, place, len(state))
    assert_same(conversion.encoder, state)


def test_the_choice_of_averaged_weights_is_told(tmp_path):
    conversion = convert_tree(WRAPPINGS["timm train.py"][1](encoder_state()), tmp_path)
    assert "the encoder at state_dict_ema was taken, not the one at state_dict" in conversion.notes
    assert sum(group.count for group in conversion.dropped) == 102


def test_what_timms_config_says_is_heeded(tmp_path):
    path = write(encoder_state(), tmp_path)
    config = path.with_name("config.json")
    (note,) = convert_encoder(read_source(path)).notes
    assert note == "3 attention heads and preprocessing by ImageNet's mean and deviation are taken for granted"
    cfg = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config.write_text(json.dumps({"model_args": {"num_heads": 3}, "pretrained_cfg": cfg}))
    assert convert_encoder(read_source(path)).notes == ()
    config.write_text(json.dumps({"pretrained_cfg": {**cfg, "mean": [0.5, 0.5, 0.5]}}))
    (note,) = convert_encoder(read_source(path)).notes
    assert note.startswith("config.json: images are normalised by a mean of [0.5, 0.5, 0.5], by this model by [0.485,")
    config.write_text(json.dumps({"model_args": {"num_heads": 6}}))
    with pytest.raises(CheckpointError, match=r"num_heads 6, not 3"):
        convert_encoder(read_source(path))


def test_class_head_is_left_out(tmp_path):
    state = encoder_state(num_classes=5)
    conversion = convert_tree(state, tmp_path)
    assert [(group.prefix, group.count, group.reason) for group in conversion.dropped] == [("head", 2, "class head")]
    assert "head.weight" not in conversion.encoder


def test_fine_tuned_classifier_has_no_encoder(tmp_path):
    state = encoder_state(global_pool="avg", num_classes=5)
    path = write({"model": state}, tmp_path)
    with pytest.raises(CheckpointError, match=r"fine-tuned classifier .*\(fc_norm\).*global_pool='avg'") as caught:
        convert_encoder(read_source(path))
    advice = str(caught.value)[str(caught.value).index("timm.create_model") :].partition(";")[0]
    model = eval(advice.replace("NAME", repr(PICO)).replace("num_classes=N", "num_classes=5"))
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert torch.equal(model.head.weight, state["head.weight"])


def test_options_of_the_command_reach_the_conversion(run, tmp_path):
    state = encoder_state()
    path, out = write(changed(state, adapter__weight=torch.ones(2)), tmp_path), tmp_path / "out.safetensors"
    options = ("--dtype", "float16", "--drop", "adapter.", "--model", PICO)
    status, said, err = run(path, "-o", out, *options)
    assert (status, err) == (0, "")
    assert re.search(r"\n.*adapter.*on request", said), said
    assert_same(load_file(out), {name: tensor.half() for name, tensor in state.items()})
    assert run(path, "-o", tmp_path / "b.safetensors", "--model", "vit_tiny_patch16_pmae", "--drop", "adapter.")[0] == 1


def test_half_precision_and_half_precision_sources(tmp_path):
    state = encoder_state()
    half = convert_tree(state, tmp_path, dtype="float16").encoder
    assert_same(half, {name: tensor.half() for name, tensor in state.items()})
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    full = convert_tree(rounded, tmp_path).encoder
    assert_same(full, {name: tensor.float() for name, tensor in rounded.items()})


def test_other_image_sizes_need_the_name(tmp_path):
    state = encoder_state(img_size=128)
    with pytest.raises(ValueError, match=rf"257 tokens\); --model {PICO} resamples its positions"):
        convert_tree(state, tmp_path)
    conversion = convert_tree(state, tmp_path, model=f"{PICO}.mae_imagenette")
    assert conversion.encoder["pos_embed"].shape == (1, 65, DIM)
    assert "257 tokens to width 192, 8 blocks, patches of 8, 65 tokens" in conversion.notes[-1]


def test_registered_shapes_tell_models_apart(monkeypatch, tmp_path):
    shapes = registered_shapes()
    assert shapes["vit_huge_patch14_pmae"] == EncoderShape(1280, 32, 14, 257)
    assert len(set(shapes.values())) == len(shapes)
    monkeypatch.setattr(convert, "registered_shapes", lambda _: {**shapes, "twin": shapes[PICO]})
    with pytest.raises(ValueError, match=rf"{PICO} and twin have the checkpoint's shapes .*say --model NAME"):
        convert_tree(encoder_state(), tmp_path)


# --- what cannot be converted says why -------------------------------------------------------------------------------


def changed(state: dict[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return {**state, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


NOT_CONVERTIBLE = {
    "no encoder": (lambda s: {"layer.weight": torch.zeros(2)}, r"no encoder in a layout .*Found 1 tensors \(layer"),
    "unknown prefix": (lambda s: prefixed("trunk.", s), r"names under 'trunk\.' look like one: .*removeprefix\('trunk"),
    "missing tensor": (lambda s: without(s, "blocks.7.mlp.fc2.bias"), r"1 of its 102 .*missing \(blocks\.7\.mlp"),
    "surplus block tensor": (
        lambda s: changed(s, blocks__0__ls1__gamma=torch.ones(2)),
        r"no place for \(blocks\.0\.ls1",
    ),
    "other depth": (lambda s: {k: v for k, v in s.items() if "blocks.7" not in k}, r"7 blocks.*There are vit_base"),
    "registers": (lambda s: encoder_state(reg_tokens=4), "with register tokens, which no model of this package has"),
    "unknown tensor": (
        lambda s: changed(s, adapter__weight=torch.ones(2)),
        r"no place in vit_pico\w+ for adapter\.weight",
    ),
    "not finite": (lambda s: changed(s, norm__bias=torch.full((DIM,), torch.nan)), "norm.bias holds values that are"),
    "quantised": (lambda s: changed(s, norm__bias=torch.ones(DIM, dtype=torch.int8)), "int8: a quantised checkpoint"),
    "two encoders": (lambda s: {"encoder": s, "generator": s}, "more than one encoder .*keep only one"),
    "two sizes": (
        lambda s: {"model": s, "ema": {**s, "pos_embed": torch.ones(1, 5, DIM)}},
        "different shapes .*--model",
    ),
    "no tensors": (lambda s: {"epoch": 3}, "holds no tensors"),
    "a list": (lambda s: [s], "holds a list, not tensors by name"),
}


@pytest.mark.parametrize("kind", NOT_CONVERTIBLE)
def test_what_cannot_be_converted_says_why(kind, tmp_path):
    change, message = NOT_CONVERTIBLE[kind]
    with pytest.raises((CheckpointError, ValueError), match=message):
        convert_tree(change(encoder_state()), tmp_path)


def test_overflow_of_half_precision(tmp_path):
    state = changed(encoder_state(), norm__bias=torch.full((DIM,), 1e6))
    with pytest.raises(CheckpointError, match=r"norm\.bias does not fit float16: use float32"):
        convert_tree(state, tmp_path, dtype="float16")
    assert convert_tree(state, tmp_path).encoder["norm.bias"].max() == 1e6


def test_named_models_are_checked(tmp_path):
    state = encoder_state()
    with pytest.raises(ValueError, match=r"'vit_base_patch16_224' is no model of this package; there are vit_base"):
        convert_tree(state, tmp_path, model="vit_base_patch16_224")
    with pytest.raises(CheckpointError, match="complete encoder of vit_tiny_patch16_pmae"):
        convert_tree(state, tmp_path, model="vit_tiny_patch16_pmae")


def test_tensors_are_dropped_on_request(tmp_path):
    state = encoder_state()
    conversion = convert_tree(changed(state, adapter__weight=torch.ones(2)), tmp_path, drop=["adapter."])
    assert_same(conversion.encoder, state)
    assert conversion.dropped[0].reason == "left out on request"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_cut_short_files(suffix, run, tmp_path):
    state, path = encoder_state(), tmp_path / f"cut.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    content = path.read_bytes()
    for length in (0, 5, 9, 200, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        status, _, err = run(path, "-o", tmp_path / "out.safetensors")
        assert status == 1
        assert err.startswith(f"pmae: error: {path} is broken")
        assert err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_files_given_by_mistake(run, tmp_path):
    output = tmp_path / "out.safetensors"
    pointer = tmp_path / "pytorch_model.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html>Not found</html>")
    for file, message in (
        (tmp_path / "none.pth", "no such checkpoint"),
        (tmp_path, "is a folder: give the file in it"),
        (tmp_path / "model-00001-of-00002.safetensors", "a part of a checkpoint in several files"),
        (pointer, "is a Git LFS pointer, not the weights"),
        (page, "is no checkpoint: it begins with b'<!DOCTYPE html>"),
    ):
        if file.name.startswith("model-"):
            file.touch()
        status, _, err = run(file, "-o", output)
        assert status == 1
        assert message in err
        assert str(file) in err


def test_outputs_are_checked_before_the_work(run, tmp_path, monkeypatch):
    path = tmp_path / "in.safetensors"
    save_file(encoder_state(), path)
    monkeypatch.setattr("perceptual_mae_models.convert_sources.read_source", None)
    for arguments, message in (
        (("-o", tmp_path / "out.pth"), "must end in .safetensors"),
        (("-o", path), "must be different files"),
        (("-o", tmp_path / "o.safetensors", "--decoder", tmp_path / "o.safetensors"), "must be different files"),
        (("-o", tmp_path / "o.safetensors", "--norm-pix-loss"), "of --decoder FILE, which is not given"),
    ):
        status, _, err = run(path, *arguments)
        assert status == 1
        assert message in err


# --- converted files are like any other ------------------------------------------------------------------------------


def test_converted_files_load_everywhere(photos, run, capsys, tmp_path):
    state, output = encoder_state(), tmp_path / "out.safetensors"
    assert run(write(prefixed("module.", state), tmp_path), "-o", output)[0] == 0
    assert_same(dict(open_converted(output).state_dict()), state)
    plain = timm.create_model(PICO)
    plain.load_state_dict(load_file(output), strict=True)
    features = tmp_path / "features.safetensors"
    arguments = ["embed", str(photos / "class0"), "-o", str(features), "--checkpoint", str(output), "--device", "cpu"]
    assert cli.main(arguments) == 0
    extractor = FeatureExtractor(plain, device="cpu")
    expected = extractor(sorted((photos / "class0").iterdir()))
    torch.testing.assert_close(load_file(features)["features"], expected, rtol=1e-4, atol=1e-5)


def test_a_source_is_read_once_more_the_same(tmp_path):
    """A converted file converts to itself."""
    state, output = encoder_state(), tmp_path / "out.safetensors"
    conversion = convert_tree(state, tmp_path)
    convert.save_weights(output, conversion.encoder, conversion.metadata)
    source = read_source(output)
    assert isinstance(source, Source)
    again = convert_encoder(source)
    assert_same(again.encoder, conversion.encoder)
    assert again.dropped == ()
