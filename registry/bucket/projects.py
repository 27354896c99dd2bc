"""Projects that were deployed, in the bucket. Whoever runs one checks its hash, and its signature where a key is set.

models/<model>/projects/<sha256>/project.tar.gz
models/<model>/projects/<sha256>/<key>.sig.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import shipreader.signatures as signatures
from shipreader.errors import RefusedError
from shipreader.records import NAME, require_sparse
from train_and_ship.infra.errors import JobError, PreconditionFailedError, ReleaseError, SettingsError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.project_archive import MOST_BYTES, TREE, is_complete, mark, read_about, sha256_of, unpack
from train_and_ship.infra.rundir import file_sha256
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.keys import projects_prefix
from train_and_ship.registry.bucket.signing import load_private_key, load_public_key, sign_digests

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

ARCHIVE = "project.tar.gz"
SCHEME = "project:"
_SIGNATURE = re.compile(r"MANIFEST\.(?P<key>[0-9a-f]{16})\.sig\.json")
"""Name of a signature, by the begin of its key's id."""
_log = logging.getLogger(__name__)
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

    What lies under their names and is neither is written over: nobody could run it, and it kept others from deploying.

    Args:
        store: the bucket.
        model: whose project.
        job: the job file, relative to the tree.
        archive: its bytes.
        signing_key: private key in PEM; None leaves it unsigned.

    Raises:
        SettingsError: the key cannot be used.
        ReleaseError: what lies there afterwards is something else again.
    """
    reference = Reference(model, sha256_of(archive), job)
    if signing_key is not None:
        _sign(store, reference, signing_key)
    try:
        store.put_new(reference.key, archive)
    except PreconditionFailedError:
        if why := _altered(store, reference.key, reference.sha256):
            _log.warning("written again: %s", why)
            store.put(reference.key, archive)
            if why := _altered(store, reference.key, reference.sha256):
                raise ReleaseError(f"{why}, right after it was written: somebody else writes there") from None
    return reference


def broken_projects(store: ObjectStore, model: str, public_key: Path | None) -> Iterator[str]:
    """What lies among the deployed projects of a model and is none, or not what its name says: one line a kind.

    Archives are read back, the newest first, MOST_BYTES in all. Reads only.

    Args:
        store: the bucket.
        model: whose projects.
        public_key: whose signatures have to hold; of others, and without one, only what they say of their key is asked.
    """
    prefix = projects_prefix(model)
    key = load_public_key(public_key) if public_key is not None else None
    archives: list[str] = []
    signed: list[str] = []
    stray: list[str] = []
    unread, left = 0, MOST_BYTES
    listed = store.list_objects(prefix)
    for name, item in sorted(listed.items(), key=lambda one: one[1].modified, reverse=True):
        sha256, _, file = name.removeprefix(prefix).partition("/")
        found = _SIGNATURE.fullmatch(file)
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not (file == ARCHIVE or found):
            # Consoles make an empty object of a folder.
            if item.bytes or not name.endswith("/"):
                stray.append(name)
        elif found:
            reference = Reference(model, sha256, "")
            if key is not None and file == signatures.file_name(key):
                why = _unsigned(store, reference, key)
            else:
                why = _no_signature(store, name, found["key"])
            signed += [why] if why else []
        elif item.bytes > left and item.bytes <= MOST_BYTES:
            unread += 1
        else:
            left -= min(item.bytes, left)
            why = _altered(store, name, sha256) if item.bytes <= MOST_BYTES else f"{name}: {item.bytes:,} bytes"
            archives += [why] if why else []
    for what, whys, do in (
        ("deployed projects that no worker runs, because they are not what their name says", archives,
         "`ship deploy` of the same files writes one over; whoever has the role gc may delete it"),
        ("signatures of deployed projects that are none", signed,
         "`ship deploy` by the owner of the key writes one over; whoever has the role gc may delete it"),
        ("objects among deployed projects that train-and-ship does not write", stray,
         "nothing reads them: whoever has the role gc may delete them"),
    ):  # fmt: skip
        if whys:
            yield f"{model}: {what}: {len(whys):,}, first {on_one_line(whys[0])}; {do}"
    if unread:
        yield (
            f"{model}: {unread:,} deployed projects were not read back, because the newer ones have "
            f"{MOST_BYTES / 1e9:.0f} GB together; delete those that no deployment names"
        )


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
    hold(folder)
    if not _is_sound(folder):
        make_folder(folder.parent)
        # Two runs may bring it at once: the first to end has it.
        work = folder.with_name(f".{uuid.uuid4().hex}")
        work.mkdir(mode=0o700)
        try:
            _fetch(store, reference, work)
            mark(work)
            if folder.exists() and not _is_sound(folder):
                # What has become of it is nobody's to keep.
                folder.rename(work.with_name(f"{work.name}.damaged"))
            with contextlib.suppress(OSError):
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(work.with_name(f"{work.name}.damaged"), ignore_errors=True)
    # By which the janitor knows what is used.
    os.utime(folder)
    about = read_about(folder)
    if (about.model, about.job) != (reference.model, reference.job):
        raise JobError(f"job: expected {about.job} of model {about.model} in that archive, got {reference}")
    return folder / TREE / reference.job


def _is_sound(folder: Path) -> bool:
    try:
        return is_complete(folder) and bool(read_about(folder))
    except JobError:
        return False


def _fetch(store: ObjectStore, reference: Reference, work: Path) -> None:
    packed = work / ARCHIVE
    try:
        found_there = store.download_file(reference.key, packed, most=MOST_BYTES)
    except ReleaseError as error:
        raise JobError(f"{error}; `ship deploy` again writes it over") from None
    if not found_there:
        raise JobError(f"job: expected {reference.key} in the bucket {store.bucket}, found none; `ship deploy` again")
    if (found := file_sha256(packed)) != reference.sha256:
        raise JobError(
            f"{reference.key}: expected the hash {reference.sha256}, got {found}: it was changed; `ship deploy` again"
        )
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
        if why := _unsigned(store, reference, key):
            _log.warning("signed again: %s", why)
            store.put(where, bundle)
            if why := _unsigned(store, reference, key):
                raise ReleaseError(f"{why}, right after it was signed: somebody else writes there") from None


def _require_signed(store: ObjectStore, reference: Reference, public_key: Path) -> None:
    if why := _unsigned(store, reference, load_public_key(public_key)):
        raise JobError(f"{why}; SHIP_PUBLIC_KEY={public_key} asks for it; `ship deploy` with SHIP_SIGNING_KEY signs")


def _unsigned(store: ObjectStore, reference: Reference, key: EllipticCurvePublicKey) -> str:
    """Why an archive has no signature by this key; empty where it has one."""
    where = _signature_key(reference, signatures.file_name(key))
    try:
        found = store.get(where, signatures.largest(b""))
        if found is None:
            return f"{reference.key}: expected a signature by key {signatures.key_id(key)[:16]}, found none"
        signatures.require_signed(found[0], reference.signed(), key, where)
    except (RefusedError, ReleaseError, SettingsError) as error:
        # One object may be forbidden, or such that no request can read it.
        return str(error)
    return ""


def _no_signature(store: ObjectStore, where: str, begin: str) -> str:
    """Why an object is no signature by the key whose id begins so, as far as it says so itself; empty for one."""
    try:
        if (found := store.get(where, signatures.largest(b""))) is None:
            return ""
        require_sparse(found[0])
        hint = json.loads(found[0])["verificationMaterial"]["publicKey"]["hint"]
        if isinstance(hint, str) and hint[: len(begin)] == begin:
            return ""
        return f"{where}: expected a signature by key {begin}, got one by key {str(hint)[:80]!r}"
    except (ReleaseError, SettingsError) as error:
        return str(error)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{where}: expected a signature bundle, got {type(error).__name__}"


def _altered(store: ObjectStore, key: str, sha256: str) -> str:
    """Why an object is not the archive of that hash; empty for one that is, and for one that is gone."""
    try:
        found = store.hash(key, MOST_BYTES)
    except (ReleaseError, SettingsError) as error:
        return str(error)
    if found is None or found[0] == sha256:
        return ""
    return f"{key}: expected the archive of that hash, found one of {found[0]}"


def _signature_key(reference: Reference, name: str) -> str:
    return f"{projects_prefix(reference.model)}{reference.sha256}/{name}"
