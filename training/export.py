"""Turn a finished run into files that others load.

    python training/export.py RUN --name vit_pico_patch8_pmae.mae_imagenette --to DIR --data-terms TEXT --hardware TEXT

writes `NAME.safetensors` (the encoder, native timm keys), `NAME.decoder.safetensors` and `NAME.json` (provenance:
recipe, data and its terms, cost, versions, final metrics, results of evaluations, digests of both files).
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file

from training.run.checkpoint import write_atomically


def main(
    run: Annotated[Path, tyro.conf.Positional],
    name: str,
    to: Path,
    data_terms: str,
    hardware: str,
    dtype: Literal["float32", "float16"] = "float16",
    results: tuple[Path, ...] = (),
) -> None:
    """Export a finished run's weights with their provenance.

    Args:
        run: A run folder that holds encoder.safetensors and decoder.safetensors.
        name: `<architecture>.<tag>` of the weights.
        to: Folder to write to.
        data_terms: Terms of use of the images.
        hardware: What the run was done on.
        dtype: Precision on disk.
        results: JSON files of evaluations to record.
    """
    description = json.loads((run / "recipe.json").read_text())
    files = {}
    for part, suffix in (("encoder", ""), ("decoder", ".decoder")):
        source, target = run / f"{part}.safetensors", to / f"{name}{suffix}.safetensors"
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        state = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(source).items()}
        broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
        if broken:
            raise SystemExit(f"export.py: {', '.join(broken)} of {source} cannot be held in {dtype}")
        write_atomically(target, state, metadata)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        files[target.name] = {"sha256": digest, "bytes": target.stat().st_size, "dtype": dtype}
    progress = json.loads(metadata["progress"])
    provenance = {
        "name": name,
        "recipe": description["recipe"],
        "data": {**description["data"], "terms": data_terms},
        "cost": {"steps": progress["step"], "seconds": round(progress["seconds"]), "hardware": hardware},
        "final_metrics": progress["metrics"],
        "versions": description["versions"],
        "results": [json.loads(path.read_text()) for path in results],
        "files": files,
    }
    (to / f"{name}.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print("\n".join(f"wrote {to / file}" for file in (*files, f"{name}.json")))


if __name__ == "__main__":
    tyro.cli(main)
