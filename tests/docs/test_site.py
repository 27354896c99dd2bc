"""The site of the pages: made strictly, read without a server, and generated pages are current."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import command_reference, python_reference
from tests.support.projects import REPOSITORY

DOCS = REPOSITORY / "docs"
FETCHED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"|url\(([^)]+)\)""")


def test_the_page_of_commands_is_what_they_say_of_themselves() -> None:
    written = (DOCS / "commands.md").read_text()
    assert written == command_reference.page(), "python -m tests.support.command_reference > docs/commands.md"


def test_the_page_of_python_is_what_docstrings_say() -> None:
    written = (DOCS / "python-reference.md").read_text()
    assert written == python_reference.page(), "python -m tests.support.python_reference > docs/python-reference.md"


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\)", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = [path.name for path in DOCS.glob("*.md") if path.name != "index.md"]
    assert sorted(listed) == sorted([*pages, "decisions/index.md"])


def test_what_makes_the_site_is_pinned_with_hashes() -> None:
    pins = (DOCS / "site" / "requirements.txt").read_text()
    packages = re.findall(r"^([A-Za-z][\w.-]*)==\S+(.*(?:\n +--hash=sha256:[0-9a-f]{64}.*)+)", pins, re.MULTILINE)
    assert len(packages) == len(re.findall(r"^[A-Za-z]", pins, re.MULTILINE)) > 20
    assert "http" not in pins


@pytest.mark.soak
def test_the_site_has_no_dead_link_and_fetches_nothing(tmp_path: Path) -> None:
    # In a copy: somebody may be making the site in this folder.
    python = REPOSITORY / "build" / "docs" / "bin" / "python"
    made = subprocess.run(["make", "build/docs/.ready"], cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stdout + made.stderr
    for name in ("docs", "examples", "flows", "infra"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    (tmp_path / "docs" / "index.md").open("a").close()
    for place in ("benchmarks", "findings", "prefect.yaml", "prefect.toml", "CHANGELOG.md", "tasks", "registry", "tests"):
        (tmp_path / place).symlink_to(REPOSITORY / place)
    build = [python, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees", tmp_path / "docs", tmp_path / "site"]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr

    for page in (tmp_path / "site").rglob("*.html"):
        for found in FETCHED.findall(page.read_text()):
            for address in filter(None, found):
                assert not re.match(r"[\"']?(https?:)?//", address), f"{page.name} fetches {address}"

    # One that leads nowhere is found: without this the test could not fail.
    (tmp_path / "docs" / "limits.md").write_text("# Limits\n\n[x](gates.md#no-such-anchor)\n")
    broken = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert broken.returncode != 0 and "no-such-anchor" in broken.stderr
