from __future__ import annotations

from pathlib import Path

import pytest

from tasks.cpp import cache_folder
from torchworker import cpp_build
from torchworker.contract import CppRequest


@pytest.fixture(scope="session")
def runner() -> Path:
    """The real C++ runner, built on the first use on a machine."""
    built = cpp_build.build(CppRequest(cache=str(cache_folder())))
    if not built.runner:
        pytest.skip(f"there is no C++ runner here: {built.reason}")
    return Path(built.runner)
