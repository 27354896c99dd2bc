"""Who may publish names tensors, and who may write views writes there, so that a view stays where it is for good."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shipreader.reader import Reader
from shipreader.records import Release
from tests.support.onnx_releases import SIGNATURE
from tests.support.releases import CHANNEL, MODEL, NOWHERE, move
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import RECORD_BYTES, ListedObject, ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import is_of_view, is_view_config
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.maintenance.doctor import examine
from train_and_ship.registry.maintenance.retention import _in_views
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.registry.serving import layouts
from train_and_ship.registry.serving.layouts import triton_config, write_kserve, write_triton

FOLDER = f"models/{MODEL}/views/{CHANNEL}/triton/{MODEL}/"
CONFIG = f"{FOLDER}config.pbtxt"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration is always of another second than its version, as if somebody had waited."""
    listed = ObjectStore.list_objects

    def later(self: ObjectStore, prefix: str) -> dict[str, ListedObject]:
        found = listed(self, prefix)
        moved = {key: replace(item, modified=item.modified + timedelta(hours=1)) for key, item in found.items()}
        return {**found, **{key: item for key, item in moved.items() if key == CONFIG}}

    monkeypatch.setattr(layouts, "_TICK_SECONDS", 0)
    monkeypatch.setattr(ObjectStore, "list_objects", later)


def named(store: ObjectStore, folder: Path, name: str) -> Manifest:
    """A published release whose input is called so."""
    folder.mkdir()
    # ONNX as far as views look at it: the name of whoever made it.
    (folder / "model.onnx").write_bytes(bytes([0x12, len(name)]) + name.encode())
    signature: dict[str, Any] = copy.deepcopy(SIGNATURE)
    signature["inputs"][0]["name"] = name
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature=signature, metrics={})
    publish(store, folder, manifest)
    return manifest


def pulled(store: ObjectStore, folder: Path) -> Release:
    client = s3_client(Settings.load())
    return Reader(MODEL, bucket=store.bucket, folder=folder / "pulled", channel=CHANNEL, client=client).pull()


def config(store: ObjectStore) -> str:
    found = store.get(CONFIG)
    assert found is not None
    return found[0].decode()


def with_many_names(release: Release) -> Release:
    """200 outputs whose names JSON writes twelve times as long."""
    outputs = [{"name": f"{'😀' * 500}{n}", "dtype": "float32", "shape": ["batch", 4]} for n in range(200)]
    signature = {**release.manifest.signature, "outputs": outputs}
    return replace(release, manifest=replace(release.manifest, signature=signature))


@pytest.mark.parametrize(
    "name",
    [
        "versions: [ 99999999 ]",
        "version_policy { specific { versions: [ 99999999 ] } }",
        '" }\\nversion_policy { specific { versions: [ 99999999 ] } }',
    ],
)
def test_a_tensor_that_is_called_like_a_version_names_none(
    object_store: ObjectStore, tmp_path: Path, name: str
) -> None:
    good, bad = named(object_store, tmp_path / "good", "x"), named(object_store, tmp_path / "bad", name)
    for generation, manifest in enumerate((good, bad, good), start=1):
        move(object_store, manifest)
        assert write_triton(object_store, pulled(object_store, tmp_path)).generation == generation
        assert config(object_store).startswith(f"# {MODEL} release {manifest.release}\n")
        assert f"\nversion_policy {{ specific {{ versions: [ {generation} ] }} }}\n" in config(object_store)


def test_a_view_of_a_version_that_the_channel_never_had_is_written_anew(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    move(object_store, named(object_store, tmp_path / "good", "x"))
    release = pulled(object_store, tmp_path)
    object_store.put(CONFIG, triton_config(release, "onnxruntime", 99_999_999).encode())
    assert write_triton(object_store, release).generation == 1
    assert config(object_store) == triton_config(release, "onnxruntime", 1)


@pytest.mark.parametrize("there", [b"#" * (RECORD_BYTES + 1), b"no configuration", b"\xff"])
def test_a_view_that_nobody_can_read_is_written_anew(object_store: ObjectStore, tmp_path: Path, there: bytes) -> None:
    move(object_store, named(object_store, tmp_path / "good", "x"))
    object_store.put(CONFIG, there)
    release = pulled(object_store, tmp_path)
    assert write_triton(object_store, release).generation == 1
    assert config(object_store) == triton_config(release, "onnxruntime", 1)


def test_a_view_whose_configuration_nobody_would_read_is_not_written(object_store: ObjectStore, tmp_path: Path) -> None:
    move(object_store, named(object_store, tmp_path / "good", "x"))
    release = pulled(object_store, tmp_path)
    write_triton(object_store, release)
    before = object_store.list_keys(f"models/{MODEL}/views/")
    for write in (write_triton, write_kserve):
        with pytest.raises(ReleaseError, match=r"expected a configuration of at most 1,048,576 bytes, got 1,2"):
            write(object_store, replace(with_many_names(release), generation=2))
    assert object_store.list_keys(f"models/{MODEL}/views/") == before
    assert write_triton(object_store, release).generation == 1


def test_files_that_a_job_ships_are_of_the_view_and_none_is_its_configuration(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    folder, other = tmp_path / "good", f"# {MODEL} release {'a' * 20}\n"
    for name in ("config.pbtxt", "my.config.pbtxt", "triton/config.pbtxt", "9/model.onnx"):
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_text(other)
    (folder / "model.onnx").write_bytes(bytes([0x12, len(MODEL)]) + MODEL.encode())
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    publish(object_store, folder, manifest)
    move(object_store, manifest)
    release = pulled(object_store, tmp_path)
    for write, backend in ((write_triton, "onnxruntime"), (write_kserve, "python")):
        write(object_store, release, backend)
    assert not [one.what for one in examine(object_store, MODEL, NOWHERE) if "does not write" in one.what]
    # Of what the two views name nothing is a release that a job wrote into a file.
    kserve = f"models/{MODEL}/views/{CHANNEL}/kserve/1/{MODEL}/config.pbtxt"
    assert dict((view, named) for named, view in _in_views(object_store, MODEL)) == {
        CONFIG: manifest.release,
        kserve: manifest.release,
    }


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (f"triton/{MODEL}/1/files/a/b.json", True),
        (f"triton/{MODEL}/1/model.py", True),
        (f"kserve/2/{MODEL}/1/files/config.pbtxt", True),
        (f"triton/{MODEL}/files/a", False),
        (f"triton/{MODEL}/1/files/", False),
        (f"triton/{MODEL}/1/files/../model.py", False),
        (f"triton/{MODEL}/1/files/\x7f", False),
        (f"triton/{MODEL}/1/files/a\nb", False),
        (f"triton/{MODEL}/1/labels.txt", False),
        ("triton/other/1/model.onnx", False),
        (f"triton/{MODEL}/0/model.onnx", False),
        (f"kserve/{MODEL}/1/model.onnx", False),
    ],
)
def test_of_a_view_is_what_ship_view_writes(name: str, ours: bool) -> None:
    key = f"models/{MODEL}/views/{CHANNEL}/{name}"
    assert is_of_view(MODEL, key) is ours
    assert not is_view_config(MODEL, key)
