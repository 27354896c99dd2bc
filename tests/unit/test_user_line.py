"""Which lines an error names: theirs, and beside it the one of the library that they called."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchworker.process import failure
from torchworker.process.failure import user_line

LIBRARY = "import torch\ndef encode(x):\n    return deeper(x)\ndef deeper(x):\n    return torch.cat([x, 'text'])\n"
MODEL = "def forward(call, x):\n    return call(x)\n"


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """`forward` of a project's folder and `encode` of an installed library."""
    torchs = failure.LIBRARIES
    monkeypatch.setattr(failure, "LIBRARIES", (str(tmp_path / "site"), *torchs))
    found = {}
    for name, file, text in (("forward", "mine/model.py", MODEL), ("encode", "site/bert/model.py", LIBRARY)):
        path = tmp_path / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
        found[name] = runpy.run_path(str(path))[name]
    return found


def told(call: Callable[[], Any], folder: Path) -> str:
    with pytest.raises(Exception) as caught:
        call()
    # Without the test's own frames.
    return user_line(caught.value.with_traceback(caught.tb.tb_next.tb_next), str(folder / "mine"))  # type: ignore[union-attr]


def test_a_line_of_a_library_is_named_beside_theirs_and_alone_where_there_is_none(
    functions: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    forward, encode, x = functions["forward"], functions["encode"], torch.ones(2)
    library = "in bert/model.py:5, in deeper: return torch.cat([x, 'text'])"
    assert told(lambda: forward(encode, x), tmp_path) == f" (model.py:2, in forward: return call(x); {library})"
    assert told(lambda: encode(x), tmp_path) == f" ({library})"


def test_lines_of_torch_are_not_named(functions: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 1)
    assert told(lambda: functions["forward"](layer, torch.ones(2)), tmp_path) == (
        " (model.py:2, in forward: return call(x))"
    )
    assert told(lambda: layer(torch.ones(2)), tmp_path) == ""
