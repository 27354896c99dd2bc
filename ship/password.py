"""`ship password`: how to get into the local stack by hand, in a browser and with other tools."""

from __future__ import annotations

import shlex

import typer

from train_and_ship.infra.components import components
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.password import USER, read_password
from train_and_ship.infra.settings import Settings


def password(variables: bool) -> None:
    """Print the password of the local stack, or what a shell has to export.

    Raises SettingsError before the first `ship up`.
    """
    settings = Settings.load()
    if (found := read_password(settings.home)) is None:
        raise SettingsError(f"expected the password of a local stack in {settings.home}, got none; `ship up` makes it")
    if not variables:
        typer.echo(found)
        return
    for name, value in variables_of(settings, found).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def how_to_get_in(settings: Settings) -> list[str]:
    """Lines for people; none where no server is ours."""
    if not components(settings):
        return []
    return [
        f"  log in   user {USER}, password: `ship password`; Prefect asks for both in one field, {USER}:PASSWORD",
        '  tools    eval "$(ship env)", for Python, curl and aws in this shell',
    ]


def variables_of(settings: Settings, found: str) -> dict[str, str]:
    """By which other tools get into the servers that are ours; what somebody else's need is not known here.

    Args:
        settings: where they are.
        found: the password.
    """
    variables: dict[str, str] = {}
    if settings.prefect_is_local:
        variables |= {"PREFECT_API_URL": settings.prefect_api_url, "PREFECT_API_AUTH_STRING": settings.prefect_account}
        # ship/prefect_plugin.py, where the tool is installed.
        variables |= {"PREFECT_PLUGINS_ENABLED": "true", "PREFECT_PLUGINS_ALLOW": "train_and_ship"}
    if settings.mlflow_is_local:
        variables |= {"MLFLOW_TRACKING_URI": settings.mlflow_url}
        variables |= {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": found}
    if settings.s3_is_local and settings.s3_endpoint:
        variables |= {"AWS_ENDPOINT_URL": settings.s3_endpoint, "AWS_REGION": "us-east-1"}
        variables |= {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": found}
    return variables
