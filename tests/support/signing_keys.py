"""Key pairs that sign releases, as files."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def key_pair(folder: Path, name: str = "key", curve: ec.EllipticCurve | None = None, password: str = "") -> Path:
    """A private key in PEM; its public half lies beside it with the ending .pub."""
    return write_key(folder / f"{name}.pem", ec.generate_private_key(curve or ec.SECP256R1()), password)


def write_key(path: Path, key: PrivateKeyTypes, password: str = "") -> Path:
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path
