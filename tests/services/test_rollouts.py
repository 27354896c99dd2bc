"""Rollouts in a real S3 server: from one step to the next, beside other movers, and with writers that die."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import DropReply, FaultProxy, PassOn, Rule
from tests.support.fixture_types import MakeReader, Ship
from tests.support.releases import MODEL, NOWHERE, ignore, make_release, move, published, rolled_back
from tests.support.rollouts import PLAN, WATCHER, Clock, begun, channel_of, looked
from tests.support.runnable_releases import runnable
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key, rollout_key
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.rules import Approval, set_rules
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.retention import Policy, Step, decide
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.registry.rollouts.live_job import not_observed
from train_and_ship.registry.rollouts.moves import RunningError, finish, go_on, running, settle, stop
from train_and_ship.registry.rollouts.record import Outcome, Rollout, read_rollout
from train_and_ship.registry.rollouts.versions import read_versions


@pytest.fixture(scope="session")
def store_url(each_store_url: str) -> str:
    """Every promise is kept on both kinds of server."""
    return each_store_url


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def two(object_store: ObjectStore, tmp_path: Path) -> tuple[Manifest, Manifest]:
    """What is live, and a candidate."""
    live, candidate = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, live)
    return live, candidate


def now_live(store: ObjectStore) -> tuple[int, str]:
    pointer = read_pointer(channel_of(store))
    assert pointer is not None
    return pointer.generation, pointer.release


def there(store: ObjectStore) -> Rollout:
    rollout = read_rollout(channel_of(store))
    assert rollout is not None
    return rollout


def versions(store: ObjectStore) -> list[tuple[int, int, str, int]]:
    """Generation, number, outcome and share of every copy, the oldest first."""
    copies = reversed([*read_versions(channel_of(store))])
    return [(copy.generation, copy.number, copy.outcome.value, copy.share) for copy in copies]


def test_steps_stand_as_long_as_they_should_and_the_candidate_goes_live_after_the_last_with_what_was_asked(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], clock: Clock
) -> None:
    live, candidate = two
    begun(object_store, candidate, verdicts={"accuracy": "0.98 against 0.97"})
    shares = []
    for seconds in (599, 1) * 3:
        seen = looked(object_store)
        shares.append(seen.after.share if seen is not None else 0)
        assert now_live(object_store) == (1, live.release)
        clock.turn(seconds)
    assert shares == [100, 100, 500, 500, 10_000, 10_000]
    seen = looked(object_store)
    assert seen is not None and (seen.after.outcome, seen.ended) == (Outcome.PROMOTED, True)
    assert looked(object_store) is None
    record = read_history(channel_of(object_store))[-1]
    assert (record.generation, record.release, record.reason) == (2, candidate.release, "new scans")
    assert (record.moved_by, record.mlflow_version) == (WATCHER.by, "8")
    assert record.verdicts["accuracy"] == "0.98 against 0.97"
    assert record.verdicts["rollout"].startswith("1 %, 5 %, 100 % of the requests since 2026-12-01T12:00:00+00:00")
    assert versions(object_store) == [(1, 1, "", 100), (1, 2, "", 500), (1, 3, "", 10_000), (1, 4, "promoted", 10_000)]


def test_a_reader_follows_every_step_and_then_what_went_live(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], clock: Clock, make_reader: MakeReader
) -> None:
    live, candidate = two
    reader = make_reader(rollouts=True)
    assert reader.pull().id == live.release and reader.candidate is None
    begun(object_store, candidate)
    seen = []
    for _ in range(3):
        looked(object_store)
        assert reader.pull().id == live.release
        assert reader.candidate is not None and reader.candidate.release.id == candidate.release
        seen.append((reader.candidate.share, reader.candidate.key))
        clock.turn(600)
    assert seen == [(100, "user_id"), (500, "user_id"), (10_000, "user_id")]
    looked(object_store)
    assert reader.pull().id == candidate.release and reader.candidate is None


def test_what_is_not_at_its_end_by_its_deadline_ends_undecided_and_what_was_live_stays(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], clock: Clock
) -> None:
    begun(object_store, two[1])
    clock.turn(2 * 3600)
    seen = looked(object_store)
    assert seen is not None and seen.after.outcome is Outcome.UNDECIDED
    assert now_live(object_store) == (1, two[0].release)
    with pytest.raises(GateError, match=f"release {two[1].release} ended at 2026-12-01T14:00:00.*undecided"):
        begun(object_store, two[1])


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        (lambda store, three: rolled_back(store), Outcome.ROLLED_BACK),
        (lambda store, three: move(store, three[2]), Outcome.REPLACED),
        (lambda store, three: move(store, three[1]), Outcome.PROMOTED),
    ],
    ids=["rollback", "another release", "the candidate by hand"],
)
def test_any_move_of_the_pointer_ends_a_rollout_by_itself_and_the_next_look_says_what_became_of_it(
    object_store: ObjectStore, tmp_path: Path, clock: Clock, ends: Callable[[Any, Any], Any], outcome: Outcome
) -> None:
    first, candidate, other, live = (published(object_store, tmp_path / str(seed), seed) for seed in range(4))
    move(object_store, first)
    move(object_store, live)
    begun(object_store, candidate)
    ends(object_store, (live, candidate, other))
    # Nobody has written into the object, and it is void all the same.
    assert there(object_store).is_running and running(channel_of(object_store)) is None
    moved = now_live(object_store)
    clock.turn(3600)
    seen = looked(object_store)
    assert seen is not None and seen.after.outcome is outcome
    assert now_live(object_store) == moved and moved[0] == 3
    if outcome is Outcome.ROLLED_BACK:
        with pytest.raises(GateError, match="--again"):
            begun(object_store, candidate)


def test_what_a_rollout_has_ended_with_does_not_depend_on_what_was_moved_after_that(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], clock: Clock
) -> None:
    begun(object_store, two[1])
    move(object_store, two[1])
    rolled_back(object_store)
    ended = settle(channel_of(object_store), "doctor")
    assert ended is not None and ended.outcome is Outcome.PROMOTED
    assert settle(channel_of(object_store), "doctor") == ended


def test_of_two_rollouts_at_once_one_runs_and_the_other_is_told(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    candidates = [two[1], *(published(object_store, tmp_path / f"more{seed}", 10 + seed) for seed in range(3))]

    def try_to(candidate: Manifest) -> str:
        try:
            return begun(object_store, candidate).release
        except RunningError as error:
            return f"refused beside {error.rollout.release}"

    with ThreadPoolExecutor(4) as pool:
        outcomes = [*pool.map(try_to, candidates)]
    (winner,) = {one for one in outcomes if not one.startswith("refused")}
    assert outcomes.count(f"refused beside {winner}") == 3
    assert versions(object_store) == [(1, 1, "", 100)]


def test_a_second_rollout_beside_the_same_pointer_goes_on_with_its_numbers(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    first = begun(object_store, two[1])
    stop(channel_of(object_store), first, Outcome.ROLLED_BACK, WATCHER)
    second = begun(object_store, published(object_store, tmp_path / "more", 9))
    assert second.rollout != first.rollout
    assert versions(object_store) == [(1, 1, "", 100), (1, 2, "rolled back", 100), (1, 3, "", 100)]
    # Whoever still has the first one in hand changes nothing.
    assert stop(channel_of(object_store), first, Outcome.UNDECIDED, WATCHER) == second
    assert go_on(channel_of(object_store), first, WATCHER) == second


def test_nothing_is_started_beside_nothing_or_beside_itself_or_with_other_tensors(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    live = published(object_store, tmp_path / "live")
    with pytest.raises(RequestError, match=f"nothing is live, .*`ship promote digits --from {live.release[:8]}"):
        begun(object_store, live)
    move(object_store, live)
    with pytest.raises(RequestError, match="is live already"):
        begun(object_store, live)
    make_release(tmp_path / "other", 5)
    inputs = [{"name": "x", "dtype": "float32", "shape": [1, 8]}]
    other = build_manifest(
        tmp_path / "other", model=MODEL, formats={"onnx": "file0.bin"}, signature={"inputs": inputs}, metrics={}
    )
    publish(object_store, tmp_path / "other", other)
    with pytest.raises(GateError, match="has other inputs than release"):
        begun(object_store, other)
    assert read_rollout(channel_of(object_store)) is None


def test_a_start_whose_reply_was_lost_is_recognised(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, two: tuple[Manifest, Manifest]
) -> None:
    # Every repetition by the client library is lost as well.
    proxy.add(Rule(DropReply(), "PUT", "/rollouts/prod.json", times=5))
    begun(faulty, two[1])
    assert versions(object_store) == [(1, 1, "", 100)]


def test_a_rollout_beside_what_goes_off_while_it_starts_is_void_and_said_to_be(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, two: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    other = published(object_store, tmp_path / "other", 7)
    proxy.add(Rule(PassOn(), "PUT", "/rollouts/prod.json", times=1, before=lambda: ignore(move(object_store, other))))
    with pytest.raises(Exception, match="another release went live"):
        begun(faulty, two[1])
    assert there(object_store).outcome is Outcome.REPLACED


def test_a_candidate_that_is_given_up_in_the_moment_of_its_move_does_not_stay_live(
    object_store: ObjectStore, faulty: ObjectStore, proxy: FaultProxy, two: tuple[Manifest, Manifest]
) -> None:
    live, candidate = two
    rollout = begun(object_store, candidate, replace(PLAN, steps=(10_000,)))

    def give_up() -> None:
        ended = stop(channel_of(object_store), rollout, Outcome.ROLLED_BACK, replace(WATCHER, why="errors"))
        assert ended.outcome is Outcome.ROLLED_BACK

    proxy.add(Rule(PassOn(), "PUT", pointer_key(MODEL, "prod"), times=1, before=give_up))
    ended = finish(channel_of(faulty), rollout, WATCHER)
    assert ended.outcome is Outcome.ROLLED_BACK
    assert now_live(object_store) == (3, live.release)
    assert (
        "was ended in the moment of this move (watch@worker: errors)"
        in read_history(channel_of(object_store))[-1].reason
    )


def test_whoever_is_given_up_before_the_last_look_does_not_go_live(
    object_store: ObjectStore, two: tuple[Manifest, Manifest]
) -> None:
    rollout = begun(object_store, two[1], replace(PLAN, steps=(10_000,)))
    stop(channel_of(object_store), rollout, Outcome.ROLLED_BACK, WATCHER)
    assert go_on(channel_of(object_store), rollout, WATCHER).outcome is Outcome.ROLLED_BACK
    assert now_live(object_store) == (1, two[0].release)


def test_a_person_is_asked_before_the_first_step_and_not_again_at_the_last(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], ship: Ship
) -> None:
    set_rules(channel_of(object_store), Approval.REQUIRED, "ada", "customers see it")
    refused = ship("rollout", MODEL, two[1].release, "--why", "new scans")
    assert refused.status == 2 and "approval is required by the channel" in refused.errors
    assert "With `-p rollout=true` it asks a person and then begins a rollout." in refused.errors
    said = {"approved": "by someone said to be grace"}
    approved = begun(object_store, two[1], replace(PLAN, steps=(10_000,)), verdicts=said)
    assert finish(channel_of(object_store), approved, WATCHER).outcome is Outcome.PROMOTED
    assert read_history(channel_of(object_store))[-1].verdicts["approved"] == said["approved"]


def test_an_object_that_is_no_rollout_keeps_no_release_from_being_moved_and_nothing_is_written_over_it(
    object_store: ObjectStore, two: tuple[Manifest, Manifest]
) -> None:
    object_store.put_new(rollout_key(MODEL, "prod"), b"{}")
    with pytest.raises(ReleaseError, match=r"rollouts/prod.json: expected format 1"):
        begun(object_store, two[1])
    assert move(object_store, two[1]).generation == 2


class DiedError(BaseException):
    """As SIGKILL: nothing in the way catches it."""


@pytest.mark.soak
@pytest.mark.parametrize("late", [False, True], ids=["before the write", "after the write"])
def test_whoever_dies_at_any_write_is_followed_by_one_who_finishes_and_nothing_is_done_twice(
    object_store: ObjectStore, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    written = ObjectStore._put
    budget = [0]

    def put(store: ObjectStore, key: str, body: bytes, **more: Any) -> str:
        if budget[0] == 0 and not late:
            raise DiedError
        etag = written(store, key, body, **more)
        if budget[0] == 0:
            raise DiedError
        budget[0] -= 1
        return etag

    live, *candidates = (published(object_store, tmp_path / str(seed), seed) for seed in range(14))
    move(object_store, live)
    monkeypatch.setattr(ObjectStore, "_put", put)
    deaths = 0
    for number, candidate in enumerate(candidates):
        budget[0] = number

        def all_of_it(candidate: Manifest = candidate) -> None:
            known = read_rollout(channel_of(object_store))
            if known is not None and known.release == candidate.release and not known.is_running:
                return
            if running(channel_of(object_store)) is None and now_live(object_store)[1] != candidate.release:
                begun(object_store, candidate, replace(PLAN, steps=(100, 10_000)))
            while looked(object_store) is not None:
                clock.turn(600)

        for attempt in itertools.count():
            try:
                all_of_it()
                break
            except DiedError:
                deaths += 1
                assert attempt == 0
                budget[0] = 1000
        assert now_live(object_store) == (number + 2, candidate.release)
        assert there(object_store).outcome is Outcome.PROMOTED
    # Start, copy, step, copy, pointer, its record, end, copy: some of them are done by whoever follows.
    assert deaths >= 8
    assert versions(object_store) == [
        (generation, *version)
        for generation in range(1, len(candidates) + 1)
        for version in ((1, "", 100), (2, "", 10_000), (3, "promoted", 10_000))
    ]
    assert [one.generation for one in read_history(channel_of(object_store))] == [*range(1, len(candidates) + 2)]


@pytest.mark.soak
def test_the_command_begins_shows_moves_on_and_ends_a_rollout(
    object_store: ObjectStore, tmp_path: Path, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")
    live, candidate, other = (runnable(object_store, tmp_path / str(seed), 0.9, seed=seed) for seed in range(3))
    nothing = ship("rollout", MODEL, candidate.release, "--why", "new scans")
    assert nothing.status == 2 and "nothing is live" in nothing.errors
    move(object_store, live, mlflow_version="")
    assert ship("rollout", MODEL).status == 1

    begun = ship("rollout", MODEL, candidate.release[:6], "--steps", "0.5,100", "--every", "2h", "--why", "new scans")
    assert begun.status == 0, begun.errors
    assert f"release {candidate.release} at 0.5 %, step 1 of 2" in begun.text
    assert "nobody watches this rollout: Prefect: expected a server" in begun.errors
    asked = there(object_store).verdicts
    assert asked["rehearsal"] == "3 checks passed: onnx" and asked["vs_live"].startswith("accuracy 0.9 against 0.9")
    second = ship("rollout", MODEL, other.release, "--why", "x")
    assert second.status == 2 and "a rollout is running already" in second.errors
    assert f"digits prod: release {candidate.release} at 0.5 %" in ship("rollout", MODEL).text

    assert "at 100 %, step 2 of 2" in ship("rollout", MODEL, "--next", "--why", "no complaints").text
    done = ship("rollout", MODEL, "--next", "--why", "no complaints")
    assert done.status == 0 and "has ended: promoted" in done.text
    assert now_live(object_store) == (2, candidate.release)
    assert ship("rollout", MODEL, "--stop", "--why", "x").status == 2

    # The steps of the release's own job are the others that were not said.
    assert ship("rollout", MODEL, other.release, "--key", "patient", "--shadow", "--why", "new scans").status == 0
    assert (there(object_store).key, there(object_store).shadow, there(object_store).every) == ("patient", True, 600)
    back = ship("rollback", MODEL, "--why", "errors since 14:00")
    assert f"the rollout of release {other.release} has ended: rolled back" in back.text
    assert there(object_store).outcome is Outcome.ROLLED_BACK
    refused = ship("rollout", MODEL, other.release, "--why", "x")
    assert refused.status == 2 and "is not offered again by itself" in refused.errors
    assert ship("rollout", MODEL, other.release, "--again", "--why", "x").status == 0
    assert "has ended: rolled back" in ship("rollout", MODEL, "--stop", "--why", "errors").text
    told = ship("history", MODEL, "--rollouts").text
    assert [line.split("  ")[2] for line in told.splitlines() if line[:2] == "20"] == [
        "rolled back", "1 %, step 1 of 4", "rolled back", "1 %, step 1 of 4", "promoted", "100 %, step 2 of 2",
        "0.5 %, step 1 of 2",
    ]  # fmt: skip


MISTAKES = [
    (["x", "--why", "x", "--steps", "5,1,100"], "--steps: expected percentages that rise, and 1 follows 5"),
    (["x", "--why", "x", "--steps", "1,5"], "100 as the last percentage"),
    (["x", "--why", "x", "--steps", "1,120"], "up to 100, of which 120 is none"),
    (["x", "--why", "x", "--steps", "a"], "--steps: expected percentages with commas"),
    (["x", "--why", "x", "--every", "soon"], "--every: expected a number and one of s, m, h, d"),
    (["x", "--why", "x", "--stop-if", "errors"], "--stop-if: expected each limit once, such as errors=+0.5%"),
    (["x", "--why", "x", "--stop-if", "errors=1%"], "--stop-if: expected +0.5% (half a point more than live)"),
    (["x", "--next"], "expected one of CANDIDATE, --next and --stop"),
    (["--next", "--steps", "1,100"], "expected CANDIDATE with --steps"),
    (["--next"], "expected a reason for the record"),
    (["x"], "expected a reason for the record"),
    (["--stop", "--why", "x"], "expected a rollout that is running, got none"),
]


def test_mistakes_of_the_command_are_told_before_anything_is_done(object_store: ObjectStore, ship: Ship) -> None:
    object_store.put(pointer_key(MODEL, "staging"), b"{}")
    for words, said in MISTAKES:
        done = ship("rollout", MODEL, *words)
        assert done.status == 2 and said in done.errors, (words, done.errors)


def test_the_doctor_writes_down_what_another_pointer_has_ended_and_tells_of_what_nobody_watches(
    object_store: ObjectStore, two: tuple[Manifest, Manifest], clock: Clock
) -> None:
    begun(object_store, two[1])
    clock.turn(600 + 599)
    assert [one.what for one in examine(object_store, MODEL, NOWHERE) if "rollout" in one.what] == []
    clock.turn(2)
    (unwatched,) = [one for one in examine(object_store, MODEL, NOWHERE) if "rollout" in one.what]
    assert not unwatched.can_mend and "nobody watches the rollout of release" in unwatched.what
    (kept,) = [one for one in decide(object_store, MODEL, Policy()) if one.release == two[1].release]
    assert (kept.step, kept.why) == (Step.KEEP, "being rolled out on prod")
    move(object_store, two[1])
    (ended,) = [one for one in examine(object_store, MODEL, NOWHERE) if "rollout" in one.what]
    assert ended.can_mend and there(object_store).outcome is Outcome.PROMOTED


def test_limits_beside_a_live_release_that_has_nothing_observed_are_told(
    object_store: ObjectStore, two: tuple[Manifest, Manifest]
) -> None:
    rollout = begun(object_store, two[1], replace(PLAN, stop_if={"errors": "+0.5%"}))
    said = not_observed(channel_of(object_store), rollout)
    assert said.startswith("nothing will be observed: ") and said.endswith("stop_if (errors)")
    assert not_observed(channel_of(object_store), replace(rollout, stop_if={})) == ""
