"""The generated policies on a store that enforces them: Ceph RGW. Each role does its work, and is denied the rest."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shipreader.errors import UnavailableError
from shipreader.observations import Observer
from shipreader.reader import Reader
from tests.support.ceph_rgw import RgwServer
from tests.support.fixture_types import Connect
from tests.support.onnx_releases import onnx_release
from tests.support.releases import CHANNEL, MODEL, make_release, move, published, rolled_back
from tests.support.rollouts import WATCHER, begun, channel_of
from tests.support.signing_keys import key_pair
from tests.support.tool_environments import tool_python
from train_and_ship.infra.errors import ReleaseError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.iam import Role, policy
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix, rollout_key, rules_key
from train_and_ship.registry.bucket.releases import publish, verify_release
from train_and_ship.registry.bucket.tombstones import hold, tombstone_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import read_decisions
from train_and_ship.registry.channels.history import read_history, record_key
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.rules import Approval, read_rules, set_rules
from train_and_ship.registry.maintenance.retention import Policy, carry_out, decide
from train_and_ship.registry.release.manifest import MANIFEST
from train_and_ship.registry.rollouts.moves import stop
from train_and_ship.registry.rollouts.record import Outcome, read_rollout
from train_and_ship.registry.rollouts.versions import read_versions
from train_and_ship.registry.serving.layouts import write_triton

# A first run may install the judge of policies, and fetches Ceph.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def store_url(rgw_server: RgwServer) -> str:
    return rgw_server.url


AsRole = Callable[..., ObjectStore]


@pytest.fixture
def as_role(
    object_store: ObjectStore, rgw_server: RgwServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> AsRole:
    """The bucket of `object_store` as a new user sees it who has these roles' policies and nothing else."""

    def make(*roles: Role, model: str = MODEL, channel: str = "*", write_once: bool = False) -> ObjectStore:
        name = f"user-{uuid.uuid4().hex[:8]}"
        rgw_server.create_user(name, f"key-{name}", f"secret-{name}")
        for role in roles:
            asked = policy(role, object_store.bucket, model=model, channel=channel, write_once=write_once)
            document = json.dumps(asked)
            rgw_server.put_user_policy(name, role, document)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"key-{name}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"secret-{name}")
        return connect(object_store.bucket)

    return make


def denied(action: Callable[[], object]) -> None:
    with pytest.raises(SettingsError, match=r"refused these credentials: cannot .* \(403 AccessDenied"):
        action()


def test_a_trainer_publishes_and_signs_but_moves_no_channel(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    live = published(object_store, tmp_path / "live")
    before = move(object_store, live)
    trainer = as_role(Role.TRAINER)
    trainer.check()
    manifest = make_release(tmp_path / "release", seed=1)
    publish(trainer, tmp_path / "release", manifest, signing_key=key_pair(tmp_path))
    assert verify_release(trainer, MODEL, manifest.release) == manifest
    denied(lambda: move(trainer, manifest))
    denied(lambda: move(trainer, manifest, channel="staging"))
    key = pointer_key(MODEL, CHANNEL)
    denied(lambda: trainer.replace(key, b"{}", before.etag))
    denied(lambda: trainer.put_new(f"models/{MODEL}/history/{CHANNEL}/00000009.json", b"{}"))
    denied(lambda: trainer.delete(release_prefix(MODEL, live.release) + "file0.bin"))
    denied(lambda: trainer.delete(key))
    # A mark is a collector's, a claim is anybody's who publishes.
    denied(lambda: trainer.put(tombstone_key(MODEL, live.release), b"{}"))
    hold(trainer, MODEL, live.release)
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == before


def test_a_promoter_moves_its_channel_and_no_other_and_adds_to_no_release(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(2)]
    promoter = as_role(Role.PROMOTER, channel=CHANNEL)
    # There, on, and back again.
    for manifest in (*releases, releases[0]):
        move(promoter, manifest)
    assert [record.generation for record in read_history(Channel(promoter, MODEL, CHANNEL))] == [1, 2, 3]
    denied(lambda: move(promoter, releases[0], channel="staging"))
    # Likewise a rollout, whose copies it writes.
    rollout = begun(promoter, releases[1])
    stop(channel_of(promoter), rollout, Outcome.ROLLED_BACK, WATCHER)
    assert [one.number for one in read_versions(channel_of(promoter))] == [2, 1]
    for other in (as_role(Role.TRAINER), as_role(Role.VIEWER), as_role(Role.PROMOTER, channel="staging")):
        denied(lambda other=other: begun(other, releases[1], again=True))  # type: ignore[misc]
        denied(lambda other=other: other.put(rollout_key(MODEL, CHANNEL), b"{}"))  # type: ignore[misc]
    denied(lambda: publish(promoter, tmp_path / "new", make_release(tmp_path / "new", seed=2)))
    denied(lambda: promoter.delete(release_prefix(MODEL, releases[1].release) + "file0.bin"))


def test_a_nightly_run_that_may_train_and_stage_cannot_touch_production(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    nightly = as_role(Role.TRAINER, Role.PROMOTER, channel="staging")
    manifest = make_release(tmp_path / "release")
    publish(nightly, tmp_path / "release", manifest)
    assert move(nightly, manifest, channel="staging").generation == 1
    denied(lambda: move(nightly, manifest))


def test_an_owner_says_what_a_move_takes_and_nobody_else_does(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    owner = as_role(Role.OWNER, model=MODEL, channel=CHANNEL)
    said = set_rules(Channel(owner, MODEL, CHANNEL), Approval.REQUIRED, "ada", "customers see it")
    denied(lambda: set_rules(Channel(owner, MODEL, "staging"), Approval.NONE, "ada", ""))
    denied(lambda: move(owner, manifest))
    denied(lambda: owner.delete(rules_key(MODEL, CHANNEL)))
    for store in (as_role(Role.TRAINER, Role.PROMOTER), as_role(Role.COLLECTOR, Role.VIEWER)):
        channel = Channel(store, MODEL, CHANNEL)
        assert read_rules(channel) == said
        denied(lambda channel=channel: set_rules(channel, Approval.NONE, "eve", ""))  # type: ignore[misc]
        denied(lambda store=store: store.delete(rules_key(MODEL, CHANNEL)))  # type: ignore[misc]
    assert read_rules(Channel(owner, MODEL, CHANNEL)) == said


def test_rgw_16_does_not_know_the_condition_by_which_aws_keeps_records_as_they_are(
    object_store: ObjectStore, as_role: AsRole
) -> None:
    """So `ship iam` leaves it out where another store than AWS's is set."""
    key = f"models/{MODEL}/history/{CHANNEL}/00000001.json"
    as_role(Role.PROMOTER).put_new(key, b"{}")
    promoter = as_role(Role.PROMOTER, write_once=True)
    denied(lambda: promoter.put(key, b"[]"))
    # The condition says of every request that the header is missing: no record could be written at all.
    denied(lambda: promoter.put_new(key.replace("1.json", "2.json"), b"{}"))
    found = promoter.get(key)
    assert found is not None and found[0] == b"{}"


def test_a_reader_follows_its_channel_and_can_do_nothing_else(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    reader_store = as_role(Role.READER, model=MODEL, channel=CHANNEL)
    client = s3_client(Settings.load())
    reader = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "served", channel=CHANNEL, client=client)
    with pytest.raises(UnavailableError, match=r"403 .*does not exist, or these credentials may not read it"):
        reader.pull()
    # There, on, and back: conditional GETs and all, on RGW.
    for generation, manifest in enumerate((first, first, second, first), 1):
        move(object_store, manifest, channel=CHANNEL)
        release = reader.pull()
        assert release.id == manifest.release and release.generation == max(1, generation - 1)
    staging = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "other", channel="staging", client=client)
    move(object_store, first, channel="staging")
    with pytest.raises(UnavailableError, match="403"):
        staging.pull()
    denied(lambda: reader_store.list_keys("models/"))
    denied(lambda: reader_store.put_new("models/digits/releases/x", b""))
    denied(lambda: reader_store.put_new(".probe/x", b""))
    denied(lambda: reader_store.delete(pointer_key(MODEL, CHANNEL)))
    begun(object_store, second)
    assert read_rollout(channel_of(reader_store)) == read_rollout(channel_of(object_store))
    denied(lambda: reader_store.get(f"models/{MODEL}/rollouts/{CHANNEL}/00000004-0001.json"))
    denied(lambda: reader_store.put(rollout_key(MODEL, CHANNEL), b"{}"))
    denied(lambda: reader_store.get(f"models/{MODEL}/history/{CHANNEL}/00000001.json"))


@pytest.mark.parametrize("role", [Role.READER, Role.SERVER])
def test_a_server_writes_what_it_has_observed_of_its_model_and_reads_and_lists_nothing_of_it(
    object_store: ObjectStore, as_role: AsRole, role: Role
) -> None:
    server = as_role(role, model=MODEL)
    observer = Observer(MODEL, bucket=object_store.bucket, client=s3_client(Settings.load()), parquet=False)
    observer.observe(request_id="r-1")
    assert observer.flush(), observer.status()
    observer.close()
    ((key, _),) = object_store.list_keys("observations/").items()
    denied(lambda: server.get(key))
    denied(lambda: server.list_keys(f"observations/{MODEL}/"))
    denied(lambda: server.delete(key))
    for other in (key.replace(MODEL, "faces"), f"models/{MODEL}/observations/x", pointer_key(MODEL, CHANNEL)):
        denied(lambda other=other: server.put(other, b""))  # type: ignore[misc]
    # The same model's trainer and promoter read it, another's do not; only the collector deletes.
    for reads in (Role.TRAINER, Role.PROMOTER):
        store = as_role(reads)
        assert store.get(key) is not None and list(store.list_keys("observations/")) == [key]
        denied(lambda store=store: store.put(key, b""))  # type: ignore[misc]
        denied(lambda store=store: store.delete(key))  # type: ignore[misc]
    denied(lambda: as_role(Role.TRAINER, model="faces").get(key))
    denied(lambda: as_role(Role.OWNER).get(key))
    as_role(Role.COLLECTOR).delete(key)
    assert object_store.list_keys("observations/") == {}


def test_a_collector_deletes_releases_but_moves_and_replaces_nothing(
    object_store: ObjectStore, as_role: AsRole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    live, old, other = (published(object_store, tmp_path / str(seed), seed) for seed in range(3))
    before = move(object_store, live)
    collector = as_role(Role.COLLECTOR)
    keep = Policy(slowest_reader=timedelta(0))
    # Marked, and deleted two days later: what `ship gc` does.
    for days in (0, 2):
        monkeypatch.setattr(collector, "now", lambda days=days: datetime.now(UTC) + timedelta(days=days, seconds=5))
        for decision in decide(collector, MODEL, keep):
            if decision.release == old.release:
                assert carry_out(collector, MODEL, decision, keep) is None
    assert collector.list_keys(release_prefix(MODEL, old.release)) == {}
    denied(lambda: move(collector, other))
    denied(lambda: collector.delete(pointer_key(MODEL, CHANNEL)))
    denied(lambda: collector.delete(f"models/{MODEL}/history/{CHANNEL}/00000001.json"))
    denied(lambda: collector.put_new(release_prefix(MODEL, live.release) + "more", b""))
    assert read_pointer(Channel(object_store, MODEL, CHANNEL)) == before


def test_views_are_written_by_one_role_and_read_by_another(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    manifest = onnx_release(tmp_path / "release", 1.0)
    publish(object_store, tmp_path / "release", manifest)
    before = move(object_store, manifest)
    viewer = as_role(Role.VIEWER, model=MODEL, channel=CHANNEL)
    client = s3_client(Settings.load())
    reader = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "served", channel=CHANNEL, client=client)
    for generation in (1, 2, 3):
        view = write_triton(viewer, replace(reader.pull(), generation=generation))
    denied(lambda: move(viewer, manifest, channel="staging"))
    denied(lambda: viewer.replace(pointer_key(MODEL, CHANNEL), b"{}", before.etag))
    denied(lambda: viewer.delete(release_prefix(MODEL, manifest.release) + "model.onnx"))
    server = as_role(Role.SERVER, model=MODEL, channel=CHANNEL)
    names = {key.removeprefix(view.prefix) for key in server.list_keys(view.prefix)}
    assert names == {"digits/config.pbtxt", "digits/2/model.onnx", "digits/3/model.onnx"}
    assert server.get(f"{view.prefix}digits/config.pbtxt") is not None
    denied(lambda: server.list_keys("models/"))
    denied(lambda: server.get(pointer_key(MODEL, CHANNEL)))
    denied(lambda: server.put_new(f"{view.prefix}digits/9/model.onnx", b""))


def test_what_each_role_may_write_over_or_ahead_takes_no_move_along_and_stops_none(
    object_store: ObjectStore, as_role: AsRole, tmp_path: Path
) -> None:
    two = [published(object_store, tmp_path / str(seed), seed) for seed in range(2)]
    for manifest in two:
        move(object_store, manifest)
    trainer, promoter, viewer = (as_role(role, channel=CHANNEL) for role in (Role.TRAINER, Role.PROMOTER, Role.VIEWER))
    # The release that a rollback goes to is described anew, and a claim that nobody can read.
    trainer.put(release_prefix(MODEL, two[0].release) + MANIFEST, replace(two[0], metrics={"accuracy": 1.0}).encode())
    trainer.put(f"models/{MODEL}/claims/{two[0].release}.json", b"x" * 2**20)
    # Asked by whom policies let read: the owner of an RGW bucket may not read what other users write.
    with pytest.raises(ReleaseError, match="altered after it went live"):
        rolled_back(promoter)
    # The next move's place in the history is taken, and the decision of the year 2999 is made.
    promoter.put(record_key(MODEL, CHANNEL, 3), b"taken")
    promoter.put(f"models/{MODEL}/decisions/{CHANNEL}/29990101T000000.000000Z-r.json", b"{}")
    viewer.put(f"models/{MODEL}/views/{CHANNEL}/triton/{MODEL}/config.pbtxt", b"#" * 2 * 2**20)
    third = published(object_store, tmp_path / "2", 2)
    assert move(promoter, third).generation == 3 and move(promoter, two[1]).generation == 4
    channel = Channel(promoter, MODEL, CHANNEL)
    assert [one.generation for one in read_history(channel)] == [1, 2, 4]
    assert read_decisions(channel, 5) == []
    # What has to be kept cannot be told until somebody takes that away: nothing is deleted.
    with pytest.raises(ReleaseError, match=r"00000003\.json: expected the record of a move"):
        decide(as_role(Role.COLLECTOR), MODEL, Policy(slowest_reader=timedelta(0)))


def test_no_listing_ends_at_a_key_that_xml_cannot_hold(object_store: ObjectStore) -> None:
    # Pages of two: what ends one is written into the answer as it is.
    object_store._client.meta.events.register(
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.setdefault("MaxKeys", 2)
    )
    keys = sorted(f"a/{number}{character}/{number}\x01" for number in range(3) for character in ("", "\x01", "\ufffe"))
    for key in keys:
        object_store.put(key, b"")
    assert list(object_store.list_keys("a/")) == keys
    assert list(object_store.list_objects("a/", after=keys[0], until=keys[6])) == keys[1:7]
    assert object_store.list_folders("a/") == sorted(key.split("/")[1] for key in keys)
    assert object_store.has_any("a/0") and not object_store.has_any("b")


def test_a_collector_drops_uploads_of_views_and_claims_too(
    object_store: ObjectStore, as_role: AsRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"models/{MODEL}/{place}/x" for place in ("claims", "releases", f"views/{CHANNEL}")]
    for key in [*keys, "models/faces/releases/x"]:
        object_store._client.create_multipart_upload(Bucket=object_store.bucket, Key=key)
    collector = as_role(Role.COLLECTOR)
    monkeypatch.setattr(collector, "now", lambda: datetime.now(UTC) + timedelta(days=1))
    assert collector.drop_uploads(f"models/{MODEL}/", timedelta(0)) == [(key, "") for key in keys]
    ((other, why),) = collector.drop_uploads("models/faces/", timedelta(0))
    assert other == "models/faces/releases/x" and "403 AccessDenied" in why


def test_a_right_to_list_below_a_prefix_alone_takes_what_is_not_there_for_what_is_forbidden(
    object_store: ObjectStore, rgw_server: RgwServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a role of one model may list the bucket: a channel that was never moved could not be told from a refusal."""
    bucket, own = object_store.bucket, f"models/{MODEL}/*"
    held = {
        "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [f"arn:aws:s3:::{bucket}"],
        "Condition": {"StringLike": {"s3:prefix": [own]}},
    }  # fmt: skip
    read = {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": [f"arn:aws:s3:::{bucket}/{own}"]}
    rgw_server.create_user("held", "key-held", "secret-held")
    rgw_server.put_user_policy("held", "p", json.dumps({"Version": "2012-10-17", "Statement": [held, read]}))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-held")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-held")
    store = connect(bucket)
    assert store.list_keys(f"models/{MODEL}/") == {}
    denied(lambda: store.list_keys("models/faces/"))
    denied(lambda: read_pointer(Channel(store, MODEL, CHANNEL)))
    with pytest.raises(SettingsError, match="cannot look for the bucket"):
        store.check()


def test_a_user_without_a_policy_may_do_nothing(object_store: ObjectStore, as_role: AsRole, tmp_path: Path) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    nobody = as_role()
    denied(lambda: nobody.get(pointer_key(MODEL, CHANNEL)))
    denied(lambda: nobody.list_keys(""))


def test_a_linter_of_iam_policies_has_nothing_to_say() -> None:
    tool = tool_python("parliament==1.6.4", "setuptools==80.9.0")
    documents = [
        policy(role, "models", model=model, channel=channel, kms_key=kms_key)
        for role in Role
        for model, channel, kms_key in (
            ("*" if role in (Role.READER, Role.SERVER) else "digits", "*", ""),
            ("digits", "prod", "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"),
        )
    ]
    script = (
        "import json, sys, parliament\n"
        "for document in json.load(sys.stdin):\n"
        "    policy = parliament.analyze_policy_string(json.dumps(document))\n"
        "    for finding in policy.findings: print(finding)\n"
        "print('done')\n"
    )
    done = subprocess.run([tool, "-c", script], input=json.dumps(documents), capture_output=True, text=True)
    assert done.stdout == "done\n", done.stdout + done.stderr
    # It does find things.
    wrong = json.dumps(
        [{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:Fly", "Resource": "*"}]}]
    )
    assert "UNKNOWN_ACTION" in subprocess.run([tool, "-c", script], input=wrong, capture_output=True, text=True).stdout
