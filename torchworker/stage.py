"""Run one stage: read its request, do the work, write one reply. Also `python -m torchworker.stage NAME FILE`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from torchworker.contract import (
    RESULT,
    CheckRequest,
    CppRequest,
    ExportRequest,
    InspectRequest,
    LocateRequest,
    MeasureRequest,
    RehearseRequest,
    Reply,
    ScoreRequest,
    TrainRequest,
    ValidateRequest,
)
from torchworker.process.failure import Described, failure_of


def _work(stage: str, request: Path) -> Any:
    """The stage's result, a dataclass. Modules are imported here: each stage loads only its own."""
    if stage == "check":
        from torchworker.stages.check import check

        return check(CheckRequest.read(request))
    if stage == "inspect":
        from torchworker.stages.inspect import inspect

        return inspect(InspectRequest.read(request))
    if stage == "train":
        from torchworker.stages.train import train

        return train(TrainRequest.read(request), request)
    if stage == "export":
        from torchworker.stages.export import export

        return export(ExportRequest.read(request))
    if stage == "rehearse":
        from torchworker.stages.rehearse import rehearse

        return rehearse(RehearseRequest.read(request))
    if stage == "locate":
        from torchworker.stages.locate import locate

        return locate(LocateRequest.read(request))
    if stage == "score":
        from torchworker.stages.score import score

        return score(ScoreRequest.read(request))
    if stage == "cpp":
        from torchworker.stages.cpp import build

        return build(CppRequest.read(request))
    if stage == "validate":
        from torchworker.stages.validate import validate

        return validate(ValidateRequest.read(request))
    if stage == "measure":
        from torchworker.stages.measure import measure

        return measure(MeasureRequest.read(request))
    known = "check, inspect, train, export, cpp, validate, locate, measure, score or rehearse"
    raise ValueError(f"stage: expected {known}, got {stage!r}")


def _user_folder(stage: str, request: Path) -> str:
    """Where the user's code is, to tell their lines from ours; `validate` and `rehearse` run none of it."""
    if stage not in ("check", "inspect", "train", "export", "locate", "score"):
        return ""
    folder: str = json.loads(request.read_text())["project"]["folder"]
    return folder


def run_stage(stage: str, request: str) -> int:
    """Write `result.json` beside the request; 0 when it holds a result, 1 when it holds a failure."""
    path = Path(request)
    try:
        reply = Reply(result=dataclasses.asdict(_work(stage, path)))
    except Described as error:
        reply = Reply(failure=error.failure)
    except (Exception, SystemExit) as error:
        reply = Reply(failure=failure_of(error, _user_folder(stage, path)))
    reply.write(path.with_name(RESULT))
    if reply.failure is not None:
        print(f"{reply.failure.message}\n{reply.failure.traceback}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_stage(sys.argv[1], sys.argv[2]))
