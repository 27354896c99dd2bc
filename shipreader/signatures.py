"""Signatures of releases, in the format of OpenSSF Model Signing 1.0, held against public keys.

A signature is a Sigstore bundle: a DSSE envelope around an in-toto statement that names every file by SHA-256. It is
made and checked with `cryptography` alone, so that a serving machine stays small. The command `model_signing verify
key` of OpenSSF accepts the same signature for the same folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shipreader.errors import ReaderError, RefusedError
from shipreader.records import require_sparse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey

SIGNATURE_BYTES = 64 * 2**20
"""Longer ones are not read, of any release."""


def largest(manifest: bytes) -> int:
    """Bytes that the signature of a release has at most. manifest: as it is encoded, with the same names and hashes."""
    # Its text is base64 within JSON, and within that a letter may be written in six.
    return min(SIGNATURE_BYTES, 2**18 + 8 * len(manifest))


@dataclass(frozen=True)
class Signed:
    """What a signature has to be of."""

    model: str
    digests: Mapping[str, str]
    """Hexadecimal SHA-256 of every file by its path, MANIFEST.json among them."""


PAYLOAD = "application/vnd.in-toto+json"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
PREDICATE = "https://model_signing/signature/v1.0"


def load_keys(paths: Iterable[str | Path]) -> list[EllipticCurvePublicKey]:
    """Public keys from PEM files. Raises ReaderError for anything else than a P-256, P-384 or P-521 public key."""
    keys: list[EllipticCurvePublicKey] = []
    for path in paths:
        try:
            from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key
        except ImportError:
            needs = "checking signatures needs a package: pip install 'cryptography>=42'"
            raise ReaderError(needs) from None
        try:
            key = load_pem_public_key(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ReaderError(f"{path}: expected a public key in PEM, got {error}") from None
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
            raise ReaderError(
                f"{path}: expected an elliptic curve key (P-256, P-384 or P-521), got {type(key).__name__}"
            )
        keys.append(key)
    return keys


def key_id(key: EllipticCurvePublicKey) -> str:
    """The hint by which a bundle names its key: hexadecimal SHA-256 of the public key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def file_name(key: EllipticCurvePublicKey) -> str:
    """The key's signature beside the manifest. Named by the key: no listing, and keys can be changed one by one."""
    return f"MANIFEST.{key_id(key)[:16]}.sig.json"


def covered(payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding of the payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def algorithm(key: EllipticCurvePublicKey) -> ECDSA:
    """ECDSA with the hash that Model Signing takes for the key's curve."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA({256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size])


def require_signed_by_any(bundle: bytes, release: Signed, keys: Sequence[EllipticCurvePublicKey], where: str) -> None:
    """As `require_signed`, by at least one of the keys.

    Args:
        bundle: the signature, as it lies in the bucket.
        release: what it has to be of.
        keys: public ones.
        where: what messages call the bundle.
    """
    for number, key in enumerate(keys, 1):
        try:
            require_signed(bundle, release, key, where)
            return
        except RefusedError:
            if number == len(keys):
                raise


def require_signed(bundle: bytes, release: Signed, key: EllipticCurvePublicKey, where: str) -> None:
    """Check that a bundle is the key's signature of exactly this release.

    Args:
        bundle: the signature, as it lies in the bucket.
        release: what it has to be of.
        key: the public one.
        where: what messages call the bundle.

    Raises:
        RefusedError: it is not.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        require_sparse(bundle)
        document = json.loads(bundle)
        hint = document["verificationMaterial"]["publicKey"]["hint"]
        envelope = document["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (entry,) = envelope["signatures"]
        signature = base64.b64decode(entry["sig"], validate=True)
        kind = envelope["payloadType"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"{where}: expected a signature bundle, got {type(error).__name__}: {error}") from None
    if hint != key_id(key):
        raise RefusedError(f"{where}: expected a signature by key {key_id(key)}, got one by key {str(hint)[:80]!r}")
    try:
        key.verify(signature, covered(payload), algorithm(key))
    except InvalidSignature:
        raise RefusedError(f"{where}: the signature does not hold: it, or what it signs, was altered") from None
    if kind != PAYLOAD:
        raise RefusedError(f"{where}: expected a payload of {PAYLOAD}, got {str(kind)[:80]!r}")
    _require_statement(json.loads(payload), release, where)


def _require_statement(statement: Any, release: Signed, where: str) -> None:
    """What was signed, with a good signature, is this release and not another."""
    try:
        predicate = statement["predicateType"]
        (subject,) = statement["subject"]
        resources = statement["predicate"]["resources"]
        named = {item["name"]: item["digest"] for item in resources if item["algorithm"] == "sha256"}
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{where}: expected a model signature, got {type(error).__name__}: {error}") from None
    if predicate != PREDICATE or len(named) != len(resources):
        raise RefusedError(f"{where}: expected {PREDICATE} with SHA-256 digests, got {str(predicate)[:80]!r}")
    if subject["name"] != release.model:
        raise RefusedError(
            f"{where}: expected a signature of model {release.model}, got one of {str(subject['name'])[:80]!r}"
        )
    expected = release.digests
    if named != expected:
        other = sorted(name for name in named.keys() | expected.keys() if named.get(name) != expected.get(name))
        raise RefusedError(
            f"{where}: expected a signature of this release, got one of another: {', '.join(other[:5])} differ"
        )
