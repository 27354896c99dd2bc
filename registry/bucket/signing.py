"""Signatures of releases by a key of your own, in the format of OpenSSF Model Signing.

    models/<model>/releases/<release>/MANIFEST.<key>.sig.json

A signature covers MANIFEST.json and every file. It is written before the manifest, so a release that is complete has
it. Each key has an object of its own: a second key signs beside the first, which is how keys are changed. Nothing here
needs a network besides the bucket.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import shipreader.signatures as signatures
from shipreader.errors import ReaderError, RefusedError
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, SettingsError
from train_and_ship.infra.job_environment import SIGNING_PASSWORD
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.private import signing_password
from train_and_ship.registry.bucket.keys import release_prefix
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.release.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_log = logging.getLogger(__name__)

SIGNATURE = "signature"
"""What the record of a move calls it where a required one was there."""


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """Raises SettingsError for anything but an elliptic curve key in PEM, and for a wrong password."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), signing_password().encode() or None)
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(
            f"SHIP_SIGNING_KEY: expected a private key in PEM at {path}, got {type(error).__name__}: {error}; "
            f"{SIGNING_PASSWORD} is its password"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in signatures.CURVES:
        raise SettingsError(
            f"SHIP_SIGNING_KEY: {path}: expected a P-256, P-384 or P-521 key, got {type(key).__name__}; make one with "
            "`openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem`"
        )
    return key


def load_public_key(path: Path) -> EllipticCurvePublicKey:
    """Raises SettingsError for anything but an elliptic curve key in PEM."""
    try:
        return signatures.load_keys([path])[0]
    except ReaderError as error:
        raise SettingsError(str(error)) from None


def sign(manifest: Manifest, private_key: Path) -> bytes:
    """A key's signature of a release: the bundle. Raises SettingsError when the key cannot be used."""
    return sign_digests(manifest.model, _signed(manifest).digests, private_key)


def sign_digests(subject: str, digests: Mapping[str, str], private_key: Path) -> bytes:
    """A key's signature of files. Raises SettingsError when the key cannot be used.

    Args:
        subject: what they make: the name of a model.
        digests: file to hexadecimal SHA-256.
        private_key: file in PEM.
    """
    key = load_private_key(private_key)
    root = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))).hexdigest()
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": subject, "digest": {"sha256": root}}],
        "predicateType": signatures.PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
            "resources": [{"name": n, "algorithm": "sha256", "digest": digests[n]} for n in sorted(digests)],
        },
    }
    payload = canonical_json(statement)
    signature = key.sign(signatures.covered(payload), signatures.algorithm(key.public_key()))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": signatures.key_id(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": signatures.PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return canonical_json(bundle)


def publish_signature(store: ObjectStore, manifest: Manifest, private_key: Path) -> str:
    """Sign a release and bring the signature into the bucket; its key. Writes; can be repeated.

    A signature that lies there and does not hold is replaced. Raises SettingsError when the key cannot be used, and
    ReleaseError when what lies there at the end does not hold.
    """
    public_key = load_private_key(private_key).public_key()
    key = signature_key(manifest, public_key)
    # No two signatures of this kind are alike: one that is there is checked, not compared.
    # Listed, and not asked for: of what its writer has hidden there, only a listing tells the version.
    there = store.list_objects(key, until=key).get(key)
    if there is not None:
        try:
            require_signature(store, manifest, public_key)
            return key
        except (ReleaseError, SettingsError) as error:
            # The name is of this key, whose signature it is not: whoever publishes could keep its owner from signing.
            _log.warning("signed again: %s", error)
    with contextlib.suppress(PreconditionFailedError):
        signature = sign(manifest, private_key)
        if there is None:
            store.put_new(key, signature)
        else:
            store.replace(key, signature, there.etag)
    require_signature(store, manifest, public_key)
    return key


def require_signature(store: ObjectStore, manifest: Manifest, public_key: EllipticCurvePublicKey) -> None:
    """Raises ReleaseError unless the release in the bucket carries this key's signature. Reads only."""
    key = signature_key(manifest, public_key)
    found = store.get(key, signatures.largest(manifest.encode()))
    if found is None:
        raise ReleaseError(
            f"{key}: expected a signature by key {signatures.key_id(public_key)}, got none: "
            "the release was published without SHIP_SIGNING_KEY, or with another key"
        )
    try:
        signatures.require_signed(found[0], _signed(manifest), public_key, key)
    except RefusedError as error:
        raise ReleaseError(str(error)) from None


def require_signer(store: ObjectStore, manifest: Manifest, public_key: Path | None) -> dict[str, str]:
    """Before a channel moves to a release: where a key is required, its signature has to be there and hold.

    public_key: file in PEM, or None where no signature is required. Returns what was found, for the record of the move.
    Raises SettingsError when the key cannot be used, and ReleaseError when the release is not signed by it.
    """
    if public_key is None:
        return {}
    key = load_public_key(public_key)
    try:
        require_signature(store, manifest, key)
    except ReleaseError as error:
        raise ReleaseError(
            f"{manifest.model}: release {manifest.release} does not go live: {error}. SHIP_PUBLIC_KEY={public_key} "
            f"requires it; whoever has the private key signs with `ship sign {manifest.model} {manifest.release}`"
        ) from None
    return {SIGNATURE: f"by key {signatures.key_id(key)[:16]}"}


def require_usable_keys(signing_key: Path | None, public_key: Path | None) -> None:
    """Before a run that publishes: what it would sign must satisfy what is required of a release that goes live.

    Raises SettingsError for a key that cannot be used, and when no release of this run could be promoted.
    """
    private = load_private_key(signing_key) if signing_key is not None else None
    if public_key is None:
        return
    required = load_public_key(public_key)
    if private is None:
        raise SettingsError(
            f"SHIP_PUBLIC_KEY={public_key} requires releases to be signed, and SHIP_SIGNING_KEY is not set: nothing "
            "that this run publishes could go live. Set it to the private key, or leave SHIP_PUBLIC_KEY out"
        )
    if signatures.key_id(private.public_key()) != signatures.key_id(required):
        raise SettingsError(
            f"SHIP_SIGNING_KEY={signing_key} is not the private half of SHIP_PUBLIC_KEY={public_key}: nothing that "
            "this run signs could go live"
        )


def signature_key(manifest: Manifest, public_key: EllipticCurvePublicKey) -> str:
    """Where a key's signature of a release lies."""
    return release_prefix(manifest.model, manifest.release) + signatures.file_name(public_key)


def _signed(manifest: Manifest) -> signatures.Signed:
    digests = {name: entry.sha256 for name, entry in manifest.files.items()}
    return signatures.Signed(manifest.model, {**digests, MANIFEST: manifest.sha256()})
