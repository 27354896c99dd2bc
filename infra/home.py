"""The folder of all local state, `.ship`: its owner's alone from its first file on."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from torchworker.durable import make_folders, sync

NAME = ".ship"
"""Of the folder, unless SHIP_HOME names another one."""


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
    named = os.environ.get("SHIP_HOME")
    return folder.name == NAME or (bool(named) and folder.absolute() == Path(str(named)).expanduser().absolute())


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
