"""A candidate that is tried beside what is live: what the bucket says of it, and how it comes to this machine.

The object is `models/<model>/rollouts/<channel>.json`; registry/channels of train-and-ship writes it. It counts while
it is running and names the pointer that this reader follows, and is void under any other: whoever moves the channel, by
any version, has ended it. Nothing about it is ever an error for what is live.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shipreader.bucket import Bucket, NotModifiedError, is_forbidden
from shipreader.errors import ReaderError, RefusedError, UnavailableError
from shipreader.local import LocalFolder
from shipreader.records import (
    MOST_MOVES,
    RELEASE_ID,
    SHA256,
    Manifest,
    Pointer,
    Release,
    is_word,
    json_object,
    rollout_key,
)
from shipreader.releases import Releases
from shipreader.retries import Failure
from shipreader.split import LONGEST_KEY, SLOTS

ROLLOUT_BYTES = 64 * 2**10
"""A longer one is not read."""
MOST_CHANGES = 9_999
"""Of one rollout: its versions are sorted by four digits."""
LONGEST_FALLBACK_MS = 3_600_000
STATES = ("running", "ended")


@dataclass(frozen=True)
class Rollout:
    """What the bucket says of a candidate. Keys that a reader does not need are not read."""

    generation: int
    """Of the pointer that it extends."""
    extends: str
    """That pointer's nonce."""
    release: str
    manifest_sha256: str
    number: int
    """1 for the first version of the object in this rollout, one more for each change."""
    rollout: str
    """The same in all versions: 32 hexadecimal digits."""
    state: str
    """`running` or `ended`."""
    share: int
    """Hundredths of a percent of all slots, 1 to 10,000."""
    key: str
    """Of a request: the parameter that decides which release answers."""
    fallback_ms: int
    """A candidate that has not answered by then is passed over; 0 for no deadline."""
    shadow: bool
    """Whether the live release answers all, and the candidate is asked beside it."""
    moved_at: str
    """When this version was written: UTC, ISO 8601, by its writer's clock."""


@dataclass(frozen=True)
class Candidate:
    """A verified release that is tried beside what is live."""

    release: Release
    """In a folder of its own; `release.generation` is the one that it extends."""
    share: int
    """Hundredths of a percent: it answers where `slot_of(model, key) < share`."""
    key: str
    """The name of the request's parameter whose value is the key, such as `user_id`."""
    fallback_ms: int
    """Milliseconds that it may take; 0 for no limit."""
    shadow: bool
    """Whether it is asked on the side, and answers nobody."""
    rollout: str
    """The rollout's id."""
    number: int
    """How often the rollout has changed: 1 at its start."""

    def __str__(self) -> str:
        """Which one it is, and who gets it, on one line."""
        what = "is asked on the side for" if self.shadow else "answers"
        return f"candidate {self.release.id} {what} {self.share / 100:g} % by {self.key}"


def decode_rollout(encoded: bytes, model: str, channel: str) -> Rollout:
    """Raises RefusedError unless it is the rollout of this model's channel, in a format that this reader knows."""
    key = rollout_key(model, channel)
    document = json_object(encoded, key)
    if (document.get("model"), document.get("channel")) != (model, channel):
        raise RefusedError(
            f"{key}: expected the rollout of {model} {channel}, "
            f"got {str(document.get('model'))[:80]!r} {str(document.get('channel'))[:80]!r}"
        )

    def take(name: str, expected: str, good: Callable[[Any], bool]) -> Any:
        value = document.get(name)
        if not good(value):
            raise RefusedError(f"{key}: {name}: expected {expected}, got {repr(value)[:80]}")
        return value

    def whole(name: str, least: int, most: int) -> int:
        good = take(name, f"{least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most)
        return int(good)

    def text(name: str, expected: str, good: Callable[[str], object] = lambda value: True) -> str:
        return str(take(name, expected, lambda value: is_word(value) and bool(good(value))))

    return Rollout(
        generation=whole("generation", 1, MOST_MOVES),
        extends=text("extends", "the nonce of a pointer"),
        # It becomes part of keys and paths.
        release=text("release", "a release id", RELEASE_ID.fullmatch),
        manifest_sha256=text("manifest_sha256", "a SHA-256", SHA256.fullmatch),
        number=whole("number", 1, MOST_CHANGES),
        rollout=text("rollout", "the id of a rollout"),
        state=text("state", " or ".join(STATES), STATES.__contains__),
        share=whole("share", 1, SLOTS),
        key=take("key", "the name of a parameter", _is_name_of_key),
        fallback_ms=whole("fallback_ms", 0, LONGEST_FALLBACK_MS),
        shadow=bool(take("shadow", "true or false", lambda value: isinstance(value, bool))),
        moved_at=text("moved_at", "a time"),
    )


class Rollouts:
    """Those of one channel, as one reader follows them."""

    def __init__(
        self,
        bucket: Bucket,
        local: LocalFolder,
        releases: Releases,
        model: str,
        channel: str,
        first_pause: float,
    ) -> None:
        """What is followed, and where it goes.

        Args:
            bucket: it holds the object.
            local: the folder of the channel.
            releases: bring the candidate.
            model: its name in the bucket.
            channel: the channel.
            first_pause: seconds until a candidate that was refused is asked for again; they double.
        """
        self._bucket, self._local, self._releases = bucket, local, releases
        self._key = rollout_key(model, channel)
        self._model, self._channel, self._first_pause = model, channel, first_pause
        self._etag: str | None = None
        self._found: Rollout | RefusedError | None = None
        """What lies there under this ETag."""
        self._refused: Failure | None = None
        self.candidate: Candidate | None = None
        """What is tried; None while there is nothing, or it cannot be had."""
        self.problem = ""
        """Why a rollout that runs is not followed."""
        self.unseen = ""
        """Why nobody knows whether there is one."""

    def void_unless(self, pointer: Pointer) -> None:
        """Let go of the candidate when the channel has another pointer than it extends."""
        if (found := self._found) is None or isinstance(found, RefusedError) or not _extends(found, pointer):
            self.candidate, self.problem = None, ""

    def look(
        self,
        pointer: Pointer,
        live: Release,
        stays: set[str],
        accept: Callable[[Release], None],
        interrupt: Callable[[], None],
    ) -> None:
        """Follow the object once; `candidate` and `problem` say what came of it. In the folder's lock.

        Args:
            pointer: what the channel says; it is followed already.
            live: the release that it names.
            stays: ids of releases that stay in this folder; none of them is replaced by another of its name.
            accept: raises RefusedError for a candidate that this machine does not take.
            interrupt: called while files come; what it raises breaks that off.
        """
        try:
            found = self._read()
            if found is None or found.state != "running" or not _extends(found, pointer):
                self.candidate, self.problem = None, ""
            elif (now := self.candidate) is not None and _is_of(now, found):
                # It is here; the share and how it is asked may have changed.
                self.candidate, self.problem = _candidate(found, now.release), ""
            else:
                self.candidate = None
                self._bring(found, pointer, live, stays, accept, interrupt)
        except (ReaderError, OSError) as error:
            if not isinstance(error, UnavailableError):
                # Of one that is tried already nobody knows better while the bucket is away.
                self.candidate = None
            self.problem = str(error)

    def _read(self) -> Rollout | None:
        try:
            answer = self._bucket.changed(self._key, self._etag, ROLLOUT_BYTES)
        except NotModifiedError:
            self.unseen = ""
            if isinstance(self._found, RefusedError):
                raise self._found from None
            return self._found
        except UnavailableError as error:
            if not is_forbidden(error):
                raise
            # Without the right to list, what there is not is forbidden; so is all of it by a policy of before.
            self._etag = self._found = None
            self.unseen = f"rollouts are not followed: {error}"
            return None
        except RefusedError as error:
            self._etag, self._found = None, error
            raise
        self.unseen = ""
        if answer is None:
            self._etag = self._found = None
            return None
        try:
            self._found = decode_rollout(answer[0], self._model, self._channel)
        except RefusedError as error:
            self._found = error
            raise
        finally:
            self._etag = answer[1]
        return self._found

    def _bring(
        self,
        found: Rollout,
        pointer: Pointer,
        live: Release,
        stays: set[str],
        accept: Callable[[Release], None],
        interrupt: Callable[[], None],
    ) -> None:
        what = (found.rollout, found.release, found.manifest_sha256)
        if self._refused is not None and self._refused.rests(what):
            raise self._refused.error
        try:
            if found.release == live.id:
                raise RefusedError(f"{self._key}: expected another release than the live one, got {found.release}")
            named = replace(pointer, release=found.release, manifest_sha256=found.manifest_sha256)
            if found.release in stays:
                # Another manifest of it would take the place of the one that is here.
                self._local.verified(named)
            manifest = self._releases.bring(
                named, lambda manifest: _require_same_signature(manifest, live.manifest, self._key), interrupt
            )
            folder = self._local.release(found.release)
            release = Release(self._channel, found.generation, folder, manifest, found.moved_at, found.rollout)
            accept(release)
        except (RefusedError, UnavailableError, OSError) as error:
            if not isinstance(error, UnavailableError) or is_forbidden(error):
                self._refused = Failure.after(self._refused, what, error, self._first_pause)
            raise
        self._local.note_candidate(found.release, found.generation)
        self._local.prune(stays | {found.release})
        self._refused = None
        self.candidate, self.problem = _candidate(found, release), ""


def _is_of(candidate: Candidate, found: Rollout) -> bool:
    return (candidate.rollout, candidate.release.id) == (found.rollout, found.release)


def _is_name_of_key(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_KEY and value.isprintable()


def _extends(found: Rollout, pointer: Pointer) -> bool:
    return (found.generation, found.extends) == (pointer.generation, pointer.nonce)


def _candidate(found: Rollout, release: Release) -> Candidate:
    return Candidate(release, found.share, found.key, found.fallback_ms, found.shadow, found.rollout, found.number)


def _require_same_signature(candidate: Manifest, live: Manifest, key: str) -> None:
    for side in ("inputs", "outputs"):
        if candidate.signature.get(side) != live.signature.get(side):
            raise RefusedError(
                f"{key}: expected a candidate with the {side} of the live release, got {candidate.release} with others"
            )
