"""Reports on their way to MLflow: what has to be done lies in the folder of the run until MLflow has it.

So a report that MLflow missed gets there later, with the next run of the model on this machine, by `ship doctor` or by
`ship up`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.rundir import write_whole
from train_and_ship.registry.tracking.runs import REPORT
from train_and_ship.registry.tracking.versions import RegisteredVersion, attach_report, tag_decision

WAITING = "report.waiting.json"


def keep_report(run: Path, version: RegisteredVersion, model: str, decision: str, why: str) -> None:
    """The REPORT in the folder `run` is to go to the run of this version, which gets the decision as tags."""
    document = {"model": model, "version": asdict(version), "decision": decision, "why": why}
    write_whole(run / WAITING, json.dumps(document).encode())


def send_reports(runs: Path, tracking_uri: str, *, dry_run: bool = False) -> Iterator[str]:
    """Give MLflow what waits in the runs of a model, and tell of each, in words. Writes to MLflow; can be repeated.

    runs: folder of the model's runs. dry_run: tell only. Raises ServiceError and SettingsError; what was not sent waits
    on.
    """
    for waiting in sorted(runs.glob(f"*/{WAITING}"), key=lambda path: path.stat().st_mtime):
        document = json.loads(waiting.read_text())
        model, version = document["model"], RegisteredVersion(**document["version"])
        told = f"the report of {model} version {version.version}"
        if dry_run:
            yield f"{told} is not in MLflow"
            continue
        try:
            attach_report(version, model, (waiting.parent / REPORT).read_text(), tracking_uri)
            tag_decision(version, model, document["decision"], document["why"], tracking_uri)
            told += " is in MLflow"
        except ServiceError as error:
            if getattr(error.__cause__, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            told += " is not wanted any more: somebody deleted the version or its run"
        # Whoever else sent it meanwhile has taken it away.
        waiting.unlink(missing_ok=True)
        yield told
