"""Other people's programs in environments of their own, kept in the user's cache folder.

For what cannot live beside us because it pins other versions of the same packages. Made once for each list of
requirements, which should name versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.installing import installing_environment
from train_and_ship.infra.locks import locked

LOCK_SECONDS = 1800.0
"""For another process that installs the same."""


def cache_folder() -> Path:
    """Where environments and downloads are kept; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-and-ship"


def environment(name: str, requirements: Sequence[str], report: Callable[[str], None] = lambda line: None) -> Path:
    """The interpreter of an environment that has exactly these requirements; made on first use.

    Where they have hashes (`name==version --hash=sha256:…`), all of them need one, and pip takes no file with another
    one, whatever the index says.

    Args:
        name: what it is for.
        requirements: as pip writes them, one each.
        report: told before the first use, which may take minutes.

    Raises:
        ServiceError: pip cannot get them, or another process has been at it for half an hour.
    """
    key = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    home = cache_folder() / f"{name}-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    # Another process may want the same at the same time.
    with locked(home.parent / f"{home.name}.lock", f"setting up {name} in {home}", LOCK_SECONDS, report):
        python = home / "bin" / "python"
        if not (home / "complete").exists():
            report(f"setting up {name} in {home}, once")
            shutil.rmtree(home, ignore_errors=True)
            allowed = installing_environment()
            subprocess.run([sys.executable, "-m", "venv", str(home)], env=allowed, check=True)
            # Hashes are taken from a file only.
            asked = home / "requirements.txt"
            asked.write_text("\n".join(requirements) + "\n")
            hashes = ["--require-hashes"] if any("--hash" in line for line in requirements) else []
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *hashes]
            command = [*install, "--requirement", str(asked)]
            done = subprocess.run(command, env=allowed, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(home)
                raise ServiceError(f"{name}: pip cannot install it here: {done.stderr.strip()[-1000:]}")
            # Thousands of files: all at once.
            os.sync()
            (home / "complete").touch()
    return python
