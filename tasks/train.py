"""Stage: distributed training. In: the job. Out: weights, history and data fingerprint."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

from torchworker.contract import (
    EVENTS,
    LAUNCHES,
    RESULT,
    Failure,
    Launches,
    Reply,
    TrainRequest,
    TrainResult,
    decode,
)
from train_and_ship.infra.errors import JobError, WorkerError
from train_and_ship.infra.rundir import StageFolder, link_or_copy
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.cost import Meter
from train_and_ship.registry.made_of import with_opened
from train_and_ship.registry.report.training_sections import shipped_words
from train_and_ship.registry.run_folder import ATTEMPTS, MADE_FROM, TRAIN, MadeFrom, add_fact, stage_inputs
from train_and_ship.registry.text import Table, escaped, file_size
from train_and_ship.registry.tracking.curves import RankTimes, rank_times
from train_and_ship.tasks.at_work import MINUTE, now_at
from train_and_ship.tasks.copies import live_weights
from train_and_ship.tasks.fingerprints import code_and_packages, project_hashes
from train_and_ship.tasks.launched import train_launched
from train_and_ship.tasks.requests import dynamic_dims, required_formats, train_settings
from train_and_ship.tasks.results import Inspected, Run, Trained
from train_and_ship.tasks.stage import stage_task
from train_and_ship.tasks.watchdog import Watchdog
from train_and_ship.tasks.worker import call_worker

AGAIN_SECONDS = 1.0
"""Between two attempts."""
ARTIFACT_SECONDS = 2.0
EARLY_LOG_SECONDS, LOG_SECONDS = 3.0, 10.0
"""Between two lines of the log about steps: in the first minute, and later."""
RANKS_SHOWN = 8
LINKED_BYTES = 2**20
"""From which on what was trained elsewhere is not copied: weights, which nobody writes to any more."""


# Prefect's attempts are for services alone: `train.restarts` counts what happens to ranks and machines.
@stage_task("train", delays=(1, 1))
async def train(run: Run, inspected: Inspected, start: Pointer | None = None) -> Trained:
    """Train in child processes; skipped when this run has already trained.

    Args:
        run: what is trained, and where.
        inspected: the data, which is being read meanwhile.
        start: the live release whose weights training begins with; None for the model as its factory makes it.

    Raises:
        JobError: the user's code is at fault.
        GateError: the data has been read meanwhile, and most of what is held out is training data; or, of a long
            training, what is made of the untrained model meanwhile is not the model.
        WorkerError: a rank or a machine was lost too often.
    """
    inputs = stage_inputs(run.job.training_digest(), *(("from", start.release) if start is not None else ()))
    stage = StageFolder(run.folder, TRAIN, inputs)
    with run.timed("train") as meter:
        if stage.is_complete():
            get_run_logger().info("train: already complete in this run, verified by hash")
            run.live.tail(stage.path / EVENTS)
        else:
            watchdog = Watchdog(run, inspected)
            await watchdog.until_done(_train(run, stage, start, inputs, _Progress(meter, watchdog.saw)))
    result = _result(stage.path)
    if shipped := shipped_words(run.job, result):
        get_run_logger().info("ships: %s", shipped)
    return Trained(
        folder=stage.path,
        result=result,
        digest=stage.digest(),
        start=start.release if start else "",
        made_from=decode(MadeFrom, json.loads((stage.path / MADE_FROM).read_text())),
    )


def _result(folder: Path) -> TrainResult:
    result: TrainResult = decode(TrainResult, Reply.read(folder / RESULT).result)
    return result


async def _train(run: Run, stage: StageFolder, start: Pointer | None, inputs: str, progress: _Progress) -> None:
    weights, weights_sha256 = "", ""
    project = Path(run.project.folder)
    code, files, packages = await code_and_packages(run.settings, run.job, project, run.rooms.interpreter)
    if start is not None:
        copies = run.settings.home / "releases" / run.job.name
        key = run.settings.public_key
        found, weights_sha256 = await asyncio.to_thread(
            live_weights, run.store, copies, start, run.folder / "start", key
        )
        weights = str(found)
    reporter = asyncio.create_task(progress.keep_artifact())
    # Beside the stage's folder: they outlive attempts.
    checkpoints, attempts = run.folder / "checkpoints", run.folder / ATTEMPTS
    request = TrainRequest(
        project=run.project,
        train=train_settings(run.job),
        folder=str(stage.work),
        checkpoints=str(checkpoints),
        start=weights,
        start_sha256=weights_sha256,
        formats=required_formats(run.job),
        dynamic=dynamic_dims(run.job),
    )
    try:
        while not await _attempt(run, stage, request, attempts, inputs, progress):
            pass
        await progress.finish()
    except (JobError, WorkerError):
        # Whoever goes on with this run has mended something, and has all launches again.
        (checkpoints / LAUNCHES).unlink(missing_ok=True)
        raise
    finally:
        reporter.cancel()
    trained_on = _result(stage.work)
    files = await asyncio.to_thread(
        with_opened,
        files,
        run.job,
        project,
        project_hashes(run.settings, project),
        trained_on.opened,
        trained_on.listed,
        run.rooms.interpreter.sites,
    )
    made_from = MadeFrom(git_commit=run.git_commit, code=code, packages=packages, files=files)
    add_fact(stage.work, MADE_FROM, made_from)
    run.live.send_soon()
    stage.finish()
    for leftover in (checkpoints, attempts):
        shutil.rmtree(leftover, ignore_errors=True)


async def _attempt(
    run: Run, stage: StageFolder, request: TrainRequest, attempts: Path, inputs: str, progress: _Progress
) -> bool:
    """Train into the stage's work folder; False when that ended and the run has launches left. Prefect retries none.

    Raises JobError, and WorkerError when there is nothing left.
    """
    launcher, say = run.job.train.launcher, get_run_logger()
    if (stage.work / EVENTS).exists():
        # Left by an attempt that died, perhaps with steps that MLflow was not told.
        run.live.tail(stage.work / EVENTS)
    try:
        if launcher.machines is None:
            work = stage.begin()
            run.live.tail(work / EVENTS)
            await call_worker(run.rooms.project, "train", request, work, progress.on_event)
        else:
            attempts.mkdir(exist_ok=True)
            trained = await train_launched(
                launcher, request, attempts, inputs, progress.on_event, say.info, run.rooms.interpreter.path
            )
            taken_over = partial(link_or_copy, least=LINKED_BYTES)
            shutil.copytree(trained, stage.begin(), copy_function=taken_over, dirs_exist_ok=True)
            progress.meter.cpu = _result(stage.work).cpu_seconds
    except WorkerError as error:
        if not error.retryable:
            raise
        if launcher.machines is None:
            # The agent counts its ranks' deaths, and nobody but this process its own.
            checkpoints = Path(request.checkpoints)
            launches = Launches.so_far(checkpoints).died(checkpoints, "")
            launches.keep(checkpoints)
            if end := launches.end(Failure(kind="worker", message=str(error)), request.train.restarts):
                raise WorkerError(end.message, retryable=False) from None
        say.warning("%s; training goes on from its newest checkpoint", error)
        await asyncio.sleep(AGAIN_SECONDS)
        return False
    return True


class _Progress:
    """Turns worker events into log lines and one Prefect progress artifact."""

    def __init__(self, meter: Meter, see: Callable[[dict[str, Any]], None]) -> None:
        """see: called with each event too."""
        self._logger, self.meter, self._see = get_run_logger(), meter, see
        self._percent = 0.0
        self._description = "Training starts"
        self._artifact: UUID | None = None
        self._began = self._logged = time.monotonic()
        self._straggler: int | None = None
        self._reported = False

    def on_event(self, event: dict[str, Any]) -> None:
        self._see(event)
        match event["event"]:
            case "started":
                self.meter.ranks_started(str(event["device"]), event["processes"])
                self._logger.info(
                    "training on %d processes (%s): %s samples, %s held out",
                    event["processes"], event["device"], f"{event['train_samples']:,}",
                    "a stream" if event["validation_samples"] is None else f"{event['validation_samples']:,}",
                )  # fmt: skip
            case "restarting":
                where = event["checkpoint"] or "the beginning"
                self._logger.warning("%s; training goes on from %s", event["cause"], where)
            case "checkpoint":
                for failure in event["failures"][-1:]:
                    self._logger.warning(failure)
            case "epoch":
                self._percent = 100 * event["epoch"] / event["epochs"]
                self._show(describe_epoch(event), event)
                self._say(describe_epoch(event))
            case "step":
                self._percent = 100 * event["step"] / event["steps"]
                line = (
                    f"epoch {event['epoch']}/{event['epochs']}  step {event['step']}/{event['steps']}  "
                    f"loss {event['loss']:.4f}  {_rate(event)}"
                )
                self._show(line, event)
                # A long epoch would otherwise be silent.
                if time.monotonic() - self._logged >= self._pause():
                    self._say(line)

            case "report":
                if "steps" in event:
                    self._percent = min(100.0, 100 * event["step"] / max(1, event["steps"]))
                line = describe_report(event)
                self._show(line, event)
                if time.monotonic() - self._logged >= self._pause() or not self._reported:
                    self._say(line)
                self._reported = True
        # When it starts, and when it goes on from a checkpoint.
        for note in event.get("notes", ()):
            self._logger.warning(note)

    def _show(self, line: str, event: dict[str, Any]) -> None:
        now_at("train", [line], self._percent / 100)
        self._description = describe_progress(line, event)
        times = rank_times(event)
        if times is not None and times.straggler != self._straggler:
            self._straggler = times.straggler
            if times.straggler is not None:
                self._logger.warning(_describe_straggler(times))

    def _pause(self) -> float:
        return EARLY_LOG_SECONDS if time.monotonic() - self._began < MINUTE else LOG_SECONDS

    def _say(self, line: str) -> None:
        self._logged = time.monotonic()
        self._logger.info(line)

    async def keep_artifact(self) -> None:
        """Update the artifact every few seconds until cancelled; a Prefect that does not answer is asked again."""
        shown = ""
        while True:
            if shown != self._description:
                shown = self._description
                try:
                    await self._update(self._percent)
                except Exception as error:
                    self._logger.debug("the progress artifact was not updated: %s", error)
            await asyncio.sleep(ARTIFACT_SECONDS)

    async def finish(self) -> None:
        try:
            await self._update(100.0)
        except Exception as error:
            self._logger.warning("the progress artifact was not updated: %s", error)

    async def _update(self, percent: float) -> None:
        if self._artifact is None:
            self._artifact = await acreate_progress_artifact(
                percent, key="training-progress", description=self._description
            )
        else:
            await aupdate_progress_artifact(self._artifact, percent, self._description)


def describe_progress(line: str, event: dict[str, Any]) -> str:
    """The line and, where the event says so, learning rate, memory and each rank's step, as markdown."""
    parts = [escaped(line)]
    facts = []
    if "learning_rate" in event:
        facts.append(f"learning rate {event['learning_rate']:.3g}")
    if "memory_bytes" in event:
        facts.append(f"memory {file_size(event['memory_bytes'])} in the largest process")
    if facts:
        parts.append("  ".join(facts))
    if times := rank_times(event):
        # Of many ranks, the slowest say what there is to know.
        slowest = sorted(times.seconds, key=lambda rank: -times.seconds[rank])[:RANKS_SHOWN]
        rows = [(f"rank {rank}", _milliseconds(times.seconds[rank])) for rank in sorted(slowest)]
        if len(times.seconds) > len(rows):
            rows.append((f"median of {len(times.seconds)}", _milliseconds(times.median)))
        parts.append(Table(header=("process", "step"), rows=rows).markdown())
        if times.straggler is not None:
            parts.append(f"**{_describe_straggler(times)}**")
    return "\n\n".join(parts)


def _describe_straggler(times: RankTimes) -> str:
    return (
        f"rank {times.slowest} is slow: {_milliseconds(times.seconds[times.slowest])} a step, "
        f"{times.ratio:.1f} times the median; the others wait for it"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def describe_epoch(event: dict[str, Any]) -> str:
    """`epoch 3/12  loss 0.0473  validation loss 0.0391  accuracy 0.9889  7,163 samples/s  ETA 2 s`."""
    metrics = "  ".join(
        f"{name.removeprefix('validation_').replace('_', ' ')} {value:.4f}"
        for name, value in event.items()
        if name.startswith("validation_") and name != "validation_loss"
    )
    return (
        f"epoch {event['epoch']}/{event['epochs']}  loss {event['train_loss']:.4f}  "
        f"validation loss {event['validation_loss']:.4f}  {metrics}  {_rate(event)}"
    )


def describe_report(event: dict[str, Any]) -> str:
    """`step 40/120  train loss 0.0473  learning rate 0.001`."""
    total = f"/{event['steps']}" if "steps" in event else ""
    metrics = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in event["metrics"].items())
    return f"step {event['step']}{total}  {metrics}"


def _rate(event: dict[str, Any]) -> str:
    seconds = round(event["eta_seconds"])
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    eta = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    return f"{event['samples_per_second']:,.0f} samples/s  ETA {eta}"
