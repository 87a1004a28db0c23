"""`pmae download` and `pmae verify`: weights before they are needed, and whether they are whole."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models import PretrainedCfg


def download(arguments: argparse.Namespace) -> int:
    """`pmae download`: a tag's files into the Hub's cache or a folder, checked."""
    from perceptual_mae_models.hub import MANIFEST, WEIGHTS, check_file, fetch_file, fetch_manifest, find_repository
    from perceptual_mae_models.weights import explain_unreadable_weights

    for cfg in map(_pretrained_cfg, arguments.names):
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
            manifest: dict[str, Any] | None = fetch_manifest(repository) if repository.ours else None
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
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: Path(shutil.copyfile(path, folder / name)) for name, path in paths.items()}
    for name, path in paths.items():
        print(f"{name}  {path}")


def verify(arguments: argparse.Namespace) -> int:
    """`pmae verify`: the files of a tag or of a folder against their manifest."""
    from perceptual_mae_models.hub import (
        MANIFEST,
        check_file,
        fetch_file,
        fetch_manifest,
        find_repository,
        read_manifest,
    )

    for target in arguments.targets:
        if (folder := Path(target)).is_dir():
            manifest = read_manifest(folder / MANIFEST)
            paths = {name: folder / name for name in manifest["files"]}
            source = str(folder)
        elif (cfg := _pretrained_cfg(target)).file:
            folder = Path(cfg.file).parent
            manifest = read_manifest(Path(cfg.file).with_suffix(".json"))
            paths = {name: folder / name for name in manifest["files"]}
            source = "the package"
        else:
            repository = find_repository(cfg)
            if not repository.ours:
                raise ValueError(f"{repository} is not a repository of ours and has no manifest to verify against")
            try:
                manifest = fetch_manifest(repository, local=True)
                paths = {name: fetch_file(repository, name, local=True) for name in manifest["files"]}
            except OSError as error:
                raise ValueError(f"{target} is not in the Hub's cache: `pmae download {target}` first") from error
            source = str(repository)
        for name, path in paths.items():
            check_file(path, name, manifest, source)
            print(f"{name}  ok")
    return 0


def _pretrained_cfg(name: str) -> "PretrainedCfg":
    """The facts of a tag of ours.

    Raises:
        ValueError: If we have no such tag.
    """
    import timm

    import perceptual_mae_models.vision_transformer_pmae  # noqa: F401  registers

    ours = timm.list_models(module="vision_transformer_pmae", include_tags=True)
    if name not in (*ours, *(tag.partition(".")[0] for tag in ours)):
        raise ValueError(f"{name} is neither a folder nor a model of ours; `pmae list` names all")
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None, f"timm lists {name} without a configuration"
    return cfg
