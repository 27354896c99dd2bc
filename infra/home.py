"""The folder of all local state: its owner's alone from its first file on.

One for all projects of a user, below XDG_STATE_HOME; or one of a project's own, `.ship` in its folder or above it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from pathlib import Path

from torchworker.durable import make_folders, sync
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.git import ask_git

NAME = ".ship"
"""Of the folder of a project that has one of its own."""
USERS = "train-and-ship"
"""Of the one that all other projects share."""


def find_home() -> Path:
    """The nearest `.ship` in the current folder or above it, as git looks for `.git`; else the user's own.

    One that belongs to somebody else is not theirs to say where this user's runs go, so it is passed over. Raises
    SettingsError for one that came with a repository, and where there is no such folder and nobody says where this user
    is at home.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        # A folder that may not be looked into holds none of ours.
        with contextlib.suppress(OSError):
            place = folder / NAME
            if place.is_dir() and place.stat().st_uid == os.geteuid():
                _require_made_here(place)
                return place
    return users_home()


@functools.cache
def _require_made_here(place: Path) -> None:
    """Raises SettingsError for one whose files git tracks: whoever clones it owns it, and somebody else wrote it."""
    if tracked := ask_git(place.parent, "ls-files", "--", NAME).split("\n")[0]:
        raise SettingsError(
            f"{place}: expected a folder that was made on this machine, got one that git tracks ({tracked}), which "
            "could say what is run here; `git rm -r --cached .ship` where it is yours, else delete it, or set SHIP_HOME"
        )


def users_home() -> Path:
    """`train-and-ship` below XDG_STATE_HOME, by default `~/.local/state` (XDG Base Directory Specification 0.8)."""
    # A relative one has to be ignored, says the specification.
    if (state := Path(os.environ.get("XDG_STATE_HOME", ""))).is_absolute():
        return state / USERS
    try:
        return Path.home() / ".local/state" / USERS
    except RuntimeError:
        raise SettingsError(
            "HOME: expected the folder of this user, and neither the environment nor the system names one; set "
            "SHIP_HOME to a folder for the state of the local stack"
        ) from None


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it that are missing; the home among them for its owner alone. Raises OSError.

    git ignores a home that was made here.
    """
    for place in reversed((folder, *folder.parents)):
        if _is_home(place) and not place.is_dir():
            make_folders(place.parent)
            # The mode goes with the call: a moment in which others may look in is enough for them.
            place.mkdir(mode=0o700, exist_ok=True)
            (place / ".gitignore").write_text("*\n")
            sync(place.parent)
    make_folders(folder)
    return folder


def _is_home(folder: Path) -> bool:
    if folder.name == NAME:
        return True
    if named := os.environ.get("SHIP_HOME"):
        return folder.absolute() == Path(named).expanduser().absolute()
    return folder.name == USERS and folder.absolute() == users_home()


def open_to_others(home: Path) -> str:
    """Why the home is not safe, and what to do; empty when others cannot write there, or it does not exist."""
    try:
        mode = home.stat().st_mode
    except FileNotFoundError:
        return ""
    who = [name for name, bit in (("its group", stat.S_IWGRP), ("everybody", stat.S_IWOTH)) if mode & bit]
    if not who or mode & stat.S_ISVTX:
        return ""
    return (
        f"{home} can be written by {' and '.join(who)}: whoever can changes what is run, released and signed here; "
        f"chmod go-w {home}"
    )
