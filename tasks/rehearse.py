"""Stage: the release goes to the bucket, comes back, and is tried as servers will get it, beside what is live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from torchworker.contract import (
    GOLDEN,
    LATENCY,
    RESULT,
    VALIDATION,
    Artifacts,
    MeasureResult,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    Resampling,
    ScoreRequest,
    ScoreResult,
    Timed,
    read_with,
)
from train_and_ship.infra.errors import ReleaseError, WorkerError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.releases import Published, publish
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.diff import read_copied_record
from train_and_ship.registry.gates import how_drawn, live_score, require_rehearsed
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import KindChange, changes_in_kind
from train_and_ship.registry.run_folder import (
    AGAINST,
    COMPARED,
    REHEARSE,
    Against,
    add_fact,
    read_against,
    stage_inputs,
)
from train_and_ship.registry.text import file_size
from train_and_ship.tasks import worker
from train_and_ship.tasks.at_work import now_at
from train_and_ship.tasks.copies import download_anew, live_copy
from train_and_ship.tasks.live_inputs import live_inputs
from train_and_ship.tasks.requests import measure_request, rehearse_request, timed_artifacts
from train_and_ship.tasks.results import Registered, Rehearsed, Run
from train_and_ship.tasks.stage import run_stage, stage_task
from train_and_ship.tasks.worker import Limits, ask_worker

SHOWN = 60
"""Characters of a metric's name beside a bar."""
REPORT_SECONDS = 5.0
"""Between two lines of progress of one upload."""


@stage_task("rehearse")
async def rehearse(run: Run, registered: Registered) -> Rehearsed:
    """Publish, download into a clean process, run every format on the golden inputs, and score what is live as well.

    Raises GateError when the files from the bucket do not give what was validated. How they compare with the live
    release, in numbers and in kind, is decided when the pointer moves.
    """
    with run.timed("rehearse"):
        published = await asyncio.to_thread(
            publish,
            run.store,
            registered.folder,
            registered.manifest,
            _UploadLog(run.job.name).show,
            signing_key=run.settings.signing_key,
        )
        live = await asyncio.to_thread(read_pointer, run.channel)
        return await hold_against(run, registered, published, live)


async def hold_against(run: Run, registered: Registered, published: Published, live: Pointer | None) -> Rehearsed:
    """Try a published candidate beside one live release. Downloads both; writes to this disk only.

    Args:
        run: whose candidate it is.
        registered: the candidate.
        published: the candidate in the bucket.
        live: the release that is live; None when nothing is.

    Raises GateError when the files from the bucket do not give what was validated.
    """
    manifest, against = registered.manifest, live.release if live else ""
    stage = StageFolder(run.folder, REHEARSE, stage_inputs(manifest.release, live.nonce if live else ""))

    async def make(work: Path) -> RehearseResult:
        copies = run.settings.home / "releases" / run.job.name
        hold(copies / manifest.release)
        candidate = await asyncio.to_thread(download_anew, run.store, manifest, copies / manifest.release)
        # After it: they may be one release.
        current, problem = await asyncio.to_thread(live_copy, run.store, copies, live, run.settings.public_key)
        exported = registered.validated.exported.folder
        release, job = run.job.release, run.job
        chance = Resampling(resamples=release.resamples, confidence=release.confidence, seed=job.train.seed)
        limits = Limits.of(run.settings)
        prepared = await live_inputs(
            run.rooms.project, run.project, candidate, current, exported, work / "live_inputs", limits,
            run.job.export.batch,
        )  # fmt: skip
        problem = problem or prepared.problem
        beside = current if not problem else None
        request = rehearse_request(job, candidate, beside, exported, run.project.folder, chance)
        request = replace(request, live_validation=prepared.file)
        request, result = await worker.rehearse(_room(run, request), request, work, limits)
        require_rehearsed(f"{job.name}: release {manifest.release}", result, "It was not made live.")
        # It may quote what the live release's files say.
        problem = on_one_line(problem or result.live_problem)
        result = replace(result, live_problem=problem, live_inputs=prepared.said)
        if run.job.train.custom_metrics:
            result = await _scored(run, request, result, exported, work)
        if any(gate.times_live is not None for gate in run.job.gates.values()):
            result = await _measured(run, request, result, work)
        changes = await asyncio.to_thread(_in_kind, run.job, candidate, current, result)
        told = await asyncio.to_thread(_recorded, current)
        add_fact(work, AGAINST, replace(told, live=against, changes=changes))
        return result

    result = await run_stage(stage, RehearseResult, make, COMPARED)
    recorded = read_against(stage.path)
    rehearsed = Rehearsed(
        job=run.job,
        published=published,
        result=result,
        live=against,
        changes=recorded.changes if recorded is not None else (),
        allowed=run.allowed,
    )
    for said in recorded.not_understood if recorded is not None else ():
        get_run_logger().warning("the live release tells nothing by it: %s", said)
    get_run_logger().info("rehearsed from the bucket: %d checks passed%s", len(result.verdicts), _beside(rehearsed))
    if result.live_inputs:
        get_run_logger().warning("the live release %s: %s", against, result.live_inputs)
    return rehearsed


def _in_kind(
    job: Job, candidate: RehearsedRelease, live: RehearsedRelease | None, result: RehearseResult
) -> list[KindChange]:
    """What makes the candidate another kind of thing than the live release; nothing where that is broken or absent."""
    if live is None:
        return []
    before, after = (read_copied_record(Path(release.folder)).kind for release in (live, candidate))
    return [*changes_in_kind(before, after), *live_score(job, result).contradictions(before, job.direction)]


def _recorded(live: RehearsedRelease | None) -> Against:
    """How fast the live release was when it was made, as its validation wrote it down, and what nobody understands."""
    if live is None:
        return Against(live="")
    record = read_copied_record(Path(live.folder))
    speed = None
    with contextlib.suppress(ReleaseError):
        speed = record.speed
    return Against(live="", speed=speed, not_understood=record.not_understood())


def _resampling(event: dict[str, Any]) -> None:
    """The code of the job writes to the same file: whatever stands there only tells how far it is."""
    done = event.get("done")
    if isinstance(done, float) and 0 <= done <= 1:
        now_at("rehearse", [f"resampling {on_one_line(str(event.get('metric')), SHOWN)}"], done)


async def _scored(
    run: Run, request: RehearseRequest, result: RehearseResult, exported: Path, work: Path
) -> RehearseResult:
    """The result with the metrics that are in user code, of both releases, which the clean room cannot import."""
    folder = work / "score"
    folder.mkdir()
    candidate, live = request.candidate, request.live if not result.live_problem else None
    # The live release runs with the candidate's operators: one process cannot have two of one name.
    for file in _loaded(candidate):
        os.link(Path(candidate.folder) / file, folder / file)
    os.link(exported / VALIDATION, folder / VALIDATION)
    asked = ScoreRequest(
        project=run.project,
        folder=str(folder),
        formats=candidate.formats,
        libraries=candidate.libraries,
        inputs=candidate.inputs,
        hashes=_loaded(candidate),
        batch=run.job.export.batch,
        gates=[],
        threads=run.job.threads,
        live=_artifacts(live) if live else None,
        live_validation=request.live_validation,
        resampling=request.resampling,
    )
    limits = Limits.of(run.settings)
    try:
        scored = await ask_worker(run.rooms.project, "score", asked, ScoreResult, folder, _resampling, limits)
    except WorkerError as error:
        if live is None:
            raise
        # The live release may have taken the process down; the candidate alone tells.
        (folder / RESULT).unlink(missing_ok=True)
        asked = replace(asked, live=None)
        scored = await ask_worker(run.rooms.project, "score", asked, ScoreResult, folder, limits=limits)
        scored = replace(scored, live_problem=str(error).split("\n")[0])
    mine = _joined(result.candidate, scored.metrics)
    if live is None:
        return replace(result, candidate=mine)
    if scored.live_problem:
        return replace(
            result,
            candidate=mine,
            live={},
            live_own={},
            live_problem=on_one_line(f"its own metrics failed: {scored.live_problem}"),
        )
    intervals = {**result.intervals, **scored.intervals}
    return replace(result, candidate=mine, live=_joined(result.live, scored.live), intervals=intervals)


def _joined(
    clean: Mapping[str, Mapping[str, float]], own: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Format to metric to value, of the clean room and of the user's own."""
    return {kind: {**clean.get(kind, {}), **values} for kind, values in own.items()}


def _room(run: Run, request: RehearseRequest) -> ForkServer:
    """Where the candidate and what is live load side by side."""
    sides = [side for side in (request.candidate, request.live) if side is not None]
    formats = [kind for side in sides for kind in side.formats]
    return run.rooms.for_all(formats, [name for side in sides for name in side.libraries])


async def _measured(run: Run, request: RehearseRequest, result: RehearseResult, work: Path) -> RehearseResult:
    """The result with times, sizes and memory of both releases, measured by turns on the candidate's inputs."""
    candidate, live = request.candidate, request.live
    if live is None:
        return replace(result, speed_problem=result.live_problem)
    if live.inputs != candidate.inputs:
        return replace(result, speed_problem="the live release takes other inputs")
    asked = measure_request(
        run.job,
        [*_subjects("candidate", candidate), *_subjects("live", live)],
        golden=Path(candidate.folder) / GOLDEN,
        inputs=candidate.inputs,
        serve="none",
        project=run.project,
    )
    # Fixed limits were asked before.
    asked = replace(asked, gates=[])
    limits = Limits.of(run.settings)
    speed = await ask_worker(_room(run, request), "measure", asked, MeasureResult, work / "measure", limits=limits)
    timed = [name for name, gate in run.job.gates.items() if gate.times_live is not None]
    problems = [f"{name}: {item.problem}" for name, item in speed.measured.items() if item.problem]
    return replace(
        result,
        candidate_speed=_values(speed, "candidate", candidate, timed),
        live_speed=_values(speed, "live", live, timed),
        speed_problem=on_one_line("; ".join(problems)),
    )


def _subjects(side: str, release: RehearsedRelease) -> list[Timed]:
    """What a release recommends to serve with; all it has when it recommends nothing."""
    asked = release.serve.values() or release.formats
    formats = {kind: file for kind, file in release.formats.items() if kind in asked}
    subjects = timed_artifacts(Path(release.folder), formats, release.libraries, side)
    hashes = {str(Path(release.folder) / name): sha256 for name, sha256 in _loaded(release).items()}
    read = {one.name: (*read_with(one.file, hashes), *one.libraries) for one in subjects}
    return [replace(one, hashes={path: hashes[path] for path in read[one.name]}) for one in subjects]


def _artifacts(live: RehearsedRelease) -> Artifacts:
    hashes = {name: live.files[name] for file in live.formats.values() for name in read_with(file, live.files)}
    return Artifacts(folder=live.folder, formats=live.formats, inputs=live.inputs, hashes=hashes)


def _loaded(release: RehearsedRelease) -> dict[str, str]:
    """The hashes of what is loaded of a release."""
    artifacts = [name for file in release.formats.values() for name in read_with(file, release.files)]
    return {name: release.files[name] for name in (*artifacts, *release.libraries)}


def _values(speed: MeasureResult, side: str, release: RehearsedRelease, gates: Sequence[str]) -> dict[str, float]:
    """Each gate's value of one release: of the formats that it recommends; of its best one when it recommends none."""
    values: dict[str, float] = {}
    for gate in gates:
        if release.serve and gate in ("p50_ms", "p99_ms"):
            # A release that recommends nothing for latency has what it recommends at all.
            kinds = [release.serve.get(LATENCY, next(iter(release.serve.values())))]
        else:
            kinds = list(dict.fromkeys(release.serve.values() or release.formats))
        found = [speed.measured[f"{side} {kind}"].value(gate) for kind in kinds]
        known = [value for value in found if value is not None]
        if known and len(known) == len(found):
            values[gate] = max(known) if release.serve else min(known)
    return values


def _beside(rehearsed: Rehearsed) -> str:
    if not rehearsed.live:
        return "; nothing is live to hold it against"
    if rehearsed.result.live_problem:
        return f"; the live release {rehearsed.live} could not be scored: {rehearsed.result.live_problem}"
    theirs = rehearsed.live_quality
    pairs = [f"{name} {value:.4g}, live {theirs[name]:.4g}" for name, value in rehearsed.quality.items()]
    drawn = f" ({how_drawn(rehearsed.job, rehearsed.result.groups)})" if rehearsed.result.groups else ""
    return f"; {'; '.join(pairs)}{drawn}" if pairs else ""


class _UploadLog:
    """Says now and then how far an upload is, at which rate, and when it will end."""

    def __init__(self, model: str) -> None:
        self._model, self._logger = model, get_run_logger()
        self._began = self._said = time.monotonic()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < REPORT_SECONDS or not done:
            return
        self._said = now
        rate = done / (now - self._began)
        self._logger.info(
            "%s: %s of %s in the bucket, %s/s, %d s left",
            self._model, file_size(done), file_size(total), file_size(int(rate)), round((total - done) / rate),
        )  # fmt: skip
