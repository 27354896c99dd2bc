"""Signed releases: who may use what when a key is required, and what is found when something was altered."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from shipreader.errors import ReaderError, RefusedError
from shipreader.reader import Reader
from tests.support.fixture_types import Ship
from tests.support.releases import CHANNEL, MODEL, make_release, move, replace_object
from tests.support.signing_keys import key_pair, write_key
from tests.support.tool_environments import tool_python
from train_and_ship.infra.errors import ReleaseError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.signing import (
    load_public_key,
    publish_signature,
    require_signature,
    require_signer,
    require_usable_keys,
    sign,
    signature_key,
)
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.release.manifest import MANIFEST, Manifest

# A first run installs model-signing into an environment of its own.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_pair(tmp_path)


MakeReader = Callable[..., Reader]


@pytest.fixture
def make_reader(object_store: ObjectStore, tmp_path: Path) -> MakeReader:
    def make(*public_keys: Path, folder: Path = tmp_path / "served") -> Reader:
        client = s3_client(Settings.load())
        options: dict[str, Any] = {"bucket": object_store.bucket, "channel": CHANNEL, "client": client}
        return Reader(MODEL, folder=folder, public_keys=public_keys, **options)

    return make


def test_a_signed_release_is_pulled_by_a_reader_that_requires_its_key(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
        key = key_pair(tmp_path, curve.name, curve)
        public = key.with_suffix(".pub")
        publish(object_store, tmp_path / "release", manifest, signing_key=key)
        move(object_store, manifest)
        assert make_reader(public, folder=tmp_path / f"{curve.name}-served").pull().id == manifest.release
        # Again, from the folder alone.
        assert make_reader(public, folder=tmp_path / f"{curve.name}-served").pull().id == manifest.release
        require_signature(object_store, manifest, load_public_key(public))


def test_the_tool_of_openssf_verifies_what_a_reader_has(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    # It needs pyOpenSSL without saying so.
    tool = tool_python("model-signing==1.1.1", "pyOpenSSL==26.4.0")
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    move(object_store, manifest)
    release = make_reader(key.with_suffix(".pub")).pull()
    signature = release.folder.with_name(f"{release.id}.sig.json")
    # The folder's name is not held against the signature's: the reader names folders by release.
    argv = [str(tool), "-m", "model_signing", "verify", "key", str(release.folder)]
    argv += ["--signature", str(signature), "--public_key", str(key.with_suffix(".pub"))]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (release.folder / "file0.bin").write_bytes(b"x")
    assert subprocess.run(argv, capture_output=True).returncode != 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="this machine has no openssl command")
def test_keys_made_by_openssl_work(object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    # As docs/trust.md says.
    make = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(key)]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout", "-out", str(public)], check=True)
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    move(object_store, manifest)
    assert make_reader(public).pull().id == manifest.release


def test_an_encrypted_key_needs_its_password(key: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked = key_pair(tmp_path, "locked", password="open sesame")
    manifest = make_release(tmp_path / "release")
    monkeypatch.setenv("SHIP_SIGNING_KEY_PASSWORD", "open sesame")
    sign(manifest, locked)
    for wrong in ("", "guess"):
        monkeypatch.setenv("SHIP_SIGNING_KEY_PASSWORD", wrong)
        with pytest.raises(SettingsError, match=r"SHIP_SIGNING_KEY: expected a private key.*locked\.pem") as caught:
            sign(manifest, locked)
        assert "sesame" not in str(caught.value)


def test_a_reader_that_requires_a_key_refuses_an_unsigned_release_before_any_file_is_sent(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest)
    move(object_store, manifest)
    with pytest.raises(
        RefusedError, match=r"expected a signature by key [0-9a-f]{64}, got none: published without a key"
    ):
        make_reader(key.with_suffix(".pub")).pull()
    assert list((tmp_path / "served" / "releases").iterdir()) == []
    with pytest.raises(ReleaseError, match="got none"):
        require_signature(object_store, manifest, load_public_key(key.with_suffix(".pub")))
    # Who requires none takes it, and then it still does not do for one who does.
    make_reader().pull()
    with pytest.raises(RefusedError, match="got none"):
        make_reader(key.with_suffix(".pub")).pull()
    assert make_reader(key.with_suffix(".pub")).current is None
    # Signed later.
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    assert make_reader(key.with_suffix(".pub")).pull().id == manifest.release


def test_a_signature_by_another_key_is_refused(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    thief = key_pair(tmp_path, "thief")
    publish(object_store, tmp_path / "release", manifest, signing_key=thief)
    move(object_store, manifest)
    reader = make_reader(key.with_suffix(".pub"))
    with pytest.raises(RefusedError, match="got none: published without a key, or with another one"):
        reader.pull()
    # Even under the name of the right one.
    bundle = sign(manifest, thief)
    public = load_public_key(key.with_suffix(".pub"))
    object_store.put_new(signature_key(manifest, public), bundle)
    with pytest.raises(RefusedError, match="expected a signature by key"):
        reader.pull()
    # And with the right key's name inside.
    document = json.loads(bundle)
    good = sign(manifest, key)
    document["verificationMaterial"] = json.loads(good)["verificationMaterial"]
    replace_object(object_store, signature_key(manifest, public), json.dumps(document).encode())
    with pytest.raises(RefusedError, match="the signature does not hold"):
        reader.pull()


def forge(bundle: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The bundle with another statement under the old signature."""
    document = json.loads(bundle)
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(statement)
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(document).encode()


def rename_model(statement: dict[str, Any]) -> None:
    statement["subject"][0]["name"] = "other"


def test_an_altered_signature_is_refused(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    move(object_store, manifest)
    place = signature_key(manifest, load_public_key(key.with_suffix(".pub")))
    good = sign(manifest, key)
    for altered, reason in (
        (forge(good, rename_model), "does not hold"),
        (good.replace(b'"sig":"M', b'"sig":"N'), "does not hold"),
        (b"", "expected a signature bundle"),
        (b"{}", "expected a signature bundle"),
        (b"[" * 100_000, "expected a signature bundle"),
        (good[:-20], "expected a signature bundle"),
    ):
        assert altered != good
        replace_object(object_store, place, altered)
        with pytest.raises(RefusedError, match=reason):
            make_reader(key.with_suffix(".pub")).pull()
        with pytest.raises(ReleaseError, match=reason):
            require_signature(object_store, manifest, load_public_key(key.with_suffix(".pub")))
    # Whoever has the key puts it right.
    publish_signature(object_store, manifest, key)
    assert make_reader(key.with_suffix(".pub")).pull().id == manifest.release


def test_a_good_signature_of_another_release_or_model_is_refused(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    manifest, other = make_release(tmp_path / "release"), make_release(tmp_path / "other", seed=1)
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    move(object_store, manifest)
    place = signature_key(manifest, load_public_key(key.with_suffix(".pub")))
    of_other = sign(other, key)
    replace_object(object_store, place, of_other)
    with pytest.raises(RefusedError, match=r"got one of another: MANIFEST\.json, file0\.bin.* differ"):
        make_reader(key.with_suffix(".pub")).pull()
    renamed = Manifest(**{**vars(manifest), "model": "faces"})
    of_faces = sign(renamed, key)
    replace_object(object_store, place, of_faces)
    with pytest.raises(RefusedError, match="expected a signature of model digits, got one of 'faces'"):
        make_reader(key.with_suffix(".pub")).pull()


def test_a_description_that_was_improved_under_a_good_signature_is_refused(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    """An intruder who may write the bucket moves the channel to the same files with another manifest."""
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    better = Manifest(**{**vars(manifest), "metrics": {"accuracy": 1.0}})
    replace_object(object_store, release_prefix(MODEL, manifest.release) + MANIFEST, better.encode())
    move(object_store, better)
    make_reader(folder=tmp_path / "trusting").pull()
    with pytest.raises(RefusedError, match=r"got one of another: MANIFEST\.json differ"):
        make_reader(key.with_suffix(".pub")).pull()


def test_keys_are_changed_by_signing_with_both(
    object_store: ObjectStore, make_reader: MakeReader, key: Path, tmp_path: Path
) -> None:
    manifest, newer = make_release(tmp_path / "release"), key_pair(tmp_path, "newer")
    for one in (key, newer, newer):
        publish(object_store, tmp_path / "release", manifest, signing_key=one)
    move(object_store, manifest)
    for number, keys in enumerate(([key], [newer], [newer, key])):
        publics = [one.with_suffix(".pub") for one in keys]
        assert make_reader(*publics, folder=tmp_path / str(number)).pull().id == manifest.release
    # A machine that knew the old key alone learns the new one.
    assert make_reader(newer.with_suffix(".pub"), folder=tmp_path / "0").pull().id == manifest.release


def test_keys_of_another_kind_are_named_with_what_to_do(tmp_path: Path, object_store: ObjectStore) -> None:
    manifest = make_release(tmp_path / "release")
    edwards = write_key(tmp_path / "edwards.pem", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(
        SettingsError, match=r"expected a P-256, P-384 or P-521 key, got Ed25519PrivateKey; .*openssl genpkey"
    ):
        publish(object_store, tmp_path / "release", manifest, signing_key=edwards)
    with pytest.raises(SettingsError, match=r"expected a private key in PEM at .*none\.pem"):
        publish(object_store, tmp_path / "release", manifest, signing_key=tmp_path / "none.pem")
    with pytest.raises(ReaderError, match="expected an elliptic curve key"):
        Reader(MODEL, bucket="b", folder=tmp_path, client=object(), public_keys=[edwards.with_suffix(".pub")])
    for wrong in (edwards, tmp_path / "none.pub"):
        with pytest.raises(ReaderError, match="expected a public key in PEM"):
            Reader(MODEL, bucket="b", folder=tmp_path, client=object(), public_keys=[wrong])


# ---- before a channel moves


def test_a_channel_moves_only_to_what_the_required_key_signed(
    object_store: ObjectStore, key: Path, ship: Ship, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = (make_release(tmp_path / str(seed), seed) for seed in (1, 2))
    publish(object_store, tmp_path / "1", first)
    publish(object_store, tmp_path / "2", second, signing_key=key_pair(tmp_path, "other"))
    for manifest in (first, second):
        move(object_store, manifest)
        move(object_store, manifest, channel="staging")
    monkeypatch.setenv("SHIP_PUBLIC_KEY", str(key.with_suffix(".pub")))
    back = ["rollback", MODEL, "--why", "errors"]
    forward = ["promote", MODEL, "--from", "staging~1", "--why", "again", "--no-gates"]
    for words in (back, forward):
        refused = ship(*words)
        assert refused.status == 1 and "Traceback" not in refused.errors
        assert f"release {first.release} does not go live" in refused.errors
        assert (
            "expected a signature by key" in refused.errors and f"`ship sign {MODEL} {first.release}`" in refused.errors
        )
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == second.release

    monkeypatch.setenv("SHIP_SIGNING_KEY", str(key))
    assert ship("sign", MODEL, first.release).status == 0
    assert ship(*back).status == 0
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None and live.release == first.release
    assert live.verdicts["signature"].startswith("by key ")


def test_a_signature_that_does_not_hold_keeps_a_release_from_going_live(
    object_store: ObjectStore, key: Path, tmp_path: Path
) -> None:
    manifest = make_release(tmp_path / "release")
    publish(object_store, tmp_path / "release", manifest, signing_key=key)
    public = key.with_suffix(".pub")
    assert set(require_signer(object_store, manifest, public)) == {"signature"}
    where = signature_key(manifest, load_public_key(public))
    found = object_store.get(where)
    assert found is not None
    bundle = json.loads(found[0])
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(b"x" * 70).decode()
    object_store.replace(where, json.dumps(bundle).encode(), found[1])
    with pytest.raises(ReleaseError, match=r"does not go live: .*\.sig\.json"):
        require_signer(object_store, manifest, public)
    assert require_signer(object_store, manifest, None) == {}


def test_a_run_whose_releases_could_not_go_live_is_not_begun(key: Path, tmp_path: Path) -> None:
    public, other = key.with_suffix(".pub"), key_pair(tmp_path, "other")
    require_usable_keys(None, None)
    require_usable_keys(key, None)
    require_usable_keys(key, public)
    with pytest.raises(SettingsError, match="SHIP_SIGNING_KEY is not set: nothing that this run publishes could go"):
        require_usable_keys(None, public)
    with pytest.raises(SettingsError, match=r"other\.pem is not the private half of SHIP_PUBLIC_KEY=.*key\.pub"):
        require_usable_keys(other, public)
