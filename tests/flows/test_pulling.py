"""What the flow shipped, as a serving machine gets it."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.fixture_types import Ship
from tests.support.processes import Ended
from tests.support.projects import write_project
from tests.support.signing_keys import key_pair
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import fetch_release, read_manifest
from train_and_ship.registry.bucket.signing import load_public_key, require_signature
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.release.archives import require_sound
from train_and_ship.registry.release.pickles import TORCHSCRIPT_ENTRIES, find_pickle


@pytest.fixture
def live_digits(digits: Ended, store: ObjectStore) -> Pointer:
    """The pointer of the digits example."""
    pointer = read_pointer(Channel(store, "digits", "prod"))
    assert pointer is not None
    return pointer


def test_no_file_of_a_release_is_a_pickle_and_torchs_own_archives_name_nothing_but_tensors(
    live_digits: Pointer, store: ObjectStore, tmp_path: Path
) -> None:
    manifest = fetch_release(store, "digits", live_digits.release, tmp_path / "release")
    kinds = {path: kind for kind, path in manifest.formats.items()}
    for name in manifest.files:
        assert find_pickle(tmp_path / "release" / name, kinds.get(name)) is None
    require_sound(tmp_path / "release", manifest)
    with zipfile.ZipFile(tmp_path / "release" / "model.torchscript") as archive:
        pickled = [archive.read(name) for name in archive.namelist() if name.endswith(TORCHSCRIPT_ENTRIES)]
    named = {str(arg) for data in pickled for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
    assert not any(op.name == "STACK_GLOBAL" for data in pickled for op, _, _ in pickletools.genops(data))
    tensors = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch.jit._pickle build_intlist"}
    assert {name for name in named - tensors if not re.match(r"__torch__\.|torch \w+Storage$", name)} == set()
    with zipfile.ZipFile(tmp_path / "release" / "model.pt2") as archive:
        (sample,) = [name for name in archive.namelist() if name.endswith("/sample_inputs/model.pt")]
        torch.load(io.BytesIO(archive.read(sample)), weights_only=True)
        configurations = [archive.read(name) for name in archive.namelist() if name.endswith("_config.json")]
    assert configurations and not any(b'"use_pickle":true' in text.replace(b" ", b"") for text in configurations)


def test_ship_pull_brings_what_is_live_and_says_where(live_digits: Pointer, ship: Ship, tmp_path: Path) -> None:
    ended = ship("pull", "digits", "--to", str(tmp_path / "digits"))
    assert ended.status == 0, ended.text
    assert re.match(r"digits prod: generation \d+, release [0-9a-f]{20}\n +/.*/digits/current\n", ended.output)
    assert (tmp_path / "digits" / "current" / "model.onnx").is_file()
    ended = ship("pull", "digits", "--channel", "canary", "--to", str(tmp_path / "canary"))
    assert ended.status == 1 and "nothing is live on canary" in ended.errors and "Traceback" not in ended.text
    ended = ship("pull", "digits", "--to", str(tmp_path / "digits"), SHIP_PUBLIC_KEY="/none.pub")
    assert ended.status == 2 and "expected a public key in PEM" in ended.errors


def test_a_release_is_signed_later_and_then_required_to_be(
    live_digits: Pointer, ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    key = key_pair(tmp_path)
    public = {"SHIP_PUBLIC_KEY": str(key.with_suffix(".pub"))}
    pull = ("pull", "digits", "--to", str(tmp_path / "digits"))
    assert ship(*pull).status == 0
    ended = ship(*pull, **public)
    assert ended.status == 1 and "expected a signature by key" in ended.errors
    sign = ("sign", "digits", live_digits.release)
    ended = ship(*sign)
    assert ended.status == 2 and "expected SHIP_SIGNING_KEY" in ended.errors
    ended = ship(*sign, SHIP_SIGNING_KEY=str(key))
    assert ended.status == 0 and "MANIFEST." in ended.output, ended.text
    assert ship(*pull, **public).status == 0


QUICK = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "export": {"formats": ["torchscript"]}}


def test_a_run_with_a_key_ships_a_signed_release_and_one_with_a_bad_key_does_not_begin(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    job, key = write_project(tmp_path, **QUICK, name="signed"), key_pair(tmp_path)
    ended = ship("run", str(job), SHIP_SIGNING_KEY=str(tmp_path / "none.pem"))
    assert ended.status == 2 and "expected a private key in PEM" in ended.errors and "epoch" not in ended.text
    ended = ship("run", str(job), SHIP_SIGNING_KEY=str(key))
    assert ended.status == 0, ended.text
    pointer = read_pointer(Channel(store, "signed", "prod"))
    assert pointer is not None
    manifest = read_manifest(store, "signed", pointer.release)
    require_signature(store, manifest, load_public_key(key.with_suffix(".pub")))
