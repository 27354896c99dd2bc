"""Run one stage: read its request, do the work, write one reply. Also `python -m torchworker.stage NAME FILE`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from torchworker.contract import (
    RESULT,
    CheckRequest,
    CppRequest,
    ExportRequest,
    InspectRequest,
    LiveInputsRequest,
    LocateRequest,
    MeasureRequest,
    Message,
    Project,
    RehearseRequest,
    Reply,
    RereadRequest,
    ScoreRequest,
    TrainRequest,
    ValidateRequest,
)
from torchworker.process.failure import DescribedError, failure_of

STAGES: Mapping[str, tuple[str, type[Message]]] = {
    "check": ("check", CheckRequest),
    "inspect": ("inspect", InspectRequest),
    "reread": ("reread", RereadRequest),
    "train": ("train", TrainRequest),
    "export": ("export", ExportRequest),
    "cpp": ("build", CppRequest),
    "validate": ("validate", ValidateRequest),
    "locate": ("locate", LocateRequest),
    "measure": ("measure", MeasureRequest),
    "live_inputs": ("live_inputs", LiveInputsRequest),
    "score": ("score", ScoreRequest),
    "rehearse": ("rehearse", RehearseRequest),
}
"""Stage, which is a module of `torchworker.stages`, to its function there and what that is given.

Names, not functions: a stage's process imports its own module alone.
"""


def run_stage(stage: str, request: str) -> int:
    """Do the work of one stage and write `result.json` beside its request.

    Args:
        stage: a key of STAGES.
        request: path of the file with the request.

    Returns:
        0 when the reply holds a result, 1 when it holds a failure.
    """
    path, folder = Path(request), ""
    try:
        if stage not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
        function, kind = STAGES[stage]
        message = kind.read(path)
        # Where the user's code is, to tell their lines from ours; some stages run none of it.
        project = getattr(message, "project", None)
        folder = project.folder if isinstance(project, Project) else ""
        work = getattr(importlib.import_module(f"torchworker.stages.{stage}"), function)
        reply = Reply(result=dataclasses.asdict(work(message)))
    except DescribedError as error:
        reply = Reply(failure=error.failure)
    except (Exception, SystemExit) as error:
        reply = Reply(failure=failure_of(error, folder))
    reply.write(path.with_name(RESULT))
    if reply.failure is not None:
        print(f"{reply.failure.message}\n{reply.failure.traceback}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_stage(sys.argv[1], sys.argv[2]))
