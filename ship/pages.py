"""`ship open`: a page of the stack, or the report of a run, in the browser."""

from __future__ import annotations

import webbrowser

import typer

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.newest_run import run_of
from train_and_ship.ship.password import how_to_get_in

REPORT = "report.html"


def open_page(page: str, model: str, only_print: bool) -> None:
    """Print its address, and open it where there is a browser.

    Args:
        page: `prefect`, `mlflow` or `report`.
        model: whose newest run; for `report` alone.
        only_print: without a browser.

    Raises:
        RequestError: another page, or no such report.
    """
    settings = Settings.load()
    if page == "report":
        if not model:
            raise RequestError("ship open report: expected a model: ship open report MODEL")
        report = run_of(settings, model) / REPORT
        if not report.is_file():
            raise RequestError(f"{model}: expected {report}, found none: the run has not ended, or was killed")
        address = report.resolve().as_uri()
    else:
        pages = {"prefect": settings.prefect_ui_url, "mlflow": without_password(settings.mlflow_url)}
        if page not in pages:
            raise RequestError(f"ship open: expected prefect, mlflow or report, got {page!r}")
        if model:
            raise RequestError(f"ship open {page}: expected no model, got {model!r}")
        address = pages[page]
    typer.echo(address)
    if only_print:
        return
    for line in how_to_get_in(settings)[:1] if page != "report" else ():
        typer.echo(line, err=True)
    if not webbrowser.open(address):
        typer.echo("no browser was found here; the address is above", err=True)
