"""What changed between two releases. Reads only: manifests, job, verdicts, lineage and packages, no artifact."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shipreader.records import LONGEST_PATH
from torchworker.contract import IN_CPP, PARITY, InspectResult, MeasureResult
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import Named
from train_and_ship.registry.bucket.releases import (
    TOLD,
    TOLD_BYTES,
    TOLD_VALUES,
    read_manifest,
    read_small_file,
    told_document,
)
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.kind import Kind, changes_in_kind
from train_and_ship.registry.release.documents import PURPOSES, told_data, told_samples, told_speed
from train_and_ship.registry.release.manifest import (
    DATA,
    ENVIRONMENT,
    JOB,
    LINEAGE,
    MANIFEST,
    VERDICTS,
    Manifest,
    decode_manifest,
)
from train_and_ship.registry.text import file_size, number

NONE = "–"
"""A value that one of the two does not have."""
CODE = ("git_commit", "shipping_git_commit")
FROM_DATA = ("data_fingerprint", "train_samples", "validation_samples")
SIZE_NOISE = 0.001
"""Part of a file that the digits of times in it, and the like, make up."""
LONGEST_SAID = 500
"""Characters of what cannot be understood, in words."""
Said = TypeVar("Said")
KIND = "kind"
"""The group of what makes a release another kind of thing than the other; a channel does not move over it by itself."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same in both."""

    group: str
    """KIND, or one of GROUPS."""
    name: str
    before: str
    after: str
    change: str = ""
    """How much, where both are numbers."""
    noise: bool = False
    """Whether two releases of the same model differ by as much: people are shown the others."""


@dataclass(frozen=True, kw_only=True)
class ReleaseRecord:
    """What a release keeps about itself, as text: another version may have written it."""

    manifest: Manifest
    files: Mapping[str, str]
    """Text of each file that says how it came to be, where it has it."""

    def document(self, name: str) -> Mapping[str, Any]:
        """One of its JSON files; an empty one where it has none."""
        with self.understood():
            found = told_document(self.files.get(name, "{}").encode())
            return found if isinstance(found, dict) else {}

    @property
    def kind(self) -> Kind:
        """What kind of thing it is; a file that nobody understands tells nothing."""
        return Kind.of(self.manifest, self.lenient_document)

    def lenient_document(self, name: str) -> Mapping[str, Any]:
        """One of its JSON files; an empty one where it has none, or one that nobody understands."""
        try:
            return self.document(name)
        except ReleaseError:
            return {}

    @property
    def data(self) -> InspectResult | None:
        """What its data was like; None where it does not say. Raises ReleaseError for what cannot be."""
        return self._read(DATA, told_data)

    @property
    def speed(self) -> MeasureResult | None:
        """How fast it was when it was made; None where it does not say. Raises ReleaseError for what cannot be."""
        return self._read(VERDICTS, told_speed)

    def require_understood(self) -> None:
        """Raises ReleaseError for a file that nobody understands: what it does not tell is compared with nothing."""
        for question in self._questions():
            question()

    def not_understood(self) -> list[str]:
        """In words, what it says of itself and what cannot be: that tells nothing, and the rest is compared."""
        found = []
        for question in self._questions():
            try:
                question()
            except ReleaseError as error:
                found.append(on_one_line(str(error), LONGEST_SAID))
        return list(dict.fromkeys(found))

    def _questions(self) -> Iterator[Callable[[], object]]:
        """What is asked of a record before anything is made of its numbers."""
        yield lambda: packages_of(self)
        for name in sorted(self.files.keys() - {ENVIRONMENT}):
            yield functools.partial(self._read, name, lambda _: None)
        yield lambda: self.data
        yield lambda: self.speed
        yield lambda: self._read(VERDICTS, told_samples)
        yield self._require_purposes

    def _require_purposes(self) -> None:
        with self.understood():
            if unknown := self.manifest.serve.keys() - PURPOSES:
                raise ValueError(f"{MANIFEST}: serve: expected {' and '.join(PURPOSES)}, got {', '.join(unknown)}")

    def _read(self, name: str, of: Callable[[Any], Said]) -> Said:
        """What one of its JSON files tells. Raises ReleaseError, which names the file."""
        with self.understood():
            try:
                document = told_document(self.files.get(name, "{}").encode())
                if not isinstance(document, dict):
                    raise ValueError(f"expected a JSON object, got {type(document).__name__}")
                return of(document)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}: {error or type(error).__name__}") from error

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Whoever made the release has written these files: what has another shape is the release's fault.

        So is a name that this machine has no file of, as it is too long for one or cannot be looked at.

        Raises ReleaseError for what comes of it.
        """
        try:
            yield
        except (
            *(ValueError, TypeError, KeyError, AttributeError, IndexError),
            *(ArithmeticError, RecursionError, OSError),
        ) as error:
            raise ReleaseError(
                f"{self.manifest.model} {self.manifest.release}: what it says of itself cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error


def compare(store: ObjectStore, model: str, before: Named, after: Named) -> list[Difference]:
    """Everything that differs between two releases, by group.

    Args:
        store: The bucket. It is only read.
        model: The model's name.
        before: One release.
        after: The other.

    Raises:
        ReleaseError: One has no manifest, is damaged, or has another manifest than it is known by.
    """
    one, two = (
        read_release_record(store, model, named.release, sha256=named.manifest_sha256 or None)
        for named in (before, after)
    )
    kinds = [
        Difference(group=KIND, name=f"{item.kind}: {item.of}", before=item.live, after=item.candidate)
        for item in changes_in_kind(one.kind, two.kind)
    ]
    return [
        *kinds,
        *(found for group in GROUPS for found in _differences(group, one, two)),
    ]


def read_release_record(
    store: ObjectStore, model: str, release: str, *, sha256: str | None = None, altered_are_left_out: bool = False
) -> ReleaseRecord:
    """The files in which a release says how it came to be, verified.

    Args:
        store: The bucket. It is only read.
        model: The model's name.
        release: Its id.
        sha256: Hexadecimal hash that its manifest must have, where a pointer or a record says so.
        altered_are_left_out: A file that is not what the manifest says, or no text, tells nothing, and is no error.

    Raises:
        ReleaseError: It has no manifest, or a file is not what the manifest says, or no text.
    """
    manifest = read_manifest(store, model, release, sha256=sha256)
    names = [name for name in TOLD if name in manifest.files]

    def read(name: str) -> str | None:
        try:
            return _text(f"{model} {release}: {name}", read_small_file(store, manifest, name))
        except ReleaseError:
            if not altered_are_left_out:
                raise
            return None

    found = in_parallel(read, names)
    return ReleaseRecord(
        manifest=manifest, files={name: text for name, text in zip(names, found, strict=True) if text is not None}
    )


def read_copied_record(folder: Path) -> ReleaseRecord:
    """As `read_release_record`, of a copy on this disk, which was verified when it was made.

    A file that is too large to be held in memory, or no text, tells nothing: the release may be another's.
    """
    manifest = decode_manifest((folder / MANIFEST).read_bytes())
    files = {}
    for name in TOLD:
        if name in manifest.files and manifest.files[name].bytes <= TOLD_BYTES:
            with contextlib.suppress(ReleaseError):
                files[name] = _text(name, (folder / name).read_bytes())
    return ReleaseRecord(manifest=manifest, files=files)


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ReleaseError(f"{name}: expected text, got {error}") from None


def _differences(group: str, one: ReleaseRecord, two: ReleaseRecord) -> Iterator[Difference]:
    with one.understood():
        left = GROUPS[group](one)
    with two.understood():
        right = GROUPS[group](two)
    # In the order in which they stand; what only the second has comes last.
    for name in dict.fromkeys([*left, *right]):
        with (one if name in left else two).understood():
            if not isinstance(name, str):
                raise TypeError(f"{group}: expected a name, got {type(name).__name__}")
        before, after = left.get(name), right.get(name)
        # Lists that are too deep to be compared or shown.
        with two.understood():
            if before == after:
                continue
            yield Difference(
                group=group,
                name=name,
                before=_shown(group, before),
                after=_shown(group, after),
                change=_change(before, after),
                noise=_is_noise(group, name, left, right),
            )


def _is_noise(group: str, name: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether a size, or a time that was measured with each release, differs by no more than chance makes of it.

    A median is noise while each lies among the other's calls (below its p99); p99 and the time to load, of few calls or
    of one, up to twice.
    """
    before, after = _number(left.get(name)), _number(right.get(name))
    if before is None or after is None:
        return False
    if group == "size":
        return abs(after - before) <= SIZE_NOISE * before
    if group != "latency" or min(before, after) <= 0:
        return False
    if " p50_ms" not in name:
        return max(before, after) <= 2 * min(before, after)
    most, theirs = (_number(side.get(name.replace(" p50_ms", " p99_ms"))) for side in (left, right))
    return most is not None and theirs is not None and before <= theirs and after <= most


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _change(before: Any, after: Any) -> str:
    if not isinstance(before, int | float) or not isinstance(after, int | float) or isinstance(before, bool):
        return ""
    try:
        return f"{after - before:+.4g}" + (f" ({(after - before) / before:+.1%})" if before else "")
    except OverflowError:
        # A whole number of hundreds of digits.
        return ""


def _shown(group: str, value: Any) -> str:
    if value is None:
        return NONE
    if group == "size":
        return file_size(value)
    return number(value) if isinstance(value, float) else str(value)


def _parity(record: ReleaseRecord) -> dict[str, float]:
    """How much of the allowed difference each format uses at its worst."""
    found: dict[str, float] = {}
    for verdict in record.document(VERDICTS).get("verdicts", []):
        if verdict["gate"] == PARITY and verdict["measured"] is not None:
            found[verdict["format"]] = max(found.get(verdict["format"], 0.0), verdict["measured"])
    return found


def _latencies(record: ReleaseRecord) -> dict[str, Any]:
    """Milliseconds, by format and batch, and what was fastest."""
    verdicts = record.document(VERDICTS)
    found: dict[str, Any] = {
        f"{kind} {name}": value
        for kind, values in verdicts.get("metrics", {}).items()
        for name, value in values.items()
        if name.startswith("p50_ms")
    }
    for kind, item in ((verdicts.get("speed") or {}).get("measured") or {}).items():
        if item["load_ms"] is not None:
            found[f"{kind} load_ms"] = item["load_ms"]
        for speed in item["speeds"]:
            found |= {f"{kind} {name}.batch_{speed['batch']}": speed[name] for name in ("p50_ms", "p99_ms")}
    unproven = {
        item["format"]
        for item in verdicts.get("verdicts", [])
        if not item.get("ran", True) and IN_CPP in item["format"]
    }
    return found | {
        f"recommended for {purpose}": f"{kind}, not run in C++" if f"{kind} {IN_CPP}" in unproven else kind
        for purpose, kind in record.manifest.serve.items()
    }


def _sizes(record: ReleaseRecord) -> dict[str, int]:
    """Bytes of each file, and of all."""
    sizes = {name: entry.bytes for name, entry in record.manifest.files.items()}
    return {**sizes, "all files": record.manifest.total_bytes}


def _signature(record: ReleaseRecord) -> dict[str, str]:
    """Each tensor's dtype and shape, sizes, what the first output's columns are called, and the file of each format."""
    tensors = {
        f"{side[:-1]} {tensor['name']}": f"{tensor['dtype']} {tensor['shape']}"
        for side, listed in record.manifest.signature.items()
        if side in ("inputs", "outputs")
        for tensor in listed
    }
    signature = record.manifest.signature
    for dim in signature.get("dims", []):
        more = "or more" if dim["max"] is None else f"to {dim['max']}"
        tensors[f"sizes of {dim['name']}"] = f"{dim['min']} {more}"
    tensors |= {"samples": "each by itself"} if signature.get("coupled") else {}
    labels = signature.get("labels")
    tensors |= {"labels": ", ".join(labels)} if labels else {}
    return {**tensors, **{f"format {kind}": path for kind, path in record.manifest.formats.items()}}


def _lineage(record: ReleaseRecord, names: tuple[str, ...]) -> dict[str, Any]:
    lineage = record.document(LINEAGE)
    return {name: lineage[name] for name in names if name in lineage}


def _inputs(record: ReleaseRecord, name: str) -> dict[str, Any]:
    """The fingerprint by which retraining knows that something is as it was."""
    found = record.document(LINEAGE).get("inputs", {}).get(name)
    return {} if found is None else {"fingerprint": found}


def packages_of(record: ReleaseRecord) -> dict[str, str]:
    """Version of every package that was installed."""
    text = record.files.get(ENVIRONMENT, "")
    with record.understood():
        if text.count("==") > TOLD_VALUES:
            raise ValueError(f"{ENVIRONMENT}: expected at most {TOLD_VALUES:,} packages")
    # One after the other: a list of all words would take many times what the text does.
    lines = (found[0] for found in re.finditer(r"\S+", text))
    return dict(line.split("==", 1) for line in lines if "==" in line)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a document by their path: `train.epochs`. Raises ValueError for a path that nobody would write."""
    found: dict[str, Any] = {}

    def add(value: Any, path: str) -> None:
        # Each leaf has the whole of it: a long name with many leaves below it would fill the memory.
        if len(path) > LONGEST_PATH:
            raise ValueError(f"a name of {len(path):,} characters")
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                add(inner, f"{path}.{name}" if path else str(name))
        elif path:
            found[path] = value

    add(value, path)
    return found


GROUPS: Mapping[str, Callable[[ReleaseRecord], Mapping[str, Any]]] = {
    "metrics": lambda record: record.manifest.metrics,
    "parity": _parity,
    "latency": _latencies,
    "size": _sizes,
    "files": lambda record: {name: entry.sha256 for name, entry in record.manifest.files.items()},
    "signature": _signature,
    "code": lambda record: {**_lineage(record, CODE), **_inputs(record, "code")},
    "data": lambda record: {**_lineage(record, FROM_DATA), **_inputs(record, "data")},
    "training": lambda record: flat(record.document(LINEAGE).get("training_environment", {})),
    "packages": packages_of,
    "job": lambda record: flat(record.document(JOB)),
}
"""What is compared, in the order in which it is shown: value by name."""
