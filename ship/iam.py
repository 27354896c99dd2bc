"""`ship iam`: the least that a role needs, as an IAM policy."""

from __future__ import annotations

import json

import typer

from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.iam import Role, policy


def iam(role: str, model: str, channel: str, kms_key: str) -> None:
    """Print the policy. Raises SettingsError for a role, model or channel that there is not."""
    if role not in list(Role):
        raise SettingsError(f"role: expected one of {', '.join(Role)}; got {role!r}")
    bucket = Settings.load().bucket
    typer.echo(json.dumps(policy(Role(role), bucket, model=model, channel=channel, kms_key=kms_key), indent=2))
