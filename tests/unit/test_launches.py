"""How often a run launches: one number, which a new checkpoint renews, and no second try for what is the same again."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.projects import write_project
from torchworker.contract import CHECKPOINT, Failure, Launches, TrainRequest
from torchworker.process.failure import UserError, may_pass, place_of, user_error
from torchworker.protocol import PROTOCOL
from torchworker.rank import _begin_again, main
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings

KILLED = Failure(kind="worker", message="rank 1 was killed")
BROKEN = Failure(kind="worker", message="ValueError: not contiguous", place="ValueError at torch.py:1 < results.py:2")


def saved(folder: Path, step: int) -> None:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / CHECKPOINT).write_text("{}")


def died(folder: Path, *failures: Failure, restarts: int = 2) -> list[Failure | None]:
    """What each of these launches ends the run with."""
    ends = []
    for failure in failures:
        launches = Launches.so_far(folder).died(folder, failure.place)
        launches.keep(folder)
        ends.append(launches.end(failure, restarts))
    return ends


def test_a_run_launches_once_and_as_often_again_as_the_job_says(tmp_path: Path) -> None:
    *before, last = died(tmp_path, KILLED, KILLED, KILLED)
    assert before == [None, None]
    assert last is not None and last.spent and last.kind == "worker"
    (only,) = died(tmp_path / "none", KILLED, restarts=0)
    assert only is not None and only.spent


def test_a_new_checkpoint_renews_the_number(tmp_path: Path) -> None:
    assert died(tmp_path, KILLED, KILLED) == [None, None]
    saved(tmp_path, 5)
    assert died(tmp_path, KILLED, KILLED) == [None, None]
    # The same step, written again, is no progress.
    saved(tmp_path, 5)
    (last,) = died(tmp_path, KILLED)
    assert last is not None


def test_the_same_exception_at_the_same_place_twice_is_a_mistake(tmp_path: Path) -> None:
    first, second = died(tmp_path, BROKEN, BROKEN)
    assert first is None
    assert second is not None and second.kind == "user"
    assert "twice, ValueError at torch.py:1" in second.message


@pytest.mark.parametrize(
    "between",
    [KILLED, replace(BROKEN, place="ValueError at torch.py:1 < loop.py:9"), replace(BROKEN, place="KeyError at x:1")],
    ids=["a death", "another place", "another exception"],
)
def test_what_differs_is_no_repetition(tmp_path: Path, between: Failure) -> None:
    assert died(tmp_path, BROKEN, between) == [None, None]


def test_a_checkpoint_between_two_errors_makes_them_two(tmp_path: Path) -> None:
    assert died(tmp_path, BROKEN) == [None]
    saved(tmp_path, 5)
    assert died(tmp_path, BROKEN) == [None]


def test_an_error_of_theirs_ends_the_run_at_once_unless_it_may_pass(tmp_path: Path) -> None:
    mistake = Failure(kind="user", message="KeyError: gene")
    assert died(tmp_path, mistake) == [mistake]
    *before, last = died(tmp_path / "other", *[replace(mistake, passing=True)] * 3)
    assert before == [None, None]
    assert last is not None and last.kind == "user" and last.spent


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ESTALE, "stale file handle"), True),
        (TimeoutError("no answer"), True),
        (ConnectionResetError("a database's"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (user_error("data.factory failed", OSError("stale"), "/p"), True),
        (FileNotFoundError("a.csv"), False),
        (user_error("data.factory failed", PermissionError("a.csv"), "/p"), False),
        (UserError("data.factory must return a dataset"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (KeyError("gene"), False),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else f"{type(value).__name__} {value}"[:40],
)
def test_memory_disks_and_connections_may_pass_and_a_wrong_path_does_not(error: BaseException, passes: bool) -> None:
    assert may_pass(error) is passes


def test_a_place_is_where_the_exception_was_raised_and_by_whom_it_was_called() -> None:
    def fails(how: Callable[[], Any]) -> str:
        try:
            how()
        except Exception as error:
            return place_of(error)
        return ""

    def one() -> None:
        raise ValueError("at 0x7f")

    def other() -> None:
        one()

    assert fails(one) != fails(other)
    assert fails(one).startswith("ValueError at test_launches.py:")
    assert place_of(raised(KeyError("a"))) == place_of(raised(KeyError("b")))


# ---- where torchrun starts all ranks again


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    job, folder = load_job(write_project(tmp_path / "p", train={"epochs": 1, "restarts": 1}))
    work = tmp_path / "work"
    work.mkdir()
    return TrainRequest(
        project=project_of(job, folder), train=train_settings(job), folder=str(work), checkpoints=str(tmp_path / "c")
    )


def test_rank_0_counts_what_torchrun_starts_again_and_ends_it_at_the_number(request_: TrainRequest) -> None:
    folder, checkpoints = Path(request_.folder), Path(request_.checkpoints)
    for rank in (1, 0):
        _begin_again(folder, request_, rank)
    assert Launches.so_far(checkpoints).deaths == 0
    _begin_again(folder, request_, 0)
    assert Launches.so_far(checkpoints).deaths == 1
    with pytest.raises(SystemExit):
        _begin_again(folder, request_, 0)
    assert Failure.read(folder / "failure-rank0.json").spent
    # The others see it, and so does whatever torchrun starts after that.
    with pytest.raises(SystemExit):
        _begin_again(folder, request_, 1)
    assert Launches.so_far(checkpoints).deaths == 2


def test_nothing_is_trained_again_after_a_mistake(request_: TrainRequest) -> None:
    folder = Path(request_.folder)
    _begin_again(folder, request_, 0)
    Failure(kind="user", message="KeyError: gene", rank=1).write(folder / "failure-rank1.json")
    for rank in (0, 1):
        with pytest.raises(SystemExit):
            _begin_again(folder, request_, rank)
    assert Launches.so_far(Path(request_.checkpoints)).deaths == 0


def test_an_error_of_an_earlier_start_is_not_taken_for_one_of_the_next(request_: TrainRequest) -> None:
    folder = Path(request_.folder)
    _begin_again(folder, request_, 0)
    replace(BROKEN, rank=1).write(folder / "failure-rank1.json")
    _begin_again(folder, request_, 0)
    assert not list(folder.glob("failure-rank*"))


def test_a_machine_with_another_torchworker_trains_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, project = load_job(write_project(tmp_path / "project"))
    request = TrainRequest(
        project=project_of(job, project), train=train_settings(job), folder=str(tmp_path), checkpoints="", protocol=99
    )
    request.write(tmp_path / "request.json")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(sys, "argv", ["rank", str(tmp_path / "request.json")])
    with pytest.raises(SystemExit):
        main()
    failure = Failure.read(tmp_path / "failure-rank3.json")
    # A retry cannot help.
    assert failure.kind == "user" and f"(protocol 99), got protocol {PROTOCOL}: every machine" in failure.message
