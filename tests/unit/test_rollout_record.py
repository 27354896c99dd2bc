"""The record of a rollout: what it holds, and what is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.rollouts import a_rollout
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.identity import canonical_json
from train_and_ship.registry.rollouts.record import Outcome, State, decode_rollout

KEY = "models/digits/rollouts/prod.json"


def changed(**changes: Any) -> bytes:
    return canonical_json({**json.loads(a_rollout().encode()), **changes})


def test_a_record_says_what_readers_were_promised_and_is_read_back_as_it_was() -> None:
    rollout = a_rollout(step=1, stop_if={"errors": "+0.5%"}, verdicts={"accuracy": "0.98"}, shadow=True)
    document = json.loads(rollout.encode())
    agreed = (
        "format model channel generation extends release manifest_sha256 number rollout nonce state outcome steps step "
        "share every deadline key fallback_ms shadow stop_if observe started_at moved_at moved_by reason flow_run "
        "mlflow_version verdicts"
    )
    assert set(document) == {*agreed.split(), "why"}
    assert (document["format"], document["share"], document["steps"]) == (1, 500, [100, 500, 10_000])
    assert (document["state"], document["outcome"]) == ("running", "")
    assert decode_rollout(rollout.encode(), KEY) == rollout


def test_keys_of_a_later_version_are_handed_on_as_they_are() -> None:
    read = decode_rollout(changed(segments=["country"]), KEY)
    assert read.further == {"segments": ["country"]}
    assert json.loads(replace(read, step=2).encode())["segments"] == ["country"]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"model": "../digits"},
        {"generation": 0},
        {"generation": True},
        {"number": 10_000},
        {"release": "AB" * 10},
        {"manifest_sha256": "cd"},
        {"nonce": "x"},
        {"state": "paused"},
        {"state": "ended"},
        {"outcome": "promoted"},
        {"steps": []},
        {"steps": [500, 100, 10_000]},
        {"steps": [100, 500]},
        {"steps": [0, 10_000]},
        {"steps": [100.0, 10_000]},
        {"steps": [100] * 101},
        {"step": 3},
        {"step": -1},
        {"share": 500},
        {"every": 0},
        {"every": 10**12},
        {"deadline": "tomorrow"},
        {"deadline": "2026-11-01T12:00:00+00:00"},
        {"moved_at": "2026-12-01T12:00:00"},
        {"key": ""},
        {"key": "user\nid"},
        {"fallback_ms": -1},
        {"shadow": 1},
        {"stop_if": []},
        {"verdicts": {"accuracy": 1}},
        {"reason": None},
    ],
    ids=str,
)
def test_what_no_rollout_says_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ReleaseError, match=r"models/digits/rollouts/prod\.json: expected"):
        decode_rollout(changed(**changes), KEY)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"{" * 10_000, b'{"format": 1}', changed() + b" "])
def test_what_is_no_record_is_refused(body: bytes) -> None:
    with pytest.raises(ReleaseError, match="expected"):
        decode_rollout(body, KEY)


def test_it_is_void_under_any_pointer_but_the_one_that_it_extends() -> None:
    rollout = a_rollout()
    live = Pointer(
        model="digits", channel="prod", generation=7, release="00" * 10, manifest_sha256="", previous=None,
        nonce=rollout.extends, moved_at="", moved_by="", reason="", flow_run="", mlflow_version="",
    )  # fmt: skip
    assert rollout.stands_under(live)
    assert not rollout.stands_under(replace(live, generation=8))
    assert not rollout.stands_under(replace(live, nonce="another"))
    assert not rollout.stands_under(None)
    assert not replace(rollout, state=State.ENDED, outcome=Outcome.UNDECIDED).stands_under(live)
