"""A release that nobody vouches for is put live, or a copy on this machine is altered: neither is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.releases import CHANNEL, MODEL, move
from tests.support.signing_keys import key_pair
from torchworker.contract import WEIGHTS, RehearsedRelease, RehearseRequest
from torchworker.process.failure import UserError
from torchworker.project.weights import start_from
from torchworker.runtimes.load import require_hashes
from torchworker.stages import rehearse
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.rundir import file_sha256
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.signing import publish_signature
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.tasks.copies import live_copy, live_weights


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_pair(tmp_path)


@pytest.fixture
def unsigned(object_store: ObjectStore, tmp_path: Path) -> tuple[Manifest, Pointer]:
    """Live, published by somebody without the key."""
    folder = tmp_path / "release"
    folder.mkdir()
    save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, folder / WEIGHTS)
    (folder / "model.onnx").write_bytes(b"not asked what it is")
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature={}, metrics={})
    publish(object_store, folder, manifest)
    move(object_store, manifest)
    pointer = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert pointer is not None
    return manifest, pointer


def test_an_unsigned_live_release_is_not_fetched_where_a_key_is_required(
    object_store: ObjectStore, unsigned: tuple[Manifest, Pointer], key: Path, tmp_path: Path
) -> None:
    manifest, pointer = unsigned
    copies = tmp_path / "copies"
    release, problem = live_copy(object_store, copies, pointer, key.with_suffix(".pub"))
    assert release is None and problem.startswith("it is broken: ")
    assert "expected a signature by key" in problem and f"`ship sign {MODEL} {manifest.release}`" in problem
    assert not copies.exists()
    # Also when a copy lies here, from before the key was required.
    assert live_copy(object_store, copies, pointer, None)[1] == ""
    assert live_copy(object_store, copies, pointer, key.with_suffix(".pub"))[0] is None


def test_training_starts_from_no_unsigned_weights(
    object_store: ObjectStore, unsigned: tuple[Manifest, Pointer], key: Path, tmp_path: Path
) -> None:
    manifest, pointer = unsigned
    copies, start, public = tmp_path / "copies", tmp_path / "start", key.with_suffix(".pub")
    with pytest.raises(ReleaseError, match=r"retrain\.start: live: .*expected a signature by key"):
        live_weights(object_store, copies, pointer, start, public)
    # The word that allows the first one: whoever has the key signs what they know.
    publish_signature(object_store, manifest, key)
    path, sha256 = live_weights(object_store, copies, pointer, start, public)
    assert file_sha256(path) == sha256
    assert live_copy(object_store, copies, pointer, public)[1] == ""


def test_a_signature_by_another_key_is_none(
    object_store: ObjectStore, unsigned: tuple[Manifest, Pointer], key: Path, tmp_path: Path
) -> None:
    manifest, pointer = unsigned
    publish_signature(object_store, manifest, key_pair(tmp_path, "other"))
    assert live_copy(object_store, tmp_path / "copies", pointer, key.with_suffix(".pub"))[0] is None


def test_weights_that_were_altered_after_they_were_verified_start_no_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "0123" / WEIGHTS
    path.parent.mkdir()
    save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, path)
    sha256 = file_sha256(path)
    start_from(model, path, sha256)
    save_file({"weight": torch.full((2, 2), 7.0), "bias": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=f"expected SHA-256 {sha256}"):
        start_from(model, path, sha256)
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_an_artifact_that_was_altered_after_it_was_verified_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"altered")
    live = RehearsedRelease(
        folder=str(tmp_path), formats={"onnx": "model.onnx"}, inputs=[], outputs=[], files={"model.onnx": "0" * 64}
    )
    request = RehearseRequest(
        candidate=live, live=live, validation=None, moved=None, metrics=(), forbidden_modules=(), forbidden_folder="",
        threads=1,
    )  # fmt: skip
    loaded: list[str] = []
    monkeypatch.setattr(rehearse, "load_artifact", lambda kind, *_: loaded.append(kind))
    problem = rehearse._score_live(request, {"target": torch.zeros(1)}, 1, 0, {}, {})
    assert problem.startswith("it is broken: ") and f"expected SHA-256 {'0' * 64}" in problem and loaded == []
    with pytest.raises(RuntimeError, match=r"model\.onnx: expected SHA-256"):
        require_hashes(tmp_path, live.files)
