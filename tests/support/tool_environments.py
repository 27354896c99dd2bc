"""Other people's servers and tools, which our releases and views are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.toolenv import environment


def tool_python(*requirements: str) -> Path:
    """The interpreter of an environment that has exactly these. Skips the test where pip cannot get them.

    requirements: `name==version`; the first one is the tool.
    """
    return tool_environment(requirements[0].partition("==")[0], requirements)


def tool_environment(name: str, requirements: Sequence[str]) -> Path:
    """The same under a name of its own."""
    try:
        return environment(name, requirements)
    except ServiceError as error:
        pytest.skip(str(error))
