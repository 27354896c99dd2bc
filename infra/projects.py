"""Which project of this machine a model belongs to: two of one name would share runs, a deployment and releases.

It is written down with the state of the stack when a person first runs, retrains or deploys the model. Two folders are
one project where git says so: clones of one repository, and its worktrees, by the folder below their top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torchworker.durable import write_durably
from train_and_ship.infra.errors import JobError, SettingsError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.provenance import git_folder, project_place

FILE = "projects.json"
"""In the home: model to `at`, the absolute folder of its project, and what git says of that."""


def claim(home: Path, model: str, project: Path) -> None:
    """From now on the model is that project's on this stack, unless it is another one's.

    Args:
        home: of the stack.
        model: name of the job.
        project: its folder, absolute.

    Raises:
        JobError: it is the model of another project, whose folder is still there.
        SettingsError: the list cannot be read.
    """
    known = _known(home)
    other = known.get(model)
    if other is not None and other["at"] == str(project):
        return
    mine = _of(project)
    if other is not None and not _same(other, mine) and Path(other["at"]).is_dir():
        raise JobError(
            f"name: {model} is the model of the project in {other['at']} on this stack ({home}), got the job of "
            f"another in {project}; they would share runs, deployment and releases. Give this one another `name`, or "
            "this project a stack of its own (`mkdir -m 700 .ship`, then `ship up`); where it has moved here for good, "
            f"take {model} out of {home / FILE}"
        )
    make_folder(home)
    write_durably(home / FILE, json.dumps({**known, model: mine}, indent=1).encode())


def _of(project: Path) -> dict[str, str]:
    place, repository = project_place(project), git_folder(project)
    return {"at": str(project), **place, **({"git": repository} if repository else {})}


def _same(one: Mapping[str, str], two: Mapping[str, str]) -> bool:
    alike = [name for name in ("repository", "git") if one.get(name) and one.get(name) == two.get(name)]
    return bool(alike) and one.get("folder") == two.get("folder")


def _known(home: Path) -> dict[str, dict[str, str]]:
    path = home / FILE
    try:
        found = {model: dict(of) for model, of in json.loads(path.read_text()).items()}
        if not all(isinstance(word, str) for of in found.values() for word in (of["at"], *of.values())):
            raise ValueError("something else than text")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path}: expected model to project as JSON, got {error!r}; delete it: the next runs write it again"
        ) from None
