"""A project's files as one archive, the same bytes for the same files, for workers on other machines.

    project.json    what it is: model, job file, commit, Python
    lock.txt        the packages of the project's environment, where it has one of its own
    tree/…          the files that git knows, as they are now, and those that the job lists

Whoever unpacks one knows its hash, and takes files and links that stay inside, nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, TypeAdapter, ValidationError

from torchworker.durable import write_durably
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.git import ask_git

PROJECT, LOCK, TREE = "project.json", "lock.txt", "tree"
MOST_BYTES, MOST_FILES = 2 * 10**9, 100_000
"""Of the files of a project; data belongs into a snapshot."""
GIT_SECONDS = 60.0
"""To list the files of a large repository."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What an archive says of itself."""

    model: str
    job: str
    """The job file, relative to the tree."""
    commit: str
    """As of `git_commit`."""
    place: dict[str, str]
    """As of `project_place`, of the project's folder."""
    python: str = ""
    """Version of the Python whose packages the lock has, such as 3.11; empty without a lock."""
    format: int = 1
    __pydantic_config__ = ConfigDict(extra="forbid")


_ABOUT = TypeAdapter(About)


@dataclass(frozen=True)
class Found:
    """The files that make a project."""

    root: Path
    """Absolute; above the job file and the project's folder."""
    files: Sequence[str]
    """Relative to the root, sorted."""
    unknown: Sequence[str]
    """Those that git neither knows nor ignores, and the job does not list: they stay here."""


def find_files(job_file: Path, project: Path, listed: Sequence[str]) -> Found:
    """What git knows of the repository that holds a project, and what the job lists.

    Args:
        job_file: absolute.
        project: absolute folder.
        listed: files and folders, relative to the job file.

    Raises:
        JobError: there is no git and nothing is listed, or something is outside, missing, too many or too large.
    """
    named = [Path(os.path.normpath(job_file.parent / name)) for name in listed]
    top = ask_git(project, "rev-parse", "--show-toplevel").strip("\n")
    if not top and not named:
        raise JobError(
            f"{job_file}: expected a repository of git around {project}, whose files a worker is sent, found none; "
            "`git init` and `git add` make one, `deploy.files` lists files instead, and `ship deploy --in-place` has "
            "workers of this machine run the folder as it is"
        )
    folders = [job_file.parent, project, *(place.parent for place in named)]
    root = Path(top) if top else Path(os.path.commonpath(folders))
    known = (
        set(ask_git(root, "ls-files", "-z", "--recurse-submodules", seconds=GIT_SECONDS).split("\0")) - {""}
        if top
        else set()
    )
    known = {name for name in known if (root / name).is_symlink() or (root / name).is_file()}
    for name, place in zip(listed, named, strict=True):
        if not place.is_relative_to(root):
            raise JobError(f"{job_file}: deploy.files: expected a file or folder below {root}, got {name}")
        if not place.exists():
            raise JobError(f"{job_file}: deploy.files: expected a file or folder at {place}, found none")
        # Whoever reads a pipe waits for somebody to write.
        for one in (place, *_files_of(place)):
            if not (one.is_file() or one.is_dir() or one.is_symlink()):
                raise JobError(f"{job_file}: deploy.files: expected files and folders, got {one}, which is neither")
        known |= {file.relative_to(root).as_posix() for file in _files_of(place)}
    for place, what in ((job_file, "the job file"), (project, "the folder of the project")):
        if not place.is_relative_to(root):
            raise JobError(f"{job_file}: expected {what} below {root}, got {place}; a worker is sent one repository")
    if job_file.relative_to(root).as_posix() not in known:
        raise JobError(f"{job_file}: git does not know this file, so no worker would get it; `git add` it")
    _require_sound(job_file, root, known)
    others = (
        ask_git(root, "ls-files", "-z", "--others", "--exclude-standard", seconds=GIT_SECONDS).split("\0")
        if top
        else []
    )
    return Found(root, sorted(known), sorted(name for name in others if name and name not in known))


def pack(found: Found, about: About, lock: str) -> bytes:
    """The archive: a tar in gzip without times, owners and other modes than 644 and 755.

    Args:
        found: the files.
        about: what it says of itself.
        lock: lines as of pip's requirements; empty for none.
    """
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        own = {PROJECT: json.dumps(asdict(about), indent=1, sort_keys=True), **({LOCK: lock} if lock else {})}
        for name, text in own.items():
            _add(archive, name, text.encode(), executable=False)
        for name in found.files:
            path = found.root / name
            if path.is_symlink():
                link = tarfile.TarInfo(f"{TREE}/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, str(path.readlink())
                archive.addfile(link)
            else:
                _add(archive, f"{TREE}/{name}", path.read_bytes(), executable=os.access(path, os.X_OK))
    return packed.getvalue()


def unpack(archive: Path, folder: Path) -> About:
    """Unpack into a folder that is there and empty; what it says of itself.

    Raises JobError for anything but files and links that stay inside, for too much, and for another format.
    """
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in _sound(packed):
                if hasattr(tarfile, "data_filter"):
                    packed.extract(member, folder, filter="data")
                else:
                    # Before Python 3.11.4; what it would refuse is refused above.
                    packed.extract(member, folder)
        _require_inside(folder / TREE)
        return _about(folder, archive.name)
    except (tarfile.TarError, OSError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise JobError(f"{archive.name}: expected a project as `ship deploy` packs it, got {error}") from None


def read_about(folder: Path) -> About:
    """Of a project that was unpacked there. Raises JobError where it was not, or has been damaged since."""
    try:
        return _about(folder, str(folder))
    except (OSError, ValueError) as error:
        said = f"{folder}: expected a project that was unpacked there, got {error}"
        raise JobError(f"{said}; delete the folder") from None


def _about(folder: Path, where: str) -> About:
    """Raises OSError, ValueError or JobError where project.json is none, or what it names is not there."""
    try:
        text = (folder / PROJECT).read_text()
        said = json.loads(text)
    except RecursionError:
        raise ValueError(f"{PROJECT} with lists in lists without end") from None
    if isinstance(said, dict) and said.get("format") != 1:
        raise JobError(f"{where}: expected format 1, got {said.get('format')!r}; update train-and-ship here")
    try:
        about = _ABOUT.validate_json(text, strict=True)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"{PROJECT} in which {place or 'all'} is wrong: {error.errors()[0]['msg']}") from None
    job = PurePosixPath(about.job)
    if job.is_absolute() or ".." in job.parts or not (folder / TREE / job).is_file():
        raise JobError(f"{where}: expected a job file in it, got {about.job!r}")
    if about.python and not (folder / LOCK).is_file():
        raise JobError(f"{where}: expected {LOCK} in it, with the packages for Python {about.python}, found none")
    return about


def mark(folder: Path) -> None:
    """Say that all of it is there. The last thing that is written."""
    write_durably(folder / "COMPLETE", b"")


def is_complete(folder: Path) -> bool:
    """Whether a project was unpacked there to its end."""
    return (folder / "COMPLETE").is_file()


def unpacked_at(path: Path) -> Path | None:
    """The folder in which the project of a file or folder was unpacked; None where it was not."""
    inside = [place for place in (path, *path.parents) if place.name == TREE and is_complete(place.parent)]
    return inside[0].parent if inside else None


def archive_of(path: Path) -> About | None:
    """What is said of the project of a file or folder; None where none was unpacked."""
    folder = unpacked_at(path)
    return read_about(folder) if folder is not None else None


def sha256_of(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _add(archive: tarfile.TarFile, name: str, content: bytes, *, executable: bool) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o755 if executable else 0o644
    archive.addfile(member, io.BytesIO(content))


def _sound(packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    size, seen, links = 0, set(), set()
    for number, member in enumerate(packed, 1):
        size += member.size
        if number > MOST_FILES + 2 or size > MOST_BYTES:
            raise JobError(
                f"expected at most {MOST_FILES:,} files and {MOST_BYTES / 1e9:.0f} GB in the archive, got more"
            )
        path = PurePosixPath(member.name)
        own = member.name in (PROJECT, LOCK)
        if not own and (path.parts[0] != TREE or len(path.parts) < 2 or ".." in path.parts):
            raise JobError(f"expected {PROJECT}, {LOCK} and files of {TREE}/ in the archive, got {member.name!r}")
        if not (member.isreg() or (member.issym() and not own)):
            raise JobError(f"{member.name}: expected a file or a link in the archive, got something else")
        if any(above in links for above in path.parents):
            raise JobError(f"{member.name}: expected a file of the archive, got one behind a link")
        if member.issym():
            links.add(path)
            target = os.path.normpath(path.parent / member.linkname)
            if member.linkname.startswith("/") or not Path(target).is_relative_to(TREE):
                raise JobError(f"{member.name}: expected a link that stays inside, got one to {member.linkname!r}")
        if member.name in seen:
            raise JobError(f"{member.name}: expected each file once in the archive, got it twice")
        seen.add(member.name)
        yield member


def _require_inside(tree: Path) -> None:
    """Raises JobError for a link that leads out, as it may through others, whatever its words say."""
    top = Path(os.path.realpath(tree))
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(top):
                raise JobError(f"{path.relative_to(tree)}: expected a link that stays inside, got {path.readlink()}")


def _files_of(place: Path) -> Iterator[Path]:
    if place.is_symlink() or place.is_file():
        yield place
        return
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*files, *links]))


def _require_sound(job_file: Path, root: Path, names: Iterable[str]) -> None:
    sizes: dict[str, int] = {}
    for name in names:
        path = root / name
        if path.is_symlink():
            # Through other links, which the words of this one do not say.
            target = Path(os.path.realpath(path))
            if path.readlink().is_absolute() or not target.is_relative_to(os.path.realpath(root)):
                raise JobError(f"{job_file}: {path} is a link that leads out of {root}, where no worker can follow it")
        else:
            sizes[name] = path.stat().st_size
    if len(sizes) > MOST_FILES or sum(sizes.values()) > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise JobError(
            f"{job_file}: expected a project of at most {MOST_FILES:,} files and {MOST_BYTES / 1e9:.0f} GB, got "
            f"{len(sizes):,} files and {sum(sizes.values()) / 1e9:.1f} GB ({', '.join(largest)}, …); data goes into a "
            "snapshot (`ship snapshot`)"
        )
