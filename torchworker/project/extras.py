"""Files that the user's code writes for whoever serves the model: `export.extras` of the job."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from torchworker.contract import Project
from torchworker.process.failure import UserError, as_user_error
from torchworker.project.user_code import resolve

_MODEL = "model"


def require_extras(project: Project) -> None:
    """Raises UserError unless what the job names can be called as it will be; it is not called."""
    if project.extras is not None:
        _find(project)


def write_extras(project: Project, model: nn.Module, folder: Path) -> None:
    """Have the files written into a new folder; nothing where the job names no function.

    Args:
        project: names the function.
        model: trained, for a function that has a parameter `model`.
        folder: is made.

    Raises:
        UserError: the function fails.
    """
    if project.extras is None:
        return
    function, more = _find(project)
    folder.mkdir()
    asked = ", ".join(["folder", *(f"{name}=…" for name in more)])
    what = f"{project.extras.where}: {project.extras.target}({asked}) failed"
    with as_user_error(what, project.folder, (Exception, SystemExit)):
        function(folder, **dict.fromkeys(more, model))


def _find(project: Project) -> tuple[Callable[..., Any], list[str]]:
    """The function, and what it is given by name."""
    assert project.extras is not None, "asked before"
    function = resolve(project.extras, project)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Of what is written in C nothing is known.
        return function, []
    more = [_MODEL] if _MODEL in signature.parameters else []
    try:
        signature.bind(None, **dict.fromkeys(more))
    except TypeError as error:
        asked = ", ".join(["folder", *(f"{name}=…" for name in more)])
        raise UserError(
            f"{project.extras.where}: {project.extras.target} is called as "
            f"{project.extras.target.rpartition(':')[2]}({asked}), but takes {signature}: {error}"
        ) from None
    return function, more
