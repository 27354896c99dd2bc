"""How Sphinx makes the site of these pages: `make docs`. Why Sphinx: decisions/0038-the-site.md."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent
REPOSITORY = PAGES.parent
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")
"""One that leaves a page's folder upwards."""
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"^- \[([^\]]+)\]\(([^)#:]+)\.md\)", re.MULTILINE)

project = "train-and-ship"
extensions = ["myst_parser"]
# Slugs are GitHub's, where the same pages are read.
myst_heading_anchors = 4
# In blocks of commands stand dots for what is left out; that is shown as it is.
suppress_warnings = ["misc.highlighting_failure"]
exclude_patterns = ["site"]

html_theme = "furo"
html_title = "train-and-ship"
html_static_path = ["site"]
html_css_files = ["site.css"]
# Nothing of another address is asked by who reads a page, nor is the source of pages copied.
html_copy_source = False
html_show_sphinx = False


def read(app: Any, name: str, text: list[str]) -> None:
    """Make a page that GitHub shows into one of the site: links out of docs/, diagrams, and the navigation."""
    page = PAGES / f"{name}.md"
    text[0] = LINK.sub(lambda found: _link(page, *found.groups()), DIAGRAM.sub(_picture, text[0]))
    if name == "index":
        text[0] += "".join(_navigation(section) for section in re.split(r"^## ", text[0], flags=re.MULTILINE)[1:])
    elif name == "decisions/index":
        text[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n0*\n```\n"


def _picture(found: re.Match[str]) -> str:
    """What tests.support.diagrams has drawn of it; a path from the folder of all pages. It opens, as large as it is."""
    picture = f"/site/diagram-{hashlib.sha256(found[1].encode()).hexdigest()[:12]}.svg"
    return f"[![diagram]({picture})](path:{picture})"


def _link(page: Path, words: str, target: str, place: str | None) -> str:
    """A file of the repository is downloaded; a folder is named."""
    path = (page.parent / target).resolve()
    if path.is_relative_to(PAGES):
        return f"[{words}]({target}{place or ''})"
    if path.is_file():
        return f"[{words}](path:{target})"
    named = f"`{path.relative_to(REPOSITORY)}`"
    return named if words.strip("`") == named.strip("`") else f"{words} ({named})"


def _navigation(section: str) -> str:
    """The pages that a section of index.md lists, as a part of the navigation at the side."""
    caption = section.partition("\n")[0]
    entries = "\n".join(f"{words} <{target}>" for words, target in ITEM.findall(section))
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n" if entries else ""


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read)
