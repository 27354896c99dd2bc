"""What changed between two releases, as `ship diff` tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fixture_types import Ship
from tests.support.releases import MODEL, damage, move, published
from tests.support.stack_servers import S3Server
from train_and_ship.infra.errors import ReleaseError, RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.catalog import Named
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.diff import KIND, NONE, Difference, _is_noise, compare
from train_and_ship.registry.release.manifest import ENVIRONMENT, JOB, LINEAGE, VERDICTS, Manifest, build_manifest
from train_and_ship.ship.diff import _table, diff


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


def told(
    store: ObjectStore,
    folder: Path,
    *,
    epochs: int,
    accuracy: float,
    parity: float,
    commit: str,
    torch: str,
    factory: str = "net:Net",
    weights: bytes = b"x",
    **more: Any,
) -> Manifest:
    """A release that tells how it came to be, as the register stage writes it."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(weights * (1000 * epochs))
    verdict = {"format": "onnx", "gate": "parity", "case": "batch 1", "measured": parity, "limit": "<= 1"}
    verdicts = [{**verdict, "measured": parity / 2}, verdict, {**verdict, "gate": "accuracy", "measured": accuracy}]
    metrics = {"onnx": {"accuracy": accuracy, "p50_ms.batch_1": 0.5 * epochs}}
    documents = {
        JOB: {"name": MODEL, "model": {"factory": factory}, "train": {"epochs": epochs, "seed": 0}, "gates": {}},
        VERDICTS: {"verdicts": verdicts, "metrics": metrics},
        LINEAGE: {"git_commit": commit, "data_fingerprint": "same", "train_samples": 10, **more},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / ENVIRONMENT).write_text(f"numpy==2.4.6\ntorch=={torch}\n")
    signature = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], "outputs": []}
    manifest = build_manifest(
        folder, model=MODEL, formats={"onnx": "model.onnx"}, signature=signature, metrics={"accuracy": accuracy}
    )
    publish(store, folder, manifest)
    return manifest


@pytest.fixture
def two(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """An older and a newer release, both once live on prod."""
    old = told(object_store, tmp_path / "a", epochs=1, accuracy=0.95, parity=0.2, commit="aaa", torch="2.12")
    new = told(object_store, tmp_path / "b", epochs=2, accuracy=0.97, parity=0.4, commit="bbb", torch="2.13")
    for manifest in (old, new):
        move(object_store, manifest)
    return [old, new]


def test_every_kind_of_change_is_told_and_nothing_else(object_store: ObjectStore, two: list[Manifest]) -> None:
    found = compare(object_store, MODEL, Named(two[0].release), Named(two[1].release))
    by_name = {(one.group, one.name): one for one in found}
    assert by_name["metrics", "accuracy"] == Difference(
        group="metrics", name="accuracy", before="0.95", after="0.97", change="+0.02 (+2.1%)"
    )
    assert (by_name["parity", "onnx"].before, by_name["parity", "onnx"].after) == ("0.2", "0.4")
    assert by_name["latency", "onnx p50_ms.batch_1"].change == "+0.5 (+100.0%)"
    assert by_name["size", "model.onnx"].change == "+1000 (+100.0%)"
    assert (by_name["code", "git_commit"].before, by_name["code", "git_commit"].after) == ("aaa", "bbb")
    assert by_name["packages", "torch"].after == "2.13"
    assert by_name["job", "train.epochs"].change == "+1 (+100.0%)"
    hashes = [manifest.files["model.onnx"].sha256 for manifest in two]
    assert [by_name["files", "model.onnx"].before, by_name["files", "model.onnx"].after] == hashes
    assert not {"data", "signature", "training"} & {one.group for one in found}
    assert compare(object_store, MODEL, Named(two[0].release), Named(two[0].release)) == []


@pytest.mark.parametrize(
    ("changed", "noise"),
    [
        ({"p50_ms": 0.9}, True),
        ({"p50_ms": 1.2}, False),
        # Of few calls, or of one.
        ({"p99_ms": 1.9}, True),
        ({"p99_ms": 2.1}, False),
        ({"load_ms": 9.0}, True),
        ({"load_ms": 11.0}, False),
        # Whatever somebody else's release says.
        ({"p50_ms": "fast"}, False),
        ({"p50_ms": 10**400}, False),
    ],
)
def test_a_time_is_noise_while_it_lies_among_the_others_calls(changed: dict[str, object], noise: bool) -> None:
    (name,) = changed
    before = {"onnx p50_ms.batch_1": 0.5, "onnx p99_ms.batch_1": 1.0, "onnx load_ms": 5.0}
    found = next(key for key in before if name in key)
    after = {**before, **dict.fromkeys([found], changed[name])}
    assert _is_noise("latency", found, before, after) is noise
    assert _is_noise("latency", found, after, before) is noise


def test_a_size_is_noise_below_a_thousandth_and_nothing_else_is() -> None:
    assert _is_noise("size", "a", {"a": 10_000}, {"a": 10_010}) and not _is_noise("size", "a", {"a": 1000}, {"a": 1002})
    assert not _is_noise("metrics", "a", {"a": 0.9}, {"a": 0.9001}) and not _is_noise("size", "a", {"a": 1}, {})


def test_what_is_noise_is_counted_and_not_shown(
    object_store: ObjectStore, two: list[Manifest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train_and_ship.ship.diff.compare", lambda *_: [
        Difference(group="latency", name="onnx load_ms", before="5", after="6", noise=True),
        Difference(group="metrics", name="accuracy", before="0.9", after="0.8"),
    ])  # fmt: skip
    monkeypatch.setattr(ObjectStore, "from_settings", lambda *_, **__: object_store)
    diff([MODEL, "prod~1", "prod"], as_json=False)
    said = capsys.readouterr().out
    assert "accuracy" in said and "load_ms" not in said and "not shown: 1 within noise" in said
    diff([MODEL, "prod~1", "prod"], as_json=True)
    assert [one["noise"] for one in json.loads(capsys.readouterr().out)["differences"]] == [True, False]


def test_what_makes_it_another_kind_of_thing_is_told_first(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path
) -> None:
    asked = {"epochs": 1, "accuracy": 0.9, "parity": 0.1, "commit": "ccc", "torch": "2.13"}
    other = told(object_store, tmp_path / "c", factory="other:Net", **asked)  # type: ignore[arg-type]
    first, *rest = compare(object_store, MODEL, Named(two[1].release), Named(other.release))
    assert first == Difference(group=KIND, name="model: model.factory", before="net:Net", after="other:Net")
    assert KIND not in {one.group for one in rest}


def test_what_only_one_of_them_tells_is_a_difference_too(
    object_store: ObjectStore, two: list[Manifest], tmp_path: Path
) -> None:
    bare = published(object_store, tmp_path / "bare")
    found = compare(object_store, MODEL, Named(two[0].release), Named(bare.release))
    assert {one.after for one in found if one.group in ("packages", "code", "job")} == {NONE}


def test_other_weights_of_the_same_size_are_a_difference(object_store: ObjectStore, tmp_path: Path) -> None:
    asked = {"epochs": 1, "accuracy": 0.9, "parity": 0.1, "commit": "ccc", "torch": "2.13"}
    both = []
    for weights in (b"a", b"b"):
        folder = tmp_path / weights.decode()
        both.append(told(object_store, folder, weights=weights, **asked))  # type: ignore[arg-type]
    (only,) = compare(object_store, MODEL, *(Named(manifest.release) for manifest in both))
    assert (only.group, only.name, only.before) == ("files", "model.onnx", both[0].files["model.onnx"].sha256)
    (line,) = _table([only]).splitlines()[2:]
    assert line.split() == ["files", "model.onnx", f"{only.before[:12]}…", f"{only.after[:12]}…"]


def test_a_description_that_was_altered_is_no_answer(object_store: ObjectStore, two: list[Manifest]) -> None:
    damage(object_store, f"models/{MODEL}/releases/{two[0].release}/{VERDICTS}")
    with pytest.raises(ReleaseError, match=r"verdicts\.json: expected what the manifest says"):
        compare(object_store, MODEL, Named(two[0].release), Named(two[1].release))


def test_the_command_takes_the_model_from_the_bucket_when_there_is_one(
    object_store: ObjectStore, two: list[Manifest], ship: Ship
) -> None:
    done = ship("diff", "prod~1", "prod")
    assert done.status == 0, done.errors
    assert f"prod~1 = {two[0].release}, prod = {two[1].release}" in done.output
    assert any(
        line.split() == ["job", "train.epochs", "1", "2", "+1", "(+100.0%)"] for line in done.output.splitlines()
    )
    assert ship("diff", MODEL, two[0].release[:6], "prod").output.count("\n") == done.output.count("\n")
    document = json.loads(ship("diff", MODEL, "prod~1", "prod", "--json").output)
    assert {one["group"] for one in document["differences"]} >= {"metrics", "parity", "packages"}
    assert "no difference" in ship("diff", "prod", "prod").output


def test_without_a_model_it_has_to_be_the_only_one(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"expected `ship diff MODEL BEFORE AFTER`.*models: none"):
        diff(["prod~1", "prod"], as_json=False)
