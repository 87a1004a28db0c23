"""Every snippet of docs/works-with.md runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
_HEADING_AND_SNIPPET = re.compile(r"^## (.+?)$|^```python\n(.+?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> list[object]:
    found, heading = [], ""
    for match in _HEADING_AND_SNIPPET.finditer(PAGE.read_text(encoding="utf-8")):
        if match[1]:
            heading = match[1]
        else:
            found.append(pytest.param(match[2], id=heading))
    return found


def test_every_section_has_a_snippet():
    assert len(snippets()) == len(re.findall(r"^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == 7


@pytest.mark.parametrize("snippet", snippets())
def test_a_snippet_runs(snippet: str, hub_folder: Path, photos: Path, tmp_path: Path):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "repository").symlink_to(hub_folder)
    (tmp_path / "query.png").symlink_to(next(photos.rglob("*.png")))
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
