"""A release wants to go live on a channel whose owner says that a person decides, without a person, or by a name."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from tests.support.fixture_types import Ship
from tests.support.releases import CHANNEL, MODEL, MOVER, NOWHERE, move, published, replace_object, rolled_back
from tests.support.ship_here import ship_here
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.iam import Role, policy
from train_and_ship.registry.bucket.keys import rules_key
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import promote_existing, roll_back
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.rules import Approval, Rules, read_rules, require_approved, set_rules
from train_and_ship.registry.channels.targets import choose_promotion, choose_rollback, verify_target
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.tasks import approval
from train_and_ship.tasks.results import Answer


@pytest.fixture
def channel(object_store: ObjectStore) -> Channel:
    return Channel(object_store, MODEL, CHANNEL, NOWHERE)


@pytest.fixture
def releases(object_store: ObjectStore, channel: Channel, tmp_path: Path) -> list[Manifest]:
    """Three, of which two were live one after the other; from then on a person decides."""
    made = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    for manifest in made[:2]:
        move(object_store, manifest)
    set_rules(channel, Approval.REQUIRED, "ada@host", "customers see it")
    return made


@pytest.fixture
def ship(capsys: pytest.CaptureFixture[str]) -> Ship:
    return lambda *words: ship_here(capsys, *words, MLFLOW_TRACKING_URI=NOWHERE)


def live(channel: Channel) -> str:
    pointer = read_pointer(channel)
    return pointer.release if pointer is not None else ""


def test_the_commands_refuse_to_move_it_and_say_how_a_person_is_asked(
    ship: Ship, channel: Channel, releases: list[Manifest]
) -> None:
    first, second, third = releases
    for words, asks in (
        (("promote", MODEL, "--from", third.release, "--why", "now", "--no-gates"), f"promote -p model={MODEL} -p"),
        (("rollback", MODEL, "--to", first.release, "--why", "now"), f"rollback -p model={MODEL} -p"),
    ):
        ended = ship(*words)
        assert ended.status == 2 and "Traceback" not in ended.text
        assert "approval is required by the channel (ada@host, " in ended.errors and "customers see it" in ended.errors
        assert f"`prefect deployment run {asks}" in ended.errors
        assert live(channel) == second.release


def test_what_was_live_before_is_back_at_once_and_the_record_says_that_nobody_was_asked(
    ship: Ship, channel: Channel, releases: list[Manifest]
) -> None:
    assert ship("rollback", MODEL, "--why", "errors since 3").status == 0
    pointer = read_pointer(channel)
    assert pointer is not None and pointer.release == releases[0].release
    assert pointer.verdicts["approval"] == "not asked: back to what was live before"


@pytest.mark.parametrize("broken", [b"", b"{}", b"[" * 100_000, b'{"approval":"none"}'])
def test_rules_that_nobody_can_read_keep_it_where_it_is_but_not_from_going_back(
    object_store: ObjectStore, channel: Channel, releases: list[Manifest], ship: Ship, broken: bytes
) -> None:
    replace_object(object_store, rules_key(MODEL, CHANNEL), broken)
    with pytest.raises(ReleaseError, match="whoever owns the channel sets it anew"):
        read_rules(channel)
    with pytest.raises(GateError, match=r"digits prod does not move: models/digits/rules/prod\.json"):
        rolled_back(object_store, releases[2].release)
    assert rolled_back(object_store).release == releases[0].release
    assert ship("channel", "set", MODEL, CHANNEL, "--approval", "required").status == 0
    assert read_rules(channel).required


def test_rules_of_another_channel_are_none_of_this_one(
    object_store: ObjectStore, channel: Channel, releases: list[Manifest]
) -> None:
    staging = set_rules(Channel(object_store, MODEL, "staging"), Approval.NONE, "eve", "")
    replace_object(object_store, rules_key(MODEL, CHANNEL), staging.encode())
    with pytest.raises(GateError, match="it is of digits staging"):
        require_approved(channel, "", "")


def test_a_rule_that_is_set_while_a_release_is_tried_counts(channel: Channel, releases: list[Manifest]) -> None:
    set_rules(channel, Approval.NONE, "ada", "")
    forward = verify_target(choose_promotion(channel, releases[2].release), read_back=False)
    back = verify_target(choose_rollback(channel, releases[2].release), read_back=False)
    set_rules(channel, Approval.REQUIRED, "ada", "")
    with pytest.raises(GateError, match="nobody was asked"):
        promote_existing(forward, MOVER, gates=False)
    with pytest.raises(GateError, match="nobody was asked"):
        roll_back(back, MOVER)
    assert live(channel) == releases[1].release


def test_two_who_set_it_at_once_do_not_undo_each_other(
    object_store: ObjectStore, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = object_store.get

    def meanwhile(key: str) -> tuple[bytes, str] | None:
        found = get(key)
        monkeypatch.setattr(object_store, "get", get)
        set_rules(channel, Approval.REQUIRED, "grace", "first")
        return found

    monkeypatch.setattr(object_store, "get", meanwhile)
    with pytest.raises(RequestError, match="somebody else has set it meanwhile"):
        set_rules(channel, Approval.NONE, "ada", "second")
    assert read_rules(channel).set_by == "grace"


def test_the_record_says_what_was_required_and_who_is_said_to_have_said_yes(
    channel: Channel, releases: list[Manifest]
) -> None:
    answer = Answer(
        approved=True, said="by someone said to be grace: fine", account="grace@desk", required=str(read_rules(channel))
    )
    verified = verify_target(choose_promotion(channel, releases[2].release), read_back=False)
    verified = dataclasses.replace(verified, approved=answer.said, verdicts={**verified.verdicts, **answer.in_words()})
    pointer = promote_existing(verified, MOVER, gates=False)
    assert pointer.verdicts["approved"] == "by someone said to be grace: fine"
    assert pointer.verdicts["approved from"] == "grace@desk" and "asked from" not in pointer.verdicts
    assert pointer.verdicts["approval"].startswith("required by the channel (ada@host, 20")


def test_a_channel_without_rules_moves_as_before_and_says_what_it_takes(
    object_store: ObjectStore, channel: Channel, ship: Ship, tmp_path: Path
) -> None:
    assert read_rules(channel) == Rules(model=MODEL, channel=CHANNEL)
    move(object_store, published(object_store, tmp_path / "release"))
    assert "digits prod: approval not required" in ship("channel", "show", CHANNEL).output
    assert require_approved(channel, "", "") == {}
    said = ship("channel", "set", CHANNEL, "--approval", "required", "--why", "customers\nsee it")
    assert said.status == 0 and ": customers see it)" in said.output
    shown = json.loads(ship("channel", "show", MODEL, CHANNEL, "--json").output)
    assert (shown["approval"], shown["why"]) == ("required", "customers see it")
    # A name that was mistyped would guard nothing.
    assert ship("channel", "set", "digit", CHANNEL, "--approval", "required").status == 2
    assert ship("channel", "set", "later", CHANNEL, "--approval", "required", "--new").status == 0


@pytest.mark.parametrize("yes", [True, False])
def test_whoever_asked_for_a_move_cannot_say_yes_to_it_but_no(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    asked: list[str] = []
    answers = [
        approval.Approval(approve=yes, by="somebody else", account="ada@host"),
        approval.Approval(approve=True, by="grace", account="grace@desk"),
    ]

    class Question:
        def __init__(self, question: str) -> None:
            asked.append(question)

        async def answer(self) -> approval.Approval:
            return answers[len(asked) - 1]

    class Log:
        def warning(self, *said: object) -> None: ...

    monkeypatch.setattr(approval, "_Question", Question)
    monkeypatch.setattr(approval, "get_run_logger", Log)
    answer = asyncio.run(approval.ask_person("Shall it?", required="by the channel", asked_from="ada@host"))
    assert (answer.approved, len(asked)) == ((True, 2) if yes else (False, 1))
    if yes:
        assert answer.account == "grace@desk" and "another person has to say yes" in asked[1]
    # Where nobody knows who asked, or the job alone requires it, one answer is one.
    asked.clear()
    assert asyncio.run(approval.ask_person("Shall it?")).account == "ada@host"


def test_only_an_owner_may_write_the_rules_and_an_owner_moves_nothing() -> None:
    def may_put(role: Role, key: str) -> bool:
        document = policy(role, "models", model=MODEL, channel=CHANNEL)
        return any(
            statement["Effect"] == "Allow" and "s3:PutObject" in statement["Action"]
            and any(resource.endswith(key) for resource in statement["Resource"])
            for statement in document["Statement"]
        )  # fmt: skip

    assert [role for role in Role if may_put(role, rules_key(MODEL, CHANNEL))] == [Role.OWNER]
    assert [role for role in Role if may_put(role, f"models/{MODEL}/channels/{CHANNEL}.json")] == [Role.PROMOTER]
    for role in Role:
        document = policy(role, "models", model=MODEL)
        deletes = [one for one in document["Statement"] if "s3:DeleteObject" in one["Action"]]
        assert not any("rules" in resource for one in deletes for resource in one["Resource"])


def test_records_are_written_once_by_policy() -> None:
    (denial,) = [one for one in policy(Role.PROMOTER, "models", model=MODEL)["Statement"] if one["Effect"] == "Deny"]
    assert denial["Condition"] == {"Null": {"s3:if-none-match": "true"}} and denial["Action"] == ["s3:PutObject"]
    assert denial["Resource"] == [
        f"arn:aws:s3:::models/models/{MODEL}/{kind}/*/*" for kind in ("history", "decisions", "rollouts")
    ]
    allowing = policy(Role.PROMOTER, "models", model=MODEL, write_once=False)["Statement"]
    assert all(one["Effect"] == "Allow" for one in allowing)
