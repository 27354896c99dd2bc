"""Of public architectures a run says nothing that is not so. `make public` asks; docs/public-models.md says what."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.public.architectures import ARCHITECTURES, Architecture
from tests.support.public.asking import ask

pytestmark = pytest.mark.public


@pytest.mark.parametrize("asked", ARCHITECTURES, ids=lambda item: f"{item.library}: {item.name}")
def test_nothing_is_said_of_a_public_architecture_that_is_not_so(asked: Architecture, tmp_path: Path) -> None:
    assert ask(asked, tmp_path).mistakes(asked) == []
