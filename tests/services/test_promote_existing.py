"""A release that is in the bucket already is tried before it goes live again: loaded, run, and compared."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.fixture_types import Ship
from tests.support.releases import CHANNEL, MODEL, NOWHERE, key_of, move, rolled_back
from tests.support.runnable_releases import (
    ARTIFACT,
    CLASSES,
    FEATURES,
    publish_folder,
    run_that_made,
    runnable,
    samples_of,
    write_release,
)
from tests.support.stack_servers import S3Server
from torchworker.contract import GOLDEN
from train_and_ship.infra.errors import GateError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import Mover, promote_existing
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.targets import Verified, choose_promotion, verify_target
from train_and_ship.registry.release.manifest import JOB, MANIFEST, Manifest
from train_and_ship.tasks.existing import promote_tried, try_out

MOVER = Mover(by="ada@host", why="a quiet week")


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


@pytest.fixture
def settings(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    return Settings.load()


def chosen(store: ObjectStore, manifest: Manifest) -> Verified:
    return verify_target(choose_promotion(Channel(store, MODEL, CHANNEL, NOWHERE), manifest.release), read_back=False)


def promoted(
    settings: Settings, store: ObjectStore, manifest: Manifest, gates: bool = True, allow: tuple[str, ...] = ()
) -> Pointer:
    async def all_of_it() -> Pointer:
        tried = await try_out(settings, chosen(store, manifest), gates=gates)
        return await promote_tried(settings, tried, MOVER, gates=gates, again=False, allow=allow)

    return asyncio.run(all_of_it())


def live(store: ObjectStore) -> str:
    pointer = read_pointer(Channel(store, MODEL, CHANNEL))
    return pointer.release if pointer is not None else ""


def test_every_format_is_loaded_and_gives_its_golden_outputs_and_the_record_says_so(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    manifest = runnable(object_store, tmp_path / "a", 0.9, seed=1)
    pointer = promoted(settings, object_store, manifest)
    assert pointer.verdicts["rehearsal"] == "3 checks passed: onnx"
    assert re.fullmatch(r"onnx: \d+ of 63 sizes from 2 to 64, seed \d+", pointer.verdicts["samples together"])
    assert pointer.verdicts["bytes"].endswith("downloaded and hashed")
    assert pointer.verdicts["vs_live"] == "nothing was live"
    # Nothing is left on this machine.
    assert list((settings.home / "rehearsals" / MODEL).iterdir()) == []


@pytest.mark.parametrize("gates", [True, False])
def test_an_artifact_that_does_not_give_its_golden_outputs_does_not_go_live(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, gates: bool
) -> None:
    manifest = runnable(object_store, tmp_path / "a", 0.9, seed=1, golden_seed=2)
    with pytest.raises(GateError, match=r"came back from the bucket, fails: onnx \(batch 1\), onnx \(batch 8\)"):
        promoted(settings, object_store, manifest, gates)
    assert live(object_store) == ""


def test_an_artifact_that_cannot_be_loaded_does_not_go_live(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    write_release(tmp_path / "a", 1, MODEL)
    (tmp_path / "a" / ARTIFACT).write_bytes(b"\x08\x09")
    with pytest.raises(GateError, match=r"fails: onnx \(load\)"):
        promoted(settings, object_store, publish_folder(object_store, tmp_path / "a", MODEL, 0.9))


def test_a_release_that_cannot_be_tried_does_not_go_live(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    write_release(tmp_path / "a", 1, MODEL)
    (tmp_path / "a" / "golden.safetensors").unlink()
    with pytest.raises(GateError, match=r"carries no golden\.safetensors"):
        promoted(settings, object_store, publish_folder(object_store, tmp_path / "a", MODEL, 0.9))


def test_golden_outputs_of_no_rows_prove_nothing(settings: Settings, object_store: ObjectStore, tmp_path: Path) -> None:
    write_release(tmp_path / "a", 1, MODEL)
    none = {"batch_1.input.x": torch.zeros(0, FEATURES), "batch_1.eager.output": torch.zeros(0, CLASSES)}
    save_file({**none, "batch_1.float64.output": torch.zeros(0, CLASSES).double()}, tmp_path / "a" / GOLDEN)
    with pytest.raises(GateError, match=r"fails: onnx \(golden inputs\)"):
        promoted(settings, object_store, publish_folder(object_store, tmp_path / "a", MODEL, 0.9))
    assert live(object_store) == ""


def test_both_are_measured_where_the_run_that_made_the_release_is_still_here(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    """What they say of themselves is the other way round."""
    good = runnable(object_store, tmp_path / "g", 0.1, seed=1, external_data=True)
    bad = runnable(object_store, tmp_path / "b", 1.0, seed=2, external_data=True)
    assert {ARTIFACT, f"{ARTIFACT}.data"} < good.files.keys() & bad.files.keys()
    for name in ("g", "b"):
        run_that_made(settings.runs / MODEL, tmp_path / name, right=1)
    move(object_store, bad)
    expected = _accuracy(2, right=1)
    # What is live boasts, which is looked at before anything replaces it.
    with pytest.raises(GateError, match=r"live_score: accuracy of the live release: 1 in its own record → 0\.\d+ on"):
        promoted(settings, object_store, good)
    pointer = promoted(settings, object_store, good, allow=("live_score",))
    assert pointer.verdicts["live_score vs live"].endswith("on these 60 samples (allowed once, with --allow)")
    assert pointer.verdicts["vs_live"] == (
        f"accuracy 1 against {expected:.4g}, both measured on 60 held-out samples (live {bad.release})"
    )
    with pytest.raises(GateError, match=f"worse than the live release {good.release}: accuracy {expected:.2f}"):
        promoted(settings, object_store, bad)
    assert live(object_store) == good.release
    assert promoted(settings, object_store, bad, gates=False).verdicts["vs_live"] == "not asked"


def _accuracy(seed: int, right: int) -> float:
    """Of the classifier of a seed, on the samples of another."""
    return float((samples_of(seed)["target"] == samples_of(right)["target"]).float().mean())


def test_where_the_samples_are_not_recorded_numbers_are_compared_and_the_record_says_so(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    first = runnable(object_store, tmp_path / "a", 0.90, seed=1)
    second = runnable(object_store, tmp_path / "b", 0.95, seed=2)
    # Samples of another run, and samples that were altered, are not this release's.
    run_that_made(settings.runs / MODEL, tmp_path / "a", right=1)
    run_that_made(settings.runs / MODEL, tmp_path / "b", right=1)
    altered = settings.runs / MODEL / "run-b/export/validation.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    move(object_store, first)
    assert promoted(settings, object_store, second).verdicts["vs_live"] == (
        f"accuracy 0.95 against 0.9, as recorded when each was made (live {first.release})"
    )
    with pytest.raises(GateError, match="worse than the live release"):
        promoted(settings, object_store, runnable(object_store, tmp_path / "c", 0.90, seed=3))


def test_a_release_is_held_against_what_is_live_when_it_moves(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    first, second, third = (runnable(object_store, tmp_path / str(seed), 0.5, seed, vs_live=-1) for seed in range(3))
    run_that_made(settings.runs / MODEL, tmp_path / "2", right=2)
    move(object_store, first)

    async def overtaken() -> Pointer:
        tried = await try_out(settings, chosen(object_store, third))
        assert tried.scored is not None and tried.scored.live == first.release
        move(object_store, second)
        return await promote_tried(settings, tried, MOVER, gates=True, again=False)

    pointer = asyncio.run(overtaken())
    assert pointer.previous == second.release
    assert pointer.verdicts["vs_live"].endswith(f"both measured on 60 held-out samples (live {second.release})")
    assert f"against {_accuracy(1, right=2):.4g}" in pointer.verdicts["vs_live"]


def test_a_live_release_that_cannot_be_measured_keeps_its_place(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    write_release(tmp_path / "strange", 1, MODEL)
    strange = publish_folder(object_store, tmp_path / "strange", MODEL, 0.1, input_name="image")
    candidate = runnable(object_store, tmp_path / "a", 0.9, seed=2)
    run_that_made(settings.runs / MODEL, tmp_path / "a", right=2)
    move(object_store, strange)
    with pytest.raises(GateError, match=r"another kind .*signature: input image: float32 \[batch, 4\] → none"):
        promoted(settings, object_store, candidate)
    with pytest.raises(GateError, match=r"cannot be compared with the live release .*its inputs are image"):
        promoted(settings, object_store, candidate, allow=("signature",))


def test_metrics_in_user_code_are_compared_as_they_were_recorded(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    manifests = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        write_release(folder, seed, MODEL)
        job = json.loads((folder / JOB).read_text())
        job["train"]["metrics"] = ["accuracy", {"factory": "plain:accuracy", "better": "higher", "name": "ours"}]
        job["gates"] = {"ours": {"vs_live": 0.0}}
        (folder / JOB).write_text(json.dumps(job))
        manifests.append(publish_folder(object_store, folder, MODEL, 0.9, metric="ours"))
        run_that_made(settings.runs / MODEL, folder, right=1)
    move(object_store, manifests[0])
    assert "as recorded when each was made" in promoted(settings, object_store, manifests[1]).verdicts["vs_live"]


def test_the_command_says_what_was_tried_and_compared(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, ship: Ship
) -> None:
    manifest = runnable(object_store, tmp_path / "a", 0.9, seed=1)
    move(object_store, manifest, channel="staging")
    done = ship("promote", MODEL, "--from", "staging", "--why", "a quiet week")
    assert done.status == 0, done.errors
    assert f"digits prod: release {manifest.release} is live, generation 1" in done.output
    assert "tried     3 checks passed: onnx" in done.output and "vs live   nothing was live" in done.output
    broken = runnable(object_store, tmp_path / "b", 0.9, seed=1, golden_seed=2)
    move(object_store, broken, channel="staging")
    refused = ship("promote", MODEL, "--from", "staging", "--why", "a quiet week")
    assert refused.status == 2 and "It was not made live on prod" in refused.errors
    assert "batch 8" in refused.errors and "Traceback" not in refused.errors


def test_a_release_of_another_kind_needs_a_word_unless_it_was_live_here_before(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, ship: Ship
) -> None:
    first = runnable(object_store, tmp_path / "a", 0.9, seed=1)
    write_release(tmp_path / "b", 2, MODEL)
    other = publish_folder(object_store, tmp_path / "b", MODEL, 0.9, max_batch=16)
    move(object_store, first)
    move(object_store, other, channel="staging")
    for gates in (True, False):
        # Gates on numbers are another matter.
        with pytest.raises(GateError, match=rf"--from {other.release[:8]} --to prod --allow signature"):
            promoted(settings, object_store, other, gates)
    assert live(object_store) == first.release
    allowed = ship("promote", MODEL, "--from", "staging", "--why", "a quiet week", "--allow", "signature")
    assert allowed.status == 0, allowed.text
    said = "sizes of input x axis 0: 1 or more → 1 to 16 (allowed once, with --allow)"
    assert f"signature vs live  {said}" in allowed.output
    # A rollback asks nobody, and neither does what was live here before.
    assert rolled_back(object_store).release == first.release
    third = runnable(object_store, tmp_path / "c", 0.9, seed=3)
    assert promoted(settings, object_store, third).previous == first.release
    again = promoted(settings, object_store, other)
    assert again.verdicts["signature vs live"].endswith("(allowed because it was live on prod before)")


@pytest.mark.parametrize("way", ["its own job allows it", "a person was asked"])
def test_a_release_of_another_kind_goes_live_when(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, way: str
) -> None:
    move(object_store, runnable(object_store, tmp_path / "a", 0.9, seed=1))
    write_release(tmp_path / "b", 2, MODEL)
    job = json.loads((tmp_path / "b" / JOB).read_text())
    if way == "its own job allows it":
        job["release"] = {"allow": ["signature"]}
    (tmp_path / "b" / JOB).write_text(json.dumps(job))
    verified = chosen(object_store, publish_folder(object_store, tmp_path / "b", MODEL, 0.9, max_batch=16))
    if way == "a person was asked":
        verified = dataclasses.replace(verified, approved="by grace: it has to be")
    pointer = promote_existing(verified, MOVER)
    how = {"its own job allows it": "by release.allow", "a person was asked": "by grace: it has to be"}[way]
    assert pointer.verdicts["signature vs live"].endswith(f"(allowed {how})")


def test_what_is_live_and_cannot_be_read_asks_for_no_consent(object_store: ObjectStore, tmp_path: Path) -> None:
    broken = runnable(object_store, tmp_path / "a", 0.9, seed=1)
    move(object_store, broken)
    object_store.delete(key_of(broken, MANIFEST))
    write_release(tmp_path / "b", 2, MODEL)
    other = publish_folder(object_store, tmp_path / "b", MODEL, 0.9, max_batch=16)
    assert promote_existing(chosen(object_store, other), MOVER, gates=False).release == other.release


def test_bytes_that_changed_in_the_bucket_are_found_before_they_are_loaded(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    manifest = runnable(object_store, tmp_path / "a", 0.9, seed=1)
    verified = chosen(object_store, manifest)
    key = key_of(manifest, ARTIFACT)
    stored = object_store.head(key)
    assert stored is not None
    object_store.replace(key, b"x" * stored.bytes, stored.etag)
    with pytest.raises(Exception, match=r"model\.onnx: altered in the bucket"):
        asyncio.run(try_out(settings, verified))
