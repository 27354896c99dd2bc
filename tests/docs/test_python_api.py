"""The script of docs/python-api.md is run as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY
from train_and_ship import api
from train_and_ship.infra.settings import Settings

PAGE = (REPOSITORY / "docs/python-api.md").read_text()


# It trains and ships.
@pytest.mark.soak
def test_the_script_works_beside_the_example_and_without_a_guard(stack: Settings, tmp_path: Path) -> None:
    script = re.search(r"^```python\n# ship_digits.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "ship_digits.py").write_text(script)
    shutil.copy(REPOSITORY / "examples/digits/digits.py", tmp_path)
    ended = subprocess.run(
        [sys.executable, "ship_digits.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"numerals release \w{20} is live on prod\n  run +http", ended.stdout), ended.stdout
    assert re.search(r"numerals prod: \d+ moves?\n", ended.stdout)


def test_each_call_and_each_exception_of_the_tables_is_public() -> None:
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert named - set(api.__all__) == set()
    functions = {name for name in api.__all__ if not isinstance(getattr(api, name), type)}
    assert functions <= named
