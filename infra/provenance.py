"""What code and which packages a run used."""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import os
import platform
import site
import socket
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import unquote, urlsplit

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.git import ask_git
from train_and_ship.infra.project_archive import archive_of
from train_and_ship.infra.rundir import file_sha256


def git_commit(folder: Path) -> str:
    """The commit of the folder's repository, with `-dirty` when it has changes; `none` outside a repository.

    Of a project that was deployed, as it was where that was done.
    """
    if (about := archive_of(folder)) is not None:
        return about.commit
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return "none"
    return f"{head}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else head


def project_place(folder: Path) -> dict[str, str]:
    """`repository`, by the last part of its origin's address, and `folder`, the path below its root; what git tells.

    Forks, mirrors and clones have both in common, and two projects of one repository differ in the folder. Of a project
    that was deployed, as it was where that was done.
    """
    if (about := archive_of(folder)) is not None:
        return about.place
    origin = without_password(_git(folder, "config", "--get", "remote.origin.url"))
    found = {"repository": origin.rstrip("/").replace(":", "/").rpartition("/")[2].removesuffix(".git")}
    if _git(folder, "rev-parse", "--is-inside-work-tree") == "true":
        found["folder"] = _git(folder, "rev-parse", "--show-prefix").rstrip("/") or "."
    return {name: said for name, said in found.items() if said}


def git_folder(folder: Path) -> str:
    """The absolute folder in which git keeps the repository, which all its worktrees share; empty outside of one."""
    return _git(folder, "rev-parse", "--path-format=absolute", "--git-common-dir")


def _git(folder: Path, *arguments: str) -> str:
    return ask_git(folder, *arguments).strip()


def environment_lock(sites: tuple[str, ...] = (), python: str = "") -> list[str]:
    """`name==version` of every installed distribution, sorted, as `pip freeze` would say, and of Python itself.

    Args:
        sites: where an environment has its packages; empty for that of this process.
        python: version of its Python; empty for this one's.
    """
    found = {name: item.version for name, item in _installed(sites).items()}
    found["python"] = python or platform.python_version()
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _installed(sites: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """By name: what an environment has, where Python looks first. sites: as of `environment_lock`.

    Not what sys.path has by now: importing setuptools, for one, adds copies of a dozen packages that it brings along.
    """
    modules = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found: dict[str, metadata.Distribution] = {}
    for item in metadata.distributions(path=[*modules, *(sites or site_folders())]):
        if name := (item.metadata["Name"] or "").lower().replace("_", "-"):
            found.setdefault(name, item)
    return found


def installed_from(sites: tuple[str, ...] = ()) -> dict[str, str]:
    """`folder` or `file`, by name, of what came from this machine and no index. sites: as of `environment_lock`."""
    found = {}
    for name, item in _installed(sites).items():
        origin = json.loads(item.read_text("direct_url.json") or "{}")
        if origin.get("url", "").startswith("file:"):
            found[name] = "folder" if "dir_info" in origin else "file"
    return found


OURS = frozenset(["train-and-ship", "torchworker", "shipreader"])
SOURCES = frozenset([".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".pyx"])
_NOT_CODE = frozenset(["__pycache__", "node_modules", "site-packages"])


@dataclass(frozen=True)
class CodeFile:
    """One file of code."""

    name: str
    """For people: relative to the project, or behind the package that it is of."""
    inner: str
    """Relative to the folder that it was found in; empty for a file that was named alone."""
    sha256: str
    """Hexadecimal."""


def code_files(
    folder: Path, more: Iterable[Path] = (), only: Iterable[Path] | None = None, sites: tuple[str, ...] = ()
) -> list[CodeFile]:
    """The source files below a folder, those of editable installs, and `more` files.

    Code that is not used counts too: what a model imports late is not known before it runs. Hidden folders and virtual
    environments do not count, and neither does this application, whose version is in `environment_lock`.

    Args:
        folder: of the project, absolute.
        more: further files, which are named.
        only: files and folders that are all that counts beside `more`; None for everything.
        sites: as of `environment_lock`, for editable installs.
    """
    found = []
    if only is None:
        found += [_code_file(path, folder, "") for path in source_files(folder)]
        for name, root in editable_folders(sites):
            found += [_code_file(path, root, f"{name}: ") for path in source_files(root)]
    else:
        several = {path: None for place in only for path in ([place] if place.is_file() else source_files(place))}
        found += [_code_file(path, folder, "") for path in several]
    return found + [CodeFile(os.path.relpath(path, folder), "", file_sha256(path)) for path in more]


def _code_file(path: Path, root: Path, before: str) -> CodeFile:
    inner = Path(os.path.relpath(path, root)).as_posix()
    return CodeFile(before + inner, inner, file_sha256(path))


def code_fingerprint(files: Iterable[CodeFile]) -> str:
    """16 hexadecimal digits over files of code."""
    digest = hashlib.sha256()
    for file in files:
        if file.inner:
            digest.update(f"{file.inner}\n".encode())
        digest.update(bytes.fromhex(file.sha256))
    return digest.hexdigest()[:16]


def source_files(folder: Path) -> Iterator[Path]:
    """Files of code below a folder, but for hidden folders and virtual environments; in each folder sorted by name."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _NOT_CODE and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(files) if Path(name).suffix in SOURCES)


@functools.cache
def editable_folders(sites: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """Packages that are installed in place, whose version says nothing, and their sources. sites: as of
    `environment_lock`."""
    found = []
    for name, item in _installed(sites).items():
        origin = json.loads(item.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and name not in OURS:
            found.append((name, Path(unquote(urlsplit(origin["url"]).path))))
    return sorted(((name, folder) for name, folder in found if folder.is_dir()), key=lambda item: item[1])


def is_library(module: str, folder: Path) -> bool:
    """Whether a top-level module is Python's or an installed package's, and so nobody's code of the project.

    What the folder has by this name comes first, as it does for Python. A package that was installed from a folder of
    its sources (`pip install .`, `pip install -e .`) is somebody's own.
    """
    found = PathFinder.find_spec(module, [str(folder), *sys.path])
    if found is None:
        return module in sys.builtin_module_names
    places = list(found.submodule_search_locations or []) or [found.origin or ""]
    roots = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")] + site_folders()
    if not all(any(Path(place).is_relative_to(root) for root in roots) for place in places):
        return False
    return module not in _installed_from_folders()


def _installed_from_folders() -> set[str]:
    """Top-level modules of packages whose sources are in a folder of this machine (PEP 610)."""
    modules: set[str] = set()
    for place in site_folders():
        for origin in Path(place).glob("*.dist-info/direct_url.json"):
            if "dir_info" in json.loads(origin.read_text()):
                files = metadata.PathDistribution(origin.parent).files or []
                modules |= {file.parts[0].removesuffix(".py") for file in files}
    return modules


def site_folders() -> list[str]:
    """Where this process's packages are installed, the user's own folder first."""
    return [*([site.getusersitepackages()] if site.ENABLE_USER_SITE else []), *site.getsitepackages()]


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
