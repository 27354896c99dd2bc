"""Retention against a real S3 server: what stays, what goes, and promotions in between."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from tests.support.fault_proxy import DropRequest, FaultProxy, PassOn, Rule
from tests.support.fixture_types import Connect, Ship, Versioned
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, POINTER, make_release, move, published
from tests.support.stack_servers import MlflowServer, S3Server
from train_and_ship.infra.errors import ReleaseError, RequestError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket import tombstones
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import publish, verify_release
from train_and_ship.registry.bucket.tombstones import LEASE, State, claim, read_tombstone
from train_and_ship.registry.channels import swap as moving
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history, record_key
from train_and_ship.registry.channels.moves import roll_back
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.channels.targets import choose_rollback, verify_target
from train_and_ship.registry.maintenance import retention
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.retention import (
    TAG_DELETED,
    Decision,
    Policy,
    Step,
    carry_out,
    decide,
    notify_mlflow,
)
from train_and_ship.registry.release.manifest import Manifest

POLICY = Policy(keep_last=2, slowest_reader=timedelta(days=7), grace=timedelta(days=1))
DAY = timedelta(days=1)


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


class Calendar:
    """What day it is for the store and for movers."""

    def __init__(self) -> None:
        self.passed = timedelta(0)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    calendar = Calendar()
    now, boot = ObjectStore.now, tombstones.boot_seconds
    monkeypatch.setattr(ObjectStore, "now", lambda self: now(self) + calendar.passed)
    for module in (tombstones, retention, moving):
        monkeypatch.setattr(module, "boot_seconds", lambda: boot() + calendar.passed.total_seconds())

    later = lambda: (datetime.now(UTC) + calendar.passed).isoformat(timespec="milliseconds")  # noqa: E731
    monkeypatch.setattr(moving, "utc_now", later)
    return calendar


@pytest.fixture
def five(object_store: ObjectStore, tmp_path: Path, calendar: Calendar) -> list[Manifest]:
    """Five releases, promoted to prod one after the other, a month ago."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(5)]
    for manifest in manifests:
        move(object_store, manifest)
    calendar.passed = 30 * DAY
    return manifests


def steps(store: ObjectStore, manifests: list[Manifest], policy: Policy = POLICY) -> list[str]:
    """What would happen to each release, in order of the list."""
    found = {decision.release: decision.step.value for decision in decide(store, MODEL, policy)}
    return [found.get(manifest.release, "gone") for manifest in manifests]


def collect(store: ObjectStore, policy: Policy = POLICY) -> list[str]:
    """Run a collector; what could not be done."""
    refusals = [carry_out(store, MODEL, decision, policy) for decision in decide(store, MODEL, policy)]
    return [refusal for refusal in refusals if refusal is not None]


def decision_on(store: ObjectStore, manifest: Manifest) -> Decision:
    return next(one for one in decide(store, MODEL, POLICY) if one.release == manifest.release)


def state(store: ObjectStore, manifest: Manifest) -> State | None:
    stone = read_tombstone(store, MODEL, manifest.release)
    return stone.state if stone is not None else None


def present(store: ObjectStore, manifest: Manifest) -> bool:
    return store.has_any(release_prefix(MODEL, manifest.release))


def live(store: ObjectStore) -> Pointer:
    pointer = read_pointer(Channel(store, MODEL, CHANNEL))
    assert pointer is not None
    return pointer


# ---- what stays, what goes


def test_old_releases_are_marked_then_deleted_and_the_last_ones_stay(
    object_store: ObjectStore, five: list[Manifest], calendar: Calendar
) -> None:
    assert steps(object_store, five) == ["mark", "mark", "mark", "keep", "keep"]
    assert collect(object_store) == []
    assert steps(object_store, five) == ["marked", "marked", "marked", "keep", "keep"]
    assert all(verify_release(object_store, MODEL, manifest.release) for manifest in five)
    calendar.passed += DAY
    assert steps(object_store, five) == ["delete", "delete", "delete", "keep", "keep"]
    assert collect(object_store) == []
    assert [present(object_store, manifest) for manifest in five] == [False, False, False, True, True]
    assert state(object_store, five[0]) is State.DELETED
    assert steps(object_store, five) == ["gone", "gone", "gone", "keep", "keep"]
    # The history stays, and so does its answer.
    assert [entry.release for entry in read_history(Channel(object_store, MODEL, CHANNEL))] == [
        one.release for one in five
    ]
    assert [finding for finding in examine(object_store, MODEL, NOWHERE) if "aliases" not in finding.what] == []


def test_what_is_live_anywhere_or_was_until_lately_or_is_new_stays(
    object_store: ObjectStore, five: list[Manifest], calendar: Calendar, tmp_path: Path
) -> None:
    move(object_store, five[1], channel="staging")
    new = published(object_store, tmp_path / "new", 9)
    # Off since today: a reader that looked just before may be fetching it still.
    move(object_store, five[0])
    move(object_store, five[2])
    reasons = {one.release: one.why for one in decide(object_store, MODEL, POLICY)}
    assert steps(object_store, [new]) == ["mark"]
    assert reasons[five[2].release] == "live on prod" and reasons[five[1].release] == "live on staging"
    assert reasons[five[0].release] == "among the last 2 of prod"
    assert reasons[five[4].release] == "still live on prod less than 7 days, 0:00:00 ago"
    assert steps(object_store, five) == ["keep", "keep", "keep", "mark", "keep"]
    # The store says when it was written; on that day it is new.
    calendar.passed = timedelta(0)
    assert steps(object_store, [new]) == ["keep"]


def test_an_upload_that_died_is_removed_too(object_store: ObjectStore, five: list[Manifest], tmp_path: Path) -> None:
    dead = make_release(tmp_path / "dead", 9)
    object_store.put_new(release_prefix(MODEL, dead.release) + "file0.bin", b"half")
    found = decision_on(object_store, dead)
    assert found.step is Step.MARK and found.why.startswith("incomplete, published ")


def test_a_history_with_a_hole_where_it_matters_stops_everything(
    object_store: ObjectStore, five: list[Manifest]
) -> None:
    object_store.delete(record_key(MODEL, CHANNEL, 4))
    with pytest.raises(ReleaseError, match="generation 4 is lost; what has to be kept cannot be told"):
        decide(object_store, MODEL, POLICY)
    # What is older than all that has to be kept does not matter.
    list(examine(object_store, MODEL, NOWHERE))
    object_store.delete(record_key(MODEL, CHANNEL, 1))
    assert steps(object_store, five, Policy(keep_last=2, grace=DAY))[4] == "keep"


@pytest.mark.parametrize(
    ("values", "said"),
    [({"keep_last": 1}, "at least 2"), ({"grace": timedelta(minutes=59)}, "grace: expected at least 1:00:00")],
)
def test_a_policy_that_could_not_be_safe_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Policy(**values)  # type: ignore[arg-type]


# ---- promotions in between


@pytest.fixture
def expired(object_store: ObjectStore, five: list[Manifest], calendar: Calendar) -> list[Manifest]:
    """The five, of which the first three are marked and may be deleted now."""
    collect(object_store)
    calendar.passed += DAY
    return five


def test_a_marked_release_that_goes_live_is_not_deleted(object_store: ObjectStore, expired: list[Manifest]) -> None:
    move(object_store, expired[0])
    assert state(object_store, expired[0]) is State.MARKED
    assert collect(object_store) == []
    assert state(object_store, expired[0]) is State.KEPT
    assert [present(object_store, manifest) for manifest in expired] == [True, False, False, True, True]
    verify_release(object_store, MODEL, live(object_store).release)


def test_a_rollback_to_a_marked_release_unmarks_it(object_store: ObjectStore, expired: list[Manifest]) -> None:
    target = choose_rollback(Channel(object_store, MODEL, CHANNEL, NOWHERE), expired[1].release)
    roll_back(verify_target(target), MOVER)
    assert steps(object_store, expired)[1] == "unmark" and collect(object_store) == []
    assert state(object_store, expired[1]) is State.KEPT


def test_publishing_a_marked_release_again_keeps_it_for_a_reader_long(
    object_store: ObjectStore, expired: list[Manifest], calendar: Calendar, tmp_path: Path
) -> None:
    publish(object_store, tmp_path / "0", expired[0])
    assert steps(object_store, expired)[0] == "keep"
    calendar.passed += 8 * DAY
    assert steps(object_store, expired)[0] == "mark"


def test_a_deleted_release_does_not_go_live_but_can_be_published_again(
    object_store: ObjectStore, expired: list[Manifest], tmp_path: Path
) -> None:
    collect(object_store)
    with pytest.raises(ReleaseError, match="was deleted by `ship gc`"):
        move(object_store, expired[0])
    assert live(object_store).release == expired[4].release
    assert publish(object_store, tmp_path / "0", expired[0]).present_bytes == 0
    assert move(object_store, expired[0]).generation == 6
    assert collect(object_store) == [] and live(object_store).release == expired[0].release
    verify_release(object_store, MODEL, expired[0].release)


def test_a_release_claimed_after_the_collector_decided_is_left_alone(
    object_store: ObjectStore, expired: list[Manifest]
) -> None:
    decision = decision_on(object_store, expired[0])
    assert decision.step is Step.DELETE
    move(object_store, expired[0])
    assert str(carry_out(object_store, MODEL, decision, POLICY)).startswith("claimed meanwhile by ")
    verify_release(object_store, MODEL, live(object_store).release)


def test_while_a_release_is_being_deleted_nobody_gets_it(
    connect: Connect, object_store: ObjectStore, expired: list[Manifest], tmp_path: Path
) -> None:
    decision = decision_on(object_store, expired[0])
    seen: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(ReleaseError, match="was deleted by `ship gc`"):
            move(object_store, expired[0])
        with pytest.raises(ServiceError, match="is being deleted just now") as caught:
            publish(object_store, tmp_path / "0", expired[0])
        # Soon it can be published again.
        assert caught.value.retryable
        seen.append("done")

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        proxy.add(Rule(PassOn(), "DELETE", "MANIFEST", times=1, before=meanwhile))
        assert carry_out(store, MODEL, decision, POLICY) is None
        deleted = [request.path for request in proxy.sent("DELETE", "/releases/")]
    assert seen == ["done"]
    # Without its manifest there is no release, however far the rest has got.
    assert "MANIFEST.json" in deleted[0] and len(deleted) == 5


def test_a_mover_whose_write_lands_before_the_collectors_last_look_wins(
    connect: Connect, object_store: ObjectStore, expired: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had claimed the release before that was marked, and its write was under way ever since."""
    decision = decision_on(object_store, expired[0])
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()

        def lands() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(moving, "claim", lambda *args, **kwargs: None)
                move(object_store, expired[0])

        proxy.add(Rule(PassOn(), "GET", "channels", times=1, before=lands))
        assert carry_out(store, MODEL, decision, POLICY) == "live on prod meanwhile"
    assert state(object_store, expired[0]) is State.KEPT
    verify_release(object_store, MODEL, live(object_store).release)


def test_a_mover_that_stood_still_until_its_release_was_deleted_moves_back(
    connect: Connect, object_store: ObjectStore, five: list[Manifest], calendar: Calendar
) -> None:
    """A laptop sleeps between claim and move, and wakes up after mark, grace and deletion."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()

        def sleeps() -> None:
            collect(object_store)
            calendar.passed += DAY
            assert collect(object_store) == []
            assert not present(object_store, five[0])

        proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=sleeps))
        with pytest.raises(ReleaseError, match=f"stood still .*the channel went back to {five[4].release}"):
            move(store, five[0])
    pointer = live(object_store)
    assert (pointer.release, pointer.previous, pointer.kind) == (five[4].release, five[0].release, ROLLBACK)
    assert [entry.generation for entry in read_history(Channel(object_store, MODEL, CHANNEL))] == list(range(1, 8))
    verify_release(object_store, MODEL, pointer.release)


# The tests around it put each of these moments in order.
@pytest.mark.soak
def test_movers_publishers_and_collectors_at_once_never_leave_a_live_release_without_its_bytes(
    object_store: ObjectStore, calendar: Calendar, tmp_path: Path
) -> None:
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(6)]
    for manifest in manifests:
        move(object_store, manifest)
    ends: list[str] = []
    for _ in range(8):
        calendar.passed += 30 * DAY
        collect(object_store)
        calendar.passed += DAY
        wanted = [one for one in decide(object_store, MODEL, POLICY) if one.step is Step.DELETE]
        start = threading.Barrier(6)

        def collector(wanted: list[Decision] = wanted, start: threading.Barrier = start) -> None:
            start.wait()
            for decision in wanted:
                carry_out(object_store, MODEL, decision, POLICY)

        def mover(manifest: Manifest, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                move(object_store, manifest)
                ends.append("moved")
            except ReleaseError:
                ends.append("refused")

        def publisher(number: int, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                publish(object_store, tmp_path / str(number), manifests[number])
                move(object_store, manifests[number])
                ends.append("published")
            except ServiceError as error:
                assert error.retryable
                ends.append("busy")
            except ReleaseError:
                ends.append("refused")

        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(collector), pool.submit(collector)]
            jobs += [pool.submit(mover, manifest) for manifest in manifests[:2]]
            jobs += [pool.submit(publisher, number) for number in (2, 3)]
            for job in jobs:
                job.result()
        pointer = live(object_store)
        assert verify_release(object_store, MODEL, pointer.release, read_back=True).sha256() == pointer.manifest_sha256
        for number, manifest in enumerate(manifests):
            # For the next round whatever went is there again.
            publish(object_store, tmp_path / str(number), manifest)
    assert "published" in ends and ("refused" in ends or "moved" in ends)


# ---- collectors that die, and many of them


def test_a_collector_that_died_is_followed_by_the_next_one(
    connect: Connect, object_store: ObjectStore, expired: list[Manifest], calendar: Calendar
) -> None:
    decision = decision_on(object_store, expired[0])
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(DropRequest(), "DELETE", "file1"))
        with pytest.raises(ServiceError):
            carry_out(store, MODEL, decision, POLICY)
    assert state(object_store, expired[0]) is State.DELETING and present(object_store, expired[0])
    assert steps(object_store, expired)[0] == "marked"
    calendar.passed += 3 * LEASE
    assert "was begun" in decision_on(object_store, expired[0]).why
    assert collect(object_store) == []
    assert not present(object_store, expired[0]) and state(object_store, expired[0]) is State.DELETED


def test_a_collector_that_takes_too_long_stops_before_another_may_begin(
    connect: Connect, object_store: ObjectStore, expired: list[Manifest], calendar: Calendar
) -> None:
    decision = decision_on(object_store, expired[0])

    def slow() -> None:
        calendar.passed += LEASE + timedelta(seconds=1)

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(PassOn(), "DELETE", "file0", times=1, before=slow))
        assert "not finished" in str(carry_out(store, MODEL, decision, POLICY))
    assert state(object_store, expired[0]) is State.DELETING


def test_collectors_at_once_delete_everything_once(object_store: ObjectStore, expired: list[Manifest]) -> None:
    wanted = [decision_on(object_store, manifest) for manifest in expired[:3]]

    def go(_: int) -> list[str | None]:
        return [carry_out(object_store, MODEL, decision, POLICY) for decision in wanted]

    with ThreadPoolExecutor(4) as pool:
        ends = [end for refusals in pool.map(go, range(4)) for end in refusals]
    assert ends.count(None) == 3
    assert not any(present(object_store, manifest) for manifest in expired[:3])


@pytest.mark.parametrize("times", [1, 3])
def test_a_claim_whose_reply_was_lost_is_recognised(
    connect: Connect, object_store: ObjectStore, expired: list[Manifest], times: int
) -> None:
    from tests.support.fault_proxy import DropReply

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(DropReply(), "PUT", "claims", times=times))
        claim(store, MODEL, expired[0].release, publishing=False)
    assert steps(object_store, expired)[0] == "keep"


# ---- uploads and MLflow


def test_uploads_that_were_never_completed_are_dropped(
    object_store: ObjectStore, five: list[Manifest], calendar: Calendar
) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in (f"models/{MODEL}/releases/x/model.onnx", "models/other/releases/x/model.onnx"):
        client.create_multipart_upload(Bucket=object_store.bucket, Key=key)
    calendar.passed = DAY
    assert object_store.drop_uploads(f"models/{MODEL}/", 7 * DAY) == []
    calendar.passed = 8 * DAY
    assert len(object_store.drop_uploads(f"models/{MODEL}/", 7 * DAY, dry_run=True)) == 1
    assert object_store.drop_uploads(f"models/{MODEL}/", 7 * DAY) == [(f"models/{MODEL}/releases/x/model.onnx", "")]
    left = client.list_multipart_uploads(Bucket=object_store.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["models/other/releases/x/model.onnx"]


def test_the_bucket_gets_one_rule_for_uploads_and_keeps_its_others(object_store: ObjectStore) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    theirs = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}
    client.put_bucket_lifecycle_configuration(
        Bucket=object_store.bucket,
        LifecycleConfiguration={"Rules": [theirs]},  # type: ignore[list-item]
    )
    assert object_store.ensure_upload_rule(7) == "a new rule of the bucket drops them after 7 days"
    assert object_store.ensure_upload_rule(7) == "a rule of the bucket drops them"
    rules = client.get_bucket_lifecycle_configuration(Bucket=object_store.bucket)["Rules"]
    assert [rule["ID"] for rule in rules] == ["logs", "ship-incomplete-uploads"]


def test_mlflows_versions_are_tagged_or_deleted_only_when_asked(
    object_store: ObjectStore, expired: list[Manifest], mlflow_server: MlflowServer, versioned: Versioned
) -> None:
    for manifest in expired:
        versioned(manifest.release)
    client = MlflowClient(mlflow_server.url)
    client.set_registered_model_alias(MODEL, "favourite", "2")
    collect(object_store)
    with pytest.raises(ServiceError):
        list(notify_mlflow(object_store, MODEL, NOWHERE, delete_versions=False))
    told = list(notify_mlflow(object_store, MODEL, mlflow_server.url, delete_versions=False))
    assert len(told) == 3 and list(notify_mlflow(object_store, MODEL, mlflow_server.url, delete_versions=False)) == []
    tags = [client.get_model_version(MODEL, str(number)).tags.get(TAG_DELETED) for number in range(1, 6)]
    assert [tag is not None for tag in tags] == [True, True, True, False, False]
    list(notify_mlflow(object_store, MODEL, mlflow_server.url, delete_versions=True))
    # Somebody still calls the second one by a name.
    left = {str(one.version) for one in client.search_model_versions(f"name = '{MODEL}'")}
    assert left == {"2", "4", "5"}


# ---- the command


def test_the_command_shows_first_and_does_when_told(
    object_store: ObjectStore, five: list[Manifest], ship: Ship
) -> None:
    words = ["--keep", "2"]
    shown = ship("gc", *words)
    assert shown.status == 0, shown.errors
    assert shown.output.count("would mark") == 4 and "Nothing was changed; --apply does it." in shown.output
    assert [state(object_store, manifest) for manifest in five] == [None] * 5
    done = ship("gc", MODEL, *words, "--apply")
    assert done.status == 0, done.errors
    assert "digits: 3 marked" in done.output and "incomplete uploads: a new rule" in done.output
    assert [state(object_store, manifest) for manifest in five] == [State.MARKED] * 3 + [None] * 2
    for mistake, said in (
        (["--keep", "1"], "at least 2"),
        (["--grace", "5m"], "at least 1:00:00"),
        (["--grace", "x"], "7d"),
    ):
        refused = ship("gc", *mistake)
        assert (refused.status, refused.output) == (2, "") and said in refused.errors


def test_the_command_ends_with_1_when_mlflow_could_not_be_told(
    object_store: ObjectStore, expired: list[Manifest], ship: Ship
) -> None:
    ended = ship("gc", MODEL, "--keep", "2", "--apply")
    assert "digits: 3 deleted" in ended.output and "are marked by a later `ship gc`" in ended.errors
    assert ended.status == 1
