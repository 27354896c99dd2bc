"""Who may publish describes a release anew, or puts other objects under its names, after it was proven."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from shipreader import records, signatures
from shipreader.errors import RefusedError
from shipreader.local import LocalFolder
from shipreader.reader import Reader
from shipreader.records import FileEntry
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, key_of, make_release, move, published, rolled_back
from tests.support.signing_keys import key_pair
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError
from train_and_ship.infra.objectstore import ObjectStore, StoredObject
from train_and_ship.registry.bucket import releases
from train_and_ship.registry.bucket.catalog import Named
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import fetch_release, publish, told_document, verify_release
from train_and_ship.registry.bucket.signing import publish_signature, require_signature
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import record_key
from train_and_ship.registry.channels.moves import kind_changes, promote_existing, release_job
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.registry.channels.targets import (
    ask_promotion,
    ask_rollback,
    choose_promotion,
    choose_rollback,
    verify_target,
)
from train_and_ship.registry.diff import Difference, compare, flat, read_copied_record
from train_and_ship.registry.kind import FORMATS, LABELS, SIGNATURE, changes_in_kind
from train_and_ship.registry.kind import MODEL as KIND_MODEL
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.release.manifest import (
    DATA,
    ENVIRONMENT,
    JOB,
    LINEAGE,
    MANIFEST,
    VERDICTS,
    Manifest,
    build_manifest,
    release_id,
)
from train_and_ship.ship import diff
from train_and_ship.ship.rollback import rollback
from train_and_ship.ship.sign import sign
from train_and_ship.tasks.copies import download_anew, live_copy
from train_and_ship.tasks.move_report import what_changes
from train_and_ship.tasks.rehearse import _recorded

TENSOR = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}
JOB_SAYS = {
    "name": MODEL, "model": {"factory": "digits:build"}, "data": {"factory": "digits:data"}, "train": {"epochs": 1},
    "gates": {"accuracy": {"vs_live": 0}},
}  # fmt: skip


@pytest.fixture
def channel(object_store: ObjectStore) -> Channel:
    return Channel(object_store, MODEL, CHANNEL, NOWHERE)


def described_anew(store: ObjectStore, manifest: Manifest, **changes: Any) -> Manifest:
    """The same files under another description, as a PUT without a condition writes it."""
    other = replace(manifest, **changes)
    store.put(key_of(manifest, MANIFEST), other.encode())
    return other


def told(store: ObjectStore, folder: Path, files: dict[str, Any], **described: Any) -> Manifest:
    """A published release that says how it came to be."""
    folder.mkdir()
    # ONNX as far as it is looked at before it is loaded: the name of whoever made it.
    (folder / "model.onnx").write_bytes(bytes([0x12, len(folder.name)]) + folder.name.encode())
    for name, content in files.items():
        written = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(written.encode() if isinstance(written, str) else written)
    described = {
        "formats": {"onnx": "model.onnx"}, "signature": {"inputs": [TENSOR], "outputs": []},
        "metrics": {"accuracy": 0.9}, **described,
    }  # fmt: skip
    manifest = build_manifest(folder, model=MODEL, **described)
    publish(store, folder, manifest)
    return manifest


# ---- the description


def test_a_release_that_was_described_anew_does_not_go_live_by_its_old_name(
    object_store: ObjectStore, two: list[Manifest], channel: Channel
) -> None:
    move(object_store, two[0], channel="staging")
    described_anew(object_store, two[0], formats={"onnx": "file1.bin"})
    asked: list[Callable[[], object]] = [
        # What was live before, the same by its id, by its place in the history, and as another channel has it.
        lambda: ask_rollback(channel, "", None),
        lambda: ask_rollback(channel, two[0].release, None),
        lambda: ask_rollback(channel, "prod~1", None),
        lambda: ask_promotion(channel, "staging", None),
        lambda: ask_promotion(channel, "prod~1", None),
        lambda: ask_promotion(channel, two[0].release[:8], None),
        # Another channel has it in its history, and this one has not.
        lambda: ask_promotion(replace(channel, name="canary"), two[0].release, None),
        lambda: rollback(MODEL, CHANNEL, "staging", "why", quick=True),
        lambda: rollback(MODEL, "canary", two[0].release, "why", quick=True),
    ]
    for ask in asked:
        with pytest.raises(ReleaseError, match=f"expected SHA-256 {two[0].sha256()}, got .*altered after it went live"):
            ask()
    pointer = read_pointer(channel)
    assert pointer is not None and pointer.release == two[1].release


def test_a_description_that_is_not_the_one_of_its_time_is_not_signed(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIP_SIGNING_KEY", str(key_pair(tmp_path)))
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    described_anew(object_store, two[1], metrics={"accuracy": 0.99})
    move(object_store, two[0], channel="staging")
    described_anew(object_store, two[0], metrics={"accuracy": 0.99})
    for name in (CHANNEL, two[1].release, two[1].release[:8], "prod~1", "staging", two[0].release):
        with pytest.raises(ReleaseError, match="altered after it went live"):
            sign(MODEL, name)


def test_what_differs_is_told_of_releases_as_the_records_name_them(
    object_store: ObjectStore, two: list[Manifest], channel: Channel, tmp_path: Path
) -> None:
    candidate = published(object_store, tmp_path / "c", 2, accuracy=0.5)
    move(object_store, candidate, channel="staging")
    verified = ask_promotion(channel, candidate.release, None)
    assert any(one.name == "accuracy" for one in asyncio.run(what_changes(verified))[0])
    described_anew(object_store, candidate, metrics={"accuracy": 0.99})
    for before, after in ((two[1].release, candidate.release), ("prod", "staging"), ("staging~0", "prod")):
        with pytest.raises(ReleaseError, match=f"{candidate.release}/.*altered after it went live"):
            diff.diff([MODEL, before, after], as_json=False)
    # And to a person who is asked: what was verified, beside what is live.
    assert "altered after it went live" in asyncio.run(what_changes(verified))[1]
    object_store.put(key_of(candidate, MANIFEST), candidate.encode())
    described_anew(object_store, two[1], metrics={"accuracy": 0.3})
    for before in (CHANNEL, "prod~0", two[1].release):
        with pytest.raises(ReleaseError, match=f"{two[1].release}/.*altered after it went live"):
            diff.diff([MODEL, before, candidate.release], as_json=False)
    found, problem = asyncio.run(what_changes(verified))
    assert not found and f"{two[1].release}/{MANIFEST}: expected SHA-256 {two[1].sha256()}" in problem


def test_of_descriptions_that_contradict_each_other_the_channels_own_counts_or_none(
    object_store: ObjectStore, two: list[Manifest], channel: Channel
) -> None:
    other = described_anew(object_store, two[0], metrics={"accuracy": 0.99})
    for name in ("eve", "staging"):
        move(object_store, other, channel=name)
    pinned = named_release(channel, two[0].release)
    assert pinned == Named(two[0].release, two[0].sha256())
    # A channel that has none of its own: one of those who have may be lying.
    canary, said = (
        replace(channel, name="canary"),
        "had another description when it was live on each of eve, prod: name",
    )
    with pytest.raises(ReleaseError, match=said):
        named_release(canary, two[0].release)
    assert named_release(channel, "staging").manifest_sha256 == other.sha256()
    # A pointer that nobody can read hides no record, and is in nobody's way.
    for name in ("eve", "staging"):
        object_store.put(pointer_key(MODEL, name), b"{}")
    with pytest.raises(ReleaseError, match=said):
        named_release(canary, two[0].release)
    for name in ("eve", "staging"):
        object_store.delete(record_key(MODEL, name, 1))
    assert named_release(canary, two[0].release) == pinned


def test_another_description_of_what_is_live_is_not_what_a_candidate_is_held_against(
    object_store: ObjectStore, channel: Channel, tmp_path: Path
) -> None:
    live = told(object_store, tmp_path / "a", {})
    move(object_store, live)
    other = {"inputs": [{**TENSOR, "name": "y"}], "outputs": []}
    candidate = told(object_store, tmp_path / "b", {JOB: {**JOB_SAYS, "gates": {}}}, signature=other)
    verified = verify_target(choose_promotion(channel, candidate.release), read_back=False)
    assert {one.kind for one in kind_changes(verified, read_pointer(channel))} == {SIGNATURE}
    described_anew(object_store, live, signature=other)
    # It is broken by then, whatever it says: not alike.
    with pytest.raises(ReleaseError, match="altered after it went live"):
        promote_existing(verified, MOVER)


def test_a_file_of_what_is_live_that_was_written_over_hides_no_other_difference(
    object_store: ObjectStore, channel: Channel, tmp_path: Path
) -> None:
    live = told(object_store, tmp_path / "a", {LINEAGE: {"project": {"folder": "a"}}})
    move(object_store, live)
    candidate = told(object_store, tmp_path / "b", {}, signature={"inputs": [{**TENSOR, "name": "y"}], "outputs": []})
    object_store.put(key_of(live, LINEAGE), b"{}")
    verified = verify_target(choose_promotion(channel, candidate.release), read_back=False)
    assert SIGNATURE in {one.kind for one in kind_changes(verified, read_pointer(channel))}


# ---- the files


def test_the_gates_are_those_of_the_job_that_the_manifest_names(
    object_store: ObjectStore, channel: Channel, tmp_path: Path, store_url: str
) -> None:
    manifest = told(object_store, tmp_path / "a", {JOB: JOB_SAYS})
    verified = verify_target(choose_promotion(channel, manifest.release), read_back=False)
    assert release_job(verified.target, manifest).gates["accuracy"].vs_live == 0
    # As long as it was, and with the old hash in its metadata: whoever asks the store sees no difference.
    body = json.dumps({**JOB_SAYS, "gates": {}}).encode().ljust(manifest.files[JOB].bytes)
    boto3.client("s3", endpoint_url=store_url).put_object(
        Bucket=object_store.bucket, Key=key_of(manifest, JOB), Body=body,
        Metadata={"sha256": manifest.files[JOB].sha256},
    )  # fmt: skip
    with pytest.raises(GateError, match=r"gates of release .* cannot be evaluated"):
        promote_existing(verified, MOVER)
    assert read_pointer(channel) is None
    # Nor by metadata that fits.
    object_store.put(key_of(manifest, JOB), body)
    with pytest.raises(GateError, match="expected what the manifest says, got another"):
        release_job(verified.target, manifest)


def test_an_object_that_is_longer_than_the_manifest_says_does_not_fill_the_disk(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path
) -> None:
    object_store.put(key_of(two[1], "file0.bin"), b"x" * (4 * 2**20))
    with pytest.raises(ReleaseError, match=r"file0\.bin: altered in the bucket: .* expected 1,000 bytes .*, got more"):
        fetch_release(object_store, MODEL, two[1].release, tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy*"))
    # Nor is it read to its end when it is hashed.
    assert (object_store.hash(key_of(two[1], "file0.bin"), 1000) or ("", 0))[1] < 4 * 2**20


def test_a_release_for_which_there_is_no_room_is_not_begun(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ReleaseError, match=r"expected room for 20,\d+ bytes in .*, got 100"):
        fetch_release(object_store, MODEL, two[1].release, tmp_path / "copy")


def test_what_a_release_says_of_itself_in_no_shape_stops_no_move_and_makes_no_traceback(
    object_store: ObjectStore, channel: Channel, tmp_path: Path
) -> None:
    shapes: list[dict[str, Any]] = [
        {JOB: "["},
        {JOB: "[]", DATA: '{"classes": 7, "train": {"labels": {"x": 1}}}'},
        {VERDICTS: {"verdicts": [{}]}},
        {VERDICTS: {"verdicts": 3, "metrics": {"onnx": 5}}},
        {VERDICTS: {"speed": {"measured": {"onnx": {}}}}},
        {LINEAGE: {"inputs": [], "onnx": {"opset": "20"}, "training_environment": 4}},
        {DATA: {"classes": [{}], "train": {"labels": {"1": "many"}}}},
        {LINEAGE: "{" * 3000},
        {ENVIRONMENT: "numpy==1\x1b[2J"},
    ]
    good = told(object_store, tmp_path / "good", {})
    for number, files in enumerate(shapes):
        strange = told(object_store, tmp_path / f"{number}", files)
        for before, after in ((good, strange), (strange, good)):
            try:
                compare(object_store, MODEL, Named(before.release), Named(after.release))
            except ReleaseError as error:
                assert "what it says of itself cannot be read" in str(error)
        move(object_store, strange)
        verified = verify_target(choose_promotion(channel, good.release), read_back=False)
        assert promote_existing(verified, MOVER, gates=False).release == good.release


ABSURD: list[dict[str, Any]] = [
    {VERDICTS: []},
    {VERDICTS: {"speed": {"measured": {"onnx": 3}, "serve": {}, "speedups": {}, "too_slow": {}, "verdicts": []}}},
    {JOB: "["},
    {ENVIRONMENT: b"\xff\xfe==1\n"},
    {DATA: b"\xff"},
    {LINEAGE: "{" * 3000},
]


@pytest.mark.parametrize("files", ABSURD)
def test_what_nobody_understands_in_what_is_live_ends_no_run_and_hides_no_difference(
    object_store: ObjectStore, channel: Channel, tmp_path: Path, files: dict[str, Any]
) -> None:
    live = told(object_store, tmp_path / "a", files)
    move(object_store, live)
    other = {"inputs": [{**TENSOR, "name": "y"}], "outputs": []}
    candidate = told(object_store, tmp_path / "b", {JOB: {**JOB_SAYS, "gates": {}}}, signature=other)
    verified = verify_target(choose_promotion(channel, candidate.release), read_back=False)
    assert {one.kind for one in kind_changes(verified, read_pointer(channel))} == {SIGNATURE}
    # The same of the copies that a run has.
    here, problem = live_copy(object_store, tmp_path / "copies", read_pointer(channel), None)
    there = download_anew(object_store, candidate, tmp_path / "candidate")
    assert here is not None and not problem
    kinds = [read_copied_record(Path(one.folder)).kind for one in (here, there)]
    assert {one.kind for one in changes_in_kind(*kinds)} == {SIGNATURE}
    said = _recorded(here)
    assert said.speed is None and all(f"{MODEL} {live.release}: what it says" in words for words in said.not_understood)


@pytest.mark.parametrize("files", [*ABSURD[:1], *ABSURD[2:]])
def test_a_release_that_says_what_nobody_understands_does_not_go_live(
    object_store: ObjectStore, channel: Channel, tmp_path: Path, files: dict[str, Any]
) -> None:
    """What is not understood would be compared with nothing as soon as it is live."""
    strange = told(object_store, tmp_path / "a", {JOB: {**JOB_SAYS, "gates": {}}, **files})
    verified = verify_target(choose_promotion(channel, strange.release), read_back=False)
    with pytest.raises((ReleaseError, GateError), match=r"cannot be read|cannot be evaluated|expected text"):
        promote_existing(verified, MOVER)
    assert read_pointer(channel) is None


def test_what_a_release_says_in_a_great_many_small_values_is_not_read(
    object_store: ObjectStore, channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever writes past us.
    monkeypatch.setattr(releases, "require_readable", lambda *_: None)
    good = told(object_store, tmp_path / "good", {})
    many = told(object_store, tmp_path / "many", {JOB: "{" + ",".join(f'"k{i}":1' for i in range(100_001)) + "}"})
    verified = verify_target(choose_promotion(channel, many.release), read_back=False)
    tracemalloc.start()
    with pytest.raises(ReleaseError, match="expected at most 100,000 values"):
        compare(object_store, MODEL, Named(good.release), Named(many.release))
    with pytest.raises(GateError, match="expected at most 100,000 values"):
        release_job(verified.target, many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20
    packages = told(object_store, tmp_path / "packages", {ENVIRONMENT: "a==1 " * 100_001})
    with pytest.raises(ReleaseError, match="expected at most 100,000 packages"):
        compare(object_store, MODEL, Named(good.release), Named(packages.release))


@pytest.mark.parametrize(
    ("files", "described", "kind"),
    [
        ({DATA: r'{"classes": ["\ud800", "b"]}'}, {}, LABELS),
        ({DATA: {"classes": ["x" * 2**21, "b"]}}, {}, LABELS),
        ({JOB: {"model": {"factory": "\x1b[2J\n" + "f" * 2**21}}}, {}, KIND_MODEL),
        ({}, {"signature": {"inputs": [{**TENSOR, "name": f"{i}" + "n" * 500} for i in range(5000)]}}, SIGNATURE),
        ({}, {"formats": {f"f{i}": "model.onnx" for i in range(100)}}, FORMATS),
    ],
)  # fmt: skip
def test_what_the_live_release_says_of_itself_keeps_no_successor_out(
    object_store: ObjectStore, channel: Channel, tmp_path: Path,
    files: dict[str, Any], described: dict[str, Any], kind: str,
) -> None:  # fmt: skip
    move(object_store, told(object_store, tmp_path / "strange", files, **described))
    good = told(object_store, tmp_path / "good", {DATA: {"classes": ["a", "b"]}, JOB: {"model": {"factory": "a:b"}}})
    verified = verify_target(choose_promotion(channel, good.release), read_back=False)
    with pytest.raises(GateError, match=f"--allow {kind}") as refused:
        promote_existing(verified, MOVER, gates=False)
    assert "\x1b" not in str(refused.value) and len(refused.value.message) < 20_000
    pointer = promote_existing(verified, MOVER, gates=False, allow=[kind])
    assert (pointer.release, read_pointer(channel)) == (good.release, replace(pointer))
    said = pointer.verdicts[f"{kind} vs live"]
    assert said.endswith("(allowed once, with --allow)") and said.isprintable() and len(said) < 15_000


def test_words_that_no_record_can_hold_are_written_so_that_one_can(
    object_store: ObjectStore, two: list[Manifest], channel: Channel
) -> None:
    odd = {"a\udcff": "b\ud800", "long": "x" * 2**21}
    pointer = move(object_store, two[0], reason="half \udcff", moved_by="\udc80", verdicts=odd)
    assert read_pointer(channel) == pointer
    assert (pointer.reason, pointer.moved_by) == (r"half \udcff", r"\udc80")
    assert pointer.verdicts[r"a\udcff"] == r"b\ud800" and len(pointer.verdicts["long"]) == 10_000
    with pytest.raises(ReleaseError, match=r"reason has 2,097,152 characters, and 300 verdicts have 1,090: say why"):
        move(object_store, two[1], reason="x" * 2**21, verdicts={str(i): "y" for i in range(300)})


def test_names_that_are_half_a_character_stay_apart_and_whole_ones_stay_as_they_are() -> None:
    document = told_document(rb'{"classes": ["\udcff", "\udcfe", "\ud83d\ude00", "\\udcff"]}')
    assert document == {"classes": [r"\udcff", r"\udcfe", "😀", r"\udcff"]}
    # Nor in bytes that are none.
    with pytest.raises(ValueError, match="utf-8"):
        told_document(b'{"classes": ["\xed\xa0\x80"]}')


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            JOB,
            "[" + "1," * 100_001 + "1]",
            r"at most 100,000 values, got 100,002 in 200,0\d\d bytes.*shorten the job file",
        ),
        (LINEAGE, "{}" + " " * 16 * 2**20, "at most 16,777,216 bytes, got 16,777,218.*fewer files in its folder"),
        (
            ENVIRONMENT,
            "a==1\n" * 100_001,
            "at most 100,000 values, got 100,001 .*install fewer packages where it is trained",
        ),
        (
            DATA,
            json.dumps({"classes": ["c"] * 100_001}),
            "at most 100,000 values, got 100,002.*describe fewer classes or columns",
        ),
    ],
)
def test_a_release_that_says_more_of_itself_than_anybody_reads_is_not_published(
    object_store: ObjectStore, tmp_path: Path, name: str, content: str, said: str
) -> None:
    with pytest.raises(ReleaseError, match=f"{name}: expected {said}, and publish again"):
        told(object_store, tmp_path / "a", {name: content})
    assert not object_store.list_keys("models/")


def test_a_manifest_that_no_reader_would_read_is_not_built(object_store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"at most 16,777,216 bytes and 600,000 values, got .* ship fewer files, or"):
        told(object_store, tmp_path / "a", {}, signature={"inputs": [{**TENSOR, "shape": [1] * 600_001}]})
    with pytest.raises(ReleaseError, match=r"manifest of digits: expected at most 16,777,216 bytes"):
        told(object_store, tmp_path / "b", {}, signature={"note": "x" * 2**24})


def test_a_long_name_above_many_values_is_not_repeated_for_each() -> None:
    with pytest.raises(ValueError, match="a name of 10,000 characters"):
        flat({"n" * 10_000: {str(i): i for i in range(1000)}})
    with pytest.raises(ValueError, match="a name of"):
        flat({"n" * 513: 1})
    assert flat({"train": {"epochs": 1, "more": {}}, "name": "a"}) == {"train.epochs": 1, "train.more": {}, "name": "a"}


def test_of_many_differences_so_many_are_shown_and_the_others_counted() -> None:
    ones = [Difference(group="job", name=f"k{i}", before="1", after="2") for i in range(1250)]
    lines = diff._table([Difference(group="size", name="f", before="1", after="2"), *ones]).splitlines()
    assert len([line for line in lines if line.startswith("job")]) == 201
    assert "and 1,050 more" in lines[-1]


def test_numbers_of_hundreds_of_digits_are_compared(object_store: ObjectStore, tmp_path: Path) -> None:
    huge = int("9" * 400)
    one = told(object_store, tmp_path / "one", {JOB: {"a": 1}, LINEAGE: {"training_environment": {"b": 1.5}}})
    two = told(object_store, tmp_path / "two", {JOB: {"a": huge}, LINEAGE: {"training_environment": {"b": huge}}})
    for before, after in ((one, two), (two, one)):
        found = {item.name: item for item in compare(object_store, MODEL, Named(before.release), Named(after.release))}
        assert {found["a"].before, found["a"].after} == {"1", str(huge)} and found["a"].change == ""
        assert found["b"].change == ""


def test_no_path_is_deeper_or_longer_than_a_disk_takes_and_nothing_is_begun(
    object_store: ObjectStore, channel: Channel, tmp_path: Path
) -> None:
    for name in ("a/" * 32 + "f", "n" * 241, "é" * 121 + "/f", "d/" + "n" * 300):
        files = {name: FileEntry(hashlib.sha256(b"").hexdigest(), 0)}
        manifest = Manifest(model=MODEL, release=release_id(files), files=files, formats={}, signature={}, metrics={})
        encoded = manifest.encode()
        object_store.put(key_of(manifest, name), b"")
        object_store.put(key_of(manifest, MANIFEST), encoded)
        pointer = records.Pointer(MODEL, CHANNEL, 1, manifest.release, hashlib.sha256(encoded).hexdigest(), "n", "")
        with pytest.raises(RefusedError, match="32 parts and 240 bytes of each"):
            records.decode_manifest(encoded, pointer)
        with pytest.raises(ReleaseError, match="32 parts and 240 bytes of each"):
            fetch_release(object_store, MODEL, manifest.release, tmp_path / "copy")
        with pytest.raises(ReleaseError, match="32 parts and 240 bytes of each"):
            verify_target(choose_promotion(channel, manifest.release), read_back=False)
        assert not list(tmp_path.iterdir())
    assert records.stays_below("a/" * 31 + "n" * 240)


def test_empty_files_and_the_folders_above_them_take_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = FileEntry(hashlib.sha256(b"").hexdigest(), 0)
    files = dict.fromkeys([f"{i:03}" + "/a" * 30 + "/f" for i in range(200)], empty)
    assert records.room(files) == 200 * (1 + 31) * 4096
    # Each folder once, also where its name begins another one's.
    assert records.room(dict.fromkeys(["a/x/1", "a/x/2", "a-b/1", "a/y", "b"], empty)) == (5 + 3) * 4096
    manifest = records.Manifest(MODEL, "a" * 20, files, {}, {}, {}, b"{}")
    local = LocalFolder(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**7})())
    with pytest.raises(RefusedError, match="expected room for 26,214,400 bytes"):
        local.add(manifest, lambda folder, wanted: None)
    assert not list(tmp_path.iterdir())


# ---- signatures


def test_junk_under_the_name_of_a_key_keeps_its_owner_from_nothing(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path
) -> None:
    private = key_pair(tmp_path)
    (public,) = signatures.load_keys([private.with_suffix(".pub")])
    object_store.put(key_of(two[0], signatures.file_name(public)), b"[]")
    with pytest.raises(ReleaseError, match="expected a signature bundle"):
        require_signature(object_store, two[0], public)
    publish_signature(object_store, two[0], private)
    require_signature(object_store, two[0], public)
    etag = object_store.head(key_of(two[0], signatures.file_name(public)))
    publish_signature(object_store, two[0], private)
    assert object_store.head(key_of(two[0], signatures.file_name(public))) == etag


def test_junk_under_the_name_of_one_key_takes_nothing_from_the_signature_by_the_other(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path
) -> None:
    old, new = key_pair(tmp_path, "old"), key_pair(tmp_path, "new")
    publish_signature(object_store, two[1], new)
    publics = [key.with_suffix(".pub") for key in (old, new)]
    (first, _) = signatures.load_keys(publics)
    object_store.put(key_of(two[1], signatures.file_name(first)), b'{"verificationMaterial": []}')

    def reader(*keys: Path) -> Reader:
        return Reader(
            MODEL, bucket=object_store.bucket, folder=tmp_path / f"served{len(keys)}", public_keys=keys,
            client=boto3.client("s3", endpoint_url=object_store.address),
        )  # fmt: skip

    assert reader(*publics).pull().id == two[1].release
    with pytest.raises(RefusedError, match="expected a signature bundle"):
        reader(publics[0]).pull()


# ---- names


def test_a_channel_that_is_called_like_a_release_is_never_taken_for_it(
    object_store: ObjectStore, two: list[Manifest], channel: Channel
) -> None:
    live = read_pointer(channel)
    assert live is not None

    def channel_of(name: str) -> None:
        """As whoever may write all channels of a model makes it, past us."""
        forged = replace(live, channel=name)
        object_store.put(f"models/{MODEL}/channels/{name}.json", forged.encode())

    release = two[0].release
    channel_of(release)
    channel_of("v1")
    channel_of(release[:8])
    assert named_release(channel, release).release == release
    with pytest.raises(RequestError, match=f"'{release[:8]}' is a channel, and begins release {release}"):
        named_release(channel, release[:8])
    assert named_release(channel, f"{release[:8]}~0").release == two[1].release
    # A version is MLflow's word, and nobody else's.
    with pytest.raises(Exception, match="MLflow at"):
        named_release(channel, "v1")


def test_a_release_that_only_has_a_name_goes_nowhere(
    object_store: ObjectStore, two: list[Manifest], channel: Channel
) -> None:
    object_store.put(f"models/{MODEL}/releases/{'f' * 20}/model.onnx", b"x")
    with pytest.raises(ReleaseError, match="never published to the end"):
        ask_rollback(channel, "f" * 20, None)
    # The manifest of another release, under its own name.
    object_store.put(f"models/{MODEL}/releases/{'f' * 20}/{MANIFEST}", two[0].encode())
    with pytest.raises(ReleaseError, match="got that of"):
        ask_rollback(channel, "f" * 20, None)
    assert rolled_back(object_store).release == two[0].release
    verify_release(object_store, MODEL, two[0].release, read_back=True)


@pytest.fixture
def no_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps none, as Ceph RGW 16, and as every store for what went up in parts."""
    head = ObjectStore.head

    def without(store: ObjectStore, key: str) -> StoredObject | None:
        found = head(store, key)
        return replace(found, stored_sha256=None) if found is not None else None

    monkeypatch.setattr(ObjectStore, "head", without)


@pytest.fixture
def forged(object_store: ObjectStore, two: list[Manifest]) -> str:
    """Key of a file of what is live: other bytes of the same length, with the words of the true one."""
    key = key_of(two[1], "file1.bin")
    before = object_store.head(key)
    assert before is not None and before.sha256 is not None
    boto3.client("s3").put_object(
        Bucket=object_store.bucket, Key=key, Body=b"x" * before.bytes, Metadata={"sha256": before.sha256}
    )
    after = object_store.head(key)
    assert after is not None and (after.bytes, after.sha256) == (before.bytes, before.sha256)
    return key


@pytest.mark.parametrize("keeps", [True, False])
def test_the_hash_that_a_writer_says_is_not_believed(
    object_store: ObjectStore, two: list[Manifest], channel: Channel, forged: str, keeps: bool,
    tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if not keeps:
        request.getfixturevalue("no_hashes")
    (finding,) = [one.what for one in examine(object_store, MODEL, NOWHERE, dry_run=True) if "broken" in one.what]
    assert f"{forged}: expected SHA-256 {two[1].files['file1.bin'].sha256}" in finding
    for attempt in (
        lambda: publish(object_store, tmp_path / "1", two[1]),
        lambda: verify_release(object_store, MODEL, two[1].release),
        lambda: verify_release(object_store, MODEL, two[1].release, etags={}),
        lambda: verify_release(object_store, MODEL, two[1].release, read_back=True),
    ):
        with pytest.raises(ReleaseError, match=r"file1\.bin: expected SHA-256 .*delete it and publish again"):
            attempt()
    # What is said mends it.
    object_store.delete(forged)
    assert publish(object_store, tmp_path / "1", two[1]).sent_bytes == two[1].files["file1.bin"].bytes
    verify_release(object_store, MODEL, two[1].release, read_back=True)


def test_a_quick_rollback_believes_a_writer_and_a_usual_one_reads_each_file_once(
    object_store: ObjectStore, two: list[Manifest], channel: Channel, forged: str, no_hashes: None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    move(object_store, two[0])
    verified = verify_target(choose_rollback(channel, ""), read_back=False)
    assert (verified.target.release, "read back" in verified.verdicts["bytes"]) == (two[1].release, False)
    with pytest.raises(ReleaseError, match="when read back"):
        rolled_back(object_store)
    read: list[str] = []
    hashed = ObjectStore.hash

    def counted(store: ObjectStore, key: str, most: int | None = None) -> tuple[str, int] | None:
        read.append(key)
        return hashed(store, key, most)

    monkeypatch.setattr(ObjectStore, "hash", counted)
    # A move of what this process has just brought reads nothing, and going back reads it once.
    third = make_release(tmp_path / "2", 2)
    move(object_store, third, etags=publish(object_store, tmp_path / "2", third).etags)
    assert read == []
    assert rolled_back(object_store).release == two[0].release
    assert sorted(read) == [key_of(two[0], name) for name in sorted(two[0].files)]
