"""Tables that somebody made of several evaluations, with what is to be said of them."""

from dataclasses import dataclass

from training.report.markdown import write_tables
from training.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What stands before the evaluations on a page, or by itself in Markdown."""

    title: str
    notes: tuple[str, ...] = ()
    """Paragraphs; names are between backticks."""
    tables: tuple[tuple[str, Table], ...] = ()
    """Each with the name of the images it is about."""
    pictures: tuple[tuple[str, str], ...] = ()
    """Each with what it shows, and its path from the folder of the text."""


def write_chapter(chapter: Chapter) -> str:
    """A chapter in Markdown."""
    parts = [f"## {chapter.title}\n", *(f"{note}\n" for note in chapter.notes)]
    if chapter.tables:
        parts.append(write_tables(chapter.tables, "images"))
    parts += [f"![{caption}]({path})\n" for caption, path in chapter.pictures]
    return "\n".join(parts)
