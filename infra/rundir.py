"""Stage folders of a run: written in a work folder, completed by a manifest written last and one rename.

A folder that has its manifest is complete; running the stage again finds it, verifies every file by hash, and
does nothing. Anything else that lies there is left over from a death and is thrown away; a complete stage that is not
what it was any more is set aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torchworker.durable import rename_durably, set_aside
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.home import make_folder

MANIFEST = "STAGE.json"
RUN_ID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""What Prefect calls a flow run, and the name of the folder of one."""
COMPLETED = "timings.json"
"""In the folder of a run that came to its end."""
TORN = (ValueError, TypeError, KeyError, AttributeError)
"""What reading half of a JSON document, or another one, raises."""
Kind = TypeVar("Kind")


class StageFolder:
    """One stage of one run."""

    def __init__(self, run: Path, name: str, inputs: str) -> None:
        """inputs: digest of everything the stage depends on; a complete stage with other inputs is redone."""
        self.path = run / name
        """Where the files are once the stage is complete."""
        self.work = run / f"{name}.work"
        """Where they are written until then."""
        self._inputs = inputs
        self._damaged = ""

    def is_complete(self) -> bool:
        """Whether the stage ended with these inputs and every file is still what it was."""
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            return False
        try:
            said = json.loads(manifest.read_bytes())
            same, files = said["inputs"] == self._inputs, said["files"]
        except TORN as error:
            self._damaged = f"{MANIFEST} cannot be read ({error}), and the stage is done again"
            return False
        if same and files != (found := _hashes(self.path)):
            wrong = min(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
            self._damaged = f"{wrong} is missing, added or changed, and the stage is done again"
        return bool(same and not self._damaged)

    def begin(self) -> Path:
        """An empty work folder."""
        if self._damaged and self.path.exists():
            set_aside(self.path, self._damaged)
        self._damaged = ""
        for leftover in (self.work, self.path):
            if leftover.exists():
                shutil.rmtree(leftover)
        make_folder(self.work.parent)
        self.work.mkdir()
        return self.work

    def finish(self) -> str:
        """Complete the stage; returns the digest that the next stage depends on."""
        table = {"inputs": self._inputs, "files": _hashes(self.work)}
        (self.work / MANIFEST).write_text(json.dumps(table, indent=1))
        rename_durably(self.work, self.path)
        return self.digest()

    def digest(self) -> str:
        """Hash of the complete stage's manifest."""
        return file_sha256(self.path / MANIFEST)


def read_kept(path: Path, decode: Callable[[bytes], Kind]) -> Kind | None:
    """What a file says that an earlier process left; a damaged one is set aside, with a warning, and says nothing.

    Args:
        path: of the file.
        decode: makes a value of its content. What it raises of TORN says that it is damaged.

    Returns:
        None where there is no file, or a damaged one.
    """
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except TORN as error:
        set_aside(path, f"it cannot be read ({type(error).__name__}: {error})")
        return None


def link_or_copy(source: str | Path, target: str | Path, least: int = 0) -> None:
    """Give a file that nobody changes any more another name, or a copy where it is on another file system.

    Args:
        source: the file.
        target: the name; what has it is replaced.
        least: bytes from which on a file gets another name; a smaller one is copied.
    """
    Path(target).unlink(missing_ok=True)
    if Path(source).stat().st_size >= least:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def is_run_id(text: str) -> bool:
    """Whether it is the id of a flow run, and no path: it becomes part of one."""
    return re.fullmatch(RUN_ID, text) is not None


def require_run_id(resume: str) -> None:
    """Raises JobError unless `resume` can be the id of a run; an empty one names none."""
    if resume and not is_run_id(resume):
        raise JobError(
            "resume: expected the id of a flow run, which is the name of its folder, such as "
            f"0932e559-aef2-4a0b-8800-1413436e53d9, got {resume!r}"
        )


def run_folder(runs: Path, flow_run_id: str, resume: str) -> Path:
    """The folder of this run, made when it is not there; or that of an earlier one. Raises JobError for no such run."""
    folder = runs / (resume or flow_run_id)
    if resume and (not is_run_id(resume) or folder.is_symlink() or not folder.is_dir()):
        known = sorted((path for path in runs.glob("*-*") if path.is_dir()), key=lambda path: -path.stat().st_mtime)
        names = ", ".join(path.name for path in known[:3])
        raise JobError(f"resume: expected the id of a run in {runs}, got {resume!r}; the last ones: {names or 'none'}")
    make_folder(folder)
    return folder
