"""History, rollback and promotion of what is in the bucket, with a real S3 server and a real MLflow beside it."""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy, PassOn, Rule
from tests.support.fixture_types import Connect, Ship
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, POINTER, damage, key_of, move, published, rolled_back
from tests.support.stack_servers import S3Server
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.moves import Mover, promote_existing, require_not_rolled_back
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.registry.channels.targets import choose_promotion, verify_target
from train_and_ship.registry.release.manifest import JOB, Manifest, build_manifest


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


# ---- rollback


def test_a_rollback_puts_back_what_was_live_before_and_says_so(object_store: ObjectStore, abc: list[Manifest]) -> None:
    pointer = rolled_back(object_store)
    assert (pointer.release, pointer.previous, pointer.generation) == (abc[1].release, abc[2].release, 4)
    assert (pointer.kind, pointer.reason, pointer.moved_by) == (ROLLBACK, MOVER.why, MOVER.by)
    assert pointer.mlflow_version == "2"
    assert pointer.verdicts == {"bytes": "4 files, 4,006 bytes, read back and hashed"}
    assert read_history(Channel(object_store, MODEL, CHANNEL))[-1] == pointer
    assert rolled_back(object_store).release == abc[0].release
    with pytest.raises(RequestError, match=r"live before .*found none; name one with --to"):
        rolled_back(object_store)
    assert rolled_back(object_store, abc[2].release).release == abc[2].release


def test_a_rollback_needs_a_reason(object_store: ObjectStore, abc: list[Manifest]) -> None:
    with pytest.raises(RequestError, match="why: expected a reason"):
        Mover(by="ada", why=" ")


def test_a_rollback_to_what_is_live_says_so(object_store: ObjectStore, abc: list[Manifest]) -> None:
    with pytest.raises(RequestError, match=rf"release {abc[2].release} is live .*already; nothing was moved"):
        rolled_back(object_store, abc[2].release)


def test_a_rollback_to_damaged_bytes_is_refused_and_names_the_file(
    object_store: ObjectStore, abc: list[Manifest]
) -> None:
    damage(object_store, key_of(abc[1], "file2.bin"))
    with pytest.raises(ReleaseError, match=r"file2\.bin: expected SHA-256"):
        rolled_back(object_store)
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == abc[2].release
    assert rolled_back(object_store, abc[0].release).release == abc[0].release


def test_bytes_that_rotted_under_the_store_are_found_by_reading_them_back(
    object_store: ObjectStore, abc: list[Manifest], s3_server: S3Server
) -> None:
    (file,) = [
        path
        for path in (s3_server.component.folder / "data").rglob("file1.bin")
        if object_store.bucket in path.parts and abc[1].release in path.parts
    ]
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ReleaseError, match=r"file1\.bin: expected SHA-256 .* when read back"):
        rolled_back(object_store)


def test_what_is_live_may_be_broken_when_it_is_rolled_back(object_store: ObjectStore, abc: list[Manifest]) -> None:
    damage(object_store, key_of(abc[2], "MANIFEST.json"))
    assert rolled_back(object_store).release == abc[1].release


def test_a_rollback_of_nothing_says_so(object_store: ObjectStore, tmp_path: Path) -> None:
    published(object_store, tmp_path / "release")
    with pytest.raises(RequestError, match="nothing is live on 'prod'"):
        rolled_back(object_store)


def test_a_rollback_that_a_promotion_overtook_is_given_up(
    connect: Connect, object_store: ObjectStore, abc: list[Manifest], tmp_path: Path
) -> None:
    fix = published(object_store, tmp_path / "fix", 9)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=lambda: _ignore(move(object_store, fix))))
        with pytest.raises(RequestError, match=f"moved it meanwhile: release {fix.release} is live"):
            rolled_back(store)
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == fix.release


def test_a_rollback_to_a_named_release_comes_after_the_promotion_that_overtook_it(
    connect: Connect, object_store: ObjectStore, abc: list[Manifest], tmp_path: Path
) -> None:
    other = published(object_store, tmp_path / "other", 9)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = connect(object_store.bucket, proxy.url)
        store.probe()
        proxy.add(Rule(PassOn(), "PUT", POINTER, times=1, before=lambda: _ignore(move(object_store, other))))
        pointer = rolled_back(store, abc[0].release)
    assert (pointer.generation, pointer.previous) == (5, other.release)


def _ignore(value: object) -> None:
    pass


def test_rollbacks_and_promotions_at_once_all_find_their_place(
    object_store: ObjectStore, abc: list[Manifest], tmp_path: Path
) -> None:
    others = [published(object_store, tmp_path / f"other{seed}", 10 + seed) for seed in range(6)]

    def go(number: int) -> Pointer | RequestError:
        try:
            return (
                move(object_store, others[number]) if number < 6 else rolled_back(object_store, abc[number % 2].release)
            )
        except RequestError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(go, range(12)))
    moves = read_history(Channel(object_store, MODEL, CHANNEL))
    assert [entry.generation for entry in moves] == list(range(1, len(moves) + 1))
    for earlier, later in itertools.pairwise(moves):
        assert later.previous == earlier.release
    assert {end.nonce for end in ends if isinstance(end, Pointer)} <= {entry.nonce for entry in moves}
    # Only somebody else's rollback to the same release can have come first.
    assert all("already" in str(end) for end in ends if isinstance(end, RequestError))


def test_what_a_rollback_left_does_not_come_back_by_itself(object_store: ObjectStore, abc: list[Manifest]) -> None:
    pointer = rolled_back(object_store)
    with pytest.raises(GateError, match=r"taken off by a rollback \(ada@host, .*errors since 14:00\).*--again"):
        require_not_rolled_back(abc[2].release, pointer)
    require_not_rolled_back(abc[0].release, pointer)
    target = choose_promotion(Channel(object_store, MODEL, CHANNEL, NOWHERE), abc[2].release)
    verified = verify_target(target)
    with pytest.raises(GateError, match="taken off by a rollback"):
        promote_existing(verified, MOVER, gates=False)
    assert promote_existing(verified, MOVER, gates=False, again=True).release == abc[2].release


# ---- promotion of what is in the bucket


def with_job(store: ObjectStore, folder: Path, accuracy: float, vs_live: float = -0.01, model: str = MODEL) -> Manifest:
    """A release that carries the job file with its gates."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(folder.name.encode())
    job = {
        "name": model,
        "model": {"factory": "digits:build"},
        "data": {"factory": "digits:data"},
        "train": {"epochs": 1},
        "gates": {"accuracy": {"vs_live": vs_live}},
    }
    (folder / JOB).write_text(json.dumps(job))
    manifest = build_manifest(
        folder, model=model, formats={"onnx": "model.onnx"}, signature={}, metrics={"accuracy": accuracy}
    )
    publish(store, folder, manifest)
    return manifest


def promoted(store: ObjectStore, release: str, gates: bool = True) -> Pointer:
    target = choose_promotion(Channel(store, MODEL, CHANNEL, NOWHERE), release)
    return promote_existing(verify_target(target), MOVER, gates=gates)


def test_a_release_moves_from_staging_to_prod(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = with_job(object_store, tmp_path / "a", 0.97)
    move(object_store, manifest, channel="staging")
    pointer = promoted(object_store, "staging")
    assert (pointer.release, pointer.channel, pointer.generation) == (manifest.release, "prod", 1)
    assert pointer.verdicts["vs_live"] == "nothing was live"
    better = with_job(object_store, tmp_path / "b", 0.98)
    assert promoted(object_store, better.release).verdicts["vs_live"] == (
        f"accuracy 0.98 against 0.97, as recorded when each was made (live {manifest.release})"
    )


def test_an_existing_release_is_held_against_what_is_live_by_its_own_gates(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    live = with_job(object_store, tmp_path / "live", 0.97)
    worse = with_job(object_store, tmp_path / "worse", 0.90)
    promoted(object_store, live.release)
    with pytest.raises(GateError, match=f"worse than the live release {live.release}"):
        promoted(object_store, worse.release)
    assert promoted(object_store, worse.release, gates=False).verdicts["vs_live"] == "not asked"


def test_gates_that_cannot_be_read_have_failed(object_store: ObjectStore, tmp_path: Path) -> None:
    manifest = published(object_store, tmp_path / "release")
    with pytest.raises(GateError, match=r"cannot be evaluated: .*job\.json: expected the job.*--no-gates"):
        promoted(object_store, manifest.release)


# ---- names of releases


def test_releases_have_many_names(object_store: ObjectStore, abc: list[Manifest]) -> None:
    ids = [manifest.release for manifest in abc]
    names = {"prod": ids[2], "prod~0": ids[2], "prod~1": ids[1], "prod~2": ids[0], ids[0]: ids[0], ids[1][:8]: ids[1]}
    channel = Channel(object_store, MODEL, tracking_uri=NOWHERE)
    assert {name: named_release(channel, name).release for name in names} == names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prod~3", "before the first move, which is prod~2"),
        ("staging", "Channels: prod"),
        ("staging~1", "nothing is live on 'staging'; channels: prod"),
        ("ffffffff", "none of them"),
        ("../../x", "none of them"),
        ("v7", "does not answer"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(
    object_store: ObjectStore, abc: list[Manifest], name: str, said: str
) -> None:
    with pytest.raises((RequestError, ServiceError), match=said):
        named_release(Channel(object_store, MODEL, tracking_uri=NOWHERE), name)


# ---- the commands


def test_the_commands_tell_the_story_of_a_channel(object_store: ObjectStore, abc: list[Manifest], ship: Ship) -> None:
    done = ship("rollback", MODEL, "--why", "errors [red]since[/] 14:00")
    assert done.status == 0, done.errors
    assert f"digits prod: release {abc[1].release} is live, generation 4" in done.output
    assert "warning: the MLflow alias champion follows later" in done.errors

    shown = ship("history", MODEL).output
    assert "rollback: errors [red]since[/] 14:00" in shown and "tester" in shown and "run-1" in shown
    assert [line.split()[0] for line in shown.splitlines() if " replaced " in line] == ["4", "3", "2", "1"]
    records = json.loads(ship("history", MODEL, "--json").output)
    assert [record["generation"] for record in records] == [1, 2, 3, 4]

    live = ship("live", MODEL)
    assert live.status == 0 and f"digits prod now: release {abc[1].release}" in live.output
    third = datetime.fromisoformat(records[2]["moved_at"])
    then = ship("live", MODEL, "--at", third.isoformat())
    assert f"release {abc[2].release}" in then.output and "until" in then.output
    before = ship(
        "live", MODEL, "--at", (datetime.fromisoformat(records[0]["moved_at"]) - timedelta(days=1)).isoformat()
    )
    assert before.status == 1 and before.output == ""
    assert "nothing was live on prod" in before.errors and "the first move was at" in before.errors


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["rollback", MODEL], 2, "--why"),
        (["rollback", MODEL, "--why", ""], 2, "expected a reason"),
        (["rollback", MODEL, "--why", "x", "--to", "prod"], 2, "already"),
        (["rollback", MODEL, "--why", "x", "--channel", "latest"], 2, "MLflow has other uses"),
        (["rollback", MODEL, "--why", "x", "--channel", "staging-previous"], 2, "MLflow has other uses"),
        (["rollback", "nobody", "--why", "x"], 2, "there are: digits"),
        (["promote", MODEL, "--from", "staging", "--why", "x"], 2, "Channels: prod"),
        (["live", MODEL, "--channel", "staging"], 1, "nothing was live on staging now; channels: prod"),
        (["live", MODEL, "--at", "tomorrow"], 2, "expected such as"),
        (["history", MODEL, "--channel", "staging"], 1, "never moved; channels: prod"),
        (["history", "No/Body"], 2, "model name"),
    ],
)
def test_a_mistake_is_one_message(
    object_store: ObjectStore, abc: list[Manifest], ship: Ship, words: list[str], status: int, said: str
) -> None:
    done = ship(*words)
    assert (done.status, done.output) == (status, "")
    assert said in done.errors and "Traceback" not in done.errors
