"""Both releases in one process: who gets which, and no request fails or waits because of the candidate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shipreader.canary import Answer, Shadow, Split
from shipreader.errors import ReaderError
from shipreader.fallbacks import MOST_FALLBACKS, Allowance
from shipreader.reader import Reader
from shipreader.records import Manifest, Release
from shipreader.rollouts import Candidate
from shipreader.split import slot_of
from tests.support.processes import PATIENCE

INSIDE, OUTSIDE = "user-3863", "user-7248"
"""The last slot of 5 %, and the first that is not: docs/serving.md."""


def release(name: str, generation: int = 7, rollout: str = "") -> Release:
    manifest = Manifest("digits", name * 20, {}, {}, {}, {}, name.encode())
    return Release("prod", generation, Path("/srv") / name, manifest, "", rollout)


OLD, NEW = release("a"), release("b", rollout="r")
CANDIDATE = Candidate(NEW, 500, "user_id", 0, False, "r", 1)


class Client:
    """Asked for nothing but its exceptions."""

    exceptions = None


class Rig:
    """A split whose reader is told by the test what is live and tried."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.reader = Reader("digits", bucket="models", folder=folder, client=Client())
        self.does: Callable[[Any], Any] = lambda request: ("b", request)
        """The candidate."""
        self.loads: list[str] = []
        self.split = Split(self.reader, self.load, **options)
        self.live(OLD)

    def load(self, found: Release) -> Callable[[Any], Any]:
        self.loads.append(found.id[0])
        return (lambda request: self.does(request)) if found.id == NEW.id else self.answer

    def answer(self, request: Any) -> Any:
        if request == "bad":
            raise ValueError("expected another request")
        return "a", request

    def live(self, found: Release) -> None:
        """In the reader's order: the rollout is void, then what is live is handed over."""
        assert self.reader._rollouts is not None
        self.reader._current, self.reader._rollouts.candidate = found, None
        self.reader._announce()
        self.reader._announce_rollout()

    def tries(self, candidate: Candidate | None) -> None:
        assert self.reader._rollouts is not None
        self.reader._rollouts.candidate = candidate
        self.reader._announce_rollout()

    def call(self, key: object, request: Any = 1) -> Answer:
        return self.split.call(key, request)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    found = Rig(tmp_path)
    found.tries(CANDIDATE)
    return found


def boom(request: Any) -> Any:
    raise RuntimeError("no such row")


def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_each_request_is_answered_by_the_release_that_its_key_is_for(rig: Rig) -> None:
    assert rig.call(INSIDE) == Answer(("b", 1), NEW, "candidate", 499, "r")
    assert rig.call(OUTSIDE) == Answer(("a", 1), OLD, "live", 500, "r")
    # Without a key, or with none that may be one.
    for key in (None, "", "x" * 2000, 1.5):
        assert rig.call(key) == Answer(("a", 1), OLD, "live", None, "r")
    chosen = rig.split.split(INSIDE)
    assert chosen.loaded(2) == ("b", 2) and chosen.live.loaded(2) == ("a", 2)
    rig.tries(replace(CANDIDATE, share=2500, number=2))
    assert rig.call(OUTSIDE).arm == "candidate" and rig.loads == ["a", "b"], "nothing is loaded anew for a step"
    assert rig.split.counts() == {"candidate": 2, "live": 5}


def test_without_a_rollout_the_live_release_answers_all(rig: Rig) -> None:
    rig.tries(None)
    assert rig.call(INSIDE) == Answer(("a", 1), OLD, "live", None, "")


def test_a_rollout_ends_with_the_look_that_saw_it_and_not_when_the_callback_was_called(rig: Rig) -> None:
    assert rig.reader._rollouts is not None
    rig.reader._rollouts.candidate = None
    assert rig.call(INSIDE).arm == "live"


def test_a_candidate_that_goes_live_is_not_loaded_again(rig: Rig) -> None:
    rig.live(replace(NEW, generation=8, rollout=""))
    assert rig.call(OUTSIDE).value == ("b", 1) and rig.call(OUTSIDE).release.generation == 8
    assert rig.loads == ["a", "b"]


def test_a_request_whose_candidate_raises_is_answered_by_the_live_release(rig: Rig) -> None:
    rig.does = boom
    found = rig.call(INSIDE)
    assert found == Answer(("a", 1), OLD, "live", 499, "r", fell_back=True, error="RuntimeError")
    # Not the candidate's fault.
    with pytest.raises(ValueError, match="another request"):
        rig.call(INSIDE, "bad")
    assert rig.split.counts() == {"live": 1, "fell back": 1}


def test_a_request_whose_candidate_is_late_is_answered_by_the_live_release(rig: Rig) -> None:
    go = threading.Event()
    rig.does = lambda request: go.wait(PATIENCE)
    rig.tries(replace(CANDIDATE, fallback_ms=20, number=2))
    began = time.monotonic()
    found = rig.call(INSIDE)
    assert (found.value, found.fell_back, found.error) == (("a", 1), True, "TimeoutError")
    assert time.monotonic() - began < PATIENCE / 2
    go.set()
    rig.does = lambda request: ("b", request)
    assert rig.call(INSIDE, 3).value == ("b", 3)


def test_candidates_that_hang_take_a_bounded_number_of_threads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shipreader.canary.MOST_LATE", 2)
    hung = threading.Event()
    busy = Rig(rig.reader._local.folder / "busy")
    busy.does = lambda request: hung.wait(PATIENCE)
    busy.tries(replace(CANDIDATE, fallback_ms=1))
    assert all(busy.call(INSIDE).value == ("a", 1) for _ in range(10))
    threads = [thread for thread in threading.enumerate() if thread.name == "shipreader-candidate"]
    assert 1 <= len(threads) <= 2 and all(thread.daemon for thread in threads)
    hung.set()


def test_a_process_whose_candidate_fails_too_often_stands_back_until_the_rollout_changes(rig: Rig) -> None:
    rig.does = boom
    for _ in range(MOST_FALLBACKS):
        assert rig.call(INSIDE).fell_back
    assert rig.reader.status().rollout_problem == ""
    assert rig.call(INSIDE).fell_back and not rig.call(INSIDE).fell_back
    said = rig.reader.status().rollout_problem
    assert "stands back until the rollout's next change" in said and "RuntimeError" in said
    assert rig.reader.status().problem == ""
    rig.does = lambda request: ("b", request)
    assert rig.call(INSIDE).arm == "live"
    rig.tries(replace(CANDIDATE, number=2))
    assert rig.call(INSIDE).arm == "candidate" and rig.reader.status().rollout_problem == ""


def test_five_in_a_hundred_may_fail_for_ever() -> None:
    allowance = Allowance()
    for number in range(10_000):
        allowance.request()
        if number % 20 == 0:
            assert not allowance.fall_back()
    assert allowance.fall_back() and allowance.spent and not allowance.fall_back()


def test_a_shadow_is_asked_on_the_side_and_answers_nobody(tmp_path: Path) -> None:
    asked: list[Shadow] = []
    rig = Rig(tmp_path, on_shadow=asked.append, shadow_share=1.0)
    rig.tries(replace(CANDIDATE, shadow=True))
    assert rig.call(INSIDE, 5) == Answer(("a", 5), OLD, "live", 499, "r")
    assert rig.call(OUTSIDE, 6).arm == "live" and rig.call(None, 7).arm == "live"
    until(lambda: asked)
    (found,) = asked
    assert (found.request, found.live, found.value, found.error) == (5, ("a", 5), ("b", 5), None)
    assert (found.slot, found.candidate.rollout) == (499, "r")
    rig.does = boom
    assert rig.call(INSIDE, 8).value == ("a", 8)
    until(lambda: len(asked) == 2)
    assert isinstance(asked[1].error, RuntimeError) and rig.split.counts() == {"live": 4, "shadow": 2}


def test_a_slow_shadow_delays_nobody_and_drops_what_it_has_no_time_for(tmp_path: Path) -> None:
    go = threading.Event()
    rig = Rig(tmp_path)
    rig.does = lambda request: go.wait(PATIENCE)
    rig.tries(replace(CANDIDATE, shadow=True))
    began = time.monotonic()
    for _ in range(100):
        assert rig.call(INSIDE).value == ("a", 1)
    assert time.monotonic() - began < PATIENCE / 2
    # One is asked, eight wait.
    assert rig.split.counts()["dropped"] in (91, 92)
    go.set()


def test_a_shadow_computes_for_a_part_of_the_time(tmp_path: Path) -> None:
    rig = Rig(tmp_path, shadow_share=0.25)
    times: list[float] = []

    def work(request: Any) -> None:
        times.append(time.monotonic())
        time.sleep(0.02)

    rig.does = work
    rig.tries(replace(CANDIDATE, shadow=True))
    for _ in range(4):
        rig.call(INSIDE)
    until(lambda: len(times) == 4)
    assert times[-1] - times[0] >= 3 * 0.08 * 0.95


def test_many_threads_ask_while_the_rollout_and_what_is_live_change(rig: Rig) -> None:
    stopping = threading.Event()

    def ask(number: int) -> int:
        asked = 0
        while not stopping.is_set():
            found = rig.call(f"user-{number}-{asked % 100}")
            name = found.value[0]
            assert found.release.id[0] == name
            slot = slot_of("digits", f"user-{number}-{asked % 100}")
            assert found.arm == "live" or (slot is not None and slot < 10_000 and name == "b")
            asked += 1
        return asked

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, number) for number in range(2)]
        try:
            for turn in range(8):
                rig.tries(replace(CANDIDATE, share=2500 * (1 + turn % 4), number=turn + 2))
                time.sleep(0.002)
                if turn % 3 == 2:
                    rig.live(replace(OLD, generation=8 + turn))
        finally:
            stopping.set()
        assert all(found.result() > 0 for found in asking)


def test_a_reader_is_taken_over_before_it_is_started(tmp_path: Path) -> None:
    reader = Reader("digits", bucket="models", folder=tmp_path, client=Client())
    with pytest.raises(ReaderError, match="expected more than 0 and at most 1"):
        Split(reader, lambda found: found, shadow_share=0)
    split = Split(reader, lambda found: found)
    with pytest.raises(ReaderError, match="nothing is loaded yet"):
        split.call("ada", 1)
    with pytest.raises(ReaderError, match="without on_change"):
        Split(reader, lambda found: found)
