"""The power goes off at every operation of a run on its folder: what was said to be done is there, and the rest begins
again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.power_cut import Left, State, cut_everywhere
from train_and_ship.infra.rundir import StageFolder, read_kept, run_folder

STAGES = ("train", "export")
RUN = """
import os, sys
from pathlib import Path
from tests.support.power_cut import promise
from torchworker.durable import write_durably
from train_and_ship.infra.rundir import StageFolder, run_folder

home = Path(sys.argv[1])
folder = run_folder(home / "runs" / "digits", "a-b", "")
write_durably(folder / "begun", b"2026-11-30")
promise(home, "begun")
for name in ("train", "export"):
    stage = StageFolder(folder, name, inputs=name)
    assert not stage.is_complete()
    work = stage.begin()
    (work / "weights").write_bytes(name.encode() * 1000)
    (work / "files").mkdir()
    os.link(work / "weights", work / "files" / "weights")
    with (work / "events.jsonl").open("a") as events:
        events.write(name)
    stage.finish()
    promise(home, name)
write_durably(folder / "begun", b"2026-12-01")
promise(home, "again")
"""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    return cut_everywhere(RUN, tmp_path_factory.mktemp("power") / "home")


def test_what_a_run_has_completed_is_there_after_a_power_cut_and_all_else_is_done_again(
    states: list[State], tmp_path: Path
) -> None:
    for number, state in enumerate(states):
        folder = run_folder(state.put(tmp_path / str(number)) / "runs" / "digits", "a-b", "")
        begun = read_kept(folder / "begun", bytes.decode)
        assert begun in ({"2026-12-01"} if "again" in state.promised else {"2026-11-30", "2026-12-01"}) or (
            begun is None and "begun" not in state.promised
        ), state
        for name in STAGES:
            stage = StageFolder(folder, name, inputs=name)
            complete = stage.is_complete()
            assert complete or name not in state.promised, state
            if not complete:
                (stage.begin() / "weights").write_bytes(name.encode() * 1000)
                stage.finish()
            assert stage.is_complete() and (stage.path / "weights").read_bytes() == name.encode() * 1000, state


def test_the_states_are_those_that_matter(states: list[State]) -> None:
    """Or the test above shows nothing: a stage of which only the name, or half of the content, is on the disk."""
    trees = {left: [dict(state.tree) for state in states if state.left == left] for left in Left}
    whole = b"train" * 1000
    at = "runs/digits/a-b/train.work/weights"
    found = {left: {tree.get(at, "nothing") for tree in trees[left]} for left in Left}
    assert found[Left.NOTHING] == {"nothing"}
    assert found[Left.NAMES] >= {"nothing", b""} and found[Left.HALF] >= {whole[: len(whole) // 2]}
    assert any("runs/digits/a-b/train/weights" in tree for tree in trees[Left.NOTHING])


def test_what_is_renamed_and_not_synced_is_lost_or_empty(tmp_path: Path) -> None:
    """The test of the test: the library sees what a careless program loses."""
    careless = """
import sys
from pathlib import Path
from tests.support.power_cut import promise
folder = Path(sys.argv[1])
(folder / "it.part").write_text("content")
(folder / "it.part").rename(folder / "it")
promise(folder, "it")
"""
    last = [state for state in cut_everywhere(careless, tmp_path / "folder") if "it" in state.promised]
    assert {state.left: dict(state.tree).get("it") for state in last} == {
        Left.NOTHING: None,
        Left.NAMES: b"",
        Left.HALF: b"cont",
        Left.ALL: b"content",
    }
