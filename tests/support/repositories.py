"""Repositories of git that tests write."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *words: str) -> str:
    """What a command of git says there, with a person's name and no configuration of the machine."""
    who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path, *, add: bool = True) -> Path:
    """Make one of what lies there, committed."""
    git(folder, "init", "--quiet")
    if add:
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", "first")
    return folder
