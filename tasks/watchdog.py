"""What goes on beside the training, and ends it at once when it would be in vain."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Coroutine
from typing import Any

from prefect import get_run_logger

from train_and_ship.infra.errors import JobError, ShipError, WorkerError
from train_and_ship.registry.data.checks import require_held_out
from train_and_ship.tasks.results import Inspected, Run
from train_and_ship.tasks.trial import try_export

TRIAL_SECONDS = 30.0
"""About what the trial export of a model takes."""
TIMES = 20
"""How many times as long a training has to take, for the trial to cost it little."""


class Watchdog:
    """The reading of the data, and, of a long training, the export of the untrained model."""

    def __init__(self, run: Run, inspected: Inspected) -> None:
        """
        Args:
            run: which trains.
            inspected: its data, which is being read.
        """
        self._run, self._inspected = run, inspected
        self._is_long = asyncio.Event()

    def saw(self, event: dict[str, Any]) -> None:
        """Take an event of the training: how long it will take is known from its first steps."""
        if event.get("eta_seconds", 0.0) >= TIMES * TRIAL_SECONDS:
            self._is_long.set()

    async def until_done(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; raises what it raises, or JobError and GateError of what is found meanwhile, which ends it."""
        training = asyncio.ensure_future(work)
        watching = {asyncio.ensure_future(watch) for watch in (self._held_out(), self._captures())}
        pending: set[asyncio.Future[None]] = {training, *watching}
        try:
            while not training.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for watch in done - {training}:
                    watch.result()
            await training
        finally:
            for task in (training, *watching):
                task.cancel()
            await asyncio.gather(training, *watching, return_exceptions=True)

    async def _held_out(self) -> None:
        """What else the reading comes to is told where its facts are used."""
        with contextlib.suppress(JobError, WorkerError):
            facts = await self._inspected.facts()
            require_held_out(self._run.job.data.checks, facts.overlap, facts.validation.samples)

    async def _captures(self) -> None:
        """Of a training of hours nobody wants to hear at its end that the model cannot be exported."""
        run, log = self._run, get_run_logger()
        folder = run.folder / "trial"
        await self._is_long.wait()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            trial = await try_export(run.rooms, run.job, run.project, folder, log.info)
        except WorkerError as error:
            log.warning("the trial export beside the training did not come to an end: %s", error)
            return
        except ShipError:
            log.error("training is ended: what the job asks for cannot be made of its model")
            raise
        left_out = "".join(f"; {kind} would be left out: {why}" for kind, why in trial.exported.left_out.items())
        log.info("the untrained model can be exported: %s%s", ", ".join(trial.exported.artifacts), left_out)
