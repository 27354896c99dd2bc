"""What code and which packages a run used."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import site
import socket
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit


def git_commit(folder: Path) -> str:
    """The commit of the folder's repository, with `-dirty` when it has changes; `none` outside a repository."""
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return "none"
    return f"{head}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else head


def project_place(folder: Path) -> dict[str, str]:
    """`repository`, by the last part of its origin's address, and `folder`, the path below its root; what git tells.

    Forks, mirrors and clones have both in common, and two projects of one repository differ in the folder.
    """
    origin = _git(folder, "config", "--get", "remote.origin.url")
    found = {"repository": origin.rstrip("/").replace(":", "/").rpartition("/")[2].removesuffix(".git")}
    if _git(folder, "rev-parse", "--is-inside-work-tree") == "true":
        found["folder"] = _git(folder, "rev-parse", "--show-prefix").rstrip("/") or "."
    return {name: said for name, said in found.items() if said}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment_lock() -> list[str]:
    """`name==version` of every installed distribution, sorted, as `pip freeze` would say, and of Python itself."""
    found = {name: item.version for name, item in _installed().items()}
    found["python"] = platform.python_version()
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _installed() -> dict[str, metadata.Distribution]:
    """By name: what this environment has, where Python looks first.

    Not what sys.path has by now: importing setuptools, for one, adds copies of a dozen packages that it brings along.
    """
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    modules = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found: dict[str, metadata.Distribution] = {}
    for item in metadata.distributions(path=[*modules, *user, *site.getsitepackages()]):
        if name := (item.metadata["Name"] or "").lower().replace("_", "-"):
            found.setdefault(name, item)
    return found


SOURCES = frozenset([".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".pyx"])
_NOT_CODE = frozenset(["__pycache__", "node_modules", "site-packages"])


def code_fingerprint(folder: Path, more: Iterable[Path] = ()) -> str:
    """16 hexadecimal digits over the source files below a folder, those of editable installs, and `more` files.

    Code that is not used counts too: what a model imports late is not known before it runs. Hidden folders and virtual
    environments do not count, and neither does this application, whose version is in `environment_lock`.
    """
    digest = hashlib.sha256()
    for root in [folder, *_editable_folders()]:
        for path in _sources(root):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    for path in more:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _sources(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _NOT_CODE and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(files) if Path(name).suffix in SOURCES)


def _editable_folders() -> list[Path]:
    """Sources of packages that are installed in place, whose version says nothing."""
    found = []
    for name, item in _installed().items():
        origin = json.loads(item.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and name != "train-and-ship":
            found.append(Path(unquote(urlsplit(origin["url"]).path)))
    return sorted(folder for folder in found if folder.is_dir())


def asked_by(why: str) -> str:
    """Who this process runs as, behind the reason when one is given."""
    return f"{why} ({who()})" if why else who()


def who() -> str:
    """The person and the machine that this process runs as: `ada@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
