"""Stage folders of a run: written in a work folder, completed by a manifest written last and one rename.

A folder that has its manifest is complete; running the stage again finds it, verifies every file by hash, and
does nothing. Anything else that lies there is left over from a death and is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from train_and_ship.infra.errors import JobError
from train_and_ship.infra.home import make_folder

MANIFEST = "STAGE.json"
RUN_ID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""What Prefect calls a flow run, and the name of the folder of one."""


class StageFolder:
    """One stage of one run."""

    def __init__(self, run: Path, name: str, inputs: str) -> None:
        """inputs: digest of everything the stage depends on; a complete stage with other inputs is redone."""
        self.path = run / name
        """Where the files are once the stage is complete."""
        self.work = run / f"{name}.work"
        """Where they are written until then."""
        self._inputs = inputs

    def is_complete(self) -> bool:
        """Whether the stage ended with these inputs and every file is still what it was."""
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            return False
        said = json.loads(manifest.read_text())
        return bool(said["inputs"] == self._inputs and said["files"] == _hashes(self.path))

    def begin(self) -> Path:
        """An empty work folder."""
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
        self.work.rename(self.path)
        return self.digest()

    def digest(self) -> str:
        """Hash of the complete stage's manifest."""
        return file_sha256(self.path / MANIFEST)


def write_whole(path: Path, content: bytes) -> None:
    """Write by rename: a reader, and what is left after a kill, has all of it or what was there before."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


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
