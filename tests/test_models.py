"""The registered encoders: names, facts, starting values, and every way timm's users run them."""

import json
import pickle
import statistics
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay

import perceptual_mae_models
from perceptual_mae_models.pos_embed import build_2d_sincos_pos_embed

PICO = "vit_pico_patch8_pmae"
MODULE = "vision_transformer_pmae"
# Each architecture beside the timm entry point it must equal, tensor by tensor.
TIMM_TWINS = {
    "vit_tiny_patch16_pmae": "vit_tiny_patch16_224",
    "vit_small_patch16_pmae": "vit_small_patch16_224",
    "vit_base_patch16_pmae": "vit_base_patch16_224",
    "vit_large_patch16_pmae": "vit_large_patch16_224",
    "vit_huge_patch14_pmae": "vit_huge_patch14_224",
}
ARCHITECTURES = sorted([PICO, *TIMM_TWINS])
METHODS = ["stylegan2_ada_p", "msg_gan_p", "ls_gan_p", "ms_ssim", "mae"]


def tagged_names() -> list[str]:
    return timm.list_models(module=MODULE, include_tags=True)


def random_pico(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(PICO, **kwargs).eval()


# --- position embedding ----------------------------------------------------------------------------------------------


def mae_formula(dim: int, rows: int, columns: int) -> np.ndarray:
    """MAE's published formula, written out again: half the channels for x, half for y, each [sin, cos]."""

    def one_axis(position: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
        angle = np.einsum("m,d->md", position.reshape(-1).astype(np.float64), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    return np.concatenate([one_axis(x), one_axis(y)], axis=1)


@pytest.mark.parametrize(("dim", "grid"), [(192, (8, 8)), (16, (3, 5)), (4, (1, 7)), (1280, (16, 16))])
def test_sincos_equals_maes_formula(dim, grid):
    ours = build_2d_sincos_pos_embed(dim, grid)
    assert ours.dtype == torch.float32
    assert ours.shape == (1, grid[0] * grid[1], dim)
    np.testing.assert_array_equal(ours[0].numpy(), mae_formula(dim, *grid).astype(np.float32))


def test_sincos_known_values():
    code = build_2d_sincos_pos_embed(4, (3, 2)).reshape(3, 2, 4)
    torch.testing.assert_close(code[0, 0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    row, column = torch.tensor(2.0), torch.tensor(1.0)
    torch.testing.assert_close(code[2, 1], torch.stack([column.sin(), column.cos(), row.sin(), row.cos()]))


@pytest.mark.parametrize(("dim", "grid"), [(6, (2, 2)), (0, (2, 2)), (-4, (2, 2)), (8, (0, 2)), (8, (2, 0))])
def test_sincos_refuses_what_it_cannot_build(dim, grid):
    with pytest.raises(ValueError, match=r"multiple of 4|grid_size"):
        build_2d_sincos_pos_embed(dim, grid)


@pytest.mark.parametrize(
    ("kwargs", "num_prefix_rows", "grid"),
    [
        ({}, 1, (8, 8)),
        ({"img_size": (32, 64)}, 1, (4, 8)),
        ({"patch_size": 16}, 1, (4, 4)),
        ({"class_token": False, "global_pool": "avg"}, 0, (8, 8)),
        ({"reg_tokens": 4}, 5, (8, 8)),
        ({"reg_tokens": 4, "no_embed_class": True}, 0, (8, 8)),
        ({"dynamic_img_size": True}, 1, (8, 8)),
        ({"dtype": torch.bfloat16}, 1, (8, 8)),
        ({"weight_init": "skip"}, 1, (8, 8)),
    ],
)
def test_position_embedding_starts_as_sincos(kwargs, num_prefix_rows, grid):
    model = timm.create_model(PICO, **kwargs)
    expected = np.concatenate([np.zeros((num_prefix_rows, 192)), mae_formula(192, *grid)])
    expected = torch.from_numpy(expected).float().to(model.pos_embed.dtype)
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    assert torch.equal(model.pos_embed[0], expected)


def test_position_embedding_can_be_left_out():
    assert timm.create_model(PICO, pos_embed="none").pos_embed is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_builds_on_the_meta_device(name):
    with torch.device("meta"):
        assert timm.create_model(name).pos_embed.is_meta
    assert timm.create_model(name, device="meta").pos_embed.is_meta


# --- registry and facts ----------------------------------------------------------------------------------------------


def test_every_architecture_is_registered_and_exported():
    assert timm.list_models(module=MODULE) == ARCHITECTURES
    for name in ARCHITECTURES:
        assert getattr(perceptual_mae_models.vision_transformer_pmae, name) is timm.model_entrypoint(name)
    assert set(perceptual_mae_models.vision_transformer_pmae.__all__) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tags_and_default(name):
    tags = {tagged.split(".")[1] for tagged in tagged_names() if tagged.startswith(f"{name}.")}
    data = "imagenette" if name == PICO else "in1k"
    expected = {f"{method}_{data}" for method in METHODS}
    if name in ("vit_base_patch16_pmae", "vit_large_patch16_pmae", "vit_huge_patch14_pmae"):
        expected.add("fb_mae_in1k")
    assert tags == expected
    default = timm.get_pretrained_cfg(name).tag
    assert default == ("mae_imagenette" if name == PICO else "stylegan2_ada_p_in1k")


@pytest.mark.parametrize("tagged", tagged_names())
def test_cfg_facts(tagged):
    cfg = timm.get_pretrained_cfg(tagged)
    assert cfg.mean == IMAGENET_DEFAULT_MEAN
    assert cfg.std == IMAGENET_DEFAULT_STD
    assert cfg.interpolation == "bicubic"
    assert cfg.crop_pct == 0.9
    assert cfg.num_classes == 0
    assert cfg.input_size == ((3, 64, 64) if tagged.startswith(PICO) else (3, 224, 224))
    assert cfg.fixed_input_size
    assert (cfg.first_conv, cfg.classifier) == ("patch_embed.proj", "head")
    assert cfg.hf_hub_filename == "model.safetensors"
    assert cfg.paper_ids == ("arXiv:2111.06377" if "mae_i" in tagged.split(".")[1] else "arXiv:2212.14504")
    if cfg.tag == "fb_mae_in1k":
        twin = timm.get_pretrained_cfg(f"{TIMM_TWINS[cfg.architecture]}.mae")
        assert (cfg.hf_hub_id, cfg.license) == (twin.hf_hub_id, twin.license)
        assert cfg.license == "cc-by-nc-4.0"
    else:
        assert cfg.hf_hub_id == f"perceptual-mae/{tagged}"
        assert cfg.license == "apache-2.0"


@pytest.mark.parametrize(("ours", "timms"), TIMM_TWINS.items())
def test_architecture_equals_timms(ours, timms):
    with torch.device("meta"):
        model, twin = timm.create_model(ours), timm.create_model(timms, num_classes=0)
    assert type(model) is VisionTransformer
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    assert model.blocks[0].attn.num_heads == twin.blocks[0].attn.num_heads
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6
    assert model.num_classes == 0


def test_pico_architecture():
    model = random_pico()
    assert type(model) is VisionTransformer
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (192, 8, 3)
    assert model.patch_embed.patch_size == (8, 8)
    assert model.patch_embed.img_size == (64, 64)
    assert model.norm.eps == 1e-6


def test_transform_comes_from_the_cfg():
    config = timm.data.resolve_model_data_config(random_pico())
    assert config["mean"] == IMAGENET_DEFAULT_MEAN
    assert config["std"] == IMAGENET_DEFAULT_STD
    assert config["input_size"] == (3, 64, 64)
    assert config["interpolation"] == "bicubic"


# Forked children import the package again and again on top of one slow `import timm`. Processor time, not wall time: a
# busy machine must not fail this.
_IMPORT_PROBE = """
import json, os, sys, time, timm
before = timm.list_models(include_tags=True)
vits = timm.list_models("vit_*", module="vision_transformer")
facts = {name: timm.get_pretrained_cfg(name).to_dict() for name in vits}
for _ in range(5):
    if os.fork():
        os.wait()
        continue
    start = time.process_time()
    import perceptual_mae_models
    milliseconds = 1000 * (time.process_time() - start)
    after = timm.list_models(include_tags=True)
    print(json.dumps({
        "milliseconds": milliseconds,
        "lost": sorted(set(before) - set(after)),
        "gained": sorted(set(after) - set(before)),
        "changed": [name for name, cfg in facts.items() if timm.get_pretrained_cfg(name).to_dict() != cfg],
        "features_loaded": "perceptual_mae_models.features" in sys.modules,
    }), flush=True)
    os._exit(0)
"""


def test_import_is_cheap_silent_and_leaves_timms_names_alone():
    command = [sys.executable, "-W", "error::UserWarning:perceptual_mae_models", "-c", _IMPORT_PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "perceptual_mae_models" not in done.stderr
    probes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(probes) == 5
    for probe in probes:
        assert probe["lost"] == []
        assert probe["changed"] == []
        assert probe["gained"] == sorted(tagged_names())
        assert not probe["features_loaded"]
    assert statistics.median(probe["milliseconds"] for probe in probes) <= 50


def test_package_surface():
    assert isinstance(perceptual_mae_models.__version__, str)
    assert perceptual_mae_models.FeatureExtractor.__name__ == "FeatureExtractor"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = perceptual_mae_models.no_such_name


# --- running ---------------------------------------------------------------------------------------------------------


def test_forward_parts_agree():
    model, images = random_pico(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert tokens.shape == (2, 65, 192)
        torch.testing.assert_close(model.forward_head(tokens), tokens[:, 0])
        torch.testing.assert_close(model(images), tokens[:, 0])


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooled_features_go_through_the_encoders_own_norm(pool):
    model, images = random_pico(global_pool=pool), torch.randn(2, 3, 64, 64)
    assert set(model.state_dict()) == set(random_pico().state_dict())
    with torch.no_grad():
        patches = model.forward_features(images)[:, 1:]
        mean, highest = patches.mean(1), patches.amax(1)
        expected = {"avg": mean, "max": highest, "avgmax": 0.5 * (mean + highest)}[pool]
        torch.testing.assert_close(model(images), expected)


def test_a_pooled_classifier_gets_its_own_norm_as_in_timm():
    model = random_pico(global_pool="avg", num_classes=5)
    assert isinstance(model.norm, torch.nn.Identity)
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)
    declared = random_pico(global_pool="avg", pretrained_cfg_overlay={"num_classes": 5})
    assert set(declared.state_dict()) == set(model.state_dict())


def test_features_only_gives_the_last_maps():
    images = torch.randn(2, 3, 64, 64)
    getter = random_pico(features_only=True)
    with torch.no_grad():
        maps = getter(images)
        expected = random_pico().get_intermediate_layers(images, n=3, reshape=True)
    assert [tuple(m.shape) for m in maps] == [(2, 192, 8, 8)] * 3
    assert getter.feature_info.reduction() == [8, 8, 8]
    for ours, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, reference)
    chosen = random_pico(features_only=True, out_indices=(1, 7))
    assert chosen.feature_info.module_name() == ["blocks.1", "blocks.7"]


def test_intermediate_layers_end_in_the_features():
    model, images = random_pico(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (last,) = model.get_intermediate_layers(images, n=1, norm=True)
        torch.testing.assert_close(last, model.forward_features(images)[:, 1:])
        tokens, intermediates = model.forward_intermediates(images, indices=[0, 7])
    torch.testing.assert_close(tokens[:, 0], model(images))
    assert len(intermediates) == 2


def test_dynamic_image_size():
    fixed, dynamic = random_pico(), random_pico(dynamic_img_size=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(images), fixed(images))
        assert dynamic.forward_features(torch.randn(1, 3, 96, 32)).shape == (1, 12 * 4 + 1, 192)
        with pytest.raises(AssertionError):
            fixed(torch.randn(1, 3, 96, 32))


def test_image_size_is_the_cfgs_even_when_it_is_not_fixed():
    model = random_pico(pretrained_cfg_overlay={"fixed_input_size": False})
    assert model.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize(
    ("kwargs", "image_shape"),
    [
        ({"in_chans": 1}, (1, 64, 64)),
        ({"in_chans": 5, "num_classes": 7}, (5, 64, 64)),
        ({"img_size": (32, 96)}, (3, 32, 96)),
        ({"patch_size": 4}, (3, 64, 64)),
        ({"reg_tokens": 4, "no_embed_class": True}, (3, 64, 64)),
        ({"class_token": False, "global_pool": "avg"}, (3, 64, 64)),
        ({"pos_embed": "none"}, (3, 64, 64)),
        ({"global_pool": "map", "num_classes": 5}, (3, 64, 64)),
        ({"drop_path_rate": 0.1, "drop_rate": 0.1, "patch_drop_rate": 0.5}, (3, 64, 64)),
        ({"init_values": 1e-5, "qk_norm": True}, (3, 64, 64)),
        ({"depth": 2, "embed_dim": 96}, (3, 64, 64)),
        ({"scriptable": True, "exportable": True}, (3, 64, 64)),
    ],
)
def test_create_model_arguments_train(kwargs, image_shape):
    model = random_pico(**kwargs).train()
    output = model(torch.randn(2, *image_shape))
    assert output.shape == (2, kwargs.get("num_classes") or kwargs.get("embed_dim", 192))
    (output * torch.randn_like(output)).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(PICO, no_such_argument=1)
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model(f"{PICO}.no_such_tag")


def test_layer_decay_groups_cover_every_parameter():
    model = random_pico(num_classes=5)
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in groups}) == len(model.blocks) + 2


def test_set_input_size_and_reset_classifier():
    model = random_pico()
    model.set_input_size(img_size=(96, 64))
    model.reset_classifier(5, global_pool="avg")
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)


def test_torch_export():
    model, images = random_pico(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))


def test_pickle_needs_only_timm():
    payload = pickle.dumps(random_pico())
    assert b"perceptual_mae_models" not in payload.replace(str(perceptual_mae_models.__path__[0]).encode(), b"")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(payload)(images), random_pico()(images))
