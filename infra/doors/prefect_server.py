"""The Prefect server of the local stack, behind a guard: `python -m …doors.prefect_server server start …`.

The password is Prefect's own affair (PREFECT_SERVER_API_AUTH_STRING), and so are the origins that a browser is told of.
Which Host a request names Prefect does not look at.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import uvicorn
from prefect.server.database.configurations import AioSqliteConfiguration

from train_and_ship.infra.doors.guard import OwnPages

ACCOUNT = "PREFECT_SERVER_API_AUTH_STRING"


def main() -> None:
    """Prefect's command, whose server is guarded."""
    if not os.environ.get(ACCOUNT):
        sys.exit(f"{ACCOUNT}: expected user:password; without it everybody on this machine could start runs")
    run = uvicorn.run

    def guarded(app: Any, **options: Any) -> None:
        # A name instead of the application is loaded elsewhere, where no guard stands in front of it.
        assert callable(app), f"Prefect hands uvicorn {app!r}"
        run(OwnPages(app), **options)

    uvicorn.run = guarded
    write_at_once()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def write_at_once() -> None:
    """Have every transaction of Prefect that may write wait for SQLite's lock at its beginning.

    Prefect begins most of them as readers (BEGIN DEFERRED). One that has read what somebody else has written since may
    not write any more, and SQLite says "database is locked" without waiting, whatever the timeout. Requests that only
    read begin no transaction.
    """
    begin = AioSqliteConfiguration.begin_transaction

    def immediate(self: AioSqliteConfiguration, session: Any, with_for_update: bool = True) -> Any:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = immediate  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
