"""After parity failed: look for the place, and write the report that a person acts on."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from torchworker.contract import RESULT, LocateRequest, LocateResult, Mismatch, ValidateResult
from train_and_ship.infra.errors import ShipError
from train_and_ship.registry.report.parity_failure import embedded, error_histograms, parity_report
from train_and_ship.tasks.policy import show
from train_and_ship.tasks.results import Exported, Run
from train_and_ship.tasks.worker import ask_worker

LOCATABLE = ("torchscript", "onnx", "pt2")
"""Formats that can be looked into. Others are machine code."""


async def explain(run: Run, exported: Exported, result: ValidateResult) -> Path | None:
    """`parity.md` and its picture in the run's folder, and both in a Prefect artifact; None when parity passed."""
    if not result.mismatches:
        return None
    where = await _where(run, exported, result)
    path, plot = run.folder / "parity.md", run.folder / "parity.svg"
    drawn = error_histograms(result.errors)
    plot.write_text(drawn)
    path.write_text(parity_report(run.job.name, result.mismatches, where, plot.name))
    # An artifact has no files beside it.
    markdown = parity_report(run.job.name, result.mismatches, where, embedded(drawn))
    get_run_logger().error("\n".join(f"{kind} {place}" for kind, place in where.items()))
    await show(markdown, f"{run.job.name}: parity failed", run.job.name, "parity")
    return path


async def _where(run: Run, exported: Exported, result: ValidateResult) -> dict[str, str]:
    """For each format that failed. User code runs for this, so it is a worker's; that it fails spoils nothing."""
    probes: dict[str, str] = {}
    where: dict[str, str] = {}
    for item in result.mismatches:
        kind = item.format.removesuffix(" in C++")
        if kind in LOCATABLE and kind in exported.formats:
            probes.setdefault(kind, _question(item, run.job.export.batch))
        else:
            where[item.format] = "could not be located: this format is compiled code"
    folder = run.folder / "locate"
    folder.mkdir(exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    request = LocateRequest(
        project=run.project,
        folder=str(exported.folder),
        weights=str(exported.weights),
        formats=exported.formats,
        inputs=[spec.name for spec in exported.result.inputs],
        probes=probes,
    )
    try:
        found = await ask_worker(run.rooms.project, "locate", request, LocateResult, folder)
    except (ShipError, OSError) as error:
        reason = str(error).splitlines()[0]
        return {**where, **dict.fromkeys(probes, f"could not be located: {reason}")}
    return {**where, **found.where}


def _question(item: Mismatch, batch: int) -> str:
    """The probe to look at: the one that failed, or a batch of capture when that was a batch of real samples, of which
    there is no probe (`samples 64 to 127`, `3 samples`)."""
    name = item.probe.partition(",")[0]
    of_samples = name.startswith("samples ") or name.endswith(" samples")
    return f"batch_{batch}" if of_samples or not item.output else name
