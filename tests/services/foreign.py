"""Other people's servers and tools, each in an environment of its own, kept in the user's cache folder.

They are what our releases and views are held against. Their dependencies conflict with ours, or are many, so none of
them is in this project's environment.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@functools.cache
def tool_python(*requirements: str) -> Path:
    """The interpreter of an environment that has exactly these, made on first use.

    requirements: `name==version`. Skips the test where pip cannot get them.
    """
    name = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    first = requirements[0].replace("==", "-")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-and-ship" / f"{first}-{name}"
    python = home / "bin" / "python"
    home.parent.mkdir(parents=True, exist_ok=True)
    # Another run of the tests may want the same.
    with home.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(home)
                pytest.skip(f"pip cannot install {' '.join(requirements)} here: {done.stderr.strip()[-300:]}")
            (home / "complete").touch()
    return python
