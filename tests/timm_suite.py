"""Run timm's own `tests/test_models.py` on our entries.

    python tests/timm_suite.py                                   # every architecture (base, large, huge: tens of GiB)
    python tests/timm_suite.py vit_pico_patch8_pmae vit_tiny_patch16_pmae

The tests come from the source distribution of the installed timm version, so the same command checks any version that
is installed. Nothing is fetched from the Hub: a cache in a temporary folder holds random weights for every tag, written
as plain timm would. This is no part of `make test`, because it needs a package index and many minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import perceptual_mae_models  # noqa: F401  (registers the encoders)

_REVISION = "0" * 40


def main() -> int:
    """Fetch the tests, seed the cache, run pytest on the chosen architectures and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = timm.list_models(module="vision_transformer_pmae")
    parser.add_argument("architectures", nargs="*", default=known, metavar="ARCHITECTURE", help=", ".join(known))
    parser.add_argument("--timeout", type=int, default=1800, help="seconds allowed for one test")
    arguments = parser.parse_args()
    if unknown := set(arguments.architectures) - set(known):
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}")

    # pytest's -k also looks at folder names, so the folder must not be named after a model.
    with tempfile.TemporaryDirectory(prefix="timm-suite-") as temporary:
        folder = Path(temporary)
        fetch_timms_tests(folder)
        for architecture in arguments.architectures:
            seed_every_tag(folder / "hub", architecture)
        command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-p", "perceptual_mae_models", "-q", "-rfEs"]
        command += ["-k", " or ".join(arguments.architectures), "--timeout", str(arguments.timeout)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(folder / "hub"),
            "TIMEOUT": str(arguments.timeout),
        }
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def fetch_timms_tests(folder: Path) -> None:
    """Put `tests/` and `pyproject.toml` (its pytest markers) of the installed timm version into a folder."""
    requirement = f"timm=={timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (archive_path,) = folder.glob("timm-*.tar.gz")
    root = archive_path.name.removesuffix(".tar.gz")
    with tarfile.open(archive_path) as archive:
        for member in archive.getmembers():
            name = member.name.removeprefix(f"{root}/")
            # timm's package stays in the archive: a copy in the working folder would shadow the installed one.
            if member.isfile() and (name == "pyproject.toml" or name.startswith("tests/")):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())


def seed_every_tag(cache: Path, architecture: str) -> None:
    """Give every tag of an architecture the same random weights in a Hub cache."""
    cache.mkdir(exist_ok=True)
    weights = cache / f"{architecture}.safetensors"
    state = timm.create_model(architecture).to(torch.bfloat16).state_dict()
    save_file(state, weights, metadata={"format": "pt"})
    for cfg in timm.models.get_arch_pretrained_cfgs(architecture).values():
        seed_hub_cache(cache, cfg.hf_hub_id, weights)


def seed_hub_cache(cache: Path, repository: str, weights: Path) -> None:
    """Lay out a Hub cache folder in which `repository` holds `weights` as its `model.safetensors`."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(_REVISION)
    (snapshot / "model.safetensors").symlink_to(weights.resolve())


if __name__ == "__main__":
    sys.exit(main())
