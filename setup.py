"""The wheel of train-and-ship carries prefect.yaml and the wheels of `torchworker` and `shipreader`.

`ship worker install` puts the first of the two (train_and_ship/ship/wheels) into the environment of a project. All else
about the build is in pyproject.toml.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("torchworker", "shipreader")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


class BuildWithWheels(build_py):
    """Builds the two beside the modules."""

    def run(self) -> None:
        """Build; an editable install carries nothing, because its sources are there."""
        super().run()
        if self.editable_mode:
            return
        # What `ship up` deploys where there is no clone.
        shutil.copy("prefect.yaml", Path(self.build_lib, "train_and_ship"))
        wheels = Path(self.build_lib, "train_and_ship", "ship", "wheels").resolve()
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir(parents=True)
        for name in CARRIED:
            with tempfile.TemporaryDirectory() as folder:
                # A copy: building in place leaves a build folder behind, whose old files the next wheel would have.
                left_out = shutil.ignore_patterns("__pycache__", "build")
                source = shutil.copytree(name, Path(folder, name), ignore=left_out)
                subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=source, check=True)


setup(cmdclass={"build_py": BuildWithWheels})
