"""Stage: the release goes to the bucket, comes back, and is tried as servers will get it, beside what is live."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from torchworker.contract import (
    GOLDEN,
    LATENCY,
    PROBES,
    RESULT,
    VALIDATION,
    MeasureResult,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    Resampling,
    ScoredRelease,
    ScoreRequest,
    ScoreResult,
    Timed,
    decode,
)
from train_and_ship.infra.errors import GateError, WorkerError
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.bucket.releases import Published, publish
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.gates import VersusLive, require_good_enough, require_not_slower, verdict_table, worst
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.release.manifest import VERDICTS
from train_and_ship.registry.run_folder import AGAINST, Against, recall, write_fact
from train_and_ship.registry.text import file_size, interval_text, number
from train_and_ship.tasks.copies import download_anew, live_copy
from train_and_ship.tasks.policy import worth_retrying
from train_and_ship.tasks.register import Registered
from train_and_ship.tasks.requests import measure_request, user_modules
from train_and_ship.tasks.run import Run
from train_and_ship.tasks.validate import Validated
from train_and_ship.tasks.worker import call_worker

COMPARED = "compared.json"
REPORT_SECONDS = 5.0
"""Between two lines of progress of one upload."""


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """A candidate that is in the bucket and was tried from there."""

    job: Job
    published: Published
    result: RehearseResult
    live: str
    """The release that it was held against; empty when nothing was live."""

    @property
    def quality(self) -> dict[str, float]:
        """Each metric of the candidate at its worst over the formats."""
        return worst(self.job, self.result.candidate)

    @property
    def live_quality(self) -> dict[str, float]:
        """The same of the live release, on the same samples."""
        return worst(self.job, self.result.live)

    def require_good_enough(self) -> None:
        """Raises GateError when the live release is better than the job's gates and `release.policy` allow, or could
        not be measured."""
        # A run that was killed after the pointer moved finds its own release there.
        if self.live and self.live != self.published.release:
            result = self.result
            require_good_enough(self.job, self.versus_live)
            require_not_slower(self.job, result.candidate_speed, result.live_speed, self.live, result.speed_problem)

    @property
    def versus_live(self) -> VersusLive:
        """The quality of both."""
        return VersusLive.of(self.job, self.result, self.live)

    def in_words(self) -> dict[str, str]:
        """What was compared, for the record of the move."""
        versus = self.versus_live
        mine = {**versus.candidate, **self.result.candidate_speed}
        theirs = {**versus.theirs, **self.result.live_speed}
        found = {}
        for name, value in mine.items():
            if name in theirs:
                span = interval_text(versus.intervals.get(name))
                found[f"{name} vs live"] = f"{number(value)} against {number(theirs[name])}" + (
                    f", {self.job.release.confidence:.0%} interval of the improvement {span}" if span else ""
                )
        return found


@task(
    name="rehearse",
    task_run_name="rehearse",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=[1, 2, 5, 15],
    retry_condition_fn=worth_retrying,
)
async def rehearse(run: Run, registered: Registered, validated: Validated) -> Rehearsed:
    """Publish, download into a clean process, run every format on the golden inputs, and score what is live as well.

    Raises GateError when the files from the bucket do not give what was validated. How they compare with the live
    release is decided when the pointer moves.
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
        live = await asyncio.to_thread(read_pointer, run.store, run.job.name, run.job.release.channel)
        return await hold_against(run, registered, validated, published, live)


async def hold_against(
    run: Run, registered: Registered, validated: Validated, published: Published, live: Pointer | None
) -> Rehearsed:
    """Try a published candidate beside one live release. Downloads both; writes to this disk only."""
    manifest = registered.manifest
    stage = StageFolder(run.folder, "rehearse", inputs=f"{manifest.release} {live.nonce if live else ''}")
    if stage.is_complete():
        get_run_logger().info("rehearse: already complete in this run, verified by hash")
        result = RehearseResult.read(stage.path / COMPARED)
        return Rehearsed(job=run.job, published=published, result=result, live=live.release if live else "")
    copies = run.settings.home / "releases" / run.job.name
    candidate = await asyncio.to_thread(download_anew, run.store, manifest, copies / manifest.release)
    # After it: they may be one release.
    current, problem = await asyncio.to_thread(live_copy, run.store, copies, live)
    work = stage.begin()
    exported = validated.exported.folder
    request = RehearseRequest(
        candidate=candidate,
        live=current,
        validation=str(exported / VALIDATION),
        moved=str(exported / PROBES),
        metrics=run.job.metrics,
        forbidden_modules=user_modules(run.job),
        forbidden_folder=run.project.folder,
        threads=run.job.threads,
        sqnr_db=run.job.export.int8.sqnr_db if run.job.export.int8 is not None else 0.0,
        resampling=_resampling(run.job),
    )
    result = decode(RehearseResult, await call_worker(run.fork_server, "rehearse", request, work))
    if not result.passed:
        failed = [verdict for verdict in result.verdicts if not verdict.passed]
        names = ", ".join(f"{item.format} ({item.case})" for item in failed)
        raise GateError(
            f"{run.job.name}: release {manifest.release}, as it came back from the bucket, fails: {names}. "
            "It was not made live.",
            verdict_table(result.verdicts).text(),
        )
    result = replace(result, live_problem=problem or result.live_problem)
    if run.job.train.custom_metrics:
        result = await _scored(run, request, result, exported, work)
    if any(gate.times_live is not None for gate in run.job.gates.values()):
        result = await _measured(run, request, result, work)
    result.write(work / COMPARED)
    write_fact(work, AGAINST, Against(live=live.release if live else "", speed=_recorded_speed(current)))
    stage.finish()
    rehearsed = Rehearsed(job=run.job, published=published, result=result, live=live.release if live else "")
    get_run_logger().info("rehearsed from the bucket: %d checks passed%s", len(result.verdicts), _beside(rehearsed))
    return rehearsed


def _recorded_speed(live: RehearsedRelease | None) -> MeasureResult | None:
    """How fast the live release was when it was made, as its own validation wrote it down; None when it did not."""
    path = Path(live.folder) / VERDICTS if live is not None else None
    if path is None or not path.is_file():
        return None
    return recall(MeasureResult, json.loads(path.read_text()).get("speed"))


async def _scored(
    run: Run, request: RehearseRequest, result: RehearseResult, exported: Path, work: Path
) -> RehearseResult:
    """The result with the metrics that are in user code, of both releases, which the clean room cannot import."""

    folder = work / "score"
    folder.mkdir()
    candidate, live = request.candidate, request.live if not result.live_problem else None
    # The live release runs with the candidate's operators: one process cannot have two of one name.
    libraries = [name for name in candidate.files if name.endswith(".so")]
    for file in (*candidate.formats.values(), *libraries):
        os.link(Path(candidate.folder) / file, folder / file)
    os.link(exported / VALIDATION, folder / VALIDATION)
    asked = ScoreRequest(
        project=run.project,
        folder=str(folder),
        formats=candidate.formats,
        libraries=libraries,
        inputs=candidate.inputs,
        batch=run.job.export.batch,
        gates=[],
        threads=run.job.threads,
        live=ScoredRelease(folder=live.folder, formats=live.formats, inputs=live.inputs) if live else None,
        resampling=request.resampling,
    )
    try:
        scored: ScoreResult = decode(ScoreResult, await call_worker(run.fork_server, "score", asked, folder))
    except WorkerError as error:
        if live is None:
            raise
        # The live release may have taken the process down; the candidate alone tells.
        (folder / RESULT).unlink(missing_ok=True)
        alone = await call_worker(run.fork_server, "score", replace(asked, live=None), folder)
        scored = replace(decode(ScoreResult, alone), live_problem=str(error).split("\n")[0])
    mine = _joined(result.candidate, scored.metrics)
    if live is None:
        return replace(result, candidate=mine)
    if scored.live_problem:
        return replace(result, candidate=mine, live={}, live_problem=f"its own metrics failed: {scored.live_problem}")
    intervals = {**result.intervals, **scored.intervals}
    return replace(result, candidate=mine, live=_joined(result.live, scored.live), intervals=intervals)


def _joined(
    clean: Mapping[str, Mapping[str, float]], own: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Format to metric to value, of the clean room and of the user's own."""
    return {kind: {**clean.get(kind, {}), **values} for kind, values in own.items()}


def _resampling(job: Job) -> Resampling:
    return Resampling(resamples=job.release.resamples, confidence=job.release.confidence, seed=job.train.seed)


async def _measured(run: Run, request: RehearseRequest, result: RehearseResult, work: Path) -> RehearseResult:
    """The result with times, sizes and memory of both releases, measured by turns on the candidate's inputs."""
    candidate, live = request.candidate, request.live
    if live is None:
        return replace(result, speed_problem=result.live_problem)
    if live.inputs != candidate.inputs:
        return replace(result, speed_problem="the live release takes other inputs")
    folder = work / "measure"
    folder.mkdir()
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
    speed: MeasureResult = decode(MeasureResult, await call_worker(run.fork_server, "measure", asked, folder))
    timed = [name for name, gate in run.job.gates.items() if gate.times_live is not None]
    problems = [f"{name}: {item.problem}" for name, item in speed.measured.items() if item.problem]
    return replace(
        result,
        candidate_speed=_values(speed, "candidate", candidate, timed),
        live_speed=_values(speed, "live", live, timed),
        speed_problem="; ".join(problems),
    )


def _subjects(side: str, release: RehearsedRelease) -> list[Timed]:
    """What a release recommends to serve with; all it has when it recommends nothing."""
    libraries = [str(Path(release.folder) / name) for name in release.files if name.endswith(".so")]
    return [
        Timed(name=f"{side} {kind}", format=kind, file=str(Path(release.folder) / file), libraries=libraries)
        for kind, file in release.formats.items()
        if not release.serve or kind in release.serve.values()
    ]


def _values(speed: MeasureResult, side: str, release: RehearsedRelease, gates: Sequence[str]) -> dict[str, float]:
    """Each gate's value of one release: of the formats that it recommends; of its best one when it recommends none."""
    values: dict[str, float] = {}
    for gate in gates:
        if release.serve and gate in ("p50_ms", "p99_ms"):
            kinds = [release.serve[LATENCY]]
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
    return f"; {'; '.join(pairs)}" if pairs else ""


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
