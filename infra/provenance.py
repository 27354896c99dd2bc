"""What code and which packages a run used."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from importlib import metadata
from pathlib import Path


def git_commit(folder: Path) -> str:
    """The commit of the folder's repository, with `-dirty` when it has changes; `none` outside a repository."""
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return "none"
    return f"{head}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else head


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment_lock() -> list[str]:
    """`name==version` of every installed distribution, sorted: what `pip freeze` would say."""
    found = {(item.metadata["Name"] or "").lower().replace("_", "-"): item.version for item in metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name]


def who() -> str:
    """The person and the machine that this process runs as: `ada@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
