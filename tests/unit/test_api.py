"""The Python API: the same job as in a file, the same mistakes, values that print, and any thread that calls it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.projects import write_project
from train_and_ship import api
from train_and_ship.api import Factory, Gate, History, Job, JobError, Move, Train, UserError, check, run
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.event_loop import to_its_end
from train_and_ship.ship.run import run as run_command
from train_and_ship.tasks import at_work

MADE: dict[str, Any] = {
    "name": "plain",
    "model": {"factory": "plain:build_model"},
    "data": {"factory": "plain:build_dataset"},
    "train": {"epochs": 2, "processes": 2, "batch_size": 32},
}


def moved(generation: int = 1, **record: Any) -> Move:
    return Move(
        **{
            **{"model": "plain", "channel": "prod", "generation": generation, "release": f"{generation:020x}"},
            **{"previous": None, "moved_at": "2026-11-28T22:55:00+00:00", "by": "ada", "why": "better"},
            **{"rollback": False, "flow_run": "", "version": "3", "verdicts": {}, **record},
        }
    )


def test_a_job_made_in_python_is_the_one_of_its_file(tmp_path: Path) -> None:
    path = write_project(tmp_path, gates={"accuracy": {"min": 0.5}})
    parts = {**MADE, "model": Factory(factory="plain:build_model"), "train": Train(**MADE["train"])}
    made, loaded = Job(**parts, gates={"accuracy": Gate(min=0.5)}), Job.load(path)
    assert made.digest() == loaded.digest() == load_job(path)[0].digest()
    assert (made.file, loaded.file) == (None, path)
    assert Job.load(path, "train.epochs=7").train.epochs == 7


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean epochs?"),
        ({"train": None}, "train: missing; expected keys below it, such as epochs,"),
        ({"name": "A b"}, "name: expected lower-case letters, digits, dots, dashes or underscores, got"),
        ({"train": {**MADE["train"], "loss": 3}}, "train.loss: expected"),
        (
            {"release": {"policy": "better"}, "train": {"epochs": 1, "metrics": []}},
            "expected a metric in train.metrics with",
        ),
    ],
)
def test_a_mistake_is_told_as_in_a_job_file(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as here:
        Job(**{name: value for name, value in sorted({**MADE, **keys}.items()) if value is not None})
    with pytest.raises(JobError) as there:
        Job.load(write_project(tmp_path, **keys))
    # A file has lines.
    (mine,), (theirs,) = str(here.value).splitlines(), str(there.value).splitlines()
    assert mine.startswith("Job: ") and theirs.endswith(mine.removeprefix("Job: ")) and said in mine


def test_a_part_tells_its_own_mistakes() -> None:
    with pytest.raises(JobError, match=r'^Train: learning_rate: expected a valid number, got "0.1" \(str\)$'):
        Train(epochs=1, learning_rate="0.1")


def test_what_other_processes_import_is_named_and_not_handed_over() -> None:
    with pytest.raises(
        JobError, match=r"model.factory: expected a reference .* such as tests.support.projects:write_project, got"
    ):
        Job(**{**MADE, "model": {"factory": write_project}})


def test_paths_are_relative_to_the_file_or_to_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Job, Path, Path]] = []
    monkeypatch.setattr(
        "train_and_ship.ship.run.run_job", lambda job, place, project, *_: asked.append((job, place, project))
    )
    inside = tmp_path / "jobs"
    path = write_project(inside, project="code")
    (inside / "code").mkdir()
    run(Job.load(path))
    monkeypatch.chdir(inside)
    run(Job(**MADE, project="code"))
    monkeypatch.chdir("/")
    run(Job(**MADE, project="jobs/code"), folder=tmp_path)
    assert {project for _, _, project in asked} == {inside / "code"}
    assert [str(place) for _, place, _ in asked] == [str(path), "Job('plain')", f"{tmp_path}/Job('plain')"]
    with pytest.raises(JobError, match=r"^Job\('plain'\): project: expected a folder, got /code, which does not exist"):
        run(Job(**MADE, project="code"))


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean epochs?"),
        ({"data": Factory(factory="a:b", args={"url": "http://me:secret@host/x"})}, "expected an address without a"),
    ],
)
def test_a_job_that_was_changed_is_asked_again_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, update: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError) as error:
        check(Job(**MADE).model_copy(update=update))
    assert str(error.value).startswith("Job('plain'): ") and said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_path_in_place_of_a_job_says_how_to_load_it() -> None:
    with pytest.raises(JobError, match=r"expected a Job, such as Job.load\('job.yaml'\), got str"):
        run("job.yaml")


def test_what_comes_back_prints_as_lines_in_a_terminal_and_as_a_table_in_a_notebook() -> None:
    move = moved(why="[bold]<b>&\x1b[31m", verdicts={"accuracy vs live": "0.98 against 0.97"})
    text = str(move)
    assert text.startswith("plain prod: release 00000000000000000001, generation 1\n  since    2026-11-28T22:55")
    assert "  accuracy vs live 0.98 against 0.97" in text and "\x1b" not in text
    bundle = move._repr_mimebundle_()
    assert bundle.keys() == {"text/plain", "text/html"}
    # As it was written: neither markup of rich, nor of the page.
    assert "[bold]&lt;b&gt;&amp;" in bundle["text/html"] and "<b>" not in bundle["text/html"]
    moves = History([move, moved(2, rollback=True)])
    assert str(moves).startswith("plain prod: 2 moves\n  2 ") and "back to 00000000000000000002" in str(moves)
    assert moves[0] is move and "never moved" in History()._repr_mimebundle_()["text/plain"]


def test_commands_print_the_fields_of_what_the_api_gives_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = api.Shipped(
        model="plain", channel="prod", release="a" * 20, headline="live", run_url="http://p", version_url="http://m",
        release_uri="s3://models/x", report=tmp_path / "report.html",
    )  # fmt: skip
    monkeypatch.setattr("train_and_ship.ship.run.run_job", lambda *_: shipped)
    run_command(write_project(tmp_path), "", None, (), as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said == {**dataclasses.asdict(shipped), "report": str(tmp_path / "report.html")}
    run_command(tmp_path / "job.yaml", "", None, (), as_json=False)
    assert capsys.readouterr().out.splitlines()[:3] == ["", "live", "  run      http://p"]
    assert json.loads(History([moved()]).json())[0]["by"] == "ada"


def test_what_a_check_found_prints_as_the_command_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = (("model", "plain:build_model, 67 parameters"), ("exports", "onnx: model.onnx\npt2: model.pt2"))
    found = api.Checked(
        model="plain", project=tmp_path, python="/p", parameters=67, train_samples=96, validation_samples=None,
        inputs=(), outputs=(), exports={}, left_out={}, notes=(), facts=facts, gates=(("accuracy", "0.5", "", "", ""),),
    )  # fmt: skip
    Console(width=120).print(found)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed == str(found).splitlines() and any("67 parameters" in line for line in printed)


def test_a_check_that_takes_long_says_that_it_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(at_work, "EARLY_SECONDS", 0.02)
    monkeypatch.setattr(at_work, "LOOK_SECONDS", 0.005)

    async def build(*_: object) -> None:
        await asyncio.sleep(0.1)
        raise JobError("enough")

    monkeypatch.setattr("train_and_ship.ship.check._build", build)
    with pytest.raises(JobError, match="enough"):
        check(Job.load(write_project(tmp_path)))
    assert "check is at work, 0 s so far" in capsys.readouterr().err


def test_work_goes_to_its_end_also_where_a_loop_runs_as_in_a_notebook() -> None:
    async def answer(value: int) -> int:
        await asyncio.sleep(0)
        if value < 0:
            raise UserError("negative")
        return value

    async def cell(value: int) -> int:
        return to_its_end(answer(value))

    assert to_its_end(answer(1)) == asyncio.run(cell(1)) == 1
    with pytest.raises(UserError, match="negative"):
        asyncio.run(cell(-1))


def test_an_interrupt_in_a_notebook_ends_the_work_first() -> None:
    ended = threading.Event()

    async def work() -> None:
        # As the button of a notebook does, when the work has begun.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        to_its_end(work())

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set()


def test_a_notebook_shows_a_mistake_as_its_message() -> None:
    error = JobError("job.yaml:3: name: missing")
    error.add_note("  prod     nothing is live")
    assert error._render_traceback_() == ["JobError: job.yaml:3: name: missing", "  prod     nothing is live"]


def test_all_that_is_public_is_there_and_says_what_it_is() -> None:
    assert sorted(api.__all__) == list(api.__all__)
    for name in api.__all__:
        assert (getattr(api, name).__doc__ or "").strip(), name
