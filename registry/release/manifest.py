"""What a release is: a folder of files, and a manifest that names every one of them by hash and size.

The release id is a hash of the file table, and the manifest says nothing about when or where it was made: the same
files with the same description give the same bytes, whoever builds them. Nothing here talks to a store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from shipreader.mlserver import rows_together
from shipreader.records import (
    FILES,
    FORMAT,
    LARGEST_FILE,
    MANIFEST_BYTES,
    MOST_FILES,
    MOST_VALUES,
    PICKLE_ENDINGS,
    SHA256,
    FileEntry,
    file_above,
    require_description,
    values_in,
)
from shipreader.records import MANIFEST as MANIFEST
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.identity import RELEASE_ID_DIGITS, canonical_json, is_name, is_release_id, json_object
from train_and_ship.registry.release.files import (
    file_table,
    read_table,
    require_file,
    require_relative,
    walk,
)
from train_and_ship.registry.release.pickles import Effort, find_pickle

JOB, VERDICTS, LINEAGE, ENVIRONMENT = "job.json", "verdicts.json", "lineage.json", "environment.txt"
"""Files that tell how a release came to be: the job in full, the gates' numbers, code and data, installed packages."""
SHIPPED = FILES
"""Folder with what the job ships beside the model."""
DATA = "data.json"
"""What its data was like, in counts and quantiles; the next data is held against it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to trust and to load a release. Pure content: no clock, no host, no author."""

    model: str
    release: str
    """Release id: the hash of `files`."""
    files: Mapping[str, FileEntry]
    """By relative POSIX path, sorted."""
    formats: Mapping[str, str]
    """Format (torchscript, onnx, pt2, executorch, …) to the path of its artifact."""
    signature: Mapping[str, Any]
    """`inputs` and `outputs`: name, dtype and shape of each tensor, where a string is a dynamic dimension's name;
    `dims`: name, min and max of each, null for no limit; `coupled`: true where answers may depend on the other samples
    of a batch, and only there: the batch is 1 then; `labels`: what the columns of the first output are called, in their
    order, where that is known."""
    metrics: Mapping[str, float]
    """Quality measured before release, by metric; what the next candidate is held against."""
    serve: Mapping[str, str] = field(default_factory=dict)
    """`latency` and `throughput` to the format that was fastest at it; empty when nothing was measured."""
    format: int = FORMAT

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8. Equal manifests are equal bytes."""
        document = {
            "format": self.format,
            "model": self.model,
            "release": self.release,
            "files": file_table(self.files),
            "formats": dict(self.formats),
            "signature": dict(self.signature),
            "metrics": dict(self.metrics),
            # Releases from before there was a recommendation keep their bytes.
            **({"serve": dict(self.serve)} if self.serve else {}),
        }
        return canonical_json(document)

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the encoded manifest."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def shipped(self) -> dict[str, FileEntry]:
        """What the job ships beside the model, by path."""
        return {name: entry for name, entry in self.files.items() if name.startswith(f"{SHIPPED}/")}

    @property
    def rows_together(self) -> int:
        """How many rows of different requests servers compute together at most; 1 where each is computed by itself."""
        return rows_together(self.signature) if {"inputs", "outputs"} <= self.signature.keys() else 1

    @property
    def libraries(self) -> list[str]:
        """Shared libraries with custom operators, which are loaded before artifacts."""
        return [name for name in self.files if name.endswith(".so") and not name.startswith(f"{SHIPPED}/")]


def build_manifest(
    folder: Path,
    *,
    model: str,
    formats: Mapping[str, str],
    signature: Mapping[str, Any],
    metrics: Mapping[str, float],
    serve: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash every file below a folder and describe them. Reads only; a MANIFEST.json that lies there is not a member.

    Args:
        folder: the release's files.
        model: its model.
        formats: format to the path of its artifact.
        signature: as in `Manifest`.
        metrics: quality by metric.
        serve: `latency` and `throughput` to the recommended format; None where nothing was measured.

    Raises:
        ReleaseError: an empty folder, symbolic links, special files, names that could not be keys, pickles, archives
            that cannot be looked through for them, formats without their file, values that JSON does not have (NaN),
            and more than a reader would read.
    """
    paths = {name: path for name, path in walk(folder) if name != MANIFEST}
    for name in paths:
        _require_path(name)
    if not paths:
        raise ReleaseError(f"release folder {folder}: expected at least one file, found none")
    kinds = {path: kind for kind, path in formats.items()}
    files, effort = {}, Effort()
    for name, path in paths.items():
        if (found := find_pickle(path, kinds.get(name), effort)) is not None:
            raise ReleaseError(
                f"{name}: expected no pickle in a release, got one ({found}): reading it runs code; "
                "save tensors as .safetensors"
            )
        files[name] = FileEntry.of(path)
    manifest = Manifest(
        model=model,
        release=release_id(files),
        files=files,
        formats=dict(sorted(formats.items())),
        signature=signature,
        metrics={name: float(value) for name, value in sorted(metrics.items())},
        serve=dict(sorted((serve or {}).items())),
    )
    try:
        encoded = manifest.encode()
    except (TypeError, ValueError) as error:
        raise ReleaseError(f"manifest of {model}: expected values that JSON can hold, got: {error}") from None
    if len(encoded) > MANIFEST_BYTES or values_in(encoded) > MOST_VALUES:
        raise ReleaseError(
            f"manifest of {model}: expected at most {MANIFEST_BYTES:,} bytes and {MOST_VALUES:,} values, got "
            f"{len(encoded):,} and {values_in(encoded):,}, or no reader would take the release: ship fewer files, or a "
            "smaller signature"
        )
    # Also turns tuples into lists: what is returned equals what a reader will decode.
    return decode_manifest(encoded)


def release_id(files: Mapping[str, FileEntry]) -> str:
    """The id of a release with these files: the first 20 hexadecimal digits of the file table's SHA-256."""
    return hashlib.sha256(canonical_json(file_table(files))).hexdigest()[:RELEASE_ID_DIGITS]


def decode_manifest(encoded: bytes) -> Manifest:
    """Read a manifest. Raises ReleaseError unless it is exactly what `Manifest.encode` writes, with its own id."""
    try:
        document = json_object(encoded)
        if document.get("format") != FORMAT:
            raise ReleaseError(
                f"manifest: expected format {FORMAT}, got {document.get('format')!r}; "
                "it was written by another version of train-and-ship"
            )
        files = read_table(document["files"])
        manifest = Manifest(
            model=str(document["model"]),
            release=str(document["release"]),
            files=files,
            formats={str(name): str(path) for name, path in sorted(document["formats"].items())},
            signature=dict(document["signature"]),
            metrics={str(name): float(value) for name, value in sorted(document["metrics"].items())},
            serve={str(purpose): str(kind) for purpose, kind in sorted(document.get("serve", {}).items())},
        )
        require_description(document["formats"], document["signature"], document["metrics"])
        same = manifest.encode() == encoded
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ReleaseError(
            f"manifest: expected {MANIFEST} of format {FORMAT}, got {type(error).__name__}: {error}"
        ) from None
    if not is_name(manifest.model) or not is_release_id(manifest.release):
        raise ReleaseError(
            f"manifest: expected a model name and a release id, got {manifest.model!r} and {manifest.release!r}"
        )
    if not 0 < len(files) <= MOST_FILES or len(encoded) > MANIFEST_BYTES:
        raise ReleaseError(
            f"manifest: expected 1 to {MOST_FILES:,} files and at most {MANIFEST_BYTES:,} bytes, which is what readers "
            f"take, got {len(files):,} files and {len(encoded):,} bytes"
        )
    for name, entry in files.items():
        _require_path(name)
        if not SHA256.fullmatch(entry.sha256) or not 0 <= entry.bytes <= LARGEST_FILE:
            raise ReleaseError(f"manifest: {name}: expected a SHA-256 and a size, got {entry}")
    if (clash := file_above(files)) is not None:
        raise ReleaseError(f"manifest: {clash[0]} is a file, and the folder of {clash[1]}")
    for purpose, kind in manifest.serve.items():
        if kind not in manifest.formats:
            raise ReleaseError(
                f"manifest: serve.{purpose!r}: expected one of {', '.join(manifest.formats)}; got {kind!r}"
            )
    if (expected := release_id(files)) != manifest.release:
        raise ReleaseError(f"manifest: expected release {expected} by its file table, got {manifest.release}")
    for kind, path in manifest.formats.items():
        if path not in files:
            raise ReleaseError(f"manifest: format {kind}: expected one of {', '.join(files)}; got {path!r}")
    if not same:
        # Unknown keys, doubled keys, other spelling: something that we would drop silently.
        raise ReleaseError(f"manifest of release {manifest.release}: expected canonical JSON without other keys")
    return manifest


def verify_folder(folder: Path, manifest: Manifest) -> None:
    """Check that `folder` holds exactly the manifest's files; a MANIFEST.json beside them must be this manifest.

    Reads only. Raises ReleaseError with the file, what was expected and what was found.
    """
    found = dict(walk(folder))
    beside = found.pop(MANIFEST, None)
    if beside is not None and beside.read_bytes() != manifest.encode():
        raise ReleaseError(f"{beside}: expected the manifest of release {manifest.release}, got another")
    for name in sorted(found.keys() | manifest.files.keys()):
        if name not in manifest.files:
            raise ReleaseError(f"{folder / name}: expected no such file in release {manifest.release}, got one")
        if name not in found:
            raise ReleaseError(f"{folder / name}: expected a file of {manifest.files[name].bytes:,} bytes, got none")
        require_file(found[name], manifest.files[name])


def _require_path(name: str) -> None:
    """Raises ReleaseError unless `name` is safe as a key and as a path below a folder, and no pickle."""
    require_relative(name)
    if name.startswith("MANIFEST."):
        raise ReleaseError(f"file name {name!r}: the manifest and its signatures cannot be files that it lists")
    if PurePosixPath(name).suffix.lower() in PICKLE_ENDINGS:
        raise ReleaseError(
            f"{name}: expected no pickle in a release, got a {PurePosixPath(name).suffix} file: reading it runs code; "
            "save tensors as .safetensors"
        )
