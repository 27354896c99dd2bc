"""The folder of all local state, `.ship`: its owner's alone from its first file on."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from train_and_ship.infra.durable import sync

NAME = ".ship"
"""Of the folder, unless SHIP_HOME names another one."""


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it that are missing; the home among them for its owner alone. Raises OSError."""
    missing = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        missing.append(place)
    for place in reversed(missing):
        # The mode goes with the call: a moment in which others may look in is enough for them.
        place.mkdir(mode=0o700 if _is_home(place) else 0o777, exist_ok=True)
        sync(place.parent)
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
