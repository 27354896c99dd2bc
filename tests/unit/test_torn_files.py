"""Files as a power cut leaves them are set aside and kept; what they were needed for begins again, and no run ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shipreader.errors import ReaderError
from shipreader.local import LocalFolder, State
from shipreader.records import Pointer as ReadPointer
from torchworker.contract import CHECKPOINT, LAUNCHES, CppRequest, Launches
from torchworker.custom_loop.reporting import _read as read_journal
from torchworker.durable import DAMAGED, set_aside, write_durably
from torchworker.stages.cpp import RUNNER, build
from torchworker.training.checkpoint import _set_damaged_aside, complete, find_latest
from train_and_ship.infra.rundir import MANIFEST, StageFolder
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.run_folder import ABOUT, About, read_run, recorded_job, write_fact
from train_and_ship.tasks.decide import PLAN, _read_plan, _write_plan
from train_and_ship.tasks.launched import CURRENT, Attempt, _read
from train_and_ship.tasks.run import _begun

LIVE = Pointer(
    model="digits", channel="prod", generation=3, release="a" * 20, manifest_sha256="0" * 64, previous=None,
    nonce="n", moved_at="2026-11-24T10:00:00+00:00", moved_by="ada", reason="", flow_run="", mlflow_version="1",
)  # fmt: skip
READ = ReadPointer(
    model="digits", channel="prod", generation=3, release="a" * 20, manifest_sha256="0" * 64, nonce="n",
    moved_at="2026-11-24T10:00:00+00:00",
)  # fmt: skip
CUTS = pytest.mark.parametrize("cut", [0.0, 0.01, 0.5, 0.99], ids=["empty", "first bytes", "half", "all but the end"])


def tear(path: Path, cut: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: min(int(len(content) * cut) + (cut > 0), len(content) - 1)])


def aside(path: Path) -> Path:
    return path.with_name(path.name + DAMAGED)


# ---- runs


@CUTS
def test_a_stage_whose_manifest_is_torn_is_kept_aside_and_made_again(tmp_path: Path, cut: float) -> None:
    stage = StageFolder(tmp_path, "train", inputs="a")
    (stage.begin() / "weights").write_text("1")
    stage.finish()
    tear(stage.path / MANIFEST, cut)
    again = StageFolder(tmp_path, "train", inputs="a")
    assert not again.is_complete()
    (again.begin() / "weights").write_text("2")
    again.finish()
    assert again.is_complete() and (stage.path / "weights").read_text() == "2"
    assert (aside(stage.path) / "weights").read_text() == "1"


def test_a_stage_that_lacks_a_file_is_kept_aside_with_a_warning_that_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        stage = StageFolder(tmp_path, "train", inputs="a")
        (stage.begin() / "weights").write_text("1")
        stage.finish()
        (stage.path / "weights").write_text("")
        assert not stage.is_complete()
        stage.begin()
        assert "weights is missing, added or changed, and the stage is done again; it is kept" in caplog.text
    assert (aside(stage.path) / "weights").read_text() == ""


def test_a_stage_that_was_made_from_something_else_is_not_kept(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "train", inputs="a")
    stage.begin()
    stage.finish()
    other = StageFolder(tmp_path, "train", inputs="b")
    assert not other.is_complete()
    other.begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.work"]


@CUTS
def test_a_run_whose_facts_are_torn_is_reported_as_one_that_did_not_come_so_far(tmp_path: Path, cut: float) -> None:
    about = About(job={}, flow_run_id="a", flow_run_name="b", git_commit="", snapshot="", begun="")
    write_fact(tmp_path, ABOUT, about)
    tear(tmp_path / ABOUT, cut)
    assert read_run(tmp_path) is None and recorded_job(tmp_path) is None


@CUTS
@pytest.mark.parametrize("live", [LIVE, None])
def test_a_retraining_run_whose_plan_is_torn_decides_anew(tmp_path: Path, cut: float, live: Pointer | None) -> None:
    _write_plan(tmp_path, live, live)
    assert _read_plan(tmp_path) == (live, live)
    tear(tmp_path / PLAN, cut)
    assert _read_plan(tmp_path) is None and _read_plan(tmp_path) is None
    assert aside(tmp_path / PLAN).exists()


@CUTS
def test_when_a_run_was_begun_is_written_again_where_it_is_torn(tmp_path: Path, cut: float) -> None:
    first = _begun(tmp_path)
    assert _begun(tmp_path) == first
    tear(tmp_path / "begun", cut)
    assert _begun(tmp_path) == _begun(tmp_path) >= first


@CUTS
def test_an_attempt_that_cannot_be_read_is_launched_anew(tmp_path: Path, cut: float) -> None:
    attempt = Attempt(name="ship-1", inputs="a", options={"slurm": {}}, job="7")
    attempt.write(tmp_path / CURRENT, durably=True)
    assert _read(tmp_path / CURRENT) == attempt
    tear(tmp_path / CURRENT, cut)
    assert _read(tmp_path / CURRENT) is None and aside(tmp_path / CURRENT).exists()


@CUTS
def test_launches_that_cannot_be_read_are_counted_anew(tmp_path: Path, cut: float) -> None:
    Launches(deaths=2).keep(tmp_path)
    tear(tmp_path / LAUNCHES, cut)
    assert Launches.so_far(tmp_path) == Launches() and aside(tmp_path / LAUNCHES).exists()


# ---- checkpoints


def checkpoint(folder: Path, step: int) -> Path:
    work = folder / f"step-{step:08d}.work"
    work.mkdir()
    (work / "data").write_text(str(step))
    complete(work)
    return work.with_suffix("")


def test_a_damaged_checkpoint_is_kept_aside_and_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    sound, torn, missing = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    tear(torn / CHECKPOINT, 0.5)
    (missing / "data").unlink()
    latest, notes = find_latest(tmp_path)
    assert latest == sound and len(notes) == 2
    _set_damaged_aside(tmp_path, latest)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [sound.name, aside(torn).name, aside(missing).name]


def test_what_a_custom_loop_has_reported_is_read_whatever_else_is_in_the_file(tmp_path: Path) -> None:
    journal = tmp_path / "reports.jsonl"
    good = {"step": 1, "loss": 0.5, "time": 0.0}
    journal.write_bytes(b"\0\0\n7\n[]\n{}\n\xff\xfe\n" + json.dumps(good).encode() + b'\n{"step": 2, "lo')
    assert read_journal(journal) == [good]


def test_a_runner_that_is_an_empty_file_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchworker.stages.cpp.compiler", lambda: None)
    said = build(CppRequest(cache=str(tmp_path))).reason
    assert said == "no C++ compiler on this machine"
    monkeypatch.setattr("torchworker.stages.cpp.hashlib.sha256", lambda content: _Key())
    kept = tmp_path / ("0" * 16)
    kept.mkdir()
    (kept / RUNNER).touch()
    assert build(CppRequest(cache=str(tmp_path))).reason == said
    (kept / RUNNER).write_text("program")
    assert build(CppRequest(cache=str(tmp_path))).runner


class _Key:
    def update(self, content: bytes) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


# ---- readers


@CUTS
def test_a_reader_whose_state_is_torn_keeps_it_aside_and_follows_the_channel_anew(tmp_path: Path, cut: float) -> None:
    local = LocalFolder(tmp_path)
    with local.locked():
        state = State("models", READ, '"etag"', None)
        local.switch(state)
        assert local.state() == state
        tear(tmp_path / "state.json", cut)
        assert local.state() is None and aside(tmp_path / "state.json").exists()
        local.switch(state)
        assert local.state() == state


def test_a_state_that_is_another_programs_is_left_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"windows": []}')
    with pytest.raises(ReaderError, match="expected what a reader wrote"):
        LocalFolder(tmp_path).state()
    assert (tmp_path / "state.json").exists()


# ---- the few lines that all of them stand on


def test_what_is_set_aside_replaces_what_was_before(tmp_path: Path) -> None:
    makers: list[Callable[[Path], object]] = [Path.mkdir, Path.touch, Path.mkdir, Path.mkdir]
    for make in makers:
        make(tmp_path / "it")
        set_aside(tmp_path / "it", "it is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["it" + DAMAGED]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    with pytest.raises(OSError, match="it"):
        write_durably(tmp_path / "it", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    shutil.rmtree(tmp_path / "it")
    write_durably(tmp_path / "it", b"content")
    assert (tmp_path / "it").read_bytes() == b"content"
