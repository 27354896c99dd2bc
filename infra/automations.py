"""Tell the local Prefect server what to do by itself, when that has changed (see tasks/automations.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from train_and_ship.infra.deployments import run_to_its_end
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.settings import Settings

TIMEOUT_SECONDS = 120.0
SOURCES = Path(__file__).parents[1] / "tasks"


def automate(
    settings: Settings,
    *,
    command: Sequence[str],
    environment: Mapping[str, str],
    state: Path,
    report: Callable[[str], None],
) -> None:
    """Run a command unless that would change nothing.

    Args:
        settings: what the automations depend on.
        command: writes them.
        environment: the command's variables.
        state: the file that remembers the last time.
        report: called with each line for the person.

    Raises:
        SettingsError: the command failed; with its last line.
    """
    fingerprint = _fingerprint(settings)
    if state.exists() and state.read_text() == fingerprint:
        return
    output, failed = run_to_its_end(command, environment, TIMEOUT_SECONDS)
    last = (output.strip() or "nothing").splitlines()[-1]
    if failed:
        raise SettingsError(f"Prefect's automations could not be written: {last}")
    state.write_text(fingerprint)
    report(f"automations: {last}")


def _fingerprint(settings: Settings) -> str:
    """Changes with the addresses, which are secret, and with our code."""
    digest = hashlib.sha256(f"{settings.silent_seconds} {settings.prefect_ui_url}".encode())
    if settings.notify is not None:
        digest.update(settings.notify.get_secret_value().encode())
    for name in ("automations.py", "notification.py", "events.py"):
        digest.update((SOURCES / name).read_bytes())
    return digest.hexdigest()
