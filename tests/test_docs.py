"""The documentation: its examples run, its links lead somewhere, and it builds where mkdocs is installed."""

import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import perceptual_mae_models  # noqa: F401  (whose functions the examples use)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))

_spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
assert _spec is not None
assert _spec.loader is not None
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_without_a_network(
    example: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("perceptual_mae_models.hub.hf_hub_download", None)  # nothing is fetched
    runpy.run_path(str(example), run_name="__main__")
    assert capfd.readouterr().out.strip()


def test_every_example_is_on_its_page() -> None:
    page = (DOCS / "examples.md").read_text()
    assert len(EXAMPLES) >= 4
    assert all(f'--8<-- "examples/{example.name}"' in page for example in EXAMPLES)


def test_links_are_bent_to_the_site() -> None:
    bend = hooks.bend_links
    assert (
        bend("[a](training/README.md#cost) ![p](docs/demo.jpg)", "README.md") == "[a](training.md#cost) ![p](demo.jpg)"
    )
    assert (
        bend("[s](SCALE.md) [x](https://a.b/c) [y](#z)", "training/README.md")
        == "[s](scale.md) [x](https://a.b/c) [y](#z)"
    )
    assert bend("![k](curves.png)", "training/miniature/RESULTS.md") == "![k](miniature-curves.png)"
    assert bend("[the step](step.py)", "training/README.md") == "the step (`training/step.py`)"
    with pytest.raises(FileNotFoundError, match=r"README\.md links to nowhere\.md"):
        bend("[a](nowhere.md)", "README.md")


def test_every_page_is_in_the_navigation_and_its_links_exist() -> None:
    class Loader(yaml.SafeLoader):
        """Without mkdocs' own tags."""

    def pages(tree: object) -> list[str]:
        if isinstance(tree, dict):
            tree = list(tree.values())
        return [page for part in tree for page in pages(part)] if isinstance(tree, list) else [str(tree)]

    navigation = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert sorted(navigation) == sorted(path.name for path in DOCS.glob("*.md"))
    for source, page in hooks.PAGES.items():
        assert f"source: {source}\n" in (DOCS / page).read_text()
        hooks.bend_links((ROOT / source).read_text(), source)
    for own in DOCS.glob("*.md"):
        hooks.bend_links(own.read_text(), f"docs/{own.name}")
    assert all((ROOT / picture).is_file() for picture in hooks.PICTURES)


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "perceptual_mae_models.features.FeatureExtractor" in api
    assert "fetch_weights" in api
    shown = (tmp_path / "site" / "examples" / "index.html").read_text()
    assert all("# %%" in example.read_text() for example in EXAMPLES)
    assert shown.count("# %%") >= len(EXAMPLES)
    for name in hooks.PICTURES.values():
        assert (tmp_path / "site" / name).stat().st_size > 0


def test_what_the_reference_names_is_there() -> None:
    parts = (DOCS / "api.md").read_text().split("\n::: ")[1:]
    assert len(parts) > 8
    for part in parts:
        module, _, name = part.split()[0].rpartition(".")
        try:
            found = importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), name)
        for member in filter(None, re.findall(r"[A-Za-z_]+", "".join(re.findall(r"members: \[(.*)\]", part)))):
            assert hasattr(found, member), f"{module}.{name}.{member}"
