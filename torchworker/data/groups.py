"""Which samples belong together, where the job says so: frames of a film, visits of a patient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchworker.contract import Project
from torchworker.process.failure import UserError, as_user_error
from torchworker.project.user_code import build_function, describe_tensor


def build_group(project: Project) -> Callable[[Any], str] | None:
    """group(item) -> the key of what an item of the dataset belongs to, as text; None where the job names none.

    Raises UserError, also when it is called and gives no whole number and no text.
    """
    if project.group is None:
        return None
    function = build_function(project.group, project)
    name = f"{project.group.where}: {project.group.target}"

    def group(item: Any) -> str:
        with as_user_error(f"{name} failed on an item, a {type(item).__name__}", project.folder):
            key = function(item)
        if isinstance(key, Tensor) or hasattr(key, "dtype"):
            key = key.item() if getattr(key, "shape", None) == () else key
        if isinstance(key, bool) or not isinstance(key, int | str):
            got = describe_tensor(key) if isinstance(key, Tensor) else type(key).__name__
            raise UserError(f"{name} must return what an item belongs to as a whole number or a text, got {got}")
        # 7 and "7" are two.
        return repr(key)

    return group


class SampleGroups:
    """Numbers the groups of samples in the order in which they are first seen; their keys are not kept in a file."""

    def __init__(self, project: Project) -> None:
        """project: names the function; raises UserError when it cannot be found."""
        self._group = build_group(project)
        self._seen: dict[str, int] = {}
        self.numbers: list[int] = []
        """Of each sample's group, from 0; empty where the job names no groups."""

    @property
    def known(self) -> bool:
        """Whether the job says what groups there are."""
        return self._group is not None

    def add(self, item: Any) -> None:
        """One sample as the dataset gives it. Raises UserError when its group cannot be told."""
        if self._group is not None:
            self.numbers.append(self._seen.setdefault(self._group(item), len(self._seen)))
