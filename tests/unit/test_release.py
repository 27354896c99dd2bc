"""Manifests: what a release is, without any store."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.identity import RELEASE_ID_DIGITS, canonical_json
from train_and_ship.registry.release.manifest import MANIFEST, Manifest, build_manifest, decode_manifest, verify_folder

CONTENT = {"model.onnx": b"onnx" * 100, "weights.safetensors": b"weights", "extra/labels.txt": b"a\nb\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "release")


def write(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def build(folder: Path, **changes: Any) -> Manifest:
    arguments: dict[str, Any] = {
        "model": "digits",
        "formats": {"onnx": "model.onnx"},
        "signature": {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 64]}], "outputs": []},
        "metrics": {"accuracy": 0.97},
        **changes,
    }
    return build_manifest(folder, **arguments)


def rewrite(manifest: Manifest, **changes: Any) -> bytes:
    """The encoded manifest with other top-level values, again in canonical form."""
    return canonical_json({**json.loads(manifest.encode()), **changes})


def test_a_manifest_names_every_file_by_hash_and_size(folder: Path) -> None:
    manifest = build(folder)
    assert list(manifest.files) == sorted(CONTENT)
    for name, data in CONTENT.items():
        assert manifest.files[name].sha256 == hashlib.sha256(data).hexdigest()
        assert manifest.files[name].bytes == len(data)
    assert manifest.total_bytes == sum(len(data) for data in CONTENT.values())


def test_the_same_content_gives_the_same_bytes_wherever_and_whenever_it_is_built(folder: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "elsewhere", dict(reversed(CONTENT.items())))
    os.utime(copy / "model.onnx", (0, 0))
    assert build(folder).encode() == build(copy, metrics={"accuracy": 0.97}).encode()


def test_the_release_id_depends_on_the_files_and_on_nothing_else(folder: Path) -> None:
    before = build(folder)
    assert build(folder, metrics={"accuracy": 0.5}).release == before.release
    (folder / "extra/labels.txt").rename(folder / "extra/names.txt")
    assert build(folder).release != before.release


def test_decoding_gives_back_what_was_encoded(folder: Path) -> None:
    manifest = build(folder, signature={"inputs": [{"name": "x", "dtype": "float32", "shape": ("batch", 64)}]})
    assert decode_manifest(manifest.encode()) == manifest


def test_a_manifest_beside_the_files_is_not_one_of_them(folder: Path) -> None:
    manifest = build(folder)
    (folder / MANIFEST).write_bytes(manifest.encode())
    assert build(folder) == manifest
    verify_folder(folder, manifest)


@pytest.mark.parametrize("name", ["model.pkl", "a/b.pickle", "weights.PTH", "scaler.joblib"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    write(folder, {name: b"\x80\x04"})
    with pytest.raises(ReleaseError, match="runs code"):
        build(folder)


def test_links_are_refused_even_to_files_inside(folder: Path) -> None:
    (folder / "again.onnx").symlink_to(folder / "model.onnx")
    with pytest.raises(ReleaseError, match=r"again\.onnx: expected a regular file, got a symbolic link"):
        build(folder)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ReleaseError, match="symbolic link"):
        build(folder)


def test_special_files_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ReleaseError, match="special file"):
        build(folder)


def test_file_names_that_are_no_text_are_refused(folder: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff"))).write_bytes(b"")
    with pytest.raises(ReleaseError, match="relative path"):
        build(folder)


@pytest.mark.parametrize("missing", ["empty", "absent"])
def test_a_folder_without_files_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReleaseError, match="expected a"):
        build(tmp_path / missing)


def test_a_format_without_its_file_is_refused(folder: Path) -> None:
    with pytest.raises(ReleaseError, match=r"format pt2: expected one of .*got 'model\.pt2'"):
        build(folder, formats={"pt2": "model.pt2"})


def test_a_metric_that_is_not_a_number_is_refused(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="JSON"):
        build(folder, metrics={"accuracy": math.nan})


@pytest.mark.parametrize("model", ["", "Digits", "../digits", "a/b", "-x", "a" * 64, "digits\n"])
def test_a_model_name_that_cannot_be_part_of_a_key_is_refused(folder: Path, model: str) -> None:
    with pytest.raises(ReleaseError, match="model name"):
        build(folder, model=model)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "./a", "a/../b", "a\\b", "C:/x", "", "a\nb", MANIFEST])
def test_a_reader_refuses_a_path_that_leaves_the_folder(folder: Path, name: str) -> None:
    table = {**json.loads(build(folder).encode())["files"], name: {"sha256": "0" * 64, "bytes": 1}}
    with pytest.raises(ReleaseError, match="file name"):
        decode_manifest(with_table(build(folder), table))


def with_table(manifest: Manifest, table: dict[str, Any]) -> bytes:
    """A manifest with another file table and the id that belongs to it."""
    own = hashlib.sha256(canonical_json(table)).hexdigest()[:RELEASE_ID_DIGITS]
    return rewrite(manifest, files=table, release=own)


def test_a_reader_refuses_an_id_that_does_not_match_the_files(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="by its file table"):
        decode_manifest(rewrite(build(folder), release="0" * RELEASE_ID_DIGITS))


def test_a_reader_refuses_a_format_it_does_not_know(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="expected format 1, got 2"):
        decode_manifest(rewrite(build(folder), format=2))


def test_a_reader_refuses_what_it_would_drop_silently(folder: Path) -> None:
    with pytest.raises(ReleaseError, match="without other keys"):
        decode_manifest(rewrite(build(folder), author="someone"))


@pytest.mark.parametrize(
    "entry",
    [{"sha256": "xyz", "bytes": 1}, {"sha256": "0" * 64, "bytes": -1}, {"sha256": "0" * 64}, {"bytes": 1}, 3, None],
)
def test_a_reader_refuses_entries_that_are_no_hash_and_size(folder: Path, entry: Any) -> None:
    with pytest.raises(ReleaseError):
        decode_manifest(with_table(build(folder), {"model.onnx": entry}))


@pytest.mark.parametrize("encoded", [b"", b"{", b"[]", b"null", b'{"format":1}', b"\xff", b"[" * 100_000])
def test_a_reader_refuses_anything_else_with_a_release_error(encoded: bytes) -> None:
    with pytest.raises(ReleaseError, match="manifest"):
        decode_manifest(encoded)


def test_an_intact_folder_is_verified(folder: Path) -> None:
    verify_folder(folder, build(folder))


def test_a_changed_file_is_found_with_expected_and_got(folder: Path) -> None:
    manifest = build(folder)
    (folder / "weights.safetensors").write_bytes(b"WEIGHTS")
    got = hashlib.sha256(b"WEIGHTS").hexdigest()
    expected = manifest.files["weights.safetensors"].sha256
    with pytest.raises(ReleaseError, match=rf"weights\.safetensors: expected SHA-256 {expected}, got {got}"):
        verify_folder(folder, manifest)


def test_a_shorter_file_is_found_by_its_size(folder: Path) -> None:
    manifest = build(folder)
    (folder / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(ReleaseError, match=r"model\.onnx: expected 400 bytes, got 4"):
        verify_folder(folder, manifest)


def test_a_missing_file_is_found(folder: Path) -> None:
    manifest = build(folder)
    shutil.rmtree(folder / "extra")
    with pytest.raises(ReleaseError, match=r"extra/labels\.txt: expected a file of 4 bytes, got none"):
        verify_folder(folder, manifest)


def test_a_file_too_many_is_found(folder: Path) -> None:
    manifest = build(folder)
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"more\.bin: expected no such file"):
        verify_folder(folder, manifest)


def test_a_foreign_manifest_beside_the_files_is_found(folder: Path) -> None:
    manifest = build(folder)
    (folder / MANIFEST).write_bytes(build(folder, metrics={"accuracy": 1}).encode())
    with pytest.raises(ReleaseError, match=r"expected the manifest of release \w+, got another"):
        verify_folder(folder, manifest)


def test_a_manifest_says_what_to_serve_with_only_when_it_was_measured(folder: Path) -> None:
    plain, measured = build(folder), build(folder, serve={"throughput": "onnx", "latency": "onnx"})
    assert b'"serve"' not in plain.encode()
    assert measured.release == plain.release
    assert decode_manifest(measured.encode()).serve == {"latency": "onnx", "throughput": "onnx"}
    for wrong in ({"latency": "aoti"}, {}):
        with pytest.raises(ReleaseError):
            decode_manifest(rewrite(measured, serve=wrong))
