"""What costs seconds to make is made once for all tests, and anew when what it is made of changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import made_once


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(made_once, "KEPT", tmp_path)
    return tmp_path


def test_of_many_who_ask_one_makes_it_and_all_get_it_whole() -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")

    def ask(_: int) -> set[str]:
        return {path.name for path in made_once.made_once("thing", ("1.0",), make).iterdir()}

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [{"one", "two"}] * 8
    assert len(made) == 1


def test_other_inputs_make_another_and_the_old_one_goes(kept: Path) -> None:
    for version in ("1.0", "2.0"):
        path = made_once.made_once("thing", (version,), lambda folder: (folder / "is").touch())
        assert (path / "is").exists()
    assert [path.name for path in kept.glob("thing-*")] == [path.name]


def test_one_that_could_not_be_made_leaves_nothing_and_is_tried_again(kept: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            made_once.made_once("thing", (), fail)
    assert [path.name for path in kept.iterdir()] == ["thing.lock"]
