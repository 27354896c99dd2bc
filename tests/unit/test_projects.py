"""Models of two projects on one stack keep apart, and one project may lie in many folders."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from train_and_ship.infra.errors import JobError, SettingsError
from train_and_ship.infra.projects import FILE, claim


def folder(path: Path, origin: str = "") -> Path:
    """A project, in a repository where it has an origin."""
    path.mkdir(parents=True)
    if origin:
        for words in (["init", "--quiet"], ["remote", "add", "origin", origin]):
            subprocess.run(["git", *words], cwd=path, check=True)
    return path


def test_the_name_of_another_projects_model_is_refused_with_three_ways_out(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "first"), folder(tmp_path / "second")
    home = tmp_path / "home"
    claim(home, "digits", first)
    claim(home, "digits", first)
    claim(home, "prices", second)
    with pytest.raises(JobError) as refused:
        claim(home, "digits", second)
    for part in (str(first), str(second), "another `name`", "mkdir -m 700 .ship", str(home / FILE)):
        assert part in str(refused.value)
    assert json.loads((home / FILE).read_text())["digits"]["at"] == str(first)


def test_a_project_that_moved_takes_its_models_along(tmp_path: Path) -> None:
    claim(tmp_path / "home", "digits", folder(tmp_path / "first"))
    shutil.move(tmp_path / "first", tmp_path / "second")
    claim(tmp_path / "home", "digits", tmp_path / "second")
    with pytest.raises(JobError, match="second"):
        claim(tmp_path / "home", "digits", folder(tmp_path / "third"))


@pytest.mark.parametrize("origin", ["https://git.example/team/shop.git", "git@git.example:team/shop"])
def test_clones_of_one_repository_are_one_project(tmp_path: Path, origin: str) -> None:
    claim(tmp_path / "home", "digits", folder(tmp_path / "first", "https://git.example/team/shop"))
    claim(tmp_path / "home", "digits", folder(tmp_path / "second", origin))
    other = folder(tmp_path / "third", "https://git.example/team/other")
    with pytest.raises(JobError):
        claim(tmp_path / "home", "digits", other)


def test_worktrees_are_one_project_and_two_folders_of_a_repository_are_two(tmp_path: Path) -> None:
    home, tree = tmp_path / "home", tmp_path / "tree"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path / "first")]
    folder(tmp_path / "first")
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"], ["worktree", "add", "-q", str(tree)]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    claim(home, "digits", tmp_path / "first")
    claim(home, "digits", tree)
    with pytest.raises(JobError):
        claim(home, "digits", folder(tree / "another"))


@pytest.mark.parametrize("content", ["[", "[]", '{"digits": {}}', '{"digits": {"at": 3}}', '{"digits": "x"}'])
def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(SettingsError, match=f"{FILE}: expected"):
        claim(tmp_path, "digits", folder(tmp_path / "first"))
