"""Small comforts for the prefect command in this project's folder (see prefect.toml), or after `eval "$(ship env)"`.

- `prefect deployment run train-and-ship`: a name without a slash means the deployment and the flow of that name.
- SHIP_PREFECT_PORT alone is enough for the command to find a local server on another port.
- The command knows the password of the local server; no other one is sent it.
- `--watch` ends with what became of the run, in words, and not with the name of its state alone.

Prefect loads this while it is being imported, so it prints nothing and imports Prefect only inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from prefect.plugins import HookContext, SetupResult

# The name Prefect's plugin manager has; prefect.plugins.register_hook is the same marker, but importing it here would
# import Prefect in every process that only looks at entry points.
hook = pluggy.HookimplMarker("prefect-experimental")


@hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Called by Prefect once, before any command. Without the private class below, only the short name is lost."""
    from prefect.plugins import SetupResult

    try:
        from prefect.client.orchestration._deployments.client import DeploymentAsyncClient
    except ImportError:
        pass
    else:
        _accept_bare_names(DeploymentAsyncClient)
    if "--watch" in sys.argv:
        _end_with_the_headline()
    found = {}
    port = os.environ.get("SHIP_PREFECT_PORT")
    if port and not os.environ.get("PREFECT_API_URL"):
        found["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    found |= _password(found.get("PREFECT_API_URL", ctx.api_url or ""))
    return SetupResult(env=found) if found else None


def _password(address: str) -> dict[str, str]:
    """The variable of Prefect that lets its client into the local server, when that is what the address names."""
    from train_and_ship.infra.errors import SettingsError
    from train_and_ship.infra.password import require_own_server
    from train_and_ship.infra.settings import PREFECT_ACCOUNT, Settings

    try:
        settings = Settings.load()
        account = settings.prefect_account_at(address)
        if account:
            require_own_server(settings.home, address)
    except SettingsError:
        # `ship` says it; the command may be about another server.
        return {}
    return {PREFECT_ACCOUNT: account} if account else {}


def _accept_bare_names(client_class: Any) -> None:
    """Make `read_deployment_by_name("n")` mean "n/n", which is an error otherwise. Names with a slash are untouched."""
    read = client_class.read_deployment_by_name
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    async def read_deployment_by_name(self: Any, name: str) -> Any:
        return await read(self, name if "/" in name else f"{name}/{name}")

    client_class.read_deployment_by_name = read_deployment_by_name


def _end_with_the_headline() -> None:
    """Make `--watch` print the message of the run's last state. Without the private module below, it does not."""
    with contextlib.suppress(ImportError):
        from prefect.cli import flow_runs_watching as watching

        watch = watching.watch_flow_run
        if hasattr(watch, "__wrapped__"):
            return

        @functools.wraps(watch)
        async def watch_flow_run(flow_run_id: Any, console: Any, *more: Any, **named: Any) -> Any:
            run = await watch(flow_run_id, console, *more, **named)
            if run.state is not None and run.state.message:
                console.print(f"\n{run.state.message}", markup=False, highlight=False, soft_wrap=True)
            return run

        # The commands are imported later, and take it from there.
        watching.watch_flow_run = watch_flow_run
