"""What a move of a channel takes, as its owner says: whether a person has to say yes. One small object in the bucket.

It lies apart from the pointer, under a right of its own (`ship iam owner`): whoever moves a channel cannot change what
that takes. Without the object nothing is asked beyond what the job says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from train_and_ship.infra.errors import GateError, PreconditionFailedError, ReleaseError, RequestError, ShipError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.keys import rules_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.timeline import utc_now
from train_and_ship.registry.identity import canonical_json

APPROVAL, APPROVED = "approval", "approved"
"""In the record of a move: what was required, and who is said to have said yes."""
APPROVED_FROM, ASKED_FROM = "approved from", "asked from"
"""Likewise: the accounts of whoever said yes and of whoever asked, where they are known."""
LARGEST = 65_536
"""Bytes of the object; a longer one is none that `set_rules` wrote."""


class Approval(StrEnum):
    """Whether a person has to say yes before a channel moves; written into the bucket."""

    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What moves of one channel take."""

    model: str
    channel: str
    approval: Approval = Approval.NONE
    set_by: str = ""
    """Who said so, by their own account; empty where nobody ever did."""
    set_at: str = ""
    """UTC, ISO 8601, by the clock of whoever did; empty where nobody ever did."""
    why: str = ""
    etag: str = field(default="", compare=False)
    """The object's ETag when it was read; no part of the record."""

    @property
    def required(self) -> bool:
        """Whether a person has to say yes."""
        return self.approval is Approval.REQUIRED

    def encode(self) -> bytes:
        """The record as canonical JSON."""
        record = {name: value for name, value in asdict(self).items() if name != "etag"}
        return canonical_json({"format": _FORMAT, **record})

    def __str__(self) -> str:
        """As records and messages call it: `required by the channel (ada@host, 2026-11-30T…: customers see it)`."""
        if not self.set_at:
            return "not required"
        said = f"{self.set_by}, {self.set_at}" + (f": {self.why}" if self.why else "")
        return f"required by the channel ({said})" if self.required else f"not required ({said})"


_FORMAT = 1


def read_rules(channel: Channel) -> Rules:
    """What moves of a channel take now. Raises ReleaseError for an object that is not what `set_rules` writes."""
    key = rules_key(channel.model, channel.name)
    found = channel.store.get(key)
    if found is None:
        return Rules(model=channel.model, channel=channel.name)
    return replace(_decode(found[0], key, channel), etag=found[1])


def set_rules(channel: Channel, approval: Approval, by: str, why: str) -> Rules:
    """Say what moves of a channel take from now on. Writes; one that cannot be read is replaced too.

    Args:
        channel: which.
        approval: whether a person has to say yes.
        by: who says so.
        why: the reason, for the record.

    Raises:
        RequestError: somebody else said something else meanwhile.
        SettingsError: these credentials may not say it.
    """
    key = rules_key(channel.model, channel.name)
    rules = Rules(
        model=channel.model, channel=channel.name, approval=approval, set_by=by, set_at=utc_now(),
        why=" ".join(why.split()),
    )  # fmt: skip
    found = channel.store.get(key)
    channel.store.probe()
    try:
        if found is None:
            channel.store.put_new(key, rules.encode())
        else:
            channel.store.replace(key, rules.encode(), found[1])
    except PreconditionFailedError:
        # It may be ours, when the reply to a first attempt was lost.
        if read_rules(channel) != rules:
            raise RequestError(
                f"{channel}: not set, because somebody else has set it meanwhile; see `ship channel show`"
            ) from None
    return rules


def require_approved(channel: Channel, approved: str, way_out: str) -> dict[str, str]:
    """What the channel requires, for the record of a move. Reads the bucket.

    Args:
        channel: what is to move.
        approved: who has said yes, in words; empty when nobody was asked.
        way_out: how a person is asked, for the message.

    Raises:
        GateError: a person has to say yes and nobody was asked, or nobody can tell whether one has to.
    """
    if approved:
        # Whoever asked has put into the record by what they had to.
        return {}
    rules = known_rules(channel)
    if rules.required:
        raise GateError(f"{channel}: approval is {rules}, and nobody was asked; {way_out}")
    return {APPROVAL: str(rules)} if rules.set_at else {}


def known_rules(channel: Channel) -> Rules:
    """As `read_rules`. Raises GateError where nobody can tell what a move takes: then nothing moves."""
    try:
        return read_rules(channel)
    except ReleaseError as error:
        raise GateError(f"{channel} does not move: {error}") from None


def not_asked(channel: Channel) -> dict[str, str]:
    """What the record says of going back to what was live before, for which nobody is asked. Never raises."""
    try:
        return {APPROVAL: "not asked: back to what was live before"} if read_rules(channel).required else {}
    except ShipError:
        # A way out of an incident does not hang on it.
        return {}


def _decode(encoded: bytes, key: str, channel: Channel) -> Rules:
    try:
        if len(encoded) > LARGEST:
            raise ValueError(f"{len(encoded):,} bytes")
        document = json.loads(encoded)
        if document.pop("format") != _FORMAT:
            raise ValueError("another format")
        rules = Rules(**{**document, "approval": Approval(document["approval"])})
        # Terminals show it.
        if not all(isinstance(value, str) and value.isprintable() for value in asdict(rules).values()):
            raise ValueError("a value that is no printable text")
        if rules.encode() != encoded:
            raise ValueError("other keys or another spelling")
        if (rules.model, rules.channel) != (channel.model, channel.name):
            raise ValueError(f"it is of {rules.model} {rules.channel}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = on_one_line(f"{type(error).__name__}: {error}", 200)
        raise ReleaseError(
            f"{key}: expected what `ship channel set` writes, got {said}; whoever "
            f"owns the channel sets it anew with `ship channel set {channel.model} {channel.name} --approval …`"
        ) from None
    return rules
