"""Who may write somewhere writes an object that no request can read: it is that object's fault, and stops no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import boto3
import pytest
import typer
from botocore.exceptions import ClientError, HTTPClientError
from botocore.parsers import ResponseParserError
from botocore.retries.standard import ExponentialBackoff
from urllib3.exceptions import ProtocolError

from shipreader import bucket, signatures
from shipreader.errors import RefusedError, UnavailableError
from shipreader.reader import Reader
from shipreader.records import pointer_key
from tests.support.fault_proxy import (
    Answer,
    Fault,
    FaultProxy,
    Forward,
    ManyHeaders,
    OneHeader,
    PassOn,
    Reply,
    Request,
    Rule,
)
from tests.support.fixture_types import Connect
from tests.support.onnx_releases import onnx_release
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, move, published
from tests.support.runnable_releases import runnable
from tests.support.signing_keys import key_pair
from train_and_ship.infra import s3
from train_and_ship.infra.errors import ReleaseError, ServiceError, SettingsError, StoreFaultError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import decisions_prefix, views_prefix
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.signing import publish_signature, signature_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import record_key
from train_and_ship.registry.channels.moves import kind_changes, promote_existing, require_not_stale
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import ask_promotion
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.retention import Policy, Step, decide
from train_and_ship.registry.release.manifest import JOB, MANIFEST, Manifest
from train_and_ship.registry.serving.layouts import write_triton
from train_and_ship.ship.doctor import doctor
from train_and_ship.ship.gc import gc
from train_and_ship.ship.status import channel_statuses
from train_and_ship.tasks.copies import live_copy

KEEP = Policy(keep_last=2, slowest_reader=timedelta(0))
OTHER = "faces"
FAULTS = [
    pytest.param(ManyHeaders(), id="metadata without end"),
    pytest.param(Answer(400, "InvalidRequest"), id="a customer's key"),
    pytest.param(Answer(403, "InvalidObjectState"), id="an archive"),
    pytest.param(
        Answer(403, "AccessDenied", "User: x is not authorized to perform: kms:Decrypt on the resource"), id="a KMS key"
    ),
    # A date that is none, as which the client library takes it.
    pytest.param(OneHeader("x-amz-object-lock-retain-until-date", "soon"), id="a header that is not what it should be"),
]


@dataclass(frozen=True)
class HoldsControls:
    """A store that takes keys with control characters, as which `@` is written into listings."""

    encodes: bool
    """Writes keys as addresses have them where it is asked to."""

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        reply = forward(request)
        if self.encodes and "encoding-type=url" in request.path:
            body = re.sub(rb"(?<=<Key>)[^<]*", lambda key: quote(key[0]).encode(), reply.body)
        else:
            body = reply.body.replace(b"@", b"\x01")
        headers = [(name, value) for name, value in reply.headers if name.lower() != "content-length"]
        return Reply(reply.status, headers, body)


@dataclass(frozen=True)
class OtherListing:
    body: bytes

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        return Reply(200, [("Content-Type", "application/xml")], self.body)


@pytest.fixture
def proxy(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    # Between two tries nothing changes here.
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    with FaultProxy(store_url) as started:
        yield started


@pytest.fixture
def faulty(object_store: ObjectStore, connect: Connect, proxy: FaultProxy) -> ObjectStore:
    """The same bucket, through the proxy; commands use it too."""
    return connect(object_store.bucket, proxy.url)


def reader(store: ObjectStore, folder: Path, *keys: Path) -> Reader:
    publics = [key.with_suffix(".pub") for key in keys]
    client = s3_client(Settings.load())
    return Reader(MODEL, bucket=store.bucket, folder=folder, channel=CHANNEL, client=client, public_keys=publics)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_that_nobody_can_read_is_no_fault_of_the_network(
    faulty: ObjectStore, proxy: FaultProxy, fault: Fault, tmp_path: Path
) -> None:
    faulty.put("a/b", b"x")
    proxy.add(Rule(fault, path="/a/b"))
    for ask in (
        lambda: faulty.get("a/b"),
        lambda: faulty.head("a/b"),
        lambda: faulty.hash("a/b"),
        lambda: faulty.download_file("a/b", tmp_path / "b"),
    ):
        with pytest.raises(ReleaseError, match=r"^a/b: it"):
            ask()


def test_when_an_object_expires_is_nothing_that_is_read(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], tmp_path: Path
) -> None:
    # The client library makes a date of it, and some text ends it by an error of its own.
    proxy.add(Rule(OneHeader("Expires", "Thu, 01 Jan 2026 00:00:00 GMT")))
    for client in (s3_client(Settings.load()), bucket.s3_client(faulty.address)):
        reply = client.get_object(Bucket=faulty.bucket, Key=pointer_key(MODEL, CHANNEL))
        assert "Expires" not in reply and reply["ContentLength"] > 0
    assert reader(faulty, tmp_path / "served").pull().id == two[1].release


@pytest.mark.parametrize("kind", [ArithmeticError, KeyError, RuntimeError, TypeError, ResponseParserError])
def test_whatever_parsing_an_answer_about_an_object_ends_with_is_its_fault(
    faulty: ObjectStore, two: list[Manifest], kind: type[Exception], tmp_path: Path
) -> None:
    client = s3_client(Settings.load())

    def parse(**_: object) -> None:
        raise kind("x")

    for ours in (client, faulty._client):
        ours.meta.events.register("before-parse.s3.*", parse)
    key = pointer_key(MODEL, CHANNEL)
    for ask in (lambda: faulty.get(key), lambda: faulty.head(key), lambda: faulty.download_file(key, tmp_path / "b")):
        with pytest.raises(ReleaseError, match=f"^{key}: it cannot be read as other objects are: {kind.__name__}"):
            ask()
    with pytest.raises(RefusedError, match=f"it cannot be read as other objects are: {kind.__name__}"):
        bucket.Bucket(client, faulty.bucket).small(key, 2**20)


def test_what_is_one_objects_fault_is_the_same_for_readers_and_for_ship() -> None:
    # They import nothing of each other.
    headers = "got more than 100 headers"
    said = [HTTPClientError(error=ProtocolError("x", HTTPException(text))) for text in (headers, "other")]
    assert [s3.too_many_headers(one) for one in said] == [bucket._too_many_headers(one) for one in said]
    assert [s3.too_many_headers(one) for one in said] == [headers, None]
    refused = [
        ClientError({"Error": {"Code": code, "Message": text}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Get")  # type: ignore[typeddict-item]
        for status, code, text in (
            (403, "InvalidObjectState", ""), (403, "AccessDenied", "The ciphertext refers to a customer master key"),
            (403, "AccessDenied", "… not authorized to perform: kms:Decrypt"), (403, "AccessDenied", "Access Denied"),
            (400, "InvalidObjectState", ""), (403, "ExpiredToken", "kms"),
        )
    ]  # fmt: skip
    assert [s3.forbids_to_all(one) for one in refused] == [True, True, True, False, False, False]
    assert [bucket._forbids_to_all(one) for one in refused] == [True, True, True, False, False, False]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_starts_again_serves_what_it_has_when_the_live_release_cannot_be_read(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault, tmp_path: Path
) -> None:
    assert reader(faulty, tmp_path / "served").pull().id == two[1].release
    move(faulty, two[0])
    proxy.add(Rule(fault, path=rf"{two[0].release}/file0"))
    with reader(faulty, tmp_path / "served") as started:
        assert started.current is not None and started.current.id == two[1].release
        assert started._refused is not None and started._refused.pause == 2 * started._interval


def test_an_expired_token_and_a_broken_connection_are_no_faults_of_an_object(
    faulty: ObjectStore, proxy: FaultProxy
) -> None:
    faulty.put("a/b", b"x")
    rule = proxy.add(Rule(Answer(400, "ExpiredToken"), path="/a/b"))
    for ask in (faulty.get, faulty.head):
        with pytest.raises(SettingsError, match="refused these credentials"):
            ask("a/b")
    rule.fault = Answer(400, "RequestTimeout")
    with pytest.raises(StoreFaultError):
        faulty.get("a/b")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_claim_and_a_view_that_nobody_can_read_stop_no_collector(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault, tmp_path: Path
) -> None:
    third = published(faulty, tmp_path / "third", 3)
    faulty.put(f"models/{MODEL}/claims/{third.release}.json", b"{}")
    faulty.put(f"{views_prefix(MODEL)}{CHANNEL}/triton/{MODEL}/config.pbtxt", b"# digits release x\n")
    proxy.add(Rule(fault, method="GET", path=r"/claims/.*\.json|config\.pbtxt"))
    assert {one.release: one.step for one in decide(faulty, MODEL, KEEP)}[third.release] is Step.KEEP


@pytest.mark.parametrize("fault", [ManyHeaders(), Answer(400, "InvalidRequest")])
def test_a_view_that_nobody_can_read_is_written_anew(
    faulty: ObjectStore, proxy: FaultProxy, fault: Fault, tmp_path: Path
) -> None:
    manifest = onnx_release(tmp_path / "release", 1.0)
    publish(faulty, tmp_path / "release", manifest)
    move(faulty, manifest)
    config = f"{views_prefix(MODEL)}{CHANNEL}/triton/{MODEL}/config.pbtxt"
    faulty.put(config, b"{}")
    hidden = Rule(fault, path=config)

    def written_over() -> None:
        hidden.times = 0

    for method in ("PUT", "DELETE"):
        proxy.add(Rule(PassOn(), method=method, path=config, before=written_over))
    proxy.add(hidden)
    assert write_triton(faulty, reader(faulty, tmp_path / "served").pull()).generation == 1
    found = faulty.get(config)
    assert found is not None and found[0].startswith(f"# {MODEL} release {manifest.release}\n".encode())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_live_release_that_nobody_can_read_is_told_as_broken(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault, tmp_path: Path
) -> None:
    proxy.add(Rule(fault, path=rf"{two[1].release}/({MANIFEST}|file0)"))
    assert any("the live release is broken" in one.what for one in examine(faulty, MODEL, NOWHERE))
    release, problem = live_copy(faulty, tmp_path / "copies", read_pointer(Channel(faulty, MODEL, CHANNEL)), None)
    assert release is None and problem.startswith("it is broken")
    with pytest.raises(RefusedError, match=r"it cannot be read|its metadata is more"):
        reader(faulty, tmp_path / "served").pull()


@pytest.mark.parametrize("fault", FAULTS)
def test_records_that_nobody_can_read_hold_up_neither_a_channel_nor_the_tables_of_others(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault
) -> None:
    faulty.put(record_key(MODEL, CHANNEL, 3), b"{}")
    faulty.put(f"models/{OTHER}/channels/{CHANNEL}.json", b"{}")
    faulty.put(f"{decisions_prefix(MODEL, CHANNEL)}20250101T000000.000000Z-r.json", b"{}")
    proxy.add(Rule(fault, method="GET", path=rf"00000003\.json|/{OTHER}/channels/|/decisions/.*Z-r\.json"))
    assert [move(faulty, two[number]).generation for number in (0, 1)] == [3, 4]
    assert {row.model: bool(row.unreadable) for row in channel_statuses(faulty, {})} == {MODEL: False, OTHER: True}


def test_a_record_under_a_key_of_kms_that_others_may_not_use_holds_up_no_channel(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest]
) -> None:
    faulty.put(record_key(MODEL, CHANNEL, 3), b"{}")
    proxy.add(Rule(Answer(403, "AccessDenied"), method="GET", path=r"00000003\.json"))
    assert [move(faulty, two[number]).generation for number in (0, 1)] == [3, 4]


@pytest.mark.parametrize("name", [MANIFEST, JOB])
def test_what_is_live_and_lies_in_an_archive_keeps_no_successor_out(
    faulty: ObjectStore, proxy: FaultProxy, tmp_path: Path, name: str
) -> None:
    live, better = (runnable(faulty, tmp_path / str(seed), 0.9, seed) for seed in (1, 2))
    move(faulty, live)
    proxy.add(Rule(Answer(403, "InvalidObjectState"), method="GET", path=rf"{live.release}/{name}"))
    channel = Channel(faulty, MODEL, CHANNEL, NOWHERE)
    pointer = read_pointer(channel)
    assert pointer is not None
    with pytest.raises(ReleaseError, match=f"{name}: it cannot be read as other objects are: InvalidObjectState"):
        read_release_record(faulty, MODEL, live.release, sha256=pointer.manifest_sha256)
    copy, said = live_copy(faulty, tmp_path / "copies", pointer, None)
    assert copy is None and "it is broken" in said and "InvalidObjectState" in said
    require_not_stale(channel, better.release, pointer, "2026-11-30T00:00:00+00:00")
    asked = ask_promotion(channel, better.release, None)
    assert kind_changes(asked, pointer) == []
    assert promote_existing(asked, MOVER, gates=False).release == better.release


def test_credentials_that_may_not_read_a_release_are_no_fault_of_it(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], tmp_path: Path
) -> None:
    live = read_pointer(Channel(faulty, MODEL, CHANNEL))
    proxy.add(Rule(Answer(403, "AccessDenied"), path=two[1].release))
    with pytest.raises(SettingsError, match="refused these credentials"):
        live_copy(faulty, tmp_path / "copies", live, None)


def test_a_fault_of_one_model_ends_neither_collector_nor_doctor_nor_table(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    faulty.put(f"models/{OTHER}/channels/{CHANNEL}.json", b"{}")
    proxy.add(Rule(Answer(501, "NotImplemented"), path=f"models(/|%2F){OTHER}(/|%2F)"))
    for command in (
        lambda: gc("", KEEP, apply=False, delete_versions=False),
        lambda: doctor("", dry_run=True),
    ):
        with pytest.raises(typer.Exit) as ended:
            command()
        said = capsys.readouterr()
        assert ended.value.exit_code == 1 and f"{OTHER}: not " in said.out + said.err
        assert MODEL in said.out
    assert [row.model for row in channel_statuses(faulty, {}) if row.unreadable] == [OTHER]


@pytest.mark.parametrize("fault", [*FAULTS, pytest.param(Answer(403, "AccessDenied"), id="a key of KMS")])
def test_the_owner_of_a_key_signs_over_what_nobody_can_read(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault, tmp_path: Path
) -> None:
    key = key_pair(tmp_path)
    (public,) = signatures.load_keys([key.with_suffix(".pub")])
    name = signature_key(two[1], public)
    faulty.put(name, b"{}")
    hidden = Rule(fault, path=name)

    def written_over() -> None:
        hidden.times = 0

    proxy.add(Rule(PassOn(), method="PUT", path=name, before=written_over))
    proxy.add(hidden)
    assert publish_signature(faulty, two[1], key) == name
    reader(faulty, tmp_path / "served", key).pull()


@pytest.mark.parametrize("fault", [*FAULTS, pytest.param(Answer(403, "AccessDenied"), id="no right to list")])
def test_a_signature_that_cannot_be_read_takes_nothing_from_the_one_by_another_key(
    faulty: ObjectStore, proxy: FaultProxy, two: list[Manifest], fault: Fault, tmp_path: Path
) -> None:
    old, new = key_pair(tmp_path, "old"), key_pair(tmp_path, "new")
    (public,) = signatures.load_keys([old.with_suffix(".pub")])
    publish_signature(faulty, two[1], new)
    proxy.add(Rule(fault, path=signature_key(two[1], public)))
    assert reader(faulty, tmp_path / "both", old, new).pull().id == two[1].release
    assert reader(faulty, tmp_path / "turned", new, old).pull().id == two[1].release
    # Where no other one holds it is what it was.
    with pytest.raises(UnavailableError if fault == Answer(403, "AccessDenied") else RefusedError):
        reader(faulty, tmp_path / "old", old).pull()


# ---- uploads


@pytest.fixture
def uploads(object_store: ObjectStore, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun long ago, one below a key that XML cannot hold."""
    client = boto3.client("s3", endpoint_url=store_url)
    for key in (f"models/{MODEL}/releases/@ +%41", f"models/{MODEL}/releases/x", f"models/{OTHER}/releases/%41+x"):
        client.create_multipart_upload(Bucket=object_store.bucket, Key=key)
    monkeypatch.setattr(ObjectStore, "now", lambda _: datetime.now(UTC) + timedelta(days=8))


def test_an_upload_whose_key_no_listing_can_hold_is_dropped_where_the_store_encodes_keys(
    faulty: ObjectStore, proxy: FaultProxy, uploads: None
) -> None:
    proxy.add(Rule(HoldsControls(encodes=True), method="GET", path="uploads"))
    week = timedelta(days=7)
    assert faulty.drop_uploads(f"models/{OTHER}/", week) == [(f"models/{OTHER}/releases/%41+x", "")]
    ours = [(f"models/{MODEL}/releases/@ +%41", ""), (f"models/{MODEL}/releases/x", "")]
    assert faulty.drop_uploads(f"models/{MODEL}/", week) == ours
    assert faulty.drop_uploads(f"models/{MODEL}/", week) == []


def test_an_upload_whose_key_no_listing_can_hold_stops_the_collection_of_no_other_model(
    faulty: ObjectStore, proxy: FaultProxy, uploads: None, two: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    faulty.put(f"models/{OTHER}/x", b"")
    proxy.add(Rule(HoldsControls(encodes=False), method="GET", path="uploads"))
    with pytest.raises(typer.Exit) as ended:
        gc("", KEEP, apply=False, delete_versions=False)
    said = capsys.readouterr()
    assert ended.value.exit_code == 1 and f"{MODEL}: uploads that were never completed stay" in said.err
    assert f"{OTHER}: upload to drop: models/{OTHER}/releases/%41+x" in said.out


def test_an_upload_that_may_not_be_dropped_is_told_by_its_name_and_keeps_no_other(
    faulty: ObjectStore, proxy: FaultProxy, uploads: None, two: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.add(Rule(Answer(403, "AccessDenied"), method="DELETE", path=r"/releases/(@|%40)"))
    with pytest.raises(typer.Exit) as ended:
        gc(MODEL, KEEP, apply=True, delete_versions=False)
    said = capsys.readouterr()
    assert ended.value.exit_code == 1 and f"{MODEL}: upload dropped: models/{MODEL}/releases/x\n" in said.out
    assert f"{MODEL}: an upload is not dropped: models/{MODEL}/releases/@ +%41: s3://" in said.err
    assert "list uploads" not in said.err


# ---- listings


@dataclass(frozen=True)
class ListsAsRgw:
    """Listings as Ceph RGW 16 writes them, of pages of two names: keys as in addresses, and where a page ends as it is.

    A control character is a reference there, `&#x01;`, which XML does not hold.
    """

    keys: tuple[str, ...]

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        after = asked.get("continuation-token", asked.get("start-after", ""))
        names: list[str] = []
        for key in sorted(self.keys):
            rest = key.removeprefix(prefix)
            folder = f"{prefix}{rest.partition(delimiter)[0]}/" if delimiter and delimiter in rest else key
            if key.startswith(prefix) and folder > after and folder not in names:
                names.append(folder)
        most = int(asked.get("max-keys", 2))
        page, more = names[:most], len(names) > most
        end = f"<NextContinuationToken>{raw(page[-1])}</NextContinuationToken>" if more else ""
        begin = f"<StartAfter>{raw(after)}</StartAfter>" if after else ""
        items = "".join(
            f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            if name.endswith("/")
            else f"<Contents><Key>{quote(name)}</Key><Size>0</Size><ETag>&quot;e&quot;</ETag>"
            "<LastModified>2026-11-01T00:00:00.000Z</LastModified></Contents>"
            for name in page
        )
        text = (
            f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"<KeyCount>{len(page)}</KeyCount>{begin}{end}{items}</ListBucketResult>"
        )
        return Reply(200, [("Content-Type", "application/xml")], text.encode())


def raw(name: str) -> str:
    return "".join(f"&#x{ord(one):02X};" if ord(one) < 32 else one for one in name)


@pytest.mark.parametrize("character", ["\x01", "\x1f", "\ufffe"])
def test_a_key_at_the_end_of_a_page_that_xml_cannot_hold_breaks_no_listing(
    faulty: ObjectStore, proxy: FaultProxy, character: str
) -> None:
    keys = sorted(f"a/{number}/{character}{where}" for number in range(3) for where in range(3))
    keys += [f"a/b{character}/x", f"a/c{character}/x", "a/d/x"]
    proxy.add(Rule(ListsAsRgw(tuple(keys)), method="GET", path="list-type=2"))
    assert list(faulty.list_keys("a/")) == sorted(keys)
    assert list(faulty.list_objects("a/", after=keys[1], until=keys[5])) == keys[2:6]
    assert faulty.list_folders("a/") == sorted(["0", "1", "2", f"b{character}", f"c{character}", "d"])
    assert faulty.has_any("a/0") and not faulty.has_any("b")


def test_a_store_that_does_not_say_how_a_listing_goes_on_is_asked_no_more(
    faulty: ObjectStore, proxy: FaultProxy
) -> None:
    page = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    proxy.add(Rule(OtherListing(page), method="GET", path="list-type=2"))
    with pytest.raises(ServiceError, match=r"cannot list a/ in .*: the store does not say how it goes on"):
        faulty.list_keys("a/")
