"""What the bucket says: the pointer of a channel and the manifest of a release, read with suspicion.

The writer's side is registry/channels/pointer.py and registry/release/manifest.py of train-and-ship, which has the
constants and the rules of names from here: a serving machine installs this package alone. Both sides read documents in
their own way, and a test gives both the same bad input.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shipreader.errors import ReaderError, RefusedError

MANIFEST = "MANIFEST.json"
FILES = "files"
"""Folder of a release with what the job ships beside the model: tokenizers, tables, texts."""
FORMAT = 1
"""Layout of pointers and manifests that this reader understands."""
POINTER_BYTES, MANIFEST_BYTES = 2**20, 16 * 2**20
"""Longer ones are not read."""
MOST_FILES = 100_000
LARGEST_FILE = 2**50
"""Bytes. More than any store takes."""
MOST_MOVES = 99_999_999
"""Of a channel: their records are sorted by eight digits."""
MOST_VALUES = 6 * MOST_FILES
"""In one document, about: a manifest has three commas and brackets for each file. A great many small values take fifty
times the memory that they have bytes."""
MOST_VERDICTS = 1_000
"""Of one move: a record has one for each gate and format."""
MOST_FORMATS = 100
"""Of a release; ours have eight at most."""
MOST_LABELS, LABEL_BYTES, LABELS_BYTES = 100_000, 512, 2**20
"""Of a model: how many, UTF-8 bytes of one, and of all as JSON. Whoever asks a server for them gets all."""
MOST_DEEP = 20
"""Lists within lists of a signature; ours have four."""
LONGEST_PATH = 512
"""Characters. S3 keys end at 1,024 bytes, and the release's prefix needs some of them."""
LONGEST_PART, MOST_PARTS = 240, 32
"""Of a path: UTF-8 bytes of a part, where file systems take 255 and downloads add some, and how many parts."""
BLOCK_BYTES = 4096
"""What a disk takes for each file and folder besides its bytes, about."""
PICKLE_ENDINGS = (".pkl", ".pickle", ".pth", ".joblib")
"""Files that run code when they are read: no release has them."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Of a model or a channel: it becomes part of keys."""
RELEASE_ID = re.compile(r"[0-9a-f]{20}")
"""80 bits in hexadecimal: the beginning of the file table's SHA-256."""
SHA256 = re.compile(r"[0-9a-f]{64}")
FORMAT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
"""Of an artifact's format: onnx, onnx-int8-static."""
DTYPE = re.compile(r"[a-z][a-z0-9_]{0,31}")
"""float32, bfloat16, float8_e4m3fn."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a release."""

    sha256: str
    """64 lower-case hexadecimal digits."""
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """What a file is like, read once in pieces."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


@dataclass(frozen=True)
class Pointer:
    """What is live on a channel. Keys that this reader does not need are not read."""

    model: str
    channel: str
    generation: int
    """1 for the first move of the channel, one more for each, rollbacks included."""
    release: str
    manifest_sha256: str
    nonce: str
    """Random: two moves are never alike."""
    moved_at: str
    """UTC, ISO 8601, by the mover's clock."""


@dataclass(frozen=True)
class Manifest:
    """What a release holds."""

    model: str
    release: str
    files: Mapping[str, FileEntry]
    """By relative path with / between its parts."""
    formats: Mapping[str, str]
    """Format (torchscript, onnx, pt2) to the path of its artifact."""
    signature: Mapping[str, Any]
    """`inputs` and `outputs`: name, dtype and shape of each tensor."""
    metrics: Mapping[str, float]
    encoded: bytes
    """As it lies in the bucket."""
    serve: Mapping[str, str] = field(default_factory=dict)
    """`latency` and `throughput` to the format that was fastest at it when the release was made; may be empty."""

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class Release:
    """A verified release in a folder of this machine."""

    channel: str
    generation: int
    folder: Path
    """Its own folder, not the link `current`: it stays the same release while you read it."""
    manifest: Manifest
    moved_at: str
    """When it went live, or its rollout took the step at which it is. UTC, ISO 8601."""
    rollout: str = ""
    """Of a candidate: the rollout that tries it beside what this generation has live. Empty for what is live."""

    def __str__(self) -> str:
        """Which one it is, and where, on one line."""
        what = "candidate" if self.rollout else "release"
        return f"{self.model} {self.channel}: generation {self.generation}, {what} {self.id}, in {self.folder}"

    @property
    def model(self) -> str:
        """Its model's name."""
        return self.manifest.model

    @property
    def id(self) -> str:
        """The release's id."""
        return self.manifest.release

    def recommended(self, purpose: str) -> str | None:
        """The format that was fastest at `latency` or `throughput` when the release was made; None if not measured."""
        return self.manifest.serve.get(purpose)

    def artifact(self, format: str) -> Path:
        """The file of one format, such as `onnx`. Raises ReaderError when the release has none."""
        if format not in self.manifest.formats:
            raise ReaderError(
                f"{self.model} {self.id}: expected one of {', '.join(self.manifest.formats)}; got {format!r}"
            )
        return self.folder / self.manifest.formats[format]

    def file(self, name: str) -> Path:
        """A file or folder that the job ships beside the model (`export.files`, `export.extras`), such as `tokenizer`.

        Raises ReaderError when the release has none of this name.
        """
        wanted = f"{FILES}/{name.strip('/')}"
        if not any(file == wanted or file.startswith(f"{wanted}/") for file in self.manifest.files):
            there = dict.fromkeys(file.split("/")[1] for file in self.manifest.files if file.startswith(f"{FILES}/"))
            raise ReaderError(
                f"{self.model} {self.id}: expected one of its files ({', '.join(there) or 'it has none'}); got {name!r}"
            )
        return self.folder / wanted


def pointer_key(model: str, channel: str) -> str:
    """Raises ReaderError for names that cannot be part of a key."""
    for kind, name in (("model", model), ("channel", channel)):
        if not NAME.fullmatch(name):
            raise ReaderError(f"{kind} name: expected lower-case letters, digits, dots, dashes, _; got {name!r}")
    return f"models/{model}/channels/{channel}.json"


def rollout_key(model: str, channel: str) -> str:
    """Of the candidate that is tried beside what is live. Raises ReaderError as `pointer_key` does."""
    pointer_key(model, channel)
    return f"models/{model}/rollouts/{channel}.json"


def release_prefix(model: str, release: str) -> str:
    """Where a release lies in the bucket; with the slash at its end."""
    return f"models/{model}/releases/{release}/"


def decode_pointer(encoded: bytes, model: str, channel: str) -> Pointer:
    """Raises RefusedError unless it is the pointer of this model's channel."""
    key = pointer_key(model, channel)
    document = json_object(encoded, key)
    values: dict[str, Any] = {name: document.get(name) for name in Pointer.__dataclass_fields__}
    generation = values.pop("generation")
    wrong = [name for name, value in values.items() if not isinstance(value, str)]
    if wrong or type(generation) is not int or not 1 <= generation <= MOST_MOVES:
        raise RefusedError(f"{key}: expected the record of a move, got {_shown(document)}")
    verdicts = document.get("verdicts", {})
    if not isinstance(verdicts, dict) or len(verdicts) > MOST_VERDICTS:
        raise RefusedError(f"{key}: expected at most {MOST_VERDICTS:,} verdicts, got {_shown(document)}")
    pointer = Pointer(generation=generation, **values)
    if (pointer.model, pointer.channel) != (model, channel):
        raise RefusedError(
            f"{key}: expected the pointer of {model} {channel}, got {pointer.model[:80]!r} {pointer.channel[:80]!r}"
        )
    # It becomes part of keys and paths.
    if not RELEASE_ID.fullmatch(pointer.release) or not SHA256.fullmatch(pointer.manifest_sha256):
        raise RefusedError(f"{key}: expected a release id and a SHA-256, got {_shown(document)}")
    return pointer


def decode_manifest(encoded: bytes, pointer: Pointer) -> Manifest:
    """Read the manifest that a pointer names.

    Raises RefusedError for other bytes than the pointer's hash says, for another release, and for file names that would
    leave the folder, fall on one another, or are pickles.
    """
    key = release_prefix(pointer.model, pointer.release) + MANIFEST
    got = hashlib.sha256(encoded).hexdigest()
    if got != pointer.manifest_sha256:
        raise RefusedError(f"{key}: expected SHA-256 {pointer.manifest_sha256}, got {got}: altered after it went live")
    document = json_object(encoded, key)
    try:
        files = {str(name): FileEntry(item["sha256"], item["bytes"]) for name, item in document["files"].items()}
        manifest = Manifest(
            model=document["model"],
            release=document["release"],
            files=files,
            formats=dict(document["formats"]),
            signature=dict(document["signature"]),
            metrics=dict(document["metrics"]),
            encoded=encoded,
            serve=dict(document.get("serve", {})),
        )
        table = json.dumps(document["files"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        own = hashlib.sha256(table.encode()).hexdigest()[: len(pointer.release)]
        require_description(document["formats"], document["signature"], document["metrics"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{key}: expected a manifest, got {type(error).__name__}: {error}") from None
    if (manifest.model, manifest.release) != (pointer.model, pointer.release):
        raise RefusedError(
            f"{key}: expected the manifest of {pointer.model} {pointer.release}, "
            f"got that of {str(manifest.model)[:80]!r} {str(manifest.release)[:80]!r}"
        )
    if own != manifest.release:
        raise RefusedError(f"{key}: expected release {own} by its file table, got {manifest.release}")
    if not 0 < len(files) <= MOST_FILES:
        raise RefusedError(f"{key}: expected 1 to {MOST_FILES:,} files, got {len(files):,}")
    for name, entry in files.items():
        require_path(name, key)
        if not isinstance(entry.sha256, str) or not SHA256.fullmatch(entry.sha256):
            raise RefusedError(f"{key}: {name}: expected a SHA-256, got {entry.sha256!r}")
        if type(entry.bytes) is not int or not 0 <= entry.bytes <= LARGEST_FILE:
            raise RefusedError(f"{key}: {name}: expected a size in bytes, got {entry.bytes!r}")
    if (clash := file_above(files)) is not None:
        raise RefusedError(f"{key}: {clash[0]} is a file, and the folder of {clash[1]}")
    for kind, path in manifest.formats.items():
        if path not in files:
            raise RefusedError(f"{key}: format {kind}: expected one of its files, got {path!r}")
    for purpose, kind in manifest.serve.items():
        if not isinstance(kind, str) or kind not in manifest.formats:
            raise RefusedError(f"{key}: serve.{purpose!r}: expected one of its formats, got {kind!r}")
    return manifest


def require_description(formats: Any, signature: Any, metrics: Any) -> None:
    """What a manifest says of its artifacts, as far as servers, readers and gates take it for granted.

    Args:
        formats: format to file.
        signature: of inputs and outputs; empty where nothing is said.
        metrics: quality by name.

    Raises ValueError, TypeError, KeyError or AttributeError for anything else.
    """
    if len(formats) > MOST_FORMATS:
        raise ValueError(f"expected at most {MOST_FORMATS:,} formats, got {len(formats):,}")
    for kind, path in formats.items():
        if not isinstance(path, str) or not FORMAT_NAME.fullmatch(kind):
            raise ValueError(f"format {kind[:80]!r}: expected a name and a file")
    for name, value in metrics.items():
        # Not a bool, which is a number to Python.
        if not is_word(name) or type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"metric {name[:80]!r}: expected a finite number")
    _require_shallow(signature)
    for side in ("inputs", "outputs"):
        tensors = signature.get(side, [])
        if side == "inputs" and side in signature and not tensors:
            raise ValueError("inputs: expected at least one tensor, got none")
        for tensor in tensors:
            sizes = tensor["shape"]
            sound = is_word(tensor["name"]) and DTYPE.fullmatch(tensor["dtype"]) and isinstance(sizes, list)
            if not sound or not all(is_word(size) or _is_size(size) for size in sizes):
                raise ValueError(f"{side}: expected tensors with name, dtype and shape")
        if len({tensor["name"] for tensor in tensors}) != len(tensors):
            raise ValueError(f"{side}: expected one tensor of each name")
    if not isinstance(dims := signature.get("dims", []), list):
        raise ValueError(f"dims: expected a list, got {type(dims).__name__}")
    for dim in dims:
        low, high = dim["min"], dim["max"]
        if not is_word(dim["name"]) or not _is_size(low) or not (high is None or (_is_size(high) and low <= high)):
            raise ValueError("dims: expected name, min and max of each")
    if len({dim["name"] for dim in dims}) != len(dims):
        raise ValueError("dims: expected one range of each name")
    if "labels" in signature and (wrong := wrong_labels(signature["labels"])):
        raise ValueError(f"labels: expected {wrong}")
    if "labels" in signature and (outputs := signature.get("outputs")):
        given, counts = len(signature["labels"]), label_counts(outputs[0]["shape"])
        if counts and given not in counts:
            raise ValueError(
                f"labels: expected {' or '.join(map(str, counts))}, one for each column of {outputs[0]['name']}, got "
                f"{given:,}"
            )
    if not isinstance(signature.get("coupled", False), bool):
        raise ValueError("coupled: expected true or false")


def wrong_labels(labels: Any) -> str:
    """What is expected of labels, where that is not so: different texts, one at least. Empty for what may be labels.

    How many columns there are is asked by `label_counts`.

    labels: what the columns of the first output are called, as YAML or JSON has it.
    """
    if not isinstance(labels, list | tuple) or not labels:
        return "a list of texts, one at least"
    if len(labels) > MOST_LABELS:
        return f"at most {MOST_LABELS:,} texts, and there are {len(labels):,}"
    seen: set[str] = set()
    size = 2
    for place, label in enumerate(labels):
        if not isinstance(label, str):
            return f"texts, and number {place} is {str(label)[:80]}, which YAML reads as text in quotes only"
        if not is_word(label) or len(label.encode()) > LABEL_BYTES:
            return f"printable texts of 1 to {LABEL_BYTES} bytes in UTF-8, and number {place} is {label[:80]!r}"
        if label in seen:
            return f"each text once, and number {place} is {label[:80]!r} again"
        seen.add(label)
        # As a server answers them, with a comma and a space behind each.
        size += len(json.dumps(label, ensure_ascii=False).encode()) + 2
    return f"at most {LABELS_BYTES:,} bytes for all of them, and they have {size:,}" if size > LABELS_BYTES else ""


def label_counts(shape: Sequence[int | str]) -> list[int]:
    """How many labels an output may have: one for each column, or two where one column tells yes from no.

    shape: `[batch, …]`, where a string is a dynamic dimension's name; empty for no fixed number of columns. Of more
    than two dimensions the columns are the second one, as losses of torch have it, or the last.
    """
    columns = shape[1:] or (1,)
    counts = {size for size in (columns[0], columns[-1]) if isinstance(size, int)}
    return sorted(counts | {2} if 1 in counts else counts)


def _require_shallow(signature: Any) -> None:
    """Raises ValueError where whoever writes it anew would come to the end of the stack, also in keys nobody knows."""
    level = [signature]
    for _ in range(MOST_DEEP):
        values = [value.values() if isinstance(value, dict) else value for value in level]
        level = [inner for value in values for inner in value if isinstance(inner, dict | list)]
    if level:
        raise ValueError(f"signature: expected lists within lists to a depth of {MOST_DEEP}, got more")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_FILE


def is_word(value: Any) -> bool:
    """Whether it is a short text without signs that steer a terminal."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_PATH and value.isprintable()


def require_path(name: str, where: str) -> None:
    """Raises RefusedError unless `name` stays below the folder it is joined to, and is no pickle."""
    if not stays_below(name):
        raise RefusedError(
            f"{where}: file name {name!r}: expected a relative path with / between its parts and no .., "
            f"at most {LONGEST_PATH} characters, {MOST_PARTS} parts and {LONGEST_PART} bytes of each"
        )
    if name.startswith("MANIFEST."):
        raise RefusedError(f"{where}: file name {name!r}: names that begin so are the release's own")
    if name.lower().endswith(PICKLE_ENDINGS):
        raise RefusedError(f"{where}: {name}: expected no pickle in a release: reading one runs code")


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder of this machine by relative POSIX path, in any order.

    Raises RefusedError for links and special files.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise RefusedError(
            f"release folder {folder}: expected a folder, got {'a link' if folder.is_symlink() else 'none'}"
        )
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                mode, path = entry.stat(follow_symlinks=False).st_mode, Path(entry.path)
                if stat.S_ISDIR(mode):
                    pending.append(path)
                elif stat.S_ISREG(mode):
                    yield path.relative_to(folder).as_posix(), path
                else:
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                    raise RefusedError(f"{path}: expected a regular file, got {kind}; copy the content instead")


def stays_below(name: str) -> bool:
    """Whether a name is safe as a key, and as a path below the folder it is joined to."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and len(name) <= LONGEST_PATH
        and len(parts) <= MOST_PARTS
        and not any(part in ("", ".", "..") for part in parts)
        and ":" not in parts[0]
        and _is_utf8(name)
        and all(len(part.encode()) <= LONGEST_PART for part in parts)
    )


def file_above(files: Collection[str]) -> tuple[str, str] | None:
    """A file that is also the folder of another one, and that one: no disk has both. files: relative POSIX paths."""
    for name in files:
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (above := "/".join(parts[:end])) in files:
                return above, name
    return None


def room(files: Mapping[str, FileEntry]) -> int:
    """Bytes that files take on a disk, about, with the folders of their paths: empty ones would fill it too."""
    folders, before = 0, list[str]()
    # No name has a NUL: what is below a folder stands together.
    for name in sorted(files, key=lambda name: name.replace("/", "\0")):
        parts = name.split("/")[:-1]
        same = 0
        while same < min(len(parts), len(before)) and parts[same] == before[same]:
            same += 1
        folders += len(parts) - same
        before = parts
    return sum(entry.bytes for entry in files.values()) + BLOCK_BYTES * (len(files) + folders)


def _is_utf8(name: str) -> bool:
    # File systems hold bytes that are no text; they are listed as lone surrogates.
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_sparse(encoded: bytes, most: int = MOST_VALUES) -> None:
    """Raises ValueError for a document with more values than any of ours has: reading it would fill the memory."""
    if len(encoded) > most and (values := values_in(encoded)) > most:
        raise ValueError(f"expected at most {most:,} values, got {values:,}")


def values_in(encoded: bytes) -> int:
    """How many values a JSON document has, about; never fewer."""
    return sum(map(encoded.count, (b",", b"[", b"{")))


def json_object(encoded: bytes, key: str) -> dict[str, Any]:
    """A document of this reader's format. Raises RefusedError for anything else. key: where it lies."""
    try:
        require_sparse(encoded)
        document = json.loads(encoded)
    except (ValueError, RecursionError):
        raise RefusedError(f"{key}: expected JSON, got {encoded[:80]!r}") from None
    if not isinstance(document, dict):
        raise RefusedError(f"{key}: expected a JSON object, got {type(document).__name__}")
    if document.get("format") != FORMAT:
        raise RefusedError(
            f"{key}: expected format {FORMAT}, got {document.get('format')!r}: written by another version, "
            "which needs another reader"
        )
    return document


def _shown(document: Mapping[str, Any]) -> str:
    return repr(document)[:300]
