"""The Python that runs the code of a job: the project's own, looked at before anything is started in it, or ours."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchworker.protocol import PROTOCOL, TORCH
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.job_environment import inherited
from train_and_ship.infra.private import take_password
from train_and_ship.infra.provenance import site_folders

OLDEST = (3, 11)
"""Of Python: what torchworker asks for."""
SECONDS = 60.0
"""An interpreter that says nothing for so long is none."""
MARK = "train-and-ship:"

# Also for interpreters of long ago, which have to be told from programs that are none.
ASK = f"""
import json, platform, sys
found = {{"version": platform.python_version(), "machine": sys.platform + " " + platform.machine()}}
if sys.version_info >= {OLDEST}:
    from importlib import metadata, util
    import site
    sys.path[:] = [entry for entry in sys.path if entry]
    sites = ([site.getusersitepackages()] if site.ENABLE_USER_SITE else []) + site.getsitepackages()
    found.update(prefix=sys.prefix, path=sys.path, sites=sites)
    dists = [item for item in metadata.distributions(name="torchworker")]
    found["workers"] = {{str(item.locate_file("")): item.version for item in dists}}
    found["torch"] = next((item.version for item in metadata.distributions(name="torch")), "")
    if util.find_spec("torchworker"):
        try:
            from torchworker.protocol import PROTOCOL
            found["protocol"] = PROTOCOL
        except Exception:
            found["protocol"] = 0
print("{MARK}" + json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python, and what of it matters here."""

    path: str
    """What is started; absolute. Of a virtual environment it is the link in there."""
    version: str
    machine: str
    """`linux x86_64`."""
    prefix: str = ""
    """Folder of its environment."""
    sites: tuple[str, ...] = ()
    """Folders where packages are installed, the user's own first."""
    places: tuple[str, ...] = ()
    """Where it looks for modules."""
    torch: str = ""
    """Version; empty when there is none."""
    workers: Mapping[str, str] = field(default_factory=dict)
    """Folder to the version of torchworker that is installed there."""
    protocol: int | None = None
    """Of its torchworker; 0 for one that has none, None when there is no torchworker."""

    @functools.cached_property
    def ours(self) -> bool:
        """Whether it is the environment of this process."""
        return os.path.realpath(self.prefix) == os.path.realpath(sys.prefix)

    def has(self, module: str) -> bool:
        """Whether a top-level module can be imported there."""
        if self.ours:
            return find_spec(module) is not None
        return PathFinder.find_spec(module, list(self.places)) is not None

    def facts(self) -> dict[str, str]:
        """For the record of what was made, or proven, with it."""
        worker = next(iter(self.workers.values()), "")
        return {"python": self.version, "platform": self.machine, "torch": self.torch, "torchworker": worker}


@functools.cache
def our_interpreter() -> Interpreter:
    """The one of this process."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return Interpreter(
        path=sys.executable,
        version=platform.python_version(),
        machine=f"{sys.platform} {platform.machine()}",
        prefix=sys.prefix,
        sites=tuple(site_folders()),
        places=tuple(sys.path),
        torch=version("torch"),
        workers={sysconfig.get_path("purelib"): version("torchworker")},
        protocol=PROTOCOL,
    )


@functools.cache
def look_at(path: str) -> Interpreter:
    """What a Python says of itself, asked once a process; ours is not started for it.

    Args:
        path: absolute.

    Raises JobError for what is no Python.
    """
    if Path(path).parent == Path(sys.executable).parent and os.path.realpath(path) == os.path.realpath(sys.executable):
        return our_interpreter()
    # It may be anybody's program, and runs as the same user as this process.
    take_password()
    try:
        done = subprocess.run(
            [path, "-c", ASK], cwd="/", env=environment_of_others(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise JobError(f"expected a Python, got {path}, which cannot be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise JobError(f"expected a Python, got {path}, which says nothing within {SECONDS:.0f} s") from None
    said = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    try:
        found: dict[str, Any] = json.loads(said[-1])
        # Whatever has said it may have said anything.
        if not re.match(r"\d+\.\d+(\.|$)", found["version"]):
            raise ValueError(found["version"])
        protocol = found.get("protocol")
        return Interpreter(
            path=path,
            version=found["version"],
            machine=str(found["machine"]),
            prefix=str(found.get("prefix", "")),
            sites=tuple(map(str, found.get("sites", ()))),
            places=tuple(map(str, found.get("path", ()))),
            torch=str(found.get("torch", "")),
            workers={str(folder): str(version) for folder, version in found.get("workers", {}).items()},
            protocol=None if protocol is None else int(protocol),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        told = (done.stderr or done.stdout).strip().splitlines()
        last = f": {told[-1]}" if told else ""
        raise JobError(f"expected a Python, got {path}, which ended with {done.returncode} and is none{last}") from None


def environment_of_others() -> dict[str, str]:
    """Variables of a process under another Python than ours: where our standard library is, is not for it."""
    return {name: value for name, value in inherited(os.environ).items() if name != "PYTHONHOME"}


def problem_of(found: Interpreter) -> str:
    """Why the code of a job cannot run there, and what to do; empty when it can. The two sides have to be of one
    protocol, whichever is older."""
    install = f"`ship worker install --python {found.path}`"
    if old := too_old(found):
        return old
    if len(set(found.workers.values())) > 1:
        several = ", ".join(f"{version} in {folder}" for folder, version in sorted(found.workers.items()))
        return (
            f"it has several versions of torchworker on its path, and which one is loaded is chance: {several}; "
            f"uninstall all but one (`{found.path} -m pip uninstall torchworker`), then {install}"
        )
    if not found.torch:
        return (
            f"it has no torch: install the build for your machine there, then {install}; or that alone, which takes "
            "the newest torch that fits from your package index"
        )
    low, high = (".".join(map(str, part)) for part in TORCH)
    if not TORCH[0] <= _two(found.torch) < TORCH[1]:
        return f"its torch is {found.torch}: expected {low} or newer, and older than {high}"
    if found.protocol is None:
        return f"it has no torchworker, which runs the code of a job there: {install}"
    if found.protocol != PROTOCOL:
        age = "an older" if found.protocol < PROTOCOL else "a newer"
        version = next(iter(found.workers.values()), "")
        newer = "" if found.protocol < PROTOCOL else ", or install a newer train-and-ship"
        return (
            f"it has {age} torchworker than this train-and-ship understands ({version or 'version unknown'}, protocol "
            f"{found.protocol or 'none'}; expected protocol {PROTOCOL}): {install} puts the right one there{newer}"
        )
    return ""


def too_old(found: Interpreter) -> str:
    """What is said of a Python that torchworker does not run under; empty for one that it does."""
    if tuple(int(part) for part in found.version.split(".")[:2]) >= OLDEST:
        return ""
    return f"Python {found.version} is too old: expected {OLDEST[0]}.{OLDEST[1]} or newer"


def _two(version: str) -> tuple[int, int]:
    """Major and minor of torch's version; (0, 0) for what is none."""
    try:
        major, minor = version.split("+")[0].split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return 0, 0
