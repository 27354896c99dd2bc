"""Lives through nights: each is a run of the deployment on the real worker, with whatever breaks meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from shipreader.reader import Reader
from tests.support.month.nights import Fault, Night
from tests.support.month.project import Project
from tests.support.prefect_api import Api
from tests.support.processes import Ended, eventually, kill, processes_of, run_command
from train_and_ship.infra.fork_server import running_fork_servers
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.processes import PidFile
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import read_manifest
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import WAITING, read_decisions
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.tracking.rest import model_registry

MODEL = "parcels"
NEVER = "0 3 29 2 *"
"""The script starts each night itself, whatever the clock says."""
ENDS = ("Skipped", "Promoted", "Kept", "Failed", "Refused")
LONGEST_NIGHT = 300.0
"""Seconds; a night that takes longer is stuck."""


@dataclass(frozen=True, kw_only=True)
class Lived:
    """One night as it was."""

    night: Night
    rows: int
    """Parcels that there were to train on."""
    run: str
    """Id of the flow run."""
    state: str
    """Name of the state in which it ended."""
    asleep: datetime
    """When the night began."""
    morning: datetime
    """When it was over, and nobody had put anything right."""
    seconds: float
    served: str
    """The release that a serving machine had in the morning; empty before the first."""
    said: str
    """What `ship up` said when something had to be started again."""
    live: Pointer | None
    """When all was running again."""
    accuracy: float | None
    """Of what is live, on the parcels that were held out."""
    aliases: dict[str, str]
    """In MLflow, when all was running again."""


class Month:
    """A model, its team and a serving machine, on a stack that is running."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.project = Project(folder / MODEL)
        self.store = ObjectStore.from_settings(settings)
        self.prefect = Api(settings)
        self.registry = model_registry(settings.mlflow_url)
        self.lived: list[Lived] = []
        self.served: list[str] = []
        """Releases that the serving machine took, in order."""
        self._reader = Reader(
            MODEL, bucket=settings.bucket, folder=folder / "served", client=s3_client(settings), interval=0.5,
            on_change=lambda release: self.served.append(release.id),
        )  # fmt: skip

    def close(self) -> None:
        self._reader.close()

    def ship(self, *words: str) -> Ended:
        """The command, as a person types it."""
        return run_command("ship", *words)

    def live_through(self, nights: list[Night], report: Callable[[Lived], None] = lambda lived: None) -> None:
        """Deploy the job, and let the nights follow each other."""
        done = self.ship("deploy", "--in-place", str(self.project.job), "--cron", NEVER)
        assert done.status == 0, done.text
        for night in nights:
            lived = self._night(night)
            self.lived.append(lived)
            report(lived)

    def _night(self, night: Night) -> Lived:
        night.evening(self.project)
        rows, asleep, began = self.project.rows, datetime.now(UTC), time.monotonic()
        if night.fault in (Fault.BUCKET, Fault.MLFLOW):
            self._kill_service("s3" if night.fault is Fault.BUCKET else "mlflow")
        run = self.prefect.start("retrain", MODEL, why=f"night {night.number}")
        folder = self.settings.runs / MODEL / run
        if night.fault is Fault.MLFLOW_LATE:
            self._when(lambda: any(folder.glob("rehearse.work/*")), run)
            self._kill_service("mlflow")
        if night.fault is Fault.KILLED:
            self._when(lambda: any(folder.glob("checkpoints/step-????????")), run)
            self._kill_flow()
            self.prefect.wait(run, "Crashed")
            eventually(lambda: self._answers(run) == 1, "the worker records the run that died")
            done = run_command("prefect", "flow-run", "retry", run)
            assert done.status == 0, done.text
        state = self.prefect.wait(run, *ENDS, seconds=LONGEST_NIGHT)["state_name"]
        # A run that failed writes its answer down after Prefect knows its end.
        if night.fault is Fault.BUCKET:
            eventually((folder / WAITING).exists, "the answer waits for the bucket")
        else:
            eventually(lambda: self._answers(run) == len(night.answers), f"{night.answers} of night {night.number}")
        seconds = time.monotonic() - began
        served = self._served(night)
        # Later than everything that was done in the night, and before anybody puts anything right.
        morning = datetime.now(UTC)
        said = ""
        if night.fault in (Fault.BUCKET, Fault.MLFLOW, Fault.MLFLOW_LATE):
            up = self.ship("up")
            said = up.text
            assert up.status == 0, said
        night.morning(self.project)
        live = read_pointer(Channel(self.store, MODEL, "prod"))
        return Lived(
            night=night, rows=rows, run=run, state=str(state), asleep=asleep, morning=morning,
            seconds=seconds, served=served, said=said, live=live,
            accuracy=read_manifest(self.store, MODEL, live.release).metrics["accuracy"] if live else None,
            aliases=dict(self.registry.aliases(MODEL)),
        )  # fmt: skip

    # ---- what is looked at

    def _answers(self, run: str) -> int:
        """How many decisions of this run are on record."""
        return sum(answer.flow_run == run for answer in read_decisions(Channel(self.store, MODEL, "prod"), 5))

    def _served(self, night: Night) -> str:
        """What the serving machine has, once it had the time to look."""
        if night.fault is Fault.BUCKET:
            # It cannot know better, and goes on with what it has.
            eventually(lambda: self._reader.status().problem, "the serving machine misses the bucket")
            return self._reader.current.id if self._reader.current else ""
        live = read_pointer(Channel(self.store, MODEL, "prod"))
        if live is None:
            return ""
        if self._reader.current is None:
            self._reader.start()

        def follows() -> bool:
            return self._reader.current is not None and self._reader.current.id == live.release

        eventually(follows, f"the serving machine follows to {live.release}")
        return live.release

    # ---- what breaks

    def _kill_service(self, name: str) -> None:
        """SIGKILL, to it and all that it started."""
        record = PidFile.read(self.settings.home / "pids" / f"{name}.json")
        assert record is not None, f"{name} of this stack is not running"
        kill(record.family())

    def _kill_flow(self) -> None:
        """SIGKILL to the process that runs the flow, and to nothing else: the parent of the host of its workers."""
        parents = [process.parent() for process in processes_of(self.settings) if is_worker(process)]
        # The host forks, so that its children look like it.
        flows = {parent for parent in parents if parent is not None and not is_worker(parent)}
        assert len(flows) == 1, f"expected one run at work, found {flows}"
        kill(list(flows))

    def _when(self, moment: Callable[[], bool], run: str) -> None:
        """Wait for a moment of a run that must not end before it."""
        deadline, looked = time.monotonic() + LONGEST_NIGHT, time.monotonic()
        while not moment():
            assert time.monotonic() < deadline, "the moment did not come"
            if time.monotonic() - looked > 2:
                state = self.prefect.ask("GET", f"/flow_runs/{run}")["state"]
                assert state["type"] not in ("COMPLETED", "FAILED", "CRASHED"), state
                looked = time.monotonic()
            time.sleep(0.005)


def is_worker(process: psutil.Process) -> bool:
    """Whether it runs a stage, or the host that all stages are forked from; not this process's, which tests share."""
    named = any(word.startswith("torchworker") for word in process.cmdline())
    hosts = {host.pid for host in running_fork_servers()}
    ours = bool(hosts & {process.pid, *(parent.pid for parent in process.parents())})
    return named and not ours
