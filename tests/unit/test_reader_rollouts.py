"""The reader's own reading of a rollout: what cannot be is refused with the key and what was expected of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shipreader.errors import ReaderError, RefusedError
from shipreader.records import rollout_key
from shipreader.rollouts import Rollout, decode_rollout

GOOD: dict[str, Any] = {
    "format": 1, "model": "digits", "channel": "prod", "generation": 7, "extends": "c" * 32, "release": "d" * 20,
    "manifest_sha256": "e" * 64, "number": 3, "rollout": "a" * 32, "nonce": "b" * 32, "state": "running", "outcome": "",
    "steps": [100, 10_000], "step": 0, "share": 100, "every": 600, "deadline": "", "key": "user_id", "fallback_ms": 250,
    "shadow": False, "moved_at": "2026-12-01T04:00:00Z", "verdicts": {},
}  # fmt: skip


def decoded(**changes: Any) -> Rollout:
    return decode_rollout(json.dumps({**GOOD, **changes}).encode(), "digits", "prod")


def test_what_a_reader_needs_is_read_and_what_it_does_not_know_is_not() -> None:
    assert decoded(verdicts=None, later={"a": [1]}) == Rollout(
        generation=7, extends="c" * 32, release="d" * 20, manifest_sha256="e" * 64, number=3, rollout="a" * 32,
        state="running", share=100, key="user_id", fallback_ms=250, shadow=False, moved_at="2026-12-01T04:00:00Z",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({"channel": "staging"}, "expected the rollout of digits prod, got 'digits' 'staging'"),
        ({"generation": 0}, "generation: expected 1 to 99,999,999, got 0"),
        ({"generation": True}, "generation: expected"),
        ({"generation": 7.0}, "generation: expected"),
        ({"extends": ""}, "extends: expected the nonce"),
        ({"release": "../../../etc"}, "release: expected a release id"),
        ({"release": "d" * 20 + "\n"}, "release: expected a release id"),
        ({"manifest_sha256": None}, "manifest_sha256: expected a SHA-256, got None"),
        ({"number": 10_000}, "number: expected 1 to 9,999"),
        ({"state": "paused"}, "state: expected running or ended, got 'paused'"),
        ({"state": ["running"]}, "state: expected"),
        ({"share": 10_001}, "share: expected 1 to 10,000"),
        ({"share": 0}, "share: expected"),
        ({"share": "5%"}, "share: expected"),
        ({"key": "a\x1b[2J"}, "key: expected the name of a parameter"),
        ({"key": "k" * 1025}, "key: expected"),
        ({"fallback_ms": -1}, "fallback_ms: expected 0 to 3,600,000"),
        ({"fallback_ms": 1e300}, "fallback_ms: expected"),
        ({"shadow": 1}, "shadow: expected true or false, got 1"),
        ({"moved_at": 5}, "moved_at: expected a time"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=rf"^models/digits/rollouts/prod\.json: {said}"):
        decoded(**changes)


@pytest.mark.parametrize("encoded", [b"", b"null", b"[" * 60_000, b'{"format":1}', b"\xff", b'{"format": NaN}'])
def test_what_is_no_rollout_is_refused(encoded: bytes) -> None:
    with pytest.raises(RefusedError, match=r"models/digits/rollouts/prod\.json: "):
        decode_rollout(encoded, "digits", "prod")


def test_the_key_is_the_rollouts_also_of_a_model_that_is_called_like_a_folder() -> None:
    assert rollout_key("channels", "channels") == "models/channels/rollouts/channels.json"
    with pytest.raises(ReaderError, match="model name"):
        rollout_key("a/b", "prod")
