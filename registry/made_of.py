"""Which files a release is made of beside its data, by content: source files, what the code opens, what is named.

Each has a name, which is its path from the project, absolute where it lies outside of the project's repository, and 16
digits of its hash.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchworker import situations
from torchworker.contract import OpenedFile
from train_and_ship.infra.file_hashes import FileHashes, Identity, identity_of
from train_and_ship.infra.provenance import SOURCES, CodeFile, code_files, code_fingerprint, editable_folders
from train_and_ship.registry.job.job import Job

ABSENT, ALTERED, FOREIGN = "", "altered", "foreign"
"""In the place of a hash: it was looked for and not there; it became another one while it was trained on; it is not
looked at, as only the release says that it was opened."""
DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Files:
    """Hashes by name."""

    code: Mapping[str, str] = field(default_factory=dict)
    """Source files, and libraries that the job ships."""
    opened: Mapping[str, str] = field(default_factory=dict)
    """What model.factory, the references and their imports read."""
    listed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Folder whose content they asked for, to the names of files with endings that they read there."""
    named: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By glob of `retrain.files`, and by name of `export.files`."""
    native: Sequence[str] = ()
    """Of what was opened, that which was opened below Python: by the model, or at the same time by somebody else."""

    def touched_again(self, paths: Sequence[str], project: Path) -> Files:
        """Without what was opened natively once and not when the model was built anew. paths: opened then, absolute."""
        again = {name_of(Path(path), project) for path in paths}
        gone = {name for name in self.native if name not in again}
        return replace(self, opened={name: sha for name, sha in self.opened.items() if name not in gone}, native=())


def files_of(job: Job, project: Path, hashes: FileHashes, sites: tuple[str, ...] = ()) -> tuple[str, Files]:
    """Fingerprint of the code, and what is known of the files before anything is run.

    Args:
        job: says which count.
        project: absolute folder.
        hashes: of the project's files.
        sites: where the environment of the job has its packages; empty for that of this process.
    """
    found = _code(job, project, sites)
    named = {
        pattern: {name_of(path, project): hashes.sha256(path)[:DIGITS] for path in _matching(pattern, project)}
        for pattern in job.retrain.files
        if not pattern.startswith("!")
    }
    for shipped in job.export.files:
        place = project / shipped
        paths = sorted(place.rglob("*")) if place.is_dir() else [place]
        named[shipped] = {name_of(path, project): hashes.sha256(path)[:DIGITS] for path in paths if path.is_file()}
    hashes.save()
    return code_fingerprint(found), Files(code={file.name: file.sha256[:DIGITS] for file in found}, named=named)


def with_opened(
    files: Files,
    job: Job,
    project: Path,
    hashes: FileHashes,
    opened: Sequence[OpenedFile],
    listed: Sequence[str],
    sites: tuple[str, ...] = (),
) -> Files:
    """The same with what training opened.

    Args:
        files: from before.
        job: what was trained.
        project: absolute folder.
        hashes: of the project's files.
        opened: as rank 0 saw it.
        listed: absolute folders.
        sites: as of `files_of`.
    """
    elsewhere = job.train.launcher.machines is not None
    packages, repository = [root for _, root in editable_folders(sites)], _repository(project)
    found: dict[str, str] = {}
    native = []
    for file in opened:
        path = Path(file.path)
        name = name_of(path, project)
        # Those of packages have names that are not of this machine.
        is_code = job.retrain.code is not None or name in files.code or any(map(path.is_relative_to, packages))
        if path.suffix in SOURCES and is_code:
            continue
        if (sha := _hash_of(file, hashes, elsewhere=elsewhere)) is None:
            continue
        if not path.is_relative_to(repository):
            hashes.note(path)
        found[name] = sha
        if file.native:
            native.append(name)
    hashes.save()
    read: dict[Path, set[str]] = {}
    for path in (Path(file.path) for file in opened):
        read.setdefault(path.parent, set()).add(path.suffix)
    folders = {}
    for folder in map(Path, listed):
        endings = read.get(folder, set()) - SOURCES
        if endings and (names := _with_endings(folder, endings)):
            folders[name_of(folder, project)] = names
    return replace(files, opened=found, listed=folders, native=native)


def files_now(before: Files, now: Files, project: Path, hashes: FileHashes, sites: tuple[str, ...] = ()) -> Files:
    """What is known now, with what a release has opened as it is now.

    The release may be another's, who would learn what this machine holds: beside files of the project and of packages
    that are installed in place, only those are looked at that a run here has opened, or that the job names.

    Args:
        before: the release's.
        now: as `files_of` says.
        project: absolute folder.
        hashes: of the project's files.
        sites: as of `files_of`.
    """
    ours = [_repository(project), *(root for _, root in editable_folders(sites))]
    named = {name: sha for files in now.named.values() for name, sha in files.items()}
    # One file or folder has any number of names, and is looked at once.
    read: dict[Identity, str] = {}
    opened = {}
    for name in before.opened:
        path = _path_of(name, project)
        known = any(map(path.is_relative_to, ours)) or hashes.has_noted(path)
        opened[name] = _now(path, hashes, read) if known else named.get(name, FOREIGN)
    for place, names in _folders(before.listed, project, ours[0]).items():
        for added in set(_with_endings(place, {Path(name).suffix for name in names})) - names:
            opened[name_of(place / added, project)] = _now(place / added, hashes, read)
    hashes.save()
    return replace(now, opened=opened, listed={})


def differences(before: Files, now: Files, job: Job, project: Path) -> list[str]:
    """In words, each file once: `mypkg/edge.py added`.

    Args:
        before: the release's.
        now: from `files_now`.
        job: as it is now; what it does not count is no difference.
        project: absolute folder.
    """
    said: dict[str, str] = {}
    code = {name: sha for name, sha in before.code.items() if _counts_as_code(name, job, project)}
    said |= _compared(code, now.code)
    taken_out = [pattern[1:] for pattern in job.retrain.files if pattern.startswith("!")]
    for name, how in _compared(before.opened, now.opened).items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in taken_out):
            said.setdefault(name, how)
    for pattern, files in now.named.items():
        if pattern not in before.named:
            said[pattern] = "was not looked at before"
        else:
            said |= _compared(before.named[pattern], files)
    return [f"{name} {how}" for name, how in said.items()]


def _compared(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in sorted({*before, *now}):
        earlier, later = before.get(name, ABSENT), now.get(name, ABSENT)
        if earlier == ALTERED:
            found[name] = "changed while it was trained on"
        elif earlier != later:
            added = str(situations.READ_BY_THE_MODEL)
            if later == FOREIGN:
                found[name] = "is not looked at: no run here has opened it, and retrain.files does not name it"
                continue
            found[name] = added if earlier == ABSENT else "removed" if later == ABSENT else "changed"
    return found


def name_of(path: Path, project: Path) -> str:
    """How a file is called in a release, whichever machine it is made on."""
    # Not relative to a project that is no repository: who knows where it is the next time.
    return Path(os.path.relpath(path, project)).as_posix() if path.is_relative_to(_repository(project)) else str(path)


def _repository(project: Path) -> Path:
    return next((folder for folder in (project, *project.parents) if (folder / ".git").exists()), project)


def _path_of(name: str, project: Path) -> Path:
    return Path(os.path.normpath(project / name))


def _code(job: Job, project: Path, sites: tuple[str, ...]) -> list[CodeFile]:
    only = None if job.retrain.code is None else [_path_of(name, project) for name in job.retrain.code]
    return code_files(project, [project / library for library in job.export.libraries], only, sites)


def _counts_as_code(name: str, job: Job, project: Path) -> bool:
    if job.retrain.code is None or name in job.export.libraries:
        return True
    path = _path_of(name, project)
    return ": " not in name and any(path.is_relative_to(_path_of(only, project)) for only in job.retrain.code)


def _matching(pattern: str, project: Path) -> Iterator[Path]:
    for found in sorted(glob.glob(os.path.join(project, pattern), recursive=True)):  # noqa: PTH118, PTH207
        if (path := Path(os.path.normpath(found))).is_file() and "__pycache__" not in path.parts:
            yield path


def _with_endings(folder: Path, endings: set[str]) -> list[str]:
    """Sorted; none of a folder that is not there, or cannot be looked into."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in endings and path.is_file())
    except (OSError, ValueError):
        return []


def _folders(listed: Mapping[str, Sequence[str]], project: Path, repository: Path) -> dict[Path, set[str]]:
    """The folders of the repository among these, each once, to all names of files that a release had there."""
    places: dict[Identity, Path] = {}
    found: dict[Path, set[str]] = {}
    for folder, names in listed.items():
        place = _path_of(folder, project)
        if place.is_relative_to(repository):
            with contextlib.suppress(OSError, ValueError):
                found.setdefault(places.setdefault(_identity(place), place), set()).update(names)
    return found


def _now(path: Path, hashes: FileHashes, read: dict[Identity, str]) -> str:
    """read: hashes of files that were looked at before, which is added to."""
    try:
        identity = _identity(path)
        if identity not in read:
            read[identity] = hashes.sha256(path)[:DIGITS]
        return read[identity]
    except (OSError, ValueError):
        # Not there, or nothing that can be there: a release may name anything.
        return ABSENT


def _identity(path: Path) -> Identity:
    found = path.stat()
    return found.st_dev, *identity_of(found)


def _hash_of(file: OpenedFile, hashes: FileHashes, *, elsewhere: bool) -> str | None:
    """None for one that this machine does not have, where another one has trained."""
    path = Path(file.path)
    if not file.identity:
        return ABSENT
    try:
        identity = identity_of(path.stat())
        sha256 = hashes.sha256(path)
    except OSError:
        return None if elsewhere else ALTERED
    # Of one file two machines may see other inodes.
    same = identity[1:3] == tuple(file.identity[1:3]) if elsewhere else identity == tuple(file.identity)
    return sha256[:DIGITS] if same else ALTERED
