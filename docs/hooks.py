"""Pages of the site that are files of the repository: `source:` in a page's head names the file."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "training/README.md": "training.md",
    "training/SCALE.md": "scale.md",
    "training/miniature/README.md": "miniature.md",
    "training/miniature/RESULTS.md": "miniature-results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = {"training/miniature/curves.png": "miniature-curves.png"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Any, *, config: Any) -> Any:
    """Take pictures that lie beside those files into the site."""
    from mkdocs.structure.files import File

    for place, name in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Put the file in place of the page, if it is one's, with links bent to where things are in the site."""
    if source := page.meta.get("source"):
        return bend_links((ROOT / source).read_text(encoding="utf-8"), source)
    return bend_links(markdown, f"docs/{page.file.src_path}")


def bend_links(text: str, source: str) -> str:
    """Point relative links of a file to pages and files of the site; what is not in it becomes plain text.

    Args:
        text: Markdown.
        source: The file's path in the repository.
    """

    def bend(link: re.Match[str]) -> str:
        image, label, target, anchor = link.groups()
        place = os.path.normpath(Path(source).parent / target)
        if name := PAGES.get(place) or PICTURES.get(place):
            return f"{image}[{label}]({name}{anchor or ''})"
        if place.startswith("docs/") and (ROOT / place).is_file():
            return f"{image}[{label}]({place.removeprefix('docs/')}{anchor or ''})"
        if not (ROOT / place).exists():
            raise FileNotFoundError(f"{source} links to {target}, which does not exist")
        return label if "`" in label else f"{label} (`{place}`)"

    return _LINK.sub(bend, text)
