"""The reader's own reading of pointers and manifests: it refuses whatever the writer's side refuses, and says why."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shipreader import mlserver, records
from shipreader.errors import RefusedError
from shipreader.mlserver import served
from tests.support.projects import REPOSITORY
from torchworker.contract import WITHOUT_CODE
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.channels.pointer import Pointer, decode_pointer
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.release.manifest import MANIFEST, Manifest, build_manifest, decode_manifest

Y = {"name": "y", "dtype": "float32", "shape": ["batch", 3]}
FILE = {"sha256": "0" * 64, "bytes": 1}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    return build_manifest(tmp_path, model="digits", formats={"onnx": "model.onnx"}, signature={}, metrics={"loss": 0.5})


def pointer_to(encoded: bytes, release: str) -> records.Pointer:
    return records.Pointer("digits", "prod", 1, release, hashlib.sha256(encoded).hexdigest(), "n", "")


def both_refuse(document: dict[str, Any], reason: str) -> None:
    """With the id that belongs to the file table, as an intruder would make it."""
    try:
        table = canonical_json(document["files"])
    except UnicodeEncodeError:
        table = b""
    document = {**document, "release": hashlib.sha256(table).hexdigest()[:20]}
    encoded = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(RefusedError, match=reason):
        records.decode_manifest(encoded, pointer_to(encoded, document["release"]))
    with pytest.raises(ReleaseError):
        decode_manifest(encoded)


def test_what_the_writer_writes_is_read(manifest: Manifest) -> None:
    encoded = manifest.encode()
    read = records.decode_manifest(encoded, pointer_to(encoded, manifest.release))
    assert (read.model, read.release, read.formats) == (manifest.model, manifest.release, manifest.formats)
    assert {name: vars(entry) for name, entry in read.files.items()} == {n: vars(e) for n, e in manifest.files.items()}
    assert read.metrics == {"loss": 0.5} and read.total_bytes == 4


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/etc/passwd", "a//b", "./a", "a\\b", "C:/x", "", "a\nb", "a" * 513, "a/", "\ud800"]
)
def test_names_that_leave_the_folder_are_refused(manifest: Manifest, name: str) -> None:
    both_refuse({**json.loads(manifest.encode()), "files": {name: FILE}, "formats": {}}, "relative path|expected")


@pytest.mark.parametrize("name", [MANIFEST, "MANIFEST.0123456789abcdef.sig.json"])
def test_names_of_the_releases_own_files_are_refused(manifest: Manifest, name: str) -> None:
    both_refuse({**json.loads(manifest.encode()), "files": {name: FILE}, "formats": {}}, "release's own")


@pytest.mark.parametrize("name", ["model.pkl", "a/b.PICKLE", "weights.pth", "scaler.joblib"])
def test_pickles_are_refused(manifest: Manifest, name: str) -> None:
    both_refuse({**json.loads(manifest.encode()), "files": {name: FILE}, "formats": {}}, "no pickle")


def test_a_file_that_is_also_a_folder_is_refused(manifest: Manifest) -> None:
    document = {**json.loads(manifest.encode()), "files": {"a/b": FILE, "a/b/c/d": FILE}, "formats": {}}
    both_refuse(document, "a/b is a file, and the folder of a/b/c/d")


@pytest.mark.parametrize("entry", [{"sha256": "x", "bytes": 1}, {**FILE, "bytes": -1}, {"bytes": 1}, 3, None])
def test_entries_that_are_no_hash_and_size_are_refused(manifest: Manifest, entry: Any) -> None:
    both_refuse({**json.loads(manifest.encode()), "files": {"model.onnx": entry}}, "expected")


@pytest.mark.parametrize("size", [True, 1.0, "1"])
def test_sizes_that_are_no_whole_numbers_are_refused(manifest: Manifest, size: Any) -> None:
    both_refuse({**json.loads(manifest.encode()), "files": {"model.onnx": {**FILE, "bytes": size}}}, "expected a size")


def test_a_format_without_its_file_and_a_release_without_files_are_refused(manifest: Manifest) -> None:
    document = json.loads(manifest.encode())
    both_refuse({**document, "formats": {"pt2": "model.pt2"}}, "format pt2")
    both_refuse({**document, "files": {}, "formats": {}}, "expected 1 to")


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ({"dims": None}, "dims: expected a list, got NoneType"),
        ({"dims": False}, "dims: expected a list, got bool"),
        ({"dims": 0}, "dims: expected a list, got int"),
        ({"dims": {}}, "dims: expected a list, got dict"),
        ({"dims": [3]}, "expected a manifest"),
        ({"dims": [{"name": "x", "min": 1, "max": most} for most in (1, 8)]}, "dims: expected one range of each name"),
        ({"note": json.loads("[" * 21 + "]" * 21)}, "lists within lists to a depth of 20, got more"),
        ({"inputs": []}, "inputs: expected at least one tensor, got none"),
        ({"inputs": None}, "expected a manifest"),
        ({"inputs": {}}, "inputs: expected at least one tensor"),
        ({"inputs": {"name": 1}}, "expected a manifest"),
        ({"labels": []}, "labels: expected a list of texts, one at least"),
        ({"labels": "cat"}, "labels: expected a list of texts, one at least"),
        ({"labels": {"cat": 0}}, "labels: expected a list of texts, one at least"),
        ({"labels": ["cat", 1]}, "labels: expected texts, and number 1 is 1"),
        ({"labels": ["cat", "\x1b[2J"]}, "labels: expected printable texts"),
        ({"labels": ["cat", "cat"]}, "labels: expected each text once"),
        ({"labels": list(map(str, range(20_000))), "outputs": [Y]}, "labels: expected 3, one for each column of y"),
        ({"labels": ["cat", "dog"], "outputs": [Y]}, "labels: expected 3, one for each column of y, got 2"),
    ],
)  # fmt: skip
def test_a_signature_that_no_server_can_take_is_refused_when_it_is_read(
    manifest: Manifest, signature: dict[str, Any], said: str
) -> None:
    tensors = [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    document = json.loads(manifest.encode())
    both_refuse({**document, "signature": {"inputs": tensors, "outputs": tensors, **signature}}, said)


@pytest.mark.parametrize("encoded", [b"", b"{", b"[]", b"null", b'{"format":1}', b'{"format":2}', b"\xff"])
def test_anything_else_is_refused(encoded: bytes) -> None:
    with pytest.raises(RefusedError, match="expected"):
        records.decode_manifest(encoded, pointer_to(encoded, "0" * 20))
    with pytest.raises(RefusedError, match="expected"):
        records.decode_pointer(encoded, "digits", "prod")


def test_another_manifest_than_the_pointer_names_is_refused(manifest: Manifest) -> None:
    encoded = manifest.encode()
    good = pointer_to(encoded, manifest.release)
    with pytest.raises(RefusedError, match="altered after it went live"):
        records.decode_manifest(encoded + b" ", good)
    with pytest.raises(RefusedError, match="expected the manifest of digits 0000"):
        records.decode_manifest(encoded, pointer_to(encoded, "0" * 20))


def test_a_pointer_is_read_as_it_was_written_and_new_keys_in_it_are_no_harm() -> None:
    written = Pointer(
        model="digits", channel="prod", generation=7, release="a" * 20, manifest_sha256="b" * 64, previous=None,
        nonce="n", moved_at="2026-11-24T00:00:00+00:00", moved_by="me", reason="because", flow_run="",
        mlflow_version="",
    )  # fmt: skip
    assert decode_pointer(written.encode(), "key") == written
    later = json.dumps({**json.loads(written.encode()), "verdicts": {"accuracy": 1}}).encode()
    for encoded in (written.encode(), later):
        read = records.decode_pointer(encoded, "digits", "prod")
        assert vars(read) == {name: getattr(written, name) for name in vars(read)}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "faces"},
        {"channel": "staging"},
        {"generation": 0},
        {"generation": "1"},
        {"generation": True},
        {"release": "../../other"},
        {"release": None},
        {"manifest_sha256": "x"},
        {"nonce": 1},
    ],
    ids=str,
)
def test_a_pointer_that_names_something_else_is_refused(change: dict[str, Any]) -> None:
    good = {"format": 1, **vars(records.Pointer("digits", "prod", 1, "a" * 20, "b" * 64, "n", ""))}
    with pytest.raises(RefusedError, match=r"channels/prod\.json: expected"):
        records.decode_pointer(json.dumps({**good, **change}).encode(), "digits", "prod")


def test_a_reader_knows_what_a_release_recommends(manifest: Manifest, tmp_path: Path) -> None:
    document = json.loads(manifest.encode())
    both_refuse({**document, "serve": {"latency": "aoti"}}, "serve.'latency': expected one of its formats")
    both_refuse({**document, "serve": "onnx"}, "expected a manifest")
    both_refuse({**document, "serve": {"latency": ["onnx"]}}, "serve.'latency'")
    encoded = canonical_json({**document, "serve": {"latency": "onnx"}})
    assert decode_manifest(encoded).serve == {"latency": "onnx"}
    read = records.decode_manifest(encoded, pointer_to(encoded, manifest.release))
    release = records.Release("prod", 1, tmp_path, read, "")
    assert (release.recommended("latency"), release.recommended("throughput")) == ("onnx", None)
    assert release.artifact("onnx") == tmp_path / "model.onnx"
    # `on_change=print` shows it on one line.
    assert str(release) == f"{read.model} prod: generation 1, release {read.release}, in {tmp_path}"


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        ({}, "onnx"),
        ({"latency": "onnx", "throughput": "onnx-int8-static"}, "onnx-int8-static"),
        # MLServer runs ONNX alone.
        ({"latency": "onnx-int8-static", "throughput": "aoti"}, "onnx-int8-static"),
        ({"latency": "pt2", "throughput": "aoti"}, "onnx"),
        # What no gate has loaded, by a name of its writer's own.
        ({"latency": "onnx-int8-dynamic", "throughput": "onnx2"}, "onnx-int8-dynamic"),
        ({"latency": "onnx2", "throughput": "onnx-int8"}, "onnx"),
    ],
)
def test_the_endpoint_serves_the_onnx_format_that_is_recommended(serve: dict[str, str], expected: str) -> None:
    manifest = records.Manifest("digits", "0" * 20, {}, {}, {}, {}, b"", serve)
    assert served(records.Release("prod", 1, Path(), manifest, "")) == expected


BEFORE = "e8084c6f"
"""The last commit before releases had files beside the model, and labels; weights beside it came later still."""
READ = """
import json, sys
from pathlib import Path
from shipreader import records
from shipreader.records import Pointer, decode_manifest, files_below
assert not hasattr(records, "wrong_labels"), records.__file__
encoded = Path(sys.argv[1], "MANIFEST.json").read_bytes()
manifest = decode_manifest(encoded, Pointer(**json.loads(sys.argv[2])))
found = sorted(name for name, _ in files_below(Path(sys.argv[1])))
print(json.dumps([sorted(manifest.files), found, manifest.signature, manifest.formats]))
"""


def test_the_reader_of_before_takes_a_release_with_files_labels_and_weights_beside_the_model(tmp_path: Path) -> None:
    release = tmp_path / "release"
    (release / "files" / "tokenizer").mkdir(parents=True)
    (release / "files" / "tokenizer" / "vocab.txt").write_text("a")
    for name in ("model.onnx", "model.onnx.data"):
        (release / name).write_bytes(b"onnx")
    tensor = {"name": "y", "dtype": "float32", "shape": ["batch", 2]}
    signature = {"inputs": [tensor], "outputs": [tensor], "dims": [], "labels": ["cat", "dog"]}
    made = build_manifest(
        release, model="digits", formats={"onnx": "model.onnx"}, signature=signature, metrics={}
    )  # fmt: skip
    (release / MANIFEST).write_bytes(made.encode())
    # The format is what it was, so that nobody has to change readers before trainers.
    assert json.loads(made.encode())["format"] == 1
    old = tmp_path / "old"
    old.mkdir()
    archive = subprocess.run(["git", "archive", BEFORE, "shipreader"], cwd=REPOSITORY, capture_output=True)
    if archive.returncode:
        pytest.skip(f"the clone is shallow or no clone: {BEFORE} is not in it")
    subprocess.run(["tar", "x"], cwd=old, input=archive.stdout, check=True)
    said = json.dumps(vars(pointer_to(made.encode(), made.release)))
    read = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(release), said],
        env={"PYTHONPATH": str(old)}, capture_output=True, text=True,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    names = ["files/tokenizer/vocab.txt", "model.onnx", "model.onnx.data"]
    assert json.loads(read.stdout) == [names, [MANIFEST, *names], signature, {"onnx": "model.onnx"}]


def test_a_release_without_files_and_labels_has_the_bytes_that_it_had(manifest: Manifest) -> None:
    assert manifest.encode() == (
        b'{"files":{"model.onnx":{"bytes":4,"sha256":"' + hashlib.sha256(b"onnx").hexdigest().encode() + b'"}},'
        b'"format":1,"formats":{"onnx":"model.onnx"},"metrics":{"loss":0.5},"model":"digits",'
        b'"release":"' + manifest.release.encode() + b'","signature":{}}'
    )


def test_what_is_served_is_what_a_promotion_loads_without_a_signature() -> None:
    assert mlserver.FORMATS == WITHOUT_CODE
