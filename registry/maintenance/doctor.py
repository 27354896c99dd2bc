"""Everything that may be wrong with a model in the bucket and in MLflow, and what can be mended without a decision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from train_and_ship.infra.errors import ReleaseError, RequestError, ServiceError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.catalog import channels
from train_and_ship.registry.bucket.keys import (
    claims_prefix,
    in_release,
    is_of_view,
    releases_prefix,
    views_prefix,
)
from train_and_ship.registry.bucket.projects import broken_projects
from train_and_ship.registry.bucket.releases import verify_release
from train_and_ship.registry.channels.aliases import sync_aliases
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history, record_key
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import choose_rollback
from train_and_ship.registry.channels.timeline import numbers
from train_and_ship.registry.diff import read_release_record
from train_and_ship.registry.identity import is_release_id
from train_and_ship.registry.maintenance.history_repair import broken_links, repair_history
from train_and_ship.registry.release.manifest import MANIFEST
from train_and_ship.registry.rollouts.moves import settle, went_live_though_given_up
from train_and_ship.registry.rollouts.record import read_rollout
from train_and_ship.registry.tracking.pending_reports import send_reports

NOBODY_WATCHES = timedelta(minutes=10)
"""After so long beyond its time a rollout that did not go on is seen by nobody."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    what: str
    can_mend: bool
    """It was mended, or would be without dry_run; False leaves it to people."""


def examine(
    store: ObjectStore,
    model: str,
    tracking_uri: str,
    *,
    runs: Path | None = None,
    public_key: Path | None = None,
    dry_run: bool = False,
) -> Iterator[Finding]:
    """Look at pointers, histories, releases, deployed projects, MLflow's aliases and the reports that it lacks.

    What can be mended is.

    Args:
        store: the bucket.
        model: the model to look at.
        tracking_uri: MLflow's.
        runs: folder of the model's runs on this machine, where reports wait.
        public_key: whose signatures of deployed projects have to hold.
        dry_run: write nothing.

    Raises:
        SettingsError: the bucket or its credentials cannot be used.
        ServiceError: the bucket does not answer.
    """
    known = [Channel(store, model, name, tracking_uri) for name in channels(store, model)]
    for channel in known:
        try:
            yield from _channel(channel, dry_run)
            yield from _rollout(channel, dry_run)
        except (ReleaseError, SettingsError) as error:
            # Credentials that the bucket does not know would have ended the listing of channels.
            yield Finding(what=f"{channel}: not examined to the end: {error}", can_mend=False)
    yield from _incomplete(store, model)
    yield from _foreign(store, model)
    for told in broken_projects(store, model, public_key):
        yield Finding(what=told, can_mend=False)
    for channel in known:
        yield from _aliases(channel, dry_run)
    if runs is not None:
        yield from _reports(runs, tracking_uri, dry_run)


def _channel(channel: Channel, dry_run: bool) -> Iterator[Finding]:
    repaired = repair_history(channel, dry_run=dry_run)
    for generation in repaired.exact:
        yield Finding(what=f"{channel}: the record of generation {generation} was missing", can_mend=True)
    for generation in repaired.partial:
        told = "its neighbours tell the release; who moved, when and why cannot be recovered"
        yield Finding(what=f"{channel}: the record of generation {generation} is lost; {told}", can_mend=True)
    for generation in repaired.taken:
        key = record_key(channel.model, channel.name, generation)
        told = f"{key} holds something else, which is never replaced; without it `ship doctor` writes the record again"
        yield Finding(what=f"{channel}: the record of generation {generation} is not there: {told}", can_mend=False)
    for lost in repaired.lost:
        if len(lost) == 1:
            told = f"so is that of generation {lost.stop}; what was live then cannot be recovered"
            what = f"the record of generation {lost.start} is lost, and {told}"
        else:
            what = f"the records of generations {numbers([lost])} are lost; what was live then cannot be recovered"
        yield Finding(what=f"{channel}: {what}", can_mend=False)
    moves = read_history(channel)
    for contradiction in broken_links(moves):
        yield Finding(what=f"{channel}: {contradiction}", can_mend=False)
    live = read_pointer(channel)
    if live is None:
        asked = f"`ship rollback {channel.model} --channel {channel.name} --to {moves[-1].release[:8]} --why …`"
        back = f"{asked} puts the last one back"
        yield Finding(
            what=f"{channel}: nothing is live after {len(moves)} moves: its pointer is gone; {back}", can_mend=False
        )
        return
    if problem := _broken(channel, live.release, live.manifest_sha256):
        way_out = f"`ship rollback {channel.model} --channel {channel.name} --why …`, or publish it again"
        yield Finding(what=f"{channel}: the live release is broken: {problem}; {way_out}", can_mend=False)
    else:
        record = read_release_record(channel.store, channel.model, live.release, sha256=live.manifest_sha256)
        for said in record.not_understood():
            told = f"the live release tells nothing by it, and the next one is compared without: {said}"
            yield Finding(what=f"{channel}: {told}", can_mend=False)
    try:
        before = choose_rollback(channel, "")
    except (ReleaseError, RequestError):
        # There is none, or its record is lost, which was said.
        return
    if problem := _broken(channel, before.release, before.manifest_sha256):
        told = f"release {before.release}, to which `ship rollback` goes back, is broken: {problem}"
        way_out = "publish it again, or name another one with --to when it comes to that"
        yield Finding(what=f"{channel}: {told}; {way_out}", can_mend=False)


def _rollout(channel: Channel, dry_run: bool) -> Iterator[Finding]:
    rollout, live = read_rollout(channel), read_pointer(channel)
    if rollout is None or live is None:
        return
    if went_live_though_given_up(rollout, live):
        what = (
            f"{channel}: release {live.release} went live in the moment in which its rollout was ended "
            f"({rollout.outcome.value}); `ship rollback {channel.model} --channel {channel.name} --why …` takes it off"
        )
        yield Finding(what=what, can_mend=False)
    if not rollout.is_running:
        return
    if not rollout.extends_pointer(live):
        if not dry_run:
            settle(channel, who())
        what = f"{channel}: another pointer has ended the rollout of release {rollout.release}, which did not say so"
        yield Finding(what=what, can_mend=True)
        return
    asked = f"`ship rollout {channel.model} --to {channel.name}"
    if problem := _broken(channel, rollout.release, rollout.manifest_sha256):
        told = f"the release that is rolled out is broken: {problem}; {asked} --stop --why …` ends it"
        yield Finding(what=f"{channel}: {told}", can_mend=False)
    if channel.store.now() > rollout.next_at + NOBODY_WATCHES:
        told = f"nobody watches the rollout of {rollout}, which could have gone on at {rollout.next_at.isoformat()}"
        way_out = f"the flow `watch` does, where `ship up` has deployed it; {asked} --next --why …` goes on by hand"
        yield Finding(what=f"{channel}: {told}; {way_out}", can_mend=False)


def _broken(channel: Channel, release: str, sha256: str) -> str:
    """What is wrong with a release; empty for one that is sound. sha256: of its manifest, where a record says so."""
    try:
        verify_release(channel.store, channel.model, release, sha256=sha256 or None)
    except (ReleaseError, SettingsError) as error:
        # One object may be forbidden, or under a key of its writer's own.
        return str(error)
    return ""


def _incomplete(store: ObjectStore, model: str) -> Iterator[Finding]:
    prefix = releases_prefix(model)
    sizes: Counter[str] = Counter()
    complete: set[str] = set()
    stray, first = 0, ""
    # Once through all: whoever publishes decides how many there are.
    for key, size in store.list_keys(prefix).items():
        if (found := in_release(model, key)) is None:
            # Consoles make an empty object of a folder.
            if size or not key.endswith("/"):
                stray, first = stray + 1, first or key
            continue
        release, name = found
        sizes[release] += size
        if name == MANIFEST:
            complete.add(release)
    if stray:
        what = (
            f"{model}: objects below {prefix} that are of no release: {stray:,}, first {on_one_line(first)}; nothing "
            "reads them and `ship gc` leaves them: delete them by hand"
        )
        yield Finding(what=what, can_mend=False)
    for release in sorted(name for name in sizes if name not in complete):
        what = (
            f"{model}: release {release} is incomplete ({sizes[release]:,} bytes without a manifest): an upload in "
            "progress, or one that died; publishing it again completes it"
        )
        yield Finding(what=what, can_mend=False)


def _foreign(store: ObjectStore, model: str) -> Iterator[Finding]:
    """What lies where claims and views do and is none: nobody else tells of it, and Triton looks into all of a view."""
    claims, views = claims_prefix(model), views_prefix(model)

    def is_claim(key: str) -> bool:
        return key.endswith(".json") and is_release_id(key.removeprefix(claims).removesuffix(".json"))

    for prefix, is_ours in ((claims, is_claim), (views, partial(is_of_view, model))):
        stray, first = 0, ""
        for key, size in store.list_keys(prefix).items():
            if (size or not key.endswith("/")) and not is_ours(key):
                stray, first = stray + 1, first or key
        if stray:
            what = (
                f"{model}: objects below {prefix} that train-and-ship does not write: {stray:,}, first "
                f"{on_one_line(first)}; delete them by hand unless you know whose they are"
            )
            yield Finding(what=what, can_mend=False)


def _aliases(channel: Channel, dry_run: bool) -> Iterator[Finding]:
    try:
        done = sync_aliases(channel, dry_run=dry_run)
    except ReleaseError:
        # Said already.
        return
    except (ServiceError, SettingsError) as error:
        yield Finding(what=f"{channel}: the MLflow aliases could not be compared: {error}", can_mend=False)
        return
    for change in done.changed:
        yield Finding(what=change, can_mend=True)
    for missing in done.missing:
        yield Finding(what=missing, can_mend=False)


def _reports(runs: Path, tracking_uri: str, dry_run: bool) -> Iterator[Finding]:
    try:
        for told in send_reports(runs, tracking_uri, dry_run=dry_run):
            yield Finding(what=told, can_mend=True)
    except (ServiceError, SettingsError) as error:
        yield Finding(what=f"a report waits in {runs} for MLflow: {error}", can_mend=False)
