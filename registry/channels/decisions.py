"""What retraining decided, each time it was asked: one immutable object for each decision.

They lie beside the history of the channel, which holds moves only: a retraining run that moved nothing is told here. A
decision that the bucket did not take waits in the folder of its run for the next run of the model. So does what is to
be said of a run that is killed before it can say anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from shipreader.records import MOST_MOVES, MOST_VERDICTS
from torchworker.durable import set_aside, write_durably
from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import ReleaseError, RequestError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.shown import on_one_line, whole
from train_and_ship.registry.bucket.keys import decisions_prefix
from train_and_ship.registry.bucket.transfer import in_parallel, put_immutable
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_history
from train_and_ship.registry.channels.timeline import live_at, utc_now
from train_and_ship.registry.identity import canonical_json, is_release_id, json_object, moment, require_name


class Verdict(StrEnum):
    """What retraining decided; written into records and tags."""

    SKIPPED = "skipped"
    """Nothing was trained."""
    PROMOTED = "promoted"
    """The candidate went live."""
    KEPT = "kept"
    """The candidate did not, and is the challenger."""
    ROLLING_OUT = "rolling out"
    """The candidate answers a share of the requests beside what is live."""
    STAGED = "staged"
    """The candidate waits: another one is being rolled out."""
    FAILED = "failed"
    """There is no candidate, or a bad one."""


SKIPPED, PROMOTED, KEPT, ROLLING_OUT, STAGED, FAILED = Verdict
CLOCKS_DIFFER = timedelta(days=1)
"""By how much the clock of a machine that decides may be ahead of the store's."""
LONGEST_TEXT = 10_000
"""Characters of a text in a record: one that quotes what others wrote could be longer than anybody reads."""
PASSED_OVER = 30
"""Decisions that cannot be read, behind which earlier ones are looked for."""
WAITING = "decision.json"
"""In the folder of a run: its decision, until the bucket takes it."""
_FORMAT = 1
_TIME = "%Y%m%dT%H%M%S.%fZ"
_NAME = re.compile(r"(\d{8}T\d{6}\.\d{6}Z)-[^/]*\.json", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One answer to the question whether there is anything better to put live."""

    model: str
    channel: str
    decision: Verdict
    why: str
    at: str = field(default_factory=utc_now)
    """UTC, ISO 8601 with milliseconds, by the clock of the machine that decided."""
    flow_run: str
    asked: str
    """Who or what asked: the schedule, a person, an event."""
    live: str = ""
    """The release that was live when it was asked; empty when none was."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """What is not as it was for the live release: code, data, config, environment, to how."""
    inputs: str = ""
    """Digest of code, data, configuration, environment and start: what the candidate was made of."""
    start: str = ""
    """The release whose weights training began with; empty when it began from scratch, or there was none."""
    candidate: str = ""
    mlflow_version: str = ""
    """Of the candidate."""
    seconds: float = 0.0
    """From the question to the answer."""
    streak: int = 0
    """How many times in a row it was skipped, this one included; 0 for any other answer."""

    def encode(self) -> bytes:
        """The record as canonical JSON, without passwords in addresses: everybody reads it who may see the channel.

        Texts are cut to LONGEST_TEXT characters.
        """
        texts: dict[str, Any] = {name: _cut(without_password(getattr(self, name))) for name in ("why", "asked")}
        texts["changed"] = {_cut(name): _cut(how) for name, how in self.changed.items()}
        return canonical_json({"format": _FORMAT, **asdict(self), **texts})


def _cut(text: str) -> str:
    return whole(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def record_decision(store: ObjectStore, decision: Decision, run: Path | None = None) -> None:
    """Writes; can be repeated with the same decision. run: folder of the run, in which nothing waits from then on."""
    put_immutable(store, _key(decision), decision.encode(), "another decision")
    if run is not None:
        (run / WAITING).unlink(missing_ok=True)


def _key(decision: Decision) -> str:
    time = f"{decided_at(decision):{_TIME}}"
    return f"{decisions_prefix(decision.model, decision.channel)}{time}-{decision.flow_run}.json"


def keep_until_recorded(run: Path, decision: Decision) -> None:
    """Leave a decision in the folder of its run, made when it is not there; `record_waiting` finds it."""
    make_folder(run)
    write_durably(run / WAITING, decision.encode())


def record_waiting(store: ObjectStore, runs: Path, but: Path | None = None) -> int:
    """Record what waits in the runs of a model; returns how many. One that does not know what was live is told.

    runs: folder of the model's runs; but: that of the run that asks, as no other one is at work. What a run recorded
    later than what waits is its word. Writes; can be repeated. A file that is no decision is set aside.
    """
    recorded = 0
    for path in sorted(path for path in runs.glob(f"*/{WAITING}") if path.parent != but):
        try:
            decision = _decode(path.read_bytes(), str(path))
        except ReleaseError as error:
            set_aside(path, str(error))
            continue
        recorded += 1
        if _has_later(store, decision):
            path.unlink()
            continue
        if not decision.live:
            channel = Channel(store, decision.model, decision.channel)
            live = live_at(read_history(channel), decided_at(decision))
            decision = replace(decision, live=live.release if live else "")
        record_decision(store, decision)
        path.unlink()
    return recorded


def _has_later(store: ObjectStore, decision: Decision) -> bool:
    own = f"-{decision.flow_run}.json"
    known = store.list_keys(decisions_prefix(decision.model, decision.channel))
    return any(key.endswith(own) and key > _key(decision) for key in known)


def read_decisions(channel: Channel, last: int) -> list[Decision]:
    """The last so many decisions, oldest first.

    What is no decision of this channel, or cannot be read, is passed over with a warning; behind PASSED_OVER of them no
    earlier ones are looked for. So is one of a time that has not come: it would be the last one for good.
    """
    prefix = decisions_prefix(channel.model, channel.name)
    listed = channel.store.list_objects(prefix)
    # Keys begin with the time, so their order is that of the decisions.
    keys = [key for key in sorted(listed) if _is_past(key.removeprefix(prefix), listed[key].modified)]
    problems: list[ReleaseError] = []

    def read(key: str) -> Decision | None:
        try:
            found = channel.store.get(key)
            if found is None:
                return None
            decision = _decode(found[0], key)
            if _key(decision) != key:
                raise ReleaseError(
                    f"{on_one_line(key)}: expected the decision of that time and run, "
                    f"got the one of {on_one_line(_key(decision))}"
                )
            return decision
        except ReleaseError as error:
            problems.append(error)
            return None

    found: list[Decision] = []
    while keys and len(found) < last and len(problems) <= PASSED_OVER:
        keys, asked = keys[: len(found) - last], keys[len(found) - last :]
        found = [*(decision for decision in in_parallel(read, asked) if decision is not None), *found]
    for problem in problems:
        _log.warning("%s: a decision cannot be read: %s", channel, problem)
    return found


def _is_past(name: str, written: datetime) -> bool:
    """Whether it is the name of a decision, of a time that had come when it was written by the store's clock."""
    named = _NAME.fullmatch(name)
    try:
        time = datetime.strptime(named[1], _TIME).replace(tzinfo=UTC) if named is not None else None
    except ValueError:
        return False
    return time is not None and time <= written + CLOCKS_DIFFER


def decided_at(decision: Decision) -> datetime:
    """When the answer was given."""
    return moment(decision.at)


def _decode(encoded: bytes, key: str) -> Decision:
    try:
        document = json_object(encoded)
        if document.pop("format") != _FORMAT:
            raise ValueError("another format")
        decision = Decision(**{**document, "decision": Verdict(document["decision"])})
        if len(decision.changed) > MOST_VERDICTS:
            raise ValueError(f"{len(decision.changed):,} changes")
        texts = [value for name, value in document.items() if name not in ("changed", "seconds", "streak")]
        texts += [text for item in decision.changed.items() for text in item]
        if not all(isinstance(text, str) for text in texts) or type(decision.seconds) not in (int, float):
            raise TypeError("a value of another type")
        if type(decision.streak) is not int or not 0 <= decision.streak <= MOST_MOVES:
            raise ValueError(f"streak {decision.streak}")
        if not all(is_release_id(one) for one in (decision.live, decision.start, decision.candidate) if one):
            raise ValueError("the id of a release that is none")
        moment(decision.at)
        require_name("model", decision.model)
        require_name("channel", decision.channel)
        return decision
    except (ValueError, TypeError, KeyError, AttributeError, RequestError) as error:
        said = on_one_line(f"{type(error).__name__}: {error}")
        raise ReleaseError(f"{on_one_line(key)}: expected the record of a decision, got {said}") from None
