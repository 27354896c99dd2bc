"""What goes wrong in a bucket is found, and mended where that takes no decision."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from tests.support.fault_proxy import DropRequest, FaultProxy, Rule
from tests.support.fixture_types import Connect, Ship, Versioned
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, aliases, damage, key_of, move, published
from tests.support.stack_servers import MlflowServer, S3Server
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.objectstore import ObjectStore, StoredObject
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history, record_key
from train_and_ship.registry.channels.moves import roll_back
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import choose_rollback, verify_target
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.history_repair import REBUILT, UNPINNED, Repaired, repair_history
from train_and_ship.registry.release.manifest import MANIFEST, VERDICTS, Manifest, build_manifest


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


@pytest.fixture
def moves(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Five releases, promoted to prod one after the other."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(5)]
    for number, manifest in enumerate(manifests, 1):
        move(object_store, manifest, mlflow_version=str(number), reason=f"reason {number}")
    return manifests


def lose(store: ObjectStore, *generations: int) -> None:
    for generation in generations:
        store.delete(record_key(MODEL, CHANNEL, generation))


def findings(store: ObjectStore, uri: str = NOWHERE, dry_run: bool = False) -> list[str]:
    found = examine(store, MODEL, uri, dry_run=dry_run)
    return [finding.what for finding in found if "could not be compared" not in finding.what]


def test_a_healthy_model_has_no_findings(object_store: ObjectStore, moves: list[Manifest]) -> None:
    assert findings(object_store) == []


def test_the_last_record_is_taken_from_the_pointer(object_store: ObjectStore, moves: list[Manifest]) -> None:
    before = read_history(Channel(object_store, MODEL, CHANNEL))
    lose(object_store, 5)
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == before
    assert repair_history(Channel(object_store, MODEL, CHANNEL), dry_run=True).exact == (5,)
    assert repair_history(Channel(object_store, MODEL, CHANNEL)) == Repaired(exact=(5,))
    assert repair_history(Channel(object_store, MODEL, CHANNEL)) == Repaired()


def test_a_lost_record_is_rebuilt_from_its_neighbours(object_store: ObjectStore, moves: list[Manifest]) -> None:
    before = read_history(Channel(object_store, MODEL, CHANNEL))
    lose(object_store, 1, 3)
    first, third = findings(object_store)
    assert "generation 1 is lost; its neighbours tell the release" in first and "generation 3" in third
    after = read_history(Channel(object_store, MODEL, CHANNEL))
    assert [entry.release for entry in after] == [entry.release for entry in before]
    assert [entry.previous for entry in after] == [entry.previous for entry in before]
    assert after[2].manifest_sha256 == before[2].manifest_sha256
    assert (after[2].reason, after[2].moved_at) == (REBUILT + UNPINNED, "")
    assert findings(object_store) == []


def test_a_rebuilt_record_has_the_description_that_another_one_knows_whatever_was_written_since(
    object_store: ObjectStore, moves: list[Manifest]
) -> None:
    channel = Channel(object_store, MODEL, CHANNEL)
    move(object_store, moves[2], channel="staging")
    for manifest in moves[1:3]:
        object_store.put(key_of(manifest, MANIFEST), replace(manifest, metrics={"accuracy": 0.99}).encode())
    lose(object_store, 3)
    repair_history(channel)
    third = read_history(channel)[2]
    assert (third.manifest_sha256, third.reason) == (moves[2].sha256(), REBUILT)
    lose(object_store, 2)
    repair_history(channel)
    second = read_history(channel)[1]
    assert second.manifest_sha256 != moves[1].sha256() and second.reason == REBUILT + UNPINNED
    # Records that contradict each other: none is right by itself.
    other = replace(moves[0], metrics={"accuracy": 0.99})
    move(object_store, moves[0], channel="a")
    object_store.put(key_of(other, MANIFEST), other.encode())
    move(object_store, other, channel="b")
    lose(object_store, 1)
    repair_history(channel)
    first = read_history(channel)[0]
    assert (first.manifest_sha256, first.reason) == ("", REBUILT + UNPINNED)


def test_the_release_that_a_rollback_goes_back_to_is_looked_at_too(
    object_store: ObjectStore, moves: list[Manifest]
) -> None:
    damage(object_store, key_of(moves[3], "file2.bin"))
    (broken,) = findings(object_store)
    assert f"release {moves[3].release}, to which `ship rollback` goes back, is broken" in broken
    object_store.put(key_of(moves[3], MANIFEST), replace(moves[3], metrics={"accuracy": 0.99}).encode())
    (broken,) = findings(object_store)
    assert "altered after it went live; publish it again, or name another one with --to" in broken


def test_what_the_live_release_says_of_itself_and_cannot_be_is_named(object_store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / VERDICTS).write_text('{"validation_samples": -1}')
    manifest = build_manifest(tmp_path, model=MODEL, formats={}, signature={}, metrics={})
    publish(object_store, tmp_path, manifest)
    move(object_store, manifest)
    (said,) = findings(object_store)
    assert "digits prod: the live release tells nothing by it, and the next one is compared without: digits" in said
    assert "verdicts.json: validation_samples: expected a whole number from 0, got -1" in said


def test_one_object_that_is_forbidden_ends_the_examination_of_nothing_else(
    object_store: ObjectStore, moves: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    move(object_store, moves[0], channel="staging")
    damage(object_store, key_of(moves[0], "file2.bin"))
    head = ObjectStore.head

    def forbidding(store: ObjectStore, key: str) -> StoredObject | None:
        if key == key_of(moves[4], "file3.bin"):
            raise SettingsError(f"{key}: these credentials are refused")
        return head(store, key)

    monkeypatch.setattr(ObjectStore, "head", forbidding)
    prod, staging = findings(object_store)
    assert prod.startswith(f"{MODEL} {CHANNEL}: the live release is broken: {key_of(moves[4], 'file3.bin')}: these")
    assert staging.startswith(f"{MODEL} staging: the live release is broken") and "file2.bin" in staging


def test_of_two_lost_neighbours_the_older_is_gone(object_store: ObjectStore, moves: list[Manifest]) -> None:
    lose(object_store, 2, 3)
    lost, rebuilt = findings(object_store)[::-1]
    assert "generation 2 is lost, and so is that of generation 3; what was live then cannot be recovered" in lost
    assert "generation 3 is lost; its neighbours tell the release" in rebuilt
    assert [entry.generation for entry in read_history(Channel(object_store, MODEL, CHANNEL))] == [1, 3, 4, 5]
    assert read_history(Channel(object_store, MODEL, CHANNEL))[1].release == moves[2].release


def test_a_bucket_that_keeps_versions_gives_every_record_back(object_store: ObjectStore, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_bucket_versioning(Bucket=object_store.bucket, VersioningConfiguration={"Status": "Enabled"})
    for seed in range(4):
        move(object_store, published(object_store, tmp_path / str(seed), seed), reason=f"reason {seed}")
    before = read_history(Channel(object_store, MODEL, CHANNEL))
    lose(object_store, 1, 2, 3)
    assert repair_history(Channel(object_store, MODEL, CHANNEL)) == Repaired(exact=(1, 2, 3))
    assert read_history(Channel(object_store, MODEL, CHANNEL)) == before


def test_a_record_that_a_dead_mover_left_out_is_written(
    connect: Connect, object_store: ObjectStore, moves: list[Manifest], tmp_path: Path
) -> None:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(DropRequest(), "PUT", "00000006"))
        dead = move(store, published(object_store, tmp_path / "more", 9))
    assert findings(object_store) == [f"{MODEL} {CHANNEL}: the record of generation 6 was missing"]
    assert read_history(Channel(object_store, MODEL, CHANNEL))[-1] == dead
    assert findings(object_store) == []


def test_what_takes_a_decision_is_left_with_the_way_out(
    object_store: ObjectStore, moves: list[Manifest], tmp_path: Path
) -> None:
    damage(object_store, key_of(moves[4], "file2.bin"))
    object_store.delete(key_of(moves[0], MANIFEST))
    broken, incomplete = findings(object_store)
    assert "the live release is broken" in broken and "file2.bin" in broken and "`ship rollback digits" in broken
    assert f"release {moves[0].release} is incomplete (4,006 bytes without a manifest)" in incomplete


def test_a_deleted_pointer_is_named_and_a_rollback_puts_it_back(
    object_store: ObjectStore, moves: list[Manifest]
) -> None:
    object_store.delete(pointer_key(MODEL, CHANNEL))
    (gone,) = findings(object_store)
    assert f"its pointer is gone; `ship rollback digits --channel prod --to {moves[4].release[:8]}" in gone
    target = choose_rollback(Channel(object_store, MODEL, CHANNEL, NOWHERE), moves[4].release)
    assert roll_back(verify_target(target), MOVER).generation == 6
    assert findings(object_store) == []


def test_aliases_are_mended_and_a_dry_run_changes_nothing(
    object_store: ObjectStore, moves: list[Manifest], mlflow_server: MlflowServer, versioned: Versioned
) -> None:
    for manifest in moves:
        versioned(manifest.release)
    lose(object_store, 2)
    assert len(findings(object_store, mlflow_server.url, dry_run=True)) == 3
    assert aliases(mlflow_server) == {} and len(read_history(Channel(object_store, MODEL, CHANNEL))) == 4
    assert len(findings(object_store, mlflow_server.url)) == 3
    assert aliases(mlflow_server) == {"champion": 5, "previous": 4}
    assert findings(object_store, mlflow_server.url) == []


def test_the_command_says_what_it_mended_and_what_is_left(
    object_store: ObjectStore, moves: list[Manifest], mlflow_server: MlflowServer, versioned: Versioned, ship: Ship
) -> None:
    for manifest in moves:
        versioned(manifest.release)

    def doctor(*words: str, uri: str = mlflow_server.url) -> tuple[int, str]:
        done = ship("doctor", *words, mlflow=uri)
        return done.status, done.text

    status, said = doctor("--dry-run")
    assert status == 1 and "would mend  alias champion" in said and "2 to mend, 0 left to people" in said
    status, said = doctor(MODEL)
    assert status == 0 and "mended      alias champion of digits: version none → 5" in said
    assert doctor() == (0, "1 model examined: all well\n")
    status, said = doctor(uri=NOWHERE)
    assert status == 1 and "to do       digits prod: the MLflow aliases could not be compared" in said
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == moves[4].release
