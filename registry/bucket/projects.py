"""Projects that were deployed, in the bucket. Whoever runs one checks its hash, and its signature where a key is set.

models/<model>/projects/<sha256>/project.tar.gz
models/<model>/projects/<sha256>/<key>.sig.json
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import shipreader.signatures as signatures
from shipreader.errors import RefusedError
from shipreader.records import NAME
from train_and_ship.infra.errors import JobError, PreconditionFailedError, ReleaseError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.project_archive import MOST_BYTES, TREE, is_complete, mark, read_about, sha256_of, unpack
from train_and_ship.infra.rundir import file_sha256
from train_and_ship.registry.bucket.keys import projects_prefix
from train_and_ship.registry.bucket.signing import load_private_key, load_public_key, sign_digests

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

ARCHIVE = "project.tar.gz"
SCHEME = "project:"
_REFERENCE = re.compile(rf"{SCHEME}(?P<model>{NAME.pattern})/(?P<sha256>[0-9a-f]{{64}})/(?P<job>.+)", re.DOTALL)


@dataclass(frozen=True)
class Reference:
    """What a deployment says in place of a path: `project:<model>/<sha256>/<job file>`."""

    model: str
    sha256: str
    """Of the archive, hexadecimal."""
    job: str
    """Relative to the tree."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is a path. Raises JobError for what begins as a reference and is none."""
        if not text.startswith(SCHEME):
            return None
        if (found := _REFERENCE.fullmatch(text)) is None:
            raise JobError(f"job: expected {SCHEME}MODEL/SHA256/JOB FILE, as `ship deploy` writes it, got {text!r}")
        return cls(found["model"], found["sha256"], found["job"])

    def __str__(self) -> str:
        return f"{SCHEME}{self.model}/{self.sha256}/{self.job}"

    @property
    def key(self) -> str:
        """Of the archive."""
        return f"{projects_prefix(self.model)}{self.sha256}/{ARCHIVE}"

    def signed(self) -> signatures.Signed:
        """What a signature of it covers."""
        return signatures.Signed(self.model, {ARCHIVE: self.sha256})

    def folder(self, home: Path) -> Path:
        """Where it is unpacked."""
        return home / "projects" / self.sha256


def publish_project(store: ObjectStore, model: str, job: str, archive: bytes, signing_key: Path | None) -> Reference:
    """Bring an archive into the bucket, where it is not there, and its signature.

    Args:
        store: the bucket.
        model: whose project.
        job: the job file, relative to the tree.
        archive: its bytes.
        signing_key: private key in PEM; None leaves it unsigned.

    Raises:
        SettingsError: the key cannot be used.
        ReleaseError: something else lies under its name.
    """
    reference = Reference(model, sha256_of(archive), job)
    if signing_key is not None:
        _sign(store, reference, signing_key)
    try:
        store.put_new(reference.key, archive)
    except PreconditionFailedError:
        if store.hash(reference.key, MOST_BYTES) != (reference.sha256, len(archive)):
            raise ReleaseError(
                f"{reference.key}: expected the archive of that hash, found something else; delete it"
            ) from None
    return reference


def bring_project(store: ObjectStore, reference: Reference, home: Path, public_key: Path | None) -> Path:
    """The job file of a deployed project, unpacked on this machine once.

    Args:
        store: the bucket.
        reference: which.
        home: of this machine's state.
        public_key: whose signature it has to have; None asks for none.

    Raises:
        JobError: it is not there, is another, or carries no such signature.
    """
    if public_key is not None:
        _require_signed(store, reference, public_key)
    folder = reference.folder(home)
    if not is_complete(folder):
        make_folder(folder.parent)
        # Two runs may bring it at once: the first to end has it.
        work = folder.with_name(f".{uuid.uuid4().hex}")
        work.mkdir(mode=0o700)
        try:
            _fetch(store, reference, work)
            mark(work)
            with contextlib.suppress(OSError):
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    # By which the janitor knows what is used.
    os.utime(folder)
    about = read_about(folder)
    if (about.model, about.job) != (reference.model, reference.job):
        raise JobError(f"job: expected {about.job} of model {about.model} in that archive, got {reference}")
    return folder / TREE / reference.job


def _fetch(store: ObjectStore, reference: Reference, work: Path) -> None:
    packed = work / ARCHIVE
    if not store.download_file(reference.key, packed, most=MOST_BYTES):
        raise JobError(f"job: expected {reference.key} in the bucket {store.bucket}, found none; `ship deploy` again")
    if (found := file_sha256(packed)) != reference.sha256:
        raise JobError(f"{reference.key}: expected the hash {reference.sha256}, got {found}: it was changed")
    unpack(packed, work)
    packed.unlink()


def _sign(store: ObjectStore, reference: Reference, private_key: Path) -> None:
    key = load_private_key(private_key).public_key()
    where = _signature_key(reference, signatures.file_name(key))
    bundle = sign_digests(reference.model, reference.signed().digests, private_key)
    try:
        store.put_new(where, bundle)
    except PreconditionFailedError:
        # No two signatures are alike. What is none lies there of somebody who would keep this key from signing.
        if _unsigned(store, reference, key):
            store.put(where, bundle)


def _require_signed(store: ObjectStore, reference: Reference, public_key: Path) -> None:
    if why := _unsigned(store, reference, load_public_key(public_key)):
        raise JobError(f"{why}; SHIP_PUBLIC_KEY={public_key} asks for it; `ship deploy` with SHIP_SIGNING_KEY signs")


def _unsigned(store: ObjectStore, reference: Reference, key: EllipticCurvePublicKey) -> str:
    """Why an archive has no signature by this key; empty where it has one."""
    where = _signature_key(reference, signatures.file_name(key))
    found = store.get(where, signatures.largest(b""))
    if found is None:
        return f"{reference.key}: expected a signature by key {signatures.key_id(key)[:16]}, found none"
    try:
        signatures.require_signed(found[0], reference.signed(), key, where)
    except RefusedError as error:
        return str(error)
    return ""


def _signature_key(reference: Reference, name: str) -> str:
    return f"{projects_prefix(reference.model)}{reference.sha256}/{name}"
