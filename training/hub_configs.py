"""Generate hub_configs/: what describes the repository of every registered tag, all but the weights themselves.

python training/hub_configs.py            # write
python training/hub_configs.py --check    # exit with 1 and name the files that are not what the code says
"""

import tempfile
from pathlib import Path

import tyro

from perceptual_mae_models.vision_transformer_pmae import facts_of
from training.hub.repository import open_embedded_weights, registered_tags, write_repository

HERE = Path(__file__).parents[1] / "hub_configs"


def generate(folder: Path) -> None:
    """Write the describing files of every tag into `folder/<tag>/`."""
    for name in registered_tags():
        write_repository(facts_of(name), open_embedded_weights(name), folder / name, with_weights=False)


def find_drift(folder: Path) -> list[str]:
    """Files of a folder that differ from what the code generates, are missing there or too many; weights excepted."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        generate(fresh)
        expected = {str(path.relative_to(fresh)): path.read_bytes() for path in fresh.rglob("*.*") if path.is_file()}
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file() and path.suffix != ".safetensors"
    }
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main(folder: Path = HERE, check: bool = False) -> None:
    """Write the folder, or check that it is up to date.

    Args:
        folder: hub_configs/.
        check: Only compare.
    """
    if check:
        if drift := find_drift(folder):
            raise SystemExit("hub_configs.py: not up to date: " + ", ".join(drift))
        return
    if others := sorted({path.name for path in folder.glob("*") if path.is_dir()} - set(registered_tags())):
        raise SystemExit(f"hub_configs.py: {folder} holds {', '.join(others)}, no registered tags: take them away")
    generate(folder)


if __name__ == "__main__":
    tyro.cli(main)
