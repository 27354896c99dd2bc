"""Reports on their way to MLflow: what has to be done lies in the folder of the run until MLflow has it.

So a report that MLflow missed gets there later, with the next run of the model on this machine, by `ship doctor` or by
`ship up`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torchworker.durable import set_aside, write_durably
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.rundir import TORN
from train_and_ship.registry.tracking.connection import MISSING
from train_and_ship.registry.tracking.runs import REPORT
from train_and_ship.registry.tracking.versions import RegisteredVersion, attach_report, tag_decision

WAITING = "report.waiting.json"


def keep_report(run: Path, version: RegisteredVersion, model: str, decision: str, why: str) -> None:
    """The REPORT in the folder of a run is to go to MLflow, which gets the decision as tags. Writes one file there.

    Args:
        run: The folder.
        version: Whose run in MLflow gets it.
        model: The model's name.
        decision: What was decided, in a word.
        why: In a sentence.
    """
    document = {"model": model, "version": asdict(version), "decision": decision, "why": why}
    write_durably(run / WAITING, json.dumps(document).encode())


def send_reports(runs: Path, tracking_uri: str, *, dry_run: bool = False) -> Iterator[str]:
    """Give MLflow what waits in the runs of a model. Writes to MLflow; can be repeated.

    Args:
        runs: Folder of the model's runs.
        tracking_uri: Of MLflow.
        dry_run: Write nothing.

    Yields:
        What became of each report, in words.

    Raises:
        ServiceError: MLflow did not do what was asked. What was not sent waits on.
        SettingsError: MLflow denied access.
    """
    for waiting in sorted(runs.glob(f"*/{WAITING}"), key=lambda path: path.stat().st_mtime):
        try:
            document = json.loads(waiting.read_bytes())
            model, version = document["model"], RegisteredVersion(**document["version"])
            decision, why = document["decision"], document["why"]
            page = (waiting.parent / REPORT).read_text()
        except (*TORN, FileNotFoundError) as error:
            yield f"{waiting} cannot be sent to MLflow ({type(error).__name__}: {error}), and is set aside"
            if not dry_run:
                set_aside(waiting, "it, or the report beside it, cannot be read")
            continue
        report = f"the report of {model} version {version.version}"
        if dry_run:
            yield f"{report} is not in MLflow"
            continue
        try:
            attach_report(version, model, page, tracking_uri)
            tag_decision(version, model, decision, why, tracking_uri)
            ended = "is in MLflow"
        except ServiceError as error:
            if getattr(error.__cause__, "error_code", "") != MISSING:
                raise
            ended = "is not wanted any more: somebody deleted the version or its run"
        # Whoever else sent it meanwhile has taken it away.
        waiting.unlink(missing_ok=True)
        yield f"{report} {ended}"
