"""`ship iam`: the least that a role needs, as an IAM policy."""

from __future__ import annotations

import json

import typer

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.iam import Role, policy


def iam(role: str, model: str, channel: str, kms_key: str, write_once: bool | None) -> None:
    """Print the policy. Raises SettingsError for a role, model or channel that there is not.

    write_once: whether the policy says that records are made once; None asks for it where the store is AWS's own.
    """
    if role not in list(Role):
        raise SettingsError(f"role: expected one of {', '.join(Role)}; got {role!r}")
    settings = Settings.load()
    if write_once is None:
        write_once = not settings.s3_endpoint
        if not write_once and role == Role.PROMOTER:
            typer.echo(
                f"The store at {without_password(settings.s3_endpoint or '')} may not know the condition key "
                "s3:if-none-match, so the policy does not say that records are written once; --write-once adds it",
                err=True,
            )
    document = policy(Role(role), settings.bucket, model=model, channel=channel, kms_key=kms_key, write_once=write_once)
    typer.echo(json.dumps(document, indent=2))
