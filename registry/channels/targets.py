"""What a rollback or a promotion of an existing release is to make live: chosen, and its bytes verified. Reads only.

All raise RequestError for what cannot be asked for, and ReleaseError for a release that is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train_and_ship.infra.errors import RequestError, ShipError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.releases import verify_release
from train_and_ship.registry.bucket.signing import require_signer
from train_and_ship.registry.channels.aliases import version_of
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import find_record
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.registry.channels.timeline import rollback_target
from train_and_ship.registry.identity import require_channel, require_new_channel
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.tracking.rest import model_registry

if TYPE_CHECKING:
    from train_and_ship.registry.kind import KindChange


@dataclass(frozen=True, kw_only=True)
class Target:
    """A release that is to go live on a channel, and what was live when that was decided."""

    channel: Channel
    release: str
    mlflow_version: str
    """Empty when nobody could tell."""
    live: Pointer | None
    """What it is to replace."""
    expects_live: bool
    """Given up when something else is live by then: nobody named the release, or this very move was approved."""
    manifest_sha256: str = ""
    """As of Named."""
    was_before: bool = False
    """Whether it is what a rollback without a name goes back to: what was live before. Nobody is asked about that."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A target and what was live, measured by one process on the same held-out samples."""

    live: str
    """The release that was live; empty when nothing was."""
    samples: int
    """How many; 0 where the samples are not within reach, so that only recorded numbers can be compared."""
    candidate: Mapping[str, float]
    against: Mapping[str, float]
    """The live release's numbers."""
    problem: str
    """Why the live release could not be measured; empty when it was."""
    contradictions: Sequence[KindChange] = ()
    """Where the live release scored far below its own record."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A target whose bytes are what its manifest says."""

    target: Target
    manifest: Manifest
    verdicts: Mapping[str, str]
    scored: Scored | None = None
    """None when nobody has run it."""
    approved: str = ""
    """Who is said to have said yes, in words; empty when nobody was asked."""


def choose_rollback(channel: Channel, to: str) -> Target:
    """What a rollback goes back to. Reads only. to: as of `ask_rollback`."""
    live = _live(channel)
    if to:
        return _target(channel, to, live)
    if live is None:
        raise RequestError(
            f"{channel.model}: nothing is live on {channel.name!r}, so there is nothing to go back from; use --to"
        )
    before = rollback_target(live, lambda generation: _record_of(channel, generation))
    if before is None:
        raise RequestError(
            f"{channel}: expected a release that was live before {live.release}, found none; name one with --to"
        )
    return Target(
        channel=channel,
        release=before.release,
        mlflow_version=before.mlflow_version,
        live=live,
        expects_live=True,
        manifest_sha256=before.manifest_sha256,
        was_before=True,
    )


def choose_promotion(channel: Channel, source: str) -> Target:
    """An existing release for a channel. Reads only. source: names it, as `named_release` takes it."""
    return _target(channel, source, _live(channel))


def verify_target(target: Target, *, read_back: bool = True, public_key: Path | None = None) -> Verified:
    """Check every byte of the target, or with read_back=False what its writer or the store says of it. Reads only.

    public_key: file (PEM) of the key that has to have signed it; None asks for no signature.
    """
    store = target.channel.store
    manifest = verify_release(
        store, target.channel.model, target.release, read_back=read_back, sha256=target.manifest_sha256 or None
    )
    how = "read back and hashed" if read_back else "checked by what is said of them"
    said = f"{len(manifest.files)} files, {manifest.total_bytes:,} bytes, {how}"
    signed = require_signer(store, manifest, public_key)
    return Verified(target=target, manifest=manifest, verdicts={"bytes": said, **signed})


def ask_rollback(channel: Channel, to: str, public_key: Path | None, *, read_back: bool = True) -> Verified:
    """Resolve, choose and verify what a rollback goes back to. Reads only.

    Args:
        channel: what is to move.
        to: names a release, as `named_release` takes it; empty for what was live before.
        public_key: as in `verify_target`.
        read_back: as in `verify_target`.
    """
    return verify_target(choose_rollback(channel, to), read_back=read_back, public_key=public_key)


def ask_promotion(channel: Channel, source: str, public_key: Path | None) -> Verified:
    """Resolve, choose and verify the release that `source` names, by what the store says of it. Reads only.

    Whoever tries it before it goes live reads its files. Arguments: as of `ask_rollback`.
    """
    return verify_target(choose_promotion(channel, source), read_back=False, public_key=public_key)


def described(live: Pointer | None) -> str:
    """One line on what is live: release, since when, by whom and why."""
    if live is None:
        return "nothing is live"
    who, why = on_one_line(live.moved_by), on_one_line(live.reason)
    since = f"generation {live.generation}, {live.moved_at}, {who}: {why}"
    return f"release {live.release} is live ({since})"


def _live(channel: Channel) -> Pointer | None:
    require_channel(channel.name)
    live = read_pointer(channel)
    if live is None:
        require_new_channel(channel.name)
    return live


def _target(channel: Channel, text: str, live: Pointer | None) -> Target:
    named = named_release(channel, text)
    release = named.release
    if live is not None and live.release == release:
        raise RequestError(f"{channel}: {described(live)} already; nothing was moved")
    try:
        version = version_of(model_registry(channel.tracking_uri), channel.model, release, "") or ""
    except ShipError:
        # The record then names none, and the alias is found by the release, once MLflow is back.
        version = ""
    return Target(
        channel=channel,
        release=release,
        mlflow_version=version,
        live=live,
        expects_live=False,
        manifest_sha256=named.manifest_sha256,
    )


def _record_of(channel: Channel, generation: int) -> Pointer:
    move = find_record(channel, generation)
    if move is None:
        raise RequestError(
            f"{channel}: the record of generation {generation} is lost, so what was live before is not known; "
            f"name a release with --to, or try `ship doctor {channel.model}` first"
        )
    return move
