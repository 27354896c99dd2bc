"""Where benchmarks write what they found: sections of one markdown file, each between its own markers."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks.md"


def machine(*packages: str) -> str:
    """When and where, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."


def write(path: Path, name: str, text: str) -> None:
    """Replace the section of that name, or append it; other sections of the file stay as they are."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text() if path.exists() else "# Benchmarks\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
