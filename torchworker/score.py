"""Metrics of the user's own, from each artifact's own outputs: the one check of artifacts that needs the user's code.

It runs after the clean room has shown that the artifacts stand alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from torchworker import runtimes
from torchworker.contract import VALIDATION, ScoreRequest, ScoreResult, Verdict
from torchworker.failure import UserMistake
from torchworker.project import call_metric, enter
from torchworker.validate import judge


def score(request: ScoreRequest) -> ScoreResult:
    """Each custom metric of each format over the whole validation set, and its gates.

    A metric that fails, or gives no number, fails its gates.
    """
    enter(request.project)
    folder = Path(request.folder)
    validation = load_file(folder / VALIDATION)
    target = validation["target"]
    metrics: dict[str, dict[str, float]] = {}
    verdicts: list[Verdict] = []
    for kind, file in request.formats.items():
        call = runtimes.load(kind, folder / file, request.threads)
        parts = []
        for start in range(0, len(target), request.batch):
            part = slice(start, start + request.batch)
            inputs = {spec.name: validation[f"input.{spec.name}"][part].contiguous() for spec in request.inputs}
            parts.append(call(inputs)[0])
        outputs = torch.cat(parts)
        measured: dict[str, float] = {}
        problems: dict[str, str] = {}
        for metric in request.project.custom_metrics:
            try:
                measured[metric.name] = call_metric(metric, outputs, target, request.project)
            except UserMistake as mistake:
                problems[metric.name] = str(mistake)
        metrics[kind] = measured
        verdicts += judge(kind, measured, request.gates, len(target), problems)
    return ScoreResult(metrics=metrics, verdicts=verdicts)
