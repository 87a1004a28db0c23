"""Turn a finished run into a repository that others load, or into the files that the package holds.

    python training/export.py RUN --name vit_pico_patch8_pmae.mae_photos --repo acme/vit_pico_photos --license mit \
        --data-title "our photographs" --data-terms TEXT --hardware TEXT
    python training/export.py RUN --name vit_pico_patch8_pmae.mae_imagenette --data-terms TEXT --hardware TEXT
    python training/export.py vit_pico_patch8_pmae.mae_imagenette   # the same of weights that are in the package
    python training/export.py RUN … --layout package --to perceptual_mae_models/pretrained

A name of `pmae list` says what weights are: architecture, image size, method and images must be the run's. Any other
tag is your own, and what it says comes with it.

Files go to exports/NAME/, from where `training/publish.py` uploads them; `--results imagenette/results.json …`
records figures of `training/evaluate.py`.
"""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg

from perceptual_mae_models.convert import save_weights
from perceptual_mae_models.files import replace_file, replace_text
from perceptual_mae_models.hub import WEIGHTS, sha256_of
from perceptual_mae_models.vision_transformer_pmae import decoder_beside, facts_of, list_encoders
from training.evaluate.features import fingerprint_weights
from training.evaluate.models import open_model
from training.hub.card import DATASETS
from training.hub.repository import (
    DECODER,
    Weights,
    as_json,
    facts_of_own,
    open_embedded_weights,
    write_repository,
)
from training.hub.results import FEATURES, list_accuracies
from training.report.results import read_results as read_evaluation


def main(
    source: Annotated[str, tyro.conf.Positional],
    name: str | None = None,
    to: Path = Path("exports"),
    layout: Literal["repository", "package"] = "repository",
    repo: str | None = None,
    license: str | None = None,
    data_title: str | None = None,
    data_terms: str | None = None,
    hardware: str | None = None,
    dtype: Literal["float32", "float16"] = "float16",
    results: tuple[Path, ...] = (),
    features: str = FEATURES,
) -> None:
    """Export weights with everything that is known of them.

    Args:
        source: A run folder that holds encoder.safetensors and decoder.safetensors, or a tag whose weights are in the
            package.
        name: `<architecture>.<tag>` of a run's weights; a tag of `pmae list`, or one of your own.
        to: Folder to write to.
        layout: repository: TO/NAME/ with all files of a Hub repository. package: TO/NAME.safetensors,
            NAME.decoder.safetensors and NAME.json.
        repo: ORGANISATION/NAME on the Hub, where training/publish.py will put it and the card says it is; by default
            the tag's repository in the organisation of PMAE_HUB_ORG, or ours.
        license: Of the weights under a tag of your own, as the Hub writes it: apache-2.0, cc-by-nc-4.0, other, ...
        data_title: What the images of a tag of your own are: "pretrained without labels on ...".
        data_terms: Terms of use of a run's images.
        hardware: What the run was done on.
        dtype: Precision of a run's weights on disk.
        results: `results.json` files of training/evaluate.py to record, each called as its folder; of the models in
            them the one with these weights counts, whatever its name.
        features: Whose figures to record.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:  # nothing is written to `to` before all of it can be
            if Path(source).is_dir():
                if not (name and data_terms and hardware):
                    raise ValueError("a run needs --name, --data-terms and --hardware")
                cfg = facts_of_run(Path(source), name, repo, license, data_title)
                said = {"terms": data_terms, **({"title": data_title} if data_title else {})}
                weights = export_run(Path(source), name, Path(folder), said, hardware, dtype)
            elif embedded := open_embedded_weights(source):
                cfg, weights = facts_of_tag(source, repo), embedded
            else:
                raise ValueError(f"{source} is neither a run folder nor a tag whose weights are in the package")
            if results:
                # as they are, rounded, and as the run wrote them
                known = {fingerprint_of(weights.encoder, weights.name), weights.provenance.get("weights", "")}
                weights.provenance["results"] = [row for file in results for row in read_results(file, known, features)]
            as_package = layout == "package"
            written = (
                write_package_files(weights, to) if as_package else write_repository(cfg, weights, to / weights.name)
            )
    except (OSError, ValueError) as error:
        raise SystemExit(f"export.py: {error}") from error
    print("\n".join(f"wrote {path}" for path in written))


def facts_of_tag(name: str, repo: str | None) -> PretrainedCfg:
    """The facts of a registered tag, in the repository that was asked for.

    Raises:
        ValueError: If it is not registered.
    """
    cfg, organisation = facts_of(name), os.environ.get("PMAE_HUB_ORG")
    return replace(cfg, hf_hub_id=repo or (f"{organisation}/{name}" if organisation else cfg.hf_hub_id))


def facts_of_run(
    run: Path, name: str, repo: str | None, license_name: str | None, data_title: str | None
) -> PretrainedCfg:
    """The facts of the tag that a run's weights are to have, which must be true of the run.

    Args:
        run: Its folder.
        name: `<architecture>.<tag>`.
        repo: Its repository on the Hub.
        license_name: Of the weights, for a tag of one's own.
        data_title: Of the images, for a tag of one's own.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the name says something else than the run, or something is missing.
    """
    description = json.loads((run / "recipe.json").read_text())
    recipe, data = description["recipe"], description["data"]
    size = recipe.get("img_size")
    if (built := recipe["model"].partition(".")[0]) != name.partition(".")[0]:
        raise ValueError(f"{name} is not a name for {run}, whose encoder is a {built}")
    if name not in list_encoders(tags=True):
        if not (repo and license_name and data_title):
            raise ValueError(f"{name} is a tag of your own, which needs --repo, --license and --data-title")
        own = facts_of_own(name, recipe["method"], repository=repo, license_name=license_name)
        return replace(own, input_size=(3, size, size)) if size else own
    if license_name or data_title:
        raise ValueError(f"--license and --data-title are for tags of your own: {name} says its own")
    method, _, images = name.partition(".")[2].rpartition("_")
    title, _, count = DATASETS[images]
    if recipe.get("init"):
        raise ValueError(f"{run} began with {recipe['init']}, which {name} does not say: choose a tag of your own")
    if size not in (None, facts_of(name).input_size[-1]):
        raise ValueError(
            f"{run} learned from {size} x {size} pixels, which {name} does not say: choose a tag of your own"
        )
    if recipe["method"] != method or data["images"] != count:
        seen = f"{data['images']} of" if data["images"] else "an unknown number of images of"
        raise ValueError(
            f"{name} says {method} on {title}'s {count} images, but {run} is {recipe['method']} on {seen} "
            f"{data['name']}: choose a tag of your own, such as {built}.{recipe['method']}_mine"
        )
    return facts_of_tag(name, repo)


def export_run(run: Path, name: str, folder: Path, said: dict[str, str], hardware: str, dtype: str) -> Weights:
    """Write a run's encoder and decoder to a folder and describe them; `said` is what its images are said to be.

    Raises:
        FileNotFoundError: If the run has not ended.
        ValueError: If the weights cannot be held in `dtype`.
    """
    description = json.loads((run / "recipe.json").read_text())
    targets = folder / WEIGHTS, folder / DECODER
    for part, target in zip(("encoder", "decoder"), targets, strict=True):
        source = run / f"{part}.safetensors"
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file; a run writes it at its end")
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        state = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(source).items()}
        if broken := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{', '.join(broken)} of {source} cannot be held in {dtype}")
        save_weights(target, state, metadata)
    progress = json.loads(metadata["progress"])
    provenance = {
        "name": name,
        "recipe": description["recipe"],
        "data": {**description["data"], **said},
        "cost": {"steps": progress["step"], "seconds": round(progress["seconds"]), "hardware": hardware},
        "final_metrics": progress["metrics"],
        "versions": description["versions"],
        "weights": fingerprint_of(run / "encoder.safetensors", name),
        "results": [],
    }
    return Weights(name=name, encoder=targets[0], decoder=targets[1], provenance=provenance)


def fingerprint_of(encoder: Path, name: str) -> str:
    """What `training/evaluate.py` knows the weights of a file by; `name` tells the architecture."""
    extractor, _ = open_model(f"{name.partition('.')[0]}@{encoder}", device="cpu")
    return fingerprint_weights(extractor.model)


def read_results(file: Path, fingerprints: set[str], features: str) -> list[dict[str, Any]]:
    """The accuracies of some weights in a `results.json`, which is called as its folder.

    Raises:
        ValueError: If it has none.
    """
    found = read_evaluation(file)
    try:
        return list_accuracies(found, file.resolve().parent.name, fingerprints, features)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_package_files(weights: Weights, to: Path) -> list[Path]:
    """Write the three files that the package holds of a tag."""
    to.mkdir(parents=True, exist_ok=True)
    encoder = to / f"{weights.name}.safetensors"
    targets = {encoder: weights.encoder, decoder_beside(encoder): weights.decoder}
    files = {}
    for target, source in targets.items():
        replace_file(target, partial(shutil.copyfile, source))
        with safe_open(target, framework="pt") as opened:
            dtype = str(opened.get_tensor(next(iter(opened.keys()))).dtype).removeprefix("torch.")
        files[target.name] = {"sha256": sha256_of(target), "bytes": target.stat().st_size, "dtype": dtype}
    provenance = to / f"{weights.name}.json"
    replace_text(provenance, as_json({**weights.provenance, "files": files}))
    return [*targets, provenance]


if __name__ == "__main__":
    tyro.cli(main)
