"""Readers follow a rollout beside what is live, from a real S3 server: whatever is wrong with it, live goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shipreader.bucket import Bucket
from shipreader.canary import Split
from shipreader.errors import RefusedError
from shipreader.reader import Reader
from shipreader.records import Release
from shipreader.report import metrics, read_reports
from shipreader.rollouts import Candidate
from tests.support.fault_proxy import Answer, DropRequest, FaultProxy, OtherBytes, Rule
from tests.support.fixture_types import MakeReader
from tests.support.processes import PATIENCE
from tests.support.releases import content, damage, key_of, make_release, move, published
from tests.support.rollout_objects import put_rollout, roll_out
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.release.manifest import Manifest, build_manifest

ROLLOUTS = "/rollouts/"


@dataclass
class Tried:
    """A live release, and a candidate that is in the bucket."""

    store: ObjectStore
    live: Manifest
    candidate: Manifest
    pointer: Pointer
    folder: Path

    def roll_out(self, **changes: Any) -> None:
        roll_out(self.store, self.pointer, self.candidate, **changes)


@pytest.fixture
def tried(object_store: ObjectStore, tmp_path: Path) -> Tried:
    live, candidate = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    return Tried(object_store, live, candidate, move(object_store, live), tmp_path)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def trying(reader: Reader) -> tuple[str, int] | None:
    """The candidate's release and share, after a look."""
    reader.pull()
    found = reader.candidate
    return (found.release.id, found.share) if found is not None else None


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "served" / "releases").iterdir()}


def test_a_candidate_comes_beside_what_is_live_and_its_share_follows_the_rollout(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    seen: list[Candidate | None] = []
    reader = make_reader(on_rollout=seen.append)
    assert trying(reader) is None and seen == []
    tried.roll_out(fallback_ms=50, shadow=True)
    assert trying(reader) == (tried.candidate.release, 500)
    (found,) = seen
    assert found is not None and found == reader.candidate == reader.status().candidate
    assert (found.key, found.fallback_ms, found.shadow, found.rollout, found.number) == (
        "user_id",
        50,
        True,
        "a" * 32,
        1,
    )
    assert (found.release.generation, found.release.rollout) == (1, "a" * 32)
    assert content(found.release.folder) == content(tmp_path / "1")
    assert (tmp_path / "served" / "current").resolve().name == tried.live.release
    # Whoever reads `current` is not told of it.
    assert reader.current is not None and (reader.current.id, reader.current.rollout) == (tried.live.release, "")
    before = len(proxy.requests)
    assert trying(reader) == (tried.candidate.release, 500)
    # Nothing moved: two conditional GETs.
    assert [request.method for request in proxy.requests[before:]] == ["GET", "GET"]
    assert all("if-none-match" in request.headers for request in proxy.requests[before:])
    tried.roll_out(number=2, share=2500)
    assert trying(reader) == (tried.candidate.release, 2500)
    # The share alone is asked for.
    assert len(proxy.requests) == before + 4 and [one.share for one in seen if one] == [500, 2500]
    tried.roll_out(number=3, state="ended", outcome="rolled back")
    assert trying(reader) is None and seen[-1] is None and len(seen) == 3
    assert reader.status().rollout_problem == ""


def test_who_does_not_ask_for_rollouts_serves_what_is_live_as_readers_of_before_do(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy
) -> None:
    tried.roll_out()
    reader = make_reader()
    assert trying(reader) is None and reader.status().release is not None
    assert proxy.sent("GET", ROLLOUTS) == []


def test_a_candidate_that_goes_live_is_not_downloaded_again(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy
) -> None:
    seen: list[Any] = []
    reader = make_reader(on_rollout=seen.append, on_change=seen.append)
    tried.roll_out(share=10_000)
    reader.pull()
    before = len(proxy.sent("GET", "/file"))
    move(tried.store, tried.candidate)
    live = reader.pull()
    assert (live.id, live.generation, live.rollout) == (tried.candidate.release, 2, "")
    assert len(proxy.sent("GET", "/file")) == before == 8
    # In this order: nobody is without a release that answers.
    assert [type(one) for one in seen] == [Release, Candidate, Release, type(None)]


def test_any_move_ends_a_rollout_also_where_the_new_release_cannot_be_had(
    tried: Tried, make_reader: MakeReader, tmp_path: Path
) -> None:
    bad = published(tried.store, tmp_path / "2", 2)
    reader = make_reader(rollouts=True)
    tried.roll_out()
    assert trying(reader) is not None
    move(tried.store, bad)
    damage(tried.store, key_of(bad, "file1.bin"))
    with pytest.raises(RefusedError, match="expected SHA-256"):
        reader.pull()
    assert reader.candidate is None
    assert reader.current is not None and reader.current.id == tried.live.release


def test_a_rollout_of_another_pointer_is_void_and_no_problem(tried: Tried, make_reader: MakeReader) -> None:
    reader = make_reader(rollouts=True)
    for change in ({"generation": 2}, {"extends": "another move"}):
        tried.roll_out(**change)
        assert trying(reader) is None and reader.status().rollout_problem == ""
    tried.roll_out()
    assert trying(reader) is not None


def test_a_process_that_restarts_and_another_one_in_the_folder_take_the_candidate_up_without_a_download(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    tried.roll_out()
    first = make_reader(rollouts=True)
    assert trying(first) is not None
    before = len(proxy.sent("GET", "/file"))
    with make_reader(rollouts=True) as second:
        until(lambda: second.candidate is not None)
        assert second.candidate == first.candidate
        until(lambda: read_reports(tmp_path / "served")[0].get("candidate") == tried.candidate.release)
    assert len(proxy.sent("GET", "/file")) == before
    # One that follows no rollouts, and moves the folder on, leaves the other's candidate where it is.
    move(tried.store, published(tried.store, tmp_path / "2", 2))
    third = make_reader().pull()
    assert kept(tmp_path) == {tried.live.release, tried.candidate.release, third.id}
    move(tried.store, tried.live)
    make_reader().pull()
    assert kept(tmp_path) == {tried.live.release, third.id}


def test_a_move_that_another_process_of_the_folder_saw_ends_it_also_while_the_rollout_cannot_be_asked_for(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    tried.roll_out()
    reader = make_reader(rollouts=True)
    assert trying(reader) is not None
    move(tried.store, published(tried.store, tmp_path / "2", 2))
    make_reader().pull()
    proxy.add(Rule(DropRequest(), "GET", ROLLOUTS))
    assert trying(reader) is None and reader.current is not None and reader.current.generation == 2


def test_the_next_candidate_takes_the_place_of_the_one_before(
    tried: Tried, make_reader: MakeReader, tmp_path: Path
) -> None:
    reader = make_reader(rollouts=True)
    tried.roll_out()
    reader.pull()
    following = published(tried.store, tmp_path / "2", 2)
    roll_out(tried.store, tried.pointer, following, rollout="f" * 32)
    assert trying(reader) == (following.release, 500)
    assert kept(tmp_path) == {tried.live.release, following.release}


# ---- what is wrong with it


def test_a_rollout_that_cannot_be_followed_is_said_once_and_live_goes_on(
    tried: Tried, make_reader: MakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader = make_reader(rollouts=True)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": 2}, "expected format 1, got 2"),
        ({"share": 0}, "share: expected 1 to 10,000"),
        ({"manifest_sha256": "0" * 64}, "altered after it went live"),
        ({"release": "0" * 20}, "expected the manifest of a release, got none"),
    ]
    for number, (change, said) in enumerate(wrong, 1):
        tried.roll_out(**change)
        for _ in range(2):
            assert trying(reader) is None
            status = reader.status()
            assert said in status.rollout_problem and status.problem == ""
            assert status.ready(60) and status.release == reader.current
        assert caplog.text.count("the live release answers all") == number
    shown = metrics("digits", "prod", status)
    assert 'shipreader_rollout_problem{model="digits",channel="prod"} 1' in shown
    assert 'shipreader_problem{model="digits",channel="prod"} 0' in shown
    # The next version of it is followed at once.
    tried.roll_out(number=2)
    assert trying(reader) == (tried.candidate.release, 500) and reader.status().rollout_problem == ""
    shown = metrics("digits", "prod", reader.status())
    assert f'release="{tried.candidate.release}",shadow="false"}} 0.05' in shown


def test_an_object_that_is_no_rollout_ends_the_one_before(tried: Tried, make_reader: MakeReader) -> None:
    reader = make_reader(rollouts=True)
    for body in (b"", b"[" * 10_000, b"x" * (64 * 1024 + 1)):
        tried.roll_out()
        assert trying(reader) is not None
        put_rollout(tried.store, body)
        assert trying(reader) is None and "rollouts/prod.json: expected" in reader.status().rollout_problem


def test_without_the_right_to_read_rollouts_nobody_is_disturbed(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    tried.roll_out()
    reader = make_reader(rollouts=True)
    assert trying(reader) is not None
    # Also of an object that is not there, where these credentials may not list.
    proxy.add(Rule(Answer(403, "AccessDenied"), "GET", ROLLOUTS))
    for _ in range(3):
        assert trying(reader) is None
    assert (reader.status().problem, reader.status().rollout_problem) == ("", "")
    assert caplog.text.count("rollouts are not followed: s3://") == 1


def test_while_the_bucket_is_away_the_candidate_stays(tried: Tried, make_reader: MakeReader, proxy: FaultProxy) -> None:
    tried.roll_out()
    reader = make_reader(rollouts=True)
    assert trying(reader) is not None
    proxy.add(Rule(DropRequest(), "GET", ROLLOUTS))
    assert trying(reader) == (tried.candidate.release, 500)
    status = reader.status()
    assert status.problem == "" and "rollouts/prod.json" in status.rollout_problem
    proxy.rules.clear()
    assert trying(reader) is not None and reader.status().rollout_problem == ""


def test_a_bad_candidate_is_not_downloaded_at_every_look(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy
) -> None:
    proxy.add(Rule(OtherBytes(b"x" * 1003), "GET", f"{tried.candidate.release}/file3"))
    tried.roll_out()
    with make_reader(rollouts=True, interval=0.05, jitter=0) as reader:
        until(lambda: "expected SHA-256" in reader.status().rollout_problem)
        looks, downloads = len(proxy.sent("GET", ROLLOUTS)), len(proxy.sent("GET", "/file3"))
        until(lambda: len(proxy.sent("GET", ROLLOUTS)) >= looks + 12)
        # Pauses of 2, 4, 8… intervals.
        assert 1 <= len(proxy.sent("GET", "/file3")) - downloads < 6
        assert reader.status().problem == ""


def test_a_candidate_that_has_other_inputs_is_refused_before_it_is_downloaded(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    make_release(tmp_path / "other", 5)
    signature = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch"]}], "outputs": []}
    formats = {"onnx": "file0.bin"}
    other = build_manifest(tmp_path / "other", model="digits", formats=formats, signature=signature, metrics={})
    publish(tried.store, tmp_path / "other", other)
    roll_out(tried.store, tried.pointer, other)
    reader = make_reader(rollouts=True)
    assert trying(reader) is None
    assert "expected a candidate with the inputs of the live release" in reader.status().rollout_problem
    assert proxy.sent("GET", f"{other.release}/file") == []


def test_a_rollout_never_replaces_the_files_of_what_is_served(
    tried: Tried, make_reader: MakeReader, tmp_path: Path
) -> None:
    reader = make_reader(rollouts=True)
    roll_out(tried.store, tried.pointer, tried.live)
    assert trying(reader) is None and "another release than the live one" in reader.status().rollout_problem
    pointer = move(tried.store, tried.candidate)
    reader.pull()
    # The one before, described anew.
    forged = build_manifest(
        tmp_path / "0", model="digits", formats={"onnx": "file1.bin"}, signature={}, metrics={"accuracy": 1.0}
    )
    assert forged.release == tried.live.release and forged.sha256() != tried.live.sha256()
    before = (tmp_path / "served" / "releases" / forged.release / "MANIFEST.json").read_bytes()
    roll_out(tried.store, pointer, forged)
    assert trying(reader) is None and "expected SHA-256" in reader.status().rollout_problem
    assert (tmp_path / "served" / "releases" / forged.release / "MANIFEST.json").read_bytes() == before


def test_what_a_machine_does_not_accept_is_not_tried_there(tried: Tried, make_reader: MakeReader) -> None:
    def accept(release: Release) -> None:
        if release.rollout:
            raise RuntimeError("this runtime is too old for it")

    tried.roll_out()
    reader = make_reader(rollouts=True, accept=accept)
    assert trying(reader) is None
    assert "was not accepted: RuntimeError: this runtime is too old" in reader.status().rollout_problem


def test_a_callback_that_cannot_take_the_candidate_is_asked_again_and_live_goes_on(
    tried: Tried, make_reader: MakeReader, tmp_path: Path
) -> None:
    calls: list[Candidate | None] = []

    def on_rollout(candidate: Candidate | None) -> None:
        calls.append(candidate)
        if len(calls) < 3:
            raise RuntimeError("no room on the GPU")

    tried.roll_out()
    with make_reader(on_rollout=on_rollout) as reader:
        until(lambda: "on_rollout failed: RuntimeError: no room on the GPU" in reader.status().rollout_problem)
        assert reader.status().candidate is None and reader.status().problem == ""
        until(lambda: reader.status().candidate is not None)
        assert reader.status().rollout_problem == "" and len(calls) == 3


def test_a_move_does_not_wait_for_the_files_of_a_candidate(
    tried: Tried, make_reader: MakeReader, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shipreader.bucket.PIECE_BYTES", 100)
    following = published(tried.store, tmp_path / "2", 2)
    began = threading.Event()

    def slowly(self: Bucket, key: str, start: int) -> Iterator[bytes]:
        for piece in pieces(self, key, start):
            if tried.candidate.release in key:
                began.set()
                time.sleep(0.2)
            yield piece

    pieces = Bucket._pieces
    monkeypatch.setattr(Bucket, "_pieces", slowly)
    tried.roll_out()
    with make_reader(rollouts=True, interval=0.1) as reader:
        assert began.wait(PATIENCE)
        started = time.monotonic()
        move(tried.store, following)
        until(lambda: reader.current is not None and reader.current.id == following.release)
        assert reader.candidate is None
        # All of it would have taken 2 s and more.
        assert time.monotonic() - started < 10
        assert tried.candidate.release not in kept(tmp_path)


def test_both_releases_answer_in_one_process_until_the_channel_moves(tried: Tried, make_reader: MakeReader) -> None:
    def load(release: Release) -> Callable[[str], bytes]:
        return lambda name: (release.folder / name).read_bytes()

    reader = make_reader(interval=0.02)
    split = Split(reader, load)
    old, new = (content(tried.folder / str(seed))["file2.bin"] for seed in range(2))
    inside, outside = "user-3863", "user-7248"
    with reader:
        assert split.call(inside, "file2.bin").value == old
        tried.roll_out()
        until(lambda: split.call(inside, "file2.bin").value == new)
        assert split.call(outside, "file2.bin").value == split.call(None, "file2.bin").value == old
        # A move by any version ends it; that candidate is here already.
        move(tried.store, tried.candidate)
        until(lambda: split.call(outside, "file2.bin").value == new)
        assert split.call(inside, "file2.bin").release.generation == 2
