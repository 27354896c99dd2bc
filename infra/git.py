"""What git says of a folder, under an environment in which a repository's own commands are given nothing of ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from train_and_ship.infra.job_environment import for_git


def ask_git(folder: Path, *arguments: str, seconds: float = 10.0) -> str:
    """What a command of git prints there; empty where there is no git, no repository, or no answer.

    Args:
        folder: where it runs.
        arguments: of git.
        seconds: how long it may take.
    """
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=seconds, check=False,
            env=for_git(os.environ),
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
