"""What puts packages into an environment of somebody else's, and the torchworker that belongs there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torchworker
from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.job_environment import for_installing
from train_and_ship.infra.private import take_password

WHEELS = Path(__file__).parents[1] / "ship" / "wheels"
"""Carried by the tool's own wheel."""
MAY_CHANGE = ("torchworker", "python", "pip", "setuptools", "wheel")
"""What of an environment another version may take the place of: ours, and what installs."""
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def installing_environment() -> dict[str, str]:
    """Variables of a process that installs packages, which may run their code: it is kept from this process's secrets.

    Of Python's own what is for ours alone is left out.
    """
    take_password()
    return {name: value for name, value in for_installing(os.environ).items() if name != "PYTHONHOME"}


def installer(python: str) -> list[str]:
    """What installs packages for a Python: its own pip, else uv, which makes environments without one."""
    asked = [python, "-m", "pip", "--version"]
    if subprocess.run(asked, env=installing_environment(), capture_output=True, check=False).returncode == 0:
        return [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", python]
    raise RequestError(
        f"{python}: expected pip there, or uv on PATH, found neither; `{python} -m ensurepip` brings pip, or install "
        f"{', '.join(str(path) for path in WHEELS.glob('torchworker-*.whl')) or 'torchworker'} in your own way"
    )


@contextlib.contextmanager
def torchworker_wheel() -> Iterator[Path]:
    """The wheel of torchworker: the one that was carried here, or of a clone one that is built now."""
    # Of several, the one that this version of the tool was released with.
    if carried := sorted(WHEELS.glob(f"torchworker-{metadata.version('torchworker')}-*.whl")):
        yield carried[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        # A copy: building in place leaves a build folder behind.
        left_out = shutil.ignore_patterns("__pycache__", "build")
        source = shutil.copytree(Path(torchworker.__file__).parent, Path(folder, "torchworker"), ignore=left_out)
        done = subprocess.run(
            [sys.executable, "-c", BUILD, folder], cwd=source, env=installing_environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise RequestError(f"torchworker cannot be built from {torchworker.__file__}: expected setuptools: {last}")
        yield next(Path(folder).glob("torchworker-*.whl"))
