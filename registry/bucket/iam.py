"""Least-privilege IAM policies for the people and machines that touch the bucket.

Each policy allows what its role does and nothing else; whoever does two things gets two policies. None of them may
replace or delete the bytes of a release except the collector, and none may move a channel except the promoter. Nobody
may delete what a channel's owner says of it, and only the owner may write it. What servers have observed is read by who
trains and who promotes, and deleted by the collector.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.store_probe import PROBE_PREFIX
from train_and_ship.registry.identity import is_channel, is_name

Policy = dict[str, Any]
"""An IAM policy document, ready for JSON."""

ANY = "*"


class Role(StrEnum):
    """What somebody is there for."""

    TRAINER = "trainer"
    """Publishes releases and their signatures. May not move any channel."""
    PROMOTER = "promoter"
    """Moves channels and rollouts, rollbacks included. May not add to a release."""
    OWNER = "owner"
    """Says what a move of a channel takes (`ship channel set`). May not move one."""
    READER = "reader"
    """Follows a channel: reads, and does not list; writes what it has observed, and cannot read that."""
    COLLECTOR = "gc"
    """Marks and deletes releases, and may delete deployed projects. May not move any channel."""
    VIEWER = "viewer"
    """Follows a channel and writes its views for other servers. May not touch releases or channels."""
    SERVER = "server"
    """A Triton or KServe that reads the channel's views, which it has to list; writes what it has observed."""


def policy(
    role: Role, bucket: str, *, model: str = ANY, channel: str = ANY, kms_key: str = "", write_once: bool = True
) -> Policy:
    """The policy of one role on one bucket, for one model and channel or for all.

    Args:
        role: who it is for.
        bucket: its name.
        model: one model, or all for a role that only reads.
        channel: one channel, or all.
        kms_key: ARN of the key that encrypts the bucket (SSE-KMS); empty for buckets with the store's own keys.
        write_once: whether records (`history/`, `decisions/`, versions of `rollouts/`) may be made and never replaced,
            by the condition key `s3:if-none-match`. AWS knows it; a store that does not would deny every record (Ceph
            RGW 16).

    Raises:
        SettingsError: a name that no model or channel has, or all models for a role that writes.
    """
    for kind, name, sound in (("model", model, is_name), ("channel", channel, is_channel)):
        # A right on what is no channel would be one on another's alias.
        if name != ANY and not sound(name):
            raise SettingsError(
                f"{kind}: expected lower-case letters, digits, dots, dashes, _, or * for all; got {name!r}"
            )

    if model == ANY and role not in (Role.READER, Role.SERVER):
        # In a policy `*` crosses `/`: models/*/releases/* is also models/digits/views/prod/triton/releases/1/model.py.
        raise SettingsError(
            f"model: expected the name of one for {role}, which writes, got * for all: in a policy * also matches /, "
            "so that it would reach views, releases and records that are another role's; give --model NAME, and attach "
            "one policy for each model"
        )

    def keys(*patterns: str) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{pattern}" for pattern in patterns]

    own, observations = f"models/{model}", f"observations/{model}/*"
    pointer, history = f"{own}/channels/{channel}.json", f"{own}/history/{channel}/*"
    rollout, versions = f"{own}/rollouts/{channel}.json", f"{own}/rollouts/{channel}/*"
    decisions = f"{own}/decisions/{channel}/*"
    releases, claims, views = f"{own}/releases/*", f"{own}/claims/*", f"{own}/views/{channel}/*"
    observe = [
        _allow("Observe", ["s3:PutObject"], keys(observations)),
        # In some stores whoever has written an object may read it (Ceph RGW), unless that is denied.
        {**_allow("NeverSee", ["s3:GetObject", "s3:GetObjectVersion"], keys(observations)), "Effect": "Deny"},
    ]
    if role is Role.READER:
        statements = [_allow("Follow", ["s3:GetObject"], keys(pointer, rollout, releases)), *observe]
        return _document(statements, kms_key)
    if role is Role.SERVER:
        listing = {**_allow("List", ["s3:ListBucket"], [f"arn:aws:s3:::{bucket}"])}
        listing["Condition"] = {"StringLike": {"s3:prefix": [views]}}
        return _document([listing, _allow("Load", ["s3:GetObject"], keys(views)), *observe], kms_key)
    # Listing tells names. It cannot be held to a prefix: looking for the bucket has none, nor has reading an object
    # that is not there, which is refused (403) instead of not found (404) for whoever may list below a prefix alone.
    observed = [observations] if role in (Role.TRAINER, Role.PROMOTER) else []
    statements = [
        _allow("See", ["s3:ListBucket", "s3:ListBucketVersions", "s3:GetBucketVersioning"], [f"arn:aws:s3:::{bucket}"]),
        _allow("Read", ["s3:GetObject", "s3:GetObjectVersion"], keys(f"{own}/*", f"{PROBE_PREFIX}/*", *observed)),
        # Before the first write, the store is tried for the conditions that promotion stands on.
        _allow("Probe", ["s3:PutObject", "s3:DeleteObject"], keys(f"{PROBE_PREFIX}/*")),
    ]
    if role is Role.VIEWER:
        writing = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
        return _document([*statements, _allow("View", writing, keys(views))], kms_key)
    # Whoever publishes or promotes says that a release is needed; only the collector marks one.
    if role not in (Role.COLLECTOR, Role.OWNER):
        statements.append(_allow("Claim", ["s3:PutObject"], keys(claims)))
    if role is Role.TRAINER:
        statements.append(
            _allow("Publish", ["s3:PutObject", "s3:AbortMultipartUpload"], keys(releases, f"{own}/projects/*"))
        )
    elif role is Role.PROMOTER:
        statements.append(_allow("Move", ["s3:PutObject"], keys(pointer, history, decisions, rollout, versions)))
        if write_once:
            # Whatever else is allowed to whoever has this policy: a denial wins.
            once = {**_allow("WriteOnce", ["s3:PutObject"], keys(history, decisions, versions)), "Effect": "Deny"}
            statements.append({**once, "Condition": {"Null": {"s3:if-none-match": "true"}}})
    elif role is Role.OWNER:
        statements.append(_allow("Rule", ["s3:PutObject"], keys(f"{own}/rules/{channel}.json")))
    else:
        statements.append(_allow("Mark", ["s3:PutObject"], keys(f"{own}/tombstones/*")))
        # Of projects what somebody has put there in their place; `ship gc` deletes none.
        statements.append(_allow("Collect", ["s3:DeleteObject"], keys(releases, observations, f"{own}/projects/*")))
        # Whoever may put an object may leave an upload, also of a view or a claim. To drop one alters no object.
        statements.append(_allow("DropUploads", ["s3:AbortMultipartUpload"], keys(f"{own}/*", observations)))
        statements.append(_allow("SeeUploads", ["s3:ListBucketMultipartUploads"], [f"arn:aws:s3:::{bucket}"]))
    return _document(statements, kms_key)


def _allow(sid: str, actions: Iterable[str], resources: Iterable[str]) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}


def _document(statements: list[dict[str, Any]], kms_key: str) -> Policy:
    if kms_key:
        # Every role reads and writes something.
        statements = [*statements, _allow("Encrypt", ["kms:Decrypt", "kms:GenerateDataKey"], [kms_key])]
    return {"Version": "2012-10-17", "Statement": statements}
