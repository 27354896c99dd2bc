"""The site of the pages: made strictly, read without a server, and generated pages are current."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import command_reference, diagrams, python_reference
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


def test_every_diagram_is_drawn() -> None:
    drawn = {path.name for path in diagrams.DRAWN.glob("diagram-*.svg")}
    assert drawn == set(diagrams.diagrams()), "python -m tests.support.diagrams"


def test_what_makes_the_site_is_pinned_with_hashes() -> None:
    pins = (DOCS / "site" / "requirements.txt").read_text()
    packages = re.findall(r"^([A-Za-z][\w.-]*)==\S+(.*(?:\n +--hash=sha256:[0-9a-f]{64}.*)+)", pins, re.MULTILINE)
    assert len(packages) == len(re.findall(r"^[A-Za-z]", pins, re.MULTILINE)) > 20
    assert "http" not in pins


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[int, str, Path]]:
    """Make a site of a folder as `make docs` does; its exit, its warnings, and where it is."""
    made = subprocess.run(["make", "build/docs/.ready"], cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stdout + made.stderr

    def build(pages: Path) -> tuple[int, str, Path]:
        folder = tmp_path_factory.mktemp("site")
        words = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", DOCS]
        done = subprocess.run(
            [REPOSITORY / "build/docs/bin/python", *words, "--doctree-dir", folder / "trees", pages, folder / "site"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr, folder / "site"

    return build


@pytest.mark.soak
def test_the_site_has_no_dead_link_and_fetches_nothing(build: Callable[[Path], tuple[int, str, Path]]) -> None:
    status, warnings, site = build(DOCS)
    assert status == 0, warnings
    pages = list(site.rglob("*.html"))
    assert len(pages) > 70
    for page in pages:
        fetched = [address for found in FETCHED.findall(page.read_text()) for address in found if address]
        assert any(address.endswith(".css") or ".css?" in address for address in fetched)
        assert [address for address in fetched if re.match(r"[\"']?(https?:)?//", address)] == [], page.name


@pytest.mark.soak
@pytest.mark.parametrize("link", ["#no-such-place", "none.md", "other.md#none"])
def test_a_link_that_leads_nowhere_fails_the_build(
    build: Callable[[Path], tuple[int, str, Path]], tmp_path: Path, link: str
) -> None:
    (tmp_path / "index.md").write_text(f"# Pages\n\n## Begin\n\n- [Other](other.md)\n\n[x]({link})\n")
    (tmp_path / "other.md").write_text("# Other\n")
    status, warnings, _ = build(tmp_path)
    assert status != 0 and link.rpartition("#")[2] in warnings


@pytest.mark.soak
def test_a_page_that_nobody_lists_fails_the_build(
    build: Callable[[Path], tuple[int, str, Path]], tmp_path: Path
) -> None:
    (tmp_path / "index.md").write_text("# Pages\n")
    (tmp_path / "other.md").write_text("# Other\n")
    status, warnings, _ = build(tmp_path)
    assert status != 0 and "other.md" in warnings
