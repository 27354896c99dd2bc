"""Which run of a model is meant: the one that is named, or the newest on this machine."""

from __future__ import annotations

from pathlib import Path

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.rundir import is_run_id, require_run_id
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.identity import require_name


def run_of(settings: Settings, model: str, run: str = "") -> Path:
    """The folder of the run. Raises RequestError for a model without one, and for a run that is not here.

    Args:
        settings: where runs are.
        model: whose run.
        run: id of its flow run; empty for the newest.
    """
    require_name("model", model)
    require_run_id(run)
    found = [path for path in (settings.runs / model).glob("*") if path.is_dir() and is_run_id(path.name)]
    if run:
        found = [path for path in found if path.name == run]
    if not found:
        which = f"run {run}" if run else "a run"
        raise RequestError(
            f"{model}: expected {which} in {settings.runs / model}, found none; `ship run JOB` makes one"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)
