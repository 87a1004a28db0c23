"""What users install: the wheel, the embedded weights and their papers."""

import ast
import hashlib
import json
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import perceptual_mae_models
from perceptual_mae_models.autoencoder import random_masking
from perceptual_mae_models.reconstruction import open_shipped, rebuild, shipped_autoencoders
from perceptual_mae_models.vision_transformer_pmae import facts_of, list_encoders
from training import demo
from training.step import reconstruction_loss
from training.weights import open_embedded

ROOT = Path(__file__).parents[1]
PRETRAINED = ROOT / "perceptual_mae_models" / "pretrained"
EMBEDDED = [name for name in list_encoders(tags=True) if facts_of(name).file]


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Of the demo, which no weights have seen: (N, 3, 64, 64) in [0, 1]."""
    return torch.stack([pil_to_tensor(photo.resize((64, 64))) for photo in demo.photographs().values()]).float() / 255


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    finished = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 10e6 * len(EMBEDDED)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"perceptual_mae_models"}
    assert {f"perceptual_mae_models/pretrained/{name}.safetensors" for name in EMBEDDED} <= set(names)
    assert "perceptual_mae_models/py.typed" in names


def test_a_program_of_the_users_that_is_called_as_ours_has_the_encoders_too(tmp_path: Path) -> None:
    program = tmp_path / "pmae"
    program.write_text("import perceptual_mae_models, timm; print(timm.is_model('vit_pico_patch8_pmae'))")
    assert subprocess.check_output([sys.executable, program], text=True) == "True\n"
    assert {"FeatureExtractor", "CheckpointError"} <= set(dir(perceptual_mae_models))


def test_no_dependency_of_training_at_run_time() -> None:
    code = "import perceptual_mae_models.cli, perceptual_mae_models.features, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    roots = {name.split(".")[0] for name in loaded}
    assert not roots & {"training", "accelerate", "tyro", "pyarrow", "skimage", "sklearn", "transformers"}


def test_the_folder_of_weights_holds_those_of_the_tags_and_nothing_else() -> None:
    endings = ("safetensors", "decoder.safetensors", "json")
    assert {file.name for file in PRETRAINED.iterdir()} == {f"{tag}.{ending}" for tag in EMBEDDED for ending in endings}
    assert sorted(shipped_autoencoders()) == sorted(EMBEDDED)
    assert timm.get_pretrained_cfg("vit_pico_patch8_pmae").file, "the default is one that can be loaded"


@pytest.mark.parametrize("tag", EMBEDDED)
def test_embedded_weights_load_with_the_network_cut(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the network is cut")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = timm.create_model(tag, pretrained=True)
    fresh = timm.create_model(tag, pretrained=False)
    assert model.pretrained_cfg["tag"] == tag.partition(".")[2]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, fresh.state_dict()[name])]
    # positions differ from the fresh ones by their rounding to half precision only
    assert set(changed) == set(model.state_dict())
    torch.testing.assert_close(model.pos_embed, fresh.pos_embed, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tag", EMBEDDED)
def test_provenance_matches_the_files(tag: str) -> None:
    provenance = json.loads((PRETRAINED / f"{tag}.json").read_text())
    assert provenance["name"] == tag
    assert tag == f"{provenance['recipe']['model']}.{provenance['recipe']['method']}_imagenette"
    assert provenance["recipe"]["epochs"] >= 100
    for name, facts in provenance["files"].items():
        content = (PRETRAINED / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "dtype": "float16"}
        assert len(content) < 8e6
    assert provenance["data"]["images"] == 9469
    assert provenance["data"]["terms"]
    assert [row["value"]["mean"] for row in provenance["results"]]


def test_the_embedded_decoder_rebuilds_better_than_nothing(photographs: torch.Tensor) -> None:
    """Of normalised patches, predicting nothing at all leaves an error of 191/192 (their sample variance is 1)."""
    network, recipe = open_embedded("vit_pico_patch8_pmae.mae_imagenette")
    assert recipe.norm_pix_loss
    noise = torch.rand(len(photographs), network.num_patches, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = network(photographs, noise)
    loss = reconstruction_loss(output, photographs, network, recipe).item()
    assert loss < 0.85


@pytest.mark.parametrize("tag", EMBEDDED)
def test_hidden_pixels_are_rebuilt_nearer_than_by_the_mean_colour_of_the_visible_or_a_decoder_that_says_nothing(
    tag: str, photographs: torch.Tensor
) -> None:
    network, recipe = open_shipped(tag)
    noise = torch.rand(len(photographs), network.num_patches, generator=torch.Generator().manual_seed(0))
    masking = random_masking(noise, recipe["mask_ratio"])
    views = rebuild(network, photographs, masking, norm_pix_loss=recipe["norm_pix_loss"])
    hidden = views.hidden.expand_as(photographs)
    colours = photographs.masked_fill(hidden, 0).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
    for name, parameter in network.decoder.named_parameters():
        if name.startswith("pred"):
            parameter.data.zero_()
    nothing = rebuild(network, photographs, masking, norm_pix_loss=recipe["norm_pix_loss"]).rebuilt
    error, *trivial = ((image - photographs)[hidden].abs().mean() for image in (views.rebuilt, colours, nothing))
    assert error < 0.75 * min(trivial)


def test_the_demo_ends_with_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "demo.png")])
    demo.main()
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").resize((40, 40)).getcolors(1600)) > 500
    told = re.search(r"(\d+) of 15 nearest neighbours are crops of the same photograph", capsys.readouterr().out)
    assert told is not None
    assert int(told[1]) >= 12


def _needed_by(extra: str) -> set[str]:
    """Distributions that this one needs with an extra, directly or not."""
    found, waiting = set(), [("perceptual-mae-models", {"", extra})]
    while waiting:
        name, extras = waiting.pop()
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
            other = canonicalize_name(requirement.name)
            if wanted and other not in found:
                found.add(other)
                waiting.append((other, {"", *requirement.extras}))
    return found


def _imports(file: Path) -> Iterator[str]:
    """Packages that a module imports when it is imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


EXTRA_OF_COMMAND = {
    "perceptual_mae_models.cli": "",
    "training.demo": "picture",
    "training.pretrain": "train",
    "training.evaluate.command": "evaluate",
    "training.report.command": "evaluate",
}
_FILES_OF_EACH = """
import json, os, sys
import timm, torch  # once, for all children

for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        __import__(module)
        ours = [m for name, m in sys.modules.items() if name.startswith(("training", "perceptual_mae_models"))]
        print(json.dumps([module, [m.__file__ for m in ours if m.__file__]]), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported")
"""


@pytest.fixture(scope="module")
def files_of_commands() -> dict[str, list[str]]:
    """Our files that each command imports before it does anything."""
    command = [sys.executable, "-c", _FILES_OF_EACH, *EXTRA_OF_COMMAND]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in ran.stdout.splitlines())


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF_COMMAND.items())
def test_commands_import_what_their_extra_installs(
    module: str, extra: str, files_of_commands: dict[str, list[str]]
) -> None:
    names = {name for file in files_of_commands[module] for name in _imports(Path(file))}
    homes = metadata.packages_distributions()
    needed = _needed_by(extra) | {"perceptual-mae-models"}
    foreign = {name for name in names if name in homes and not {canonicalize_name(d) for d in homes[name]} & needed}
    assert len(names) > 5
    assert not foreign
