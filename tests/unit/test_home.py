"""Where the state of the local stack lies: one for all projects of a user, or a project's own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from train_and_ship.infra import home as homes
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.home import find_home, make_folder, users_home
from train_and_ship.infra.settings import Settings


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with nothing in it; the current one is a project in it."""
    monkeypatch.delenv("SHIP_HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work/shop/src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/shop/src")
    return tmp_path


def test_projects_without_a_stack_of_their_own_share_that_of_the_user(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = user / ".local/state/train-and-ship"
    assert Settings.load().home == shared
    monkeypatch.chdir(user)
    assert Settings.load().home == shared
    monkeypatch.setenv("XDG_STATE_HOME", str(user / "state"))
    assert Settings.load().home == user / "state/train-and-ship"
    # As the specification asks of relative ones.
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert Settings.load().home == shared


def test_the_nearest_stack_of_a_project_is_used_from_every_folder_below_it(user: Path) -> None:
    (user / "work/.ship").mkdir()
    assert Settings.load().home == user / "work/.ship"
    (user / "work/shop/.ship").mkdir()
    assert Settings.load().home == user / "work/shop/.ship"
    # A file of that name is none.
    (user / "work/shop/src/.ship").write_text("")
    assert Settings.load().home == user / "work/shop/.ship"


def test_ship_home_comes_before_both(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (user / "work/.ship").mkdir()
    monkeypatch.setenv("SHIP_HOME", "~/elsewhere")
    assert Settings.load().home == user / "elsewhere"


def test_the_folder_of_another_user_is_passed_over(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (user / "work/.ship").mkdir()
    monkeypatch.setattr(homes.os, "geteuid", lambda: os.getuid() + 1)
    assert find_home() == user / ".local/state/train-and-ship"


def test_a_user_without_a_home_is_told_what_to_set(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(homes.Path, "home", nobody)
    with pytest.raises(SettingsError, match=r"^HOME: expected .* set SHIP_HOME"):
        Settings.load()


def test_the_shared_folder_is_its_owners_alone_and_what_lies_above_it_is_not(user: Path) -> None:
    make_folder(users_home() / "logs")
    assert stat.S_IMODE(users_home().stat().st_mode) == 0o700
    assert stat.S_IMODE((user / ".local").stat().st_mode) & 0o700 == 0o700
    assert (users_home() / ".gitignore").read_text() == "*\n"
