"""The `ship` command in the testing process: no interpreter starts, and all runs share one fork server."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from rich.console import Console

from tests.support.processes import Ended, forget_projects
from tests.support.projects import REPOSITORY
from train_and_ship.ship import main


def ship_here(capsys: pytest.CaptureFixture[str], *words: str, **variables: str) -> Ended:
    """Run it as its entry point does, from the repository; variables given by name are added to the environment.

    What a command loads, how it starts and what a signal does to it is asked of `run_command`, which starts the
    installed one.
    """
    argv, environment, collects = sys.argv, dict(os.environ), gc.get_threshold()
    freeze, app = main.freeze, main.app
    capsys.readouterr()
    forget_projects()
    try:
        sys.argv = ["ship", *words]
        # A command that ends lets its garbage lie; this process goes on.
        main.freeze = lambda: None
        main.app = _parser()  # type: ignore[assignment]
        os.environ.update(variables)
        with contextlib.chdir(REPOSITORY), _log_in_this_terminal(), pytest.raises(SystemExit) as ended:
            main.main()
    finally:
        if "mlflow" in sys.modules:
            # What a command sets lasts as long as its process; the variable is asked again.
            sys.modules["mlflow"].set_tracking_uri(None)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        main.freeze, main.app = freeze, app
        gc.set_threshold(*collects)
    said = capsys.readouterr()
    return Ended(int(ended.value.code or 0), said.out, said.err)


@functools.cache
def _parser() -> click.Command:
    """What Typer makes of the commands' signatures, a hundredth of a second each time."""
    return typer.main.get_command(main.app)


@contextlib.contextmanager
def _log_in_this_terminal() -> Iterator[None]:
    """Prefect's handlers write where standard error was when they were made."""
    # Not before the tests have set the variables that Prefect reads when it is imported.
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    consoles = {handler: handler.console for handler in handlers if isinstance(handler, PrefectConsoleHandler)}
    for handler in consoles:
        handler.console = Console(file=sys.stderr, highlighter=None, soft_wrap=True)
    try:
        yield
    finally:
        for handler, console in consoles.items():
            handler.console = console
