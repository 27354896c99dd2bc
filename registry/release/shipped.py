"""What a job ships beside its model: `export.files` of the project, and what `export.extras` has written."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from shipreader.records import FILES, LONGEST_PART, LONGEST_PATH, MANIFEST, MOST_PARTS, PICKLE_ENDINGS, stays_below
from torchworker.contract import EXTERNAL_DATA, FORMAT_FILES, GOLDEN, INT8_FILES, WEIGHTS
from train_and_ship.infra.errors import JobError, ReleaseError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.release.manifest import DATA, ENVIRONMENT, JOB, LINEAGE, VERDICTS
from train_and_ship.registry.release.pickles import Effort, find_pickle

MOST = 1_000
"""Files that a job may ship: each is an object in the bucket, in each view and in MLflow, and a download of its own."""
OWN = frozenset(
    {*FORMAT_FILES.values(), *INT8_FILES.values(), *(JOB, VERDICTS, LINEAGE, DATA, ENVIRONMENT, MANIFEST)}
    | {GOLDEN, WEIGHTS, FORMAT_FILES["onnx"] + EXTERNAL_DATA}
)
"""Names that files of every release have."""
_NOT_IN_ADDRESSES = "#%?"
"""MLflow's client puts names into addresses as they are."""


def project_files(project: Path, names: Sequence[str], model: str) -> dict[str, Path]:
    """What `export.files` names, by the path that each file has below `files/`, which is its path in the project.

    Args:
        project: absolute folder.
        names: files and folders in it, with / between their parts and no `..`.
        model: for messages.

    Raises:
        JobError: a name is not there, or is that of a file of every release; a link, a special file, an empty folder, a
            pickle, a name that cannot be a key, or more than `MOST` files.
    """
    what = f"{model}: export.files"
    found: dict[str, Path] = {}
    for name in names:
        path = project / name
        try:
            for place in [path, *path.parents][: len(PurePosixPath(name).parts)]:
                _require_no_link(place, what)
            there = path.exists()
        except OSError as error:
            raise JobError(f"{what}: {path} cannot be read: {error.strerror}") from None
        if not there:
            raise JobError(f"{what}: expected a file or folder {path}, found none")
        _add(found, path, name, what)
    return _sound(found, what)


def written_files(folder: Path, model: str) -> dict[str, Path]:
    """What `export.extras` has written, by the path that each file will have below `files/`. Raises as `project_files`.

    Args:
        folder: that it was given.
        model: for messages.
    """
    what = f"{model}: export.extras"
    found: dict[str, Path] = {}
    _require_no_link(folder, what)
    # It may have been taken away, or made a file.
    if not folder.is_dir() or not any(folder.iterdir()):
        raise JobError(f"{what}: expected it to write files into the folder that it is given, got none")
    _add(found, folder, "", what)
    return _sound(found, what)


def together(of_project: Mapping[str, Path], written: Mapping[str, Path], model: str) -> dict[str, Path]:
    """Both, by the path below `files/`.

    Args:
        of_project: of `project_files`.
        written: of `written_files`.
        model: for messages.

    Raises:
        JobError: both have a file of one name, or together more than `MOST`.
    """
    folders = {str(above) for name in of_project for above in PurePosixPath(name).parents}
    for name in written:
        above = {name, *map(str, PurePosixPath(name).parents)}
        if clash := sorted(above & of_project.keys()) or ([name] if name in folders else []):
            raise JobError(f"{model}: export.extras wrote {name}, and export.files has {clash[0]}; rename one of them")
    found = {**of_project, **written}
    if len(found) > MOST:
        raise JobError(f"{model}: export.files and export.extras: {_too_many(f'{len(found):,}')}")
    return found


# ---- below


def _add(found: dict[str, Path], path: Path, name: str, what: str) -> None:
    """Every file at or below a path, which is no link. name: of the path below `files/`; empty for `files/` itself."""
    pending = [(name, path)]
    while pending:
        name, path = pending.pop()
        try:
            if not path.is_dir():
                _require_regular(path, what)
                found[name] = path
                if len(found) > MOST:
                    raise JobError(f"{what}: {_too_many('more')}")
                continue
            inside = False
            with os.scandir(path) as entries:
                for entry in entries:
                    inside = True
                    _require_no_link(Path(entry.path), what)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((f"{name}/{entry.name}".lstrip("/"), Path(entry.path)))
                        if len(pending) > MOST:
                            raise JobError(f"{what}: {_too_many('more folders')}")
                    else:
                        _require_regular(Path(entry.path), what)
                        found[f"{name}/{entry.name}".lstrip("/")] = Path(entry.path)
                    if len(found) > MOST:
                        raise JobError(f"{what}: {_too_many('more')}")
        except OSError as error:
            raise JobError(f"{what}: {path} cannot be read: {error.strerror}") from None
        if not inside:
            raise JobError(
                f"{what}: expected files in the folder {path}, which is empty: a bucket holds files and no folders"
            )


def _too_many(got: str) -> str:
    return (
        f"expected at most {MOST:,} files, got {got}: each is an object in the bucket and a download of its own; put "
        "them into one archive, or ship a list of where they are"
    )


def _require_no_link(path: Path, what: str) -> None:
    if path.is_symlink():
        raise JobError(f"{what}: expected files, got the link {path}; name what it leads to, or copy that")


def _require_regular(path: Path, what: str) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise JobError(f"{what}: expected a regular file, got the special file {path}")


def _sound(found: Mapping[str, Path], what: str) -> dict[str, Path]:
    """The same, sorted. Raises JobError for names that cannot be keys, or are a release's own, and for pickles."""
    effort = Effort()
    for name, path in found.items():
        whole = f"{FILES}/{name}"
        fits = stays_below(whole) and len(whole.encode()) <= LONGEST_PATH
        if not fits or any(sign in name for sign in _NOT_IN_ADDRESSES):
            raise JobError(
                f"{what}: {on_one_line(str(path))}: expected a name of printable letters without \\ or any of "
                f"{_NOT_IN_ADDRESSES}, with at most {LONGEST_PATH - len(FILES) - 1} bytes, {MOST_PARTS - 1} parts and "
                f"{LONGEST_PART} bytes of each; rename it"
            )
        if name in OWN or name.startswith(f"{MANIFEST.partition('.')[0]}."):
            raise JobError(
                f"{what}: {path}: expected another name than that of a file that every release has, {name}: one would "
                "be taken for the other; rename it, or put it into a folder"
            )
        try:
            pickled = "it ends so" if name.lower().endswith(PICKLE_ENDINGS) else find_pickle(path, None, effort)
        except ReleaseError as error:
            raise JobError(f"{what}: {error}") from None
        except OSError as error:
            raise JobError(f"{what}: {path} cannot be read: {error.strerror}") from None
        if pickled is not None:
            raise JobError(
                f"{what}: {path}: expected no pickle in a release, got one ({pickled}): reading it runs code; save "
                "tensors as .safetensors, and what else there is as JSON"
            )
    return dict(sorted(found.items()))
