"""IAM policies as values. That a store denies what they do not allow is in tests/services/test_iam.py."""

from __future__ import annotations

import fnmatch
import itertools
import json

import pytest

from train_and_ship.infra.errors import SettingsError
from train_and_ship.registry.bucket.iam import Role, policy

RELEASE, POINTER = "models/digits/releases/r/model.onnx", "models/digits/channels/prod.json"
HISTORY, TOMBSTONE = "models/digits/history/prod/00000001.json", "models/digits/tombstones/r.json"
PROJECT = f"models/digits/projects/{'0' * 64}/project.tar.gz"
CLAIM = "models/digits/claims/r.json"
DECISION = "models/digits/decisions/prod/2026-11-17T02:00:00.000+00:00-r.json"
ROLLOUT, VERSION = "models/digits/rollouts/prod.json", "models/digits/rollouts/prod/00000001-0001.json"
VIEW = "models/digits/views/prod/triton/digits/7/model.onnx"

OBSERVED = "observations/digits/2026-12-01/04-00000000-0123456789abcdef.parquet"


def allowed(role: Role, action: str, key: str, model: str = "digits", channel: str = "*") -> bool:
    arn = f"arn:aws:s3:::models-bucket/{key}"
    effects = {
        statement["Effect"]
        for statement in policy(role, "models-bucket", model=model, channel=channel)["Statement"]
        if f"s3:{action}" in statement["Action"]
        and any(fnmatch.fnmatchcase(arn, one) for one in statement["Resource"])
        # Denied to nobody who asks as it says.
        and not (statement["Effect"] == "Deny" and "Condition" in statement)
    }
    return effects == {"Allow"}


def test_each_role_may_do_what_it_is_there_for_and_nothing_else() -> None:
    expected = {
        ("PutObject", RELEASE): {Role.TRAINER},
        ("PutObject", POINTER): {Role.PROMOTER},
        ("PutObject", HISTORY): {Role.PROMOTER},
        ("PutObject", DECISION): {Role.PROMOTER},
        ("DeleteObject", DECISION): set(),
        ("PutObject", ROLLOUT): {Role.PROMOTER},
        ("PutObject", VERSION): {Role.PROMOTER},
        ("DeleteObject", ROLLOUT): set(),
        ("GetObject", ROLLOUT): set(Role) - {Role.SERVER},
        # For all channels a reader also reads the copies: in a policy * matches / too.
        ("GetObject", VERSION): set(Role) - {Role.SERVER},
        ("PutObject", VIEW): {Role.VIEWER},
        ("DeleteObject", VIEW): {Role.VIEWER},
        ("GetObject", VIEW): set(Role) - {Role.READER},
        ("PutObject", TOMBSTONE): {Role.COLLECTOR},
        ("PutObject", CLAIM): {Role.TRAINER, Role.PROMOTER},
        ("DeleteObject", CLAIM): set(),
        ("DeleteObject", RELEASE): {Role.COLLECTOR},
        ("PutObject", PROJECT): {Role.TRAINER},
        ("DeleteObject", PROJECT): {Role.COLLECTOR},
        ("GetObject", PROJECT): set(Role) - {Role.READER, Role.SERVER},
        ("DeleteObject", POINTER): set(),
        ("DeleteObject", HISTORY): set(),
        ("DeleteObject", TOMBSTONE): set(),
        ("GetObject", RELEASE): set(Role) - {Role.SERVER},
        ("GetObject", POINTER): set(Role) - {Role.SERVER},
        ("GetObject", HISTORY): set(Role) - {Role.READER, Role.SERVER},
        ("PutObject", OBSERVED): {Role.READER, Role.SERVER},
        ("GetObject", OBSERVED): {Role.TRAINER, Role.PROMOTER},
        ("DeleteObject", OBSERVED): {Role.COLLECTOR},
    }
    for (action, key), roles in expected.items():
        assert {role for role in Role if allowed(role, action, key)} == roles, (action, key)


def test_a_policy_for_one_model_and_channel_reaches_no_other() -> None:
    for role, action in itertools.product(Role, ("GetObject", "PutObject", "DeleteObject")):
        for key in (RELEASE, POINTER, HISTORY, TOMBSTONE, OBSERVED):
            assert not allowed(role, action, key, model="faces")
        assert not allowed(role, action, "models/digits2/releases/r/model.onnx", model="digits")
    assert allowed(Role.PROMOTER, "PutObject", POINTER, channel="prod")
    assert not allowed(Role.PROMOTER, "PutObject", POINTER, channel="staging")
    assert not allowed(Role.PROMOTER, "PutObject", ROLLOUT, channel="staging")
    assert not allowed(Role.READER, "GetObject", POINTER, channel="staging")


def test_nobody_gets_a_wildcard_action_or_the_whole_bucket() -> None:
    for role in Role:
        for statement in policy(role, "models-bucket", model="digits", kms_key="arn:aws:kms:eu-west-1:1:key/k")[
            "Statement"
        ]:
            assert not any("*" in action for action in statement["Action"])
            assert not any(arn.endswith(("models-bucket/*", "models-bucket*", ":::*")) for arn in statement["Resource"])


def test_readers_cannot_list() -> None:
    assert "ListBucket" not in json.dumps(policy(Role.READER, "models-bucket"))


def test_a_bucket_with_a_key_of_its_own_needs_the_key_too() -> None:
    def actions(role: Role) -> list[str]:
        statements = policy(role, "models-bucket", model="digits", kms_key="arn:aws:kms:eu-west-1:1:key/k")["Statement"]
        return [action for one in statements for action in one["Action"] if action.startswith("kms:")]

    for role in Role:
        assert actions(role) == ["kms:Decrypt", "kms:GenerateDataKey"]


@pytest.mark.parametrize("role", [role for role in Role if role not in (Role.READER, Role.SERVER)])
def test_a_role_that_writes_needs_the_name_of_a_model(role: Role) -> None:
    with pytest.raises(SettingsError, match=rf"model: expected the name of one for {role}.*give --model NAME"):
        policy(role, "models-bucket")


@pytest.mark.parametrize("channel", ["*", "prod"])
def test_no_role_writes_below_what_is_anothers_although_a_star_crosses_slashes(channel: str) -> None:
    """As AWS matches: `fnmatch` lets * cross / too. Each key has the names of all other places behind its own."""
    own = {
        "releases": {Role.TRAINER, Role.COLLECTOR}, "claims": {Role.TRAINER, Role.PROMOTER}, "views": {Role.VIEWER},
        "channels": {Role.PROMOTER}, "history": {Role.PROMOTER}, "decisions": {Role.PROMOTER},
        "rules": {Role.OWNER}, "tombstones": {Role.COLLECTOR}, "projects": {Role.TRAINER, Role.COLLECTOR},
    }  # fmt: skip
    ends = [f"{place}/prod/{place}/1/model.py" for place in own] + [f"{place}/prod.json" for place in own]
    for (place, roles), end in itertools.product(own.items(), ends):
        for key in (f"models/digits/{place}/prod/triton/{end}", f"models/digits/{place}/prod/models/digits/{end}"):
            for role, action in itertools.product(Role, ("PutObject", "DeleteObject", "AbortMultipartUpload")):
                # Uploads that nobody completed: to drop one alters no object.
                drops = role is Role.COLLECTOR and action == "AbortMultipartUpload"
                assert drops or role in roles or not allowed(role, action, key, channel=channel), (role, action, key)


def test_a_collector_drops_uploads_of_its_model_wherever_somebody_may_have_left_one() -> None:
    assert allowed(Role.COLLECTOR, "AbortMultipartUpload", OBSERVED)
    for place in ("releases", "claims", "views/prod", "tombstones"):
        assert allowed(Role.COLLECTOR, "AbortMultipartUpload", f"models/digits/{place}/x")
        assert not allowed(Role.COLLECTOR, "AbortMultipartUpload", f"models/faces/{place}/x")
    assert not allowed(Role.COLLECTOR, "DeleteObject", "models/digits/views/prod/x")


@pytest.mark.parametrize("name", ["Digits", "a/b", "", "../x", "a*"])
def test_names_that_no_model_or_channel_has_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="model: expected"):
        policy(Role.READER, "models-bucket", model=name)
    with pytest.raises(SettingsError, match="channel: expected"):
        policy(Role.READER, "models-bucket", channel=name)
