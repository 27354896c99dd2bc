"""`make clean` deletes models and runs, so it asks first."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY


def clean(folder: Path, *words: str, answer: str | None = None) -> tuple[int, str]:
    """`make clean` in a folder that has the Makefile and a `.ship` only. answer: typed at a terminal; None for none."""
    shutil.copy(REPOSITORY / "Makefile", folder)
    (folder / ".ship").mkdir()
    typed, terminal = pty.openpty()
    if answer is not None:
        os.write(typed, f"{answer}\n".encode())
    given = subprocess.DEVNULL if answer is None else terminal
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CLEAN"))}
    done = subprocess.run(
        ["make", "clean", *words], cwd=folder, env=environment, stdin=given, capture_output=True, text=True, timeout=60
    )
    os.close(typed)
    os.close(terminal)
    return done.returncode, done.stdout + done.stderr


def test_make_clean_refuses_where_nobody_can_be_asked_and_says_the_word(tmp_path: Path) -> None:
    status, said = clean(tmp_path)
    assert status == 2 and "say make clean CLEAN=yes" in said and (tmp_path / ".ship").is_dir()


@pytest.mark.parametrize("answer", ["no", "", "y"])
def test_make_clean_deletes_nothing_unless_the_answer_is_yes(tmp_path: Path, answer: str) -> None:
    status, said = clean(tmp_path, answer=answer)
    assert status == 2 and "Type yes" in said and (tmp_path / ".ship").is_dir()


def test_make_clean_deletes_after_a_yes_at_the_terminal_or_by_the_word(tmp_path: Path) -> None:
    assert clean(tmp_path, answer="yes")[0] == 0 and not (tmp_path / ".ship").exists()
    assert clean(tmp_path, "CLEAN=yes")[0] == 0 and not (tmp_path / ".ship").exists()
