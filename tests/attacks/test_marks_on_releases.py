"""Who may write next to releases wants one deleted that is needed, or kept from whoever goes back to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.releases import CHANNEL, MODEL, NOWHERE, move, published, rolled_back
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import claims_prefix, release_prefix, releases_prefix, views_prefix
from train_and_ship.registry.bucket.releases import publish, verify_release
from train_and_ship.registry.bucket.tombstones import State, claim, hold, read_tombstone, tombstone_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import choose_rollback
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.retention import Decision, Policy, Step, carry_out, decide
from train_and_ship.registry.release.manifest import Manifest

POLICY = Policy(keep_last=2, slowest_reader=timedelta(0))
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)

Forge = Callable[[Manifest, str], None]
PassTime = Callable[[timedelta], None]


@pytest.fixture
def pass_time(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> PassTime:
    """Make it later by the store's clock."""

    def make(later: timedelta) -> None:
        # A store tells whole seconds; what was written in this one is not of the future.
        monkeypatch.setattr(object_store, "now", lambda: datetime.now(UTC) + later + timedelta(seconds=2))

    make(timedelta(0))
    return make


@pytest.fixture
def three(object_store: ObjectStore, tmp_path: Path, pass_time: PassTime) -> list[Manifest]:
    """Nobody needs the first, a rollback goes to the second, the third is live."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    for manifest in manifests:
        move(object_store, manifest)
    return manifests


@pytest.fixture
def forge(object_store: ObjectStore) -> Forge:
    """Write a mark of long ago, as whoever may write there could."""

    def write(manifest: Manifest, state: str, at: datetime = LONG_AGO, **changes: Any) -> None:
        mark = {
            **{"format": 1, "model": MODEL, "release": manifest.release, "state": state, "at": at.isoformat()},
            **{"by": "gc@host", "nonce": "0" * 32, "mlflow_done": False, **changes},
        }
        object_store.put(tombstone_key(MODEL, manifest.release), json.dumps(mark).encode())

    return write


def decision_on(store: ObjectStore, manifest: Manifest) -> Decision:
    return next(one for one in decide(store, MODEL, POLICY) if one.release == manifest.release)


def collect(store: ObjectStore) -> None:
    for decision in decide(store, MODEL, POLICY):
        carry_out(store, MODEL, decision, POLICY)


def test_an_object_that_is_called_like_a_release_is_none_and_the_doctor_says_so(
    object_store: ObjectStore, three: list[Manifest], pass_time: PassTime
) -> None:
    """It would be deleted for good, again and again: what is deleted lies below the release's folder."""
    below = releases_prefix(MODEL)
    object_store.put(below, b"")
    assert not any("of no release" in one.what for one in examine(object_store, MODEL, NOWHERE))
    for name in ("ab" * 10, "ab" * 9, "not-an-id/\x1b.bin"):
        object_store.put(below + name, b"x" * 1000)
    pass_time(timedelta(days=40))
    releases = {manifest.release for manifest in three}
    assert {decision.release for decision in decide(object_store, MODEL, POLICY)} == releases
    said = [one.what for one in examine(object_store, MODEL, NOWHERE) if "release" in one.what]
    assert len(said) == 1 and f"of no release: 3, first {below}{'ab' * 9};" in said[0]


def test_what_lies_among_claims_and_views_and_is_none_is_told(
    object_store: ObjectStore, three: list[Manifest], tmp_path: Path
) -> None:
    views = f"{views_prefix(MODEL)}{CHANNEL}/"
    for name in (f"triton/{MODEL}/config.pbtxt", f"triton/{MODEL}/3/model.onnx", f"kserve/3/{MODEL}/1/model.py"):
        object_store.put(views + name, b"x")
    assert not any("does not write" in one.what for one in examine(object_store, MODEL, NOWHERE))
    for key in (f"{claims_prefix(MODEL)}\x7f", f"{views}triton/other/1/model.py", f"{views}triton/{MODEL}/1/libx.so"):
        object_store.put(key, b"x")
    said = [one.what for one in examine(object_store, MODEL, NOWHERE) if "does not write" in one.what]
    assert len(said) == 2 and f"below {claims_prefix(MODEL)} " in said[0] and "1, first " in said[0]
    assert f"below {views_prefix(MODEL)} " in said[1] and f"2, first {views}triton/{MODEL}/1/libx.so;" in said[1]


@pytest.mark.parametrize("state", ["marked", "deleting", "deleted"])
def test_no_mark_takes_the_release_that_a_rollback_goes_to(
    object_store: ObjectStore, three: list[Manifest], forge: Forge, state: str, pass_time: PassTime
) -> None:
    forge(three[1], state)
    # Also when everything that a collector waits for is long over.
    pass_time(timedelta(hours=2))
    assert decision_on(object_store, three[1]).step is Step.UNMARK
    collect(object_store)
    stone = read_tombstone(object_store, MODEL, three[1].release)
    assert stone is not None and stone.state is State.KEPT
    verify_release(object_store, MODEL, three[1].release, read_back=True)
    assert rolled_back(object_store).release == three[1].release


def test_no_mark_takes_what_is_live(object_store: ObjectStore, three: list[Manifest], forge: Forge) -> None:
    forge(three[2], "deleting")
    for _ in range(2):
        collect(object_store)
    verify_release(object_store, MODEL, three[2].release, read_back=True)


def test_a_mark_that_says_it_is_old_gets_the_whole_grace(
    object_store: ObjectStore, three: list[Manifest], forge: Forge
) -> None:
    for state in ("marked", "deleting"):
        forge(three[0], state)
        assert decision_on(object_store, three[0]).step is Step.WAIT
        collect(object_store)
        verify_release(object_store, MODEL, three[0].release)


def test_a_release_that_is_needed_by_the_time_it_is_deleted_stays(
    object_store: ObjectStore, three: list[Manifest], pass_time: PassTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(object_store)
    pass_time(timedelta(days=2))
    decision = decision_on(object_store, three[0])
    assert decision.step is Step.DELETE
    # Its claim is lost, and by now it is no more than what one could go back to.
    with monkeypatch.context() as patch:
        patch.setattr("train_and_ship.registry.channels.swap.claim", lambda *args, **kwargs: None)
        move(object_store, three[0], channel="staging")
        move(object_store, three[2], channel="staging")
    assert carry_out(object_store, MODEL, decision, POLICY) == "among the last 2 of staging meanwhile"
    verify_release(object_store, MODEL, three[0].release)


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"\xff", b'{"against": 3}'])
def test_a_claim_that_was_written_over_still_keeps_the_release_and_stops_no_collector(
    object_store: ObjectStore, three: list[Manifest], pass_time: PassTime, junk: bytes
) -> None:
    collect(object_store)
    claim(object_store, MODEL, three[0].release, publishing=False)
    object_store.put(f"models/{MODEL}/claims/{three[0].release}.json", junk)
    pass_time(timedelta(days=2))
    assert decision_on(object_store, three[0]).step is Step.KEEP
    collect(object_store)
    verify_release(object_store, MODEL, three[0].release)


def test_a_release_about_which_a_person_is_asked_stays_until_they_have_answered(
    object_store: ObjectStore, three: list[Manifest], pass_time: PassTime
) -> None:
    hold(object_store, MODEL, three[0].release)
    pass_time(timedelta(days=7))
    assert decision_on(object_store, three[0]).step is Step.KEEP
    pass_time(timedelta(days=9))
    assert decision_on(object_store, three[0]).step is Step.MARK


def test_a_release_that_a_view_of_another_server_names_stays(object_store: ObjectStore, three: list[Manifest]) -> None:
    config = f"# {MODEL} release {three[0].release}\nname: {MODEL}\n".encode()
    object_store.put(f"models/{MODEL}/views/{CHANNEL}/kserve/1/{MODEL}/config.pbtxt", config)
    found = decision_on(object_store, three[0])
    assert found.step is Step.KEEP and "kserve/1/" in found.why


@pytest.mark.parametrize("asked", [False, True])
def test_a_release_that_was_deleted_and_published_again_goes_live(
    object_store: ObjectStore, three: list[Manifest], tmp_path: Path, pass_time: PassTime, asked: bool
) -> None:
    collect(object_store)
    pass_time(timedelta(days=2))
    collect(object_store)
    assert not object_store.has_any(release_prefix(MODEL, three[0].release))
    publish(object_store, tmp_path / "0", three[0])
    if asked:
        # A person's question writes over the claim of whoever published.
        hold(object_store, MODEL, three[0].release)
    move(object_store, three[0])
    pointer = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert pointer is not None and pointer.release == three[0].release
    assert choose_rollback(Channel(object_store, MODEL, CHANNEL, NOWHERE), "").release == three[2].release
