"""The pointer of a channel: what is live, and the record of the move that made it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from shipreader.records import MOST_MOVES, MOST_VERDICTS
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.identity import canonical_json, is_name, is_release_id, json_object, moment


class MoveKind(StrEnum):
    """Why a channel moved; written into records."""

    PROMOTION = ""
    ROLLBACK = "rollback"
    """Away from a release that disappointed."""


PROMOTION, ROLLBACK = MoveKind.PROMOTION, MoveKind.ROLLBACK


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What is live on a channel, and the record of the move that made it so."""

    model: str
    channel: str
    generation: int
    """1 for the first move of a channel, one more for each."""
    release: str
    manifest_sha256: str
    """Hexadecimal SHA-256 of the release's MANIFEST.json."""
    previous: str | None
    """The release that was live before."""
    nonce: str
    """Random; by it a mover knows its own move."""
    moved_at: str
    """UTC, ISO 8601, by the mover's clock."""
    moved_by: str
    reason: str
    flow_run: str
    """Id of the flow run that moved it; empty outside a flow."""
    mlflow_version: str
    """Version of the model in MLflow; empty when it has none."""
    kind: MoveKind = PROMOTION
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """What was proven before the move, by gate, in words."""
    etag: str = field(default="", compare=False)
    """The object's ETag when it was read; no part of the record."""

    def encode(self) -> bytes:
        """The record as canonical JSON. The last two fields are left out when empty."""
        record: dict[str, Any] = {name: getattr(self, name) for name in _TEXTS}
        record |= {"format": _POINTER_FORMAT, "generation": self.generation, "previous": self.previous}
        if self.kind:
            record["kind"] = self.kind
        if self.verdicts:
            record["verdicts"] = dict(self.verdicts)
        return canonical_json(record)


_POINTER_FORMAT = 1
_TEXTS = (
    *("model", "channel", "release", "manifest_sha256", "nonce"),
    *("moved_at", "moved_by", "reason", "flow_run", "mlflow_version"),
)


def read_pointer(channel: Channel) -> Pointer | None:
    """What is live on a channel, with the ETag it was read under; None on an unused channel."""
    key = pointer_key(channel.model, channel.name)
    found = channel.store.get(key)
    if found is None:
        return None
    pointer = decode_pointer(found[0], key)
    if (pointer.model, pointer.channel) != (channel.model, channel.name):
        raise ReleaseError(f"{key}: expected the pointer of {channel}, got {pointer.model} {pointer.channel}")
    return replace(pointer, etag=found[1])


def decode_pointer(encoded: bytes, key: str) -> Pointer:
    """Raises ReleaseError unless it is what `Pointer.encode` writes."""
    try:
        document = json_object(encoded)
        if document.get("format") != _POINTER_FORMAT:
            raise ReleaseError(f"{key}: expected format {_POINTER_FORMAT}, got {document.get('format')!r}")
        verdicts = document.get("verdicts", {})
        if len(verdicts) > MOST_VERDICTS:
            raise ValueError(f"expected at most {MOST_VERDICTS:,} verdicts, got {len(verdicts):,}")
        pointer = Pointer(
            **{name: document[name] for name in _TEXTS},
            generation=document["generation"],
            previous=document["previous"],
            kind=MoveKind(document.get("kind", PROMOTION)),
            verdicts=verdicts,
        )
        texts = [pointer.previous or "", *(getattr(pointer, name) for name in _TEXTS)]
        texts += [text for item in pointer.verdicts.items() for text in item]
        if not all(isinstance(text, str) for text in texts) or type(pointer.generation) is not int:
            raise TypeError("a value of another type")
        if not 1 <= pointer.generation <= MOST_MOVES:
            raise ValueError(f"generation {pointer.generation}")
        if pointer.moved_at:
            moment(pointer.moved_at)
        if pointer.encode() != encoded:
            raise ValueError("other keys or another spelling")
        if not is_name(pointer.model) or not is_name(pointer.channel):
            raise ValueError(f"the names {pointer.model!r} and {pointer.channel!r}")
        if not all(is_release_id(release) for release in (pointer.release, pointer.previous) if release is not None):
            raise ValueError(f"the releases {pointer.release!r} and {pointer.previous!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"{key}: expected the record of a move, got {type(error).__name__}: {error}") from None
    return pointer
