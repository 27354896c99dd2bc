"""Folders whose jobs a worker runs, as its owner named them: a deployment may name any file of the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torchworker.durable import write_durably
from train_and_ship.infra.errors import JobError, SettingsError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.settings import Settings

WORKER = "SHIP_WORKER"
"""Set for the worker of the local stack, and so for its runs."""
MORE = "SHIP_JOB_FOLDERS"
FILE = "job-folders.json"
"""In the home."""


def add_job_folder(home: Path, folder: Path) -> None:
    """From now on the worker of this home runs the jobs in a folder and below it. Only for what its owner typed.

    Raises SettingsError when the list of the folders so far cannot be read, OSError when it cannot be written.
    """
    known, added = _kept(home), str(folder.resolve())
    if added not in known:
        make_folder(home)
        write_durably(home / FILE, json.dumps([*known, added], indent=1).encode())


def require_job_folder(job: Path) -> None:
    """Raises JobError when a worker is asked for a job outside the folders of its owner; before the job is opened.

    What a person runs in a shell, without a worker, is asked nothing; nor is what a worker of one's own runs, unless
    SHIP_JOB_FOLDERS is set for it. Raises SettingsError when the list cannot be read.
    """
    if not os.environ.get(WORKER) and not os.environ.get(MORE):
        return
    settings = Settings.load()
    folders = [Path(folder).resolve() for folder in settings.job_folders.split(os.pathsep) if folder]
    if os.environ.get(WORKER):
        folders += [Path(folder) for folder in _kept(settings.home)]
    # Wherever links lead: that is what would be read.
    place = job.resolve()
    if not any(place.is_relative_to(folder) for folder in folders):
        raise JobError(
            f"job: expected a file in a folder whose jobs this worker runs ({_listed(folders)}), got {place}. Its "
            f"owner adds one with `ship deploy {job}`, with `ship up` in it, or to {MORE}, `ship down` and `ship up`"
        )


def leave_worker() -> None:
    """What this process runs is what a person typed, whatever the environment says: no folder is asked for."""
    for variable in (WORKER, MORE):
        os.environ.pop(variable, None)


def _kept(home: Path) -> list[str]:
    path = home / FILE
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: expected a list of folders as JSON, got {error}; delete it, then `ship up`"
        ) from None
    return [str(folder) for folder in found] if isinstance(found, list) else []


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in dict.fromkeys(folders)) or "there is none"
