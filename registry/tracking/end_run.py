"""End a run from outside, in a process that may carry mlflow: `python -m train_and_ship.registry.tracking.end_run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train_and_ship.registry.tracking.runs import end_run

if __name__ == "__main__":
    model, flow_run, status, reason, uri, report = json.load(sys.stdin)
    end_run(model, flow_run, status, reason, uri, Path(report) if report else None)
