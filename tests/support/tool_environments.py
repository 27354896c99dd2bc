"""Other people's servers and tools, which our releases and views are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.toolenv import environment


def tool_python(*requirements: str) -> Path:
    """The interpreter of an environment that has exactly these. Skips the test where pip cannot get them.

    requirements: `name==version`; the first one is the tool.
    """
    try:
        return environment(requirements[0].partition("==")[0], requirements)
    except ServiceError as error:
        pytest.skip(str(error))
