"""MLflow runs of a model `watched`, followed while it trains."""

from __future__ import annotations

import dataclasses
from typing import Any

from train_and_ship.registry.tracking.live_run import LiveRun
from train_and_ship.registry.tracking.runs import RunRecord

EPOCHS = 6


def run_record(flow_run: str, **changes: Any) -> RunRecord:
    base = RunRecord(
        model="watched",
        run_name="r",
        params={"epochs": EPOCHS},
        tags={"flow_run_id": flow_run, "git_commit": "3f9a1c2"},
        description="In progress",
        started=1_700_000_000.0,
    )
    return dataclasses.replace(base, **changes)


def live_run(flow_run: str, url: str, warned: list[str] | None = None, **changes: Any) -> LiveRun:
    warn = (warned if warned is not None else []).append
    live = LiveRun(run_record(flow_run, **changes), url, warn, send_seconds=0.2)
    live.start()
    return live
