"""`pmae download` and `pmae verify`: weights before they are needed, and whether they are whole."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models import PretrainedCfg


def download(arguments: argparse.Namespace) -> int:
    """`pmae download`: a tag's files into the Hub's cache or a folder, checked."""
    from perceptual_mae_models.hub import MANIFEST, WEIGHTS, check_file, fetch_file, find_manifest, find_repository
    from perceptual_mae_models.unreadable import explain_unreadable_weights
    from perceptual_mae_models.vision_transformer_pmae import facts_of

    for cfg in map(facts_of, arguments.names):
        if cfg.file:
            weights = Path(cfg.file)
            paths = {path.name: path for path in sorted(weights.parent.glob(f"{weights.stem}.*"))}
            if arguments.to:
                _deliver(paths, arguments.to)
            else:
                print(f"{cfg.architecture}.{cfg.tag}: in the package, {cfg.file}")
            continue
        repository = find_repository(cfg)
        with explain_unreadable_weights(cfg):
            names = [cfg.hf_hub_filename or WEIGHTS]
            manifest = find_manifest(repository)
            if manifest:
                names = [MANIFEST, *manifest["files"]]
            paths = {name: fetch_file(repository, name) for name in names}
            for name, path in paths.items():
                if manifest and name != MANIFEST:
                    check_file(path, name, manifest, str(repository))
        # files of all repositories have the same names
        alone = len(arguments.names) == 1
        folder = arguments.to and (arguments.to if alone else arguments.to / f"{cfg.architecture}.{cfg.tag}")
        _deliver(paths, folder)
    return 0


def _deliver(paths: dict[str, Path], folder: Path | None) -> None:
    """Copy files to a folder, where one is given, and say where they are."""
    if folder:
        for name in paths:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        paths = {name: Path(shutil.copyfile(path, folder / name)) for name, path in paths.items()}
    for name, path in paths.items():
        print(f"{name}  {path}")


def verify(arguments: argparse.Namespace) -> int:
    """`pmae verify`: the files of a tag or of a folder against their manifest."""
    from perceptual_mae_models.hub import check_file, read_manifest
    from perceptual_mae_models.vision_transformer_pmae import facts_of

    for target in arguments.targets:
        if (folder := Path(target)).is_dir():
            found = [(read_manifest(file), folder, str(folder)) for file in _list_manifests(folder)]
        elif len(folder.parts) > 1:
            raise FileNotFoundError(f"there is no folder {folder}")
        elif (cfg := facts_of(target)).file:
            weights = Path(cfg.file)
            found = [(read_manifest(weights.with_suffix(".json")), weights.parent, "the package")]
        else:
            found = [_find_cached(target, cfg)]
        for manifest, folder, source in found:
            for name in manifest["files"]:
                check_file(folder / name, name, manifest, source)
                print(f"{name}  ok")
    return 0


def _list_manifests(folder: Path) -> list[Path]:
    """The manifest of a repository's folder; of what came out of the package, those beside the weights."""
    from perceptual_mae_models.hub import MANIFEST

    if (alone := folder / MANIFEST).exists():
        return [alone]
    if beside := [
        path for file in sorted(folder.glob("*.safetensors")) if (path := file.with_suffix(".json")).exists()
    ]:
        return beside
    raise ValueError(f"{folder} holds no {MANIFEST} to verify against, and no .json beside .safetensors")


def _find_cached(target: str, cfg: "PretrainedCfg") -> tuple[dict[str, Any], Path, str]:
    """The manifest of a tag in the Hub's cache, the folder of its files, and the repository."""
    from perceptual_mae_models.hub import MANIFEST, fetch_file, find_manifest, find_repository

    repository = find_repository(cfg)
    try:
        manifest = find_manifest(repository, local=True)
        if manifest is None:
            raise ValueError(f"{repository} is not a repository of ours and has no manifest to verify against")
        for name in manifest["files"]:
            fetch_file(repository, name, local=True)
        return manifest, fetch_file(repository, MANIFEST, local=True).parent, str(repository)
    except OSError as error:
        raise ValueError(f"{target} is not in the Hub's cache: `pmae download {target}` first") from error
