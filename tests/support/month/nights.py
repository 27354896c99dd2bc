"""The story: thirty nights of one model, what happens on each, and what retraining has to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tests.support.month.project import Project
from train_and_ship.registry.channels.decisions import FAILED, KEPT, PROMOTED, SKIPPED


class Fault(Enum):
    """What breaks during a night."""

    NONE = ""
    BUCKET = "the S3 server is killed before the night, and started again in the morning"
    MLFLOW = "the MLflow server is killed before the night, and started again in the morning"
    MLFLOW_LATE = "the MLflow server is killed after the candidate was registered"
    KILLED = "the flow's process is killed in the middle of training, and the run retried"


def nothing(project: Project) -> None:
    """The project is as it was."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """One night, and what has to come of it."""

    number: int
    happens: str
    """In the table."""
    answers: tuple[str, ...]
    """What retraining has to record, in this order; more than one when a run that died is gone on with."""
    why: str
    """Regular expression that the last recorded reason has to match."""
    evening: Callable[[Project], None] = nothing
    """What changed during the day."""
    morning: Callable[[Project], None] = nothing
    """What people put right when they see what happened."""
    fault: Fault = Fault.NONE
    mark: str = ""
    """In the picture."""


NOTHING_NEW = "nothing has changed since release [0-9a-f]+: code, data, config and environment are the same"
BETTER = r"accuracy vs live: 0\.\d+ against 0\.\d+, 95% interval of the improvement \+0\.\d+ to \+0\.\d+"
TRIED = "the same code, data, config and environment were tried at .* stayed"


def quiet(number: int) -> Night:
    return Night(number=number, happens="nothing new", answers=(SKIPPED,), why=NOTHING_NEW)


def grows(number: int, parcels: int, happens: str = "", fault: Fault = Fault.NONE, mark: str = "") -> Night:
    """More data, and a better model."""
    return Night(
        number=number,
        happens=happens or f"{parcels:,} more parcels",
        answers=(FAILED, PROMOTED) if fault is Fault.KILLED else (PROMOTED,),
        why=BETTER,
        evening=lambda project: project.deliver(number, parcels),
        fault=fault,
        mark=mark,
    )


def nights() -> list[Night]:
    """A month."""
    return [
        Night(
            number=1, happens="the first 100 parcels", answers=(PROMOTED,), why="nothing was live",
            evening=lambda project: project.deliver(1, 100),
        ),
        quiet(2),
        Night(
            number=3, happens="the team makes the network wider", answers=(PROMOTED,), why=BETTER,
            evening=lambda project: project.set_job("model", args={"width": 64}), mark="wider network",
        ),
        grows(4, 150),
        quiet(5),
        Night(
            number=6, happens="a damaged delivery: missing weights, impossible distances", answers=(FAILED,),
            why=r"missing of train parcel: .*outside of train parcel",
            evening=lambda project: project.deliver_damaged(6, 200),
            morning=lambda project: project.take_back(6), mark="corrupt data",
        ),
        grows(7, 200, "the delivery again, sound: 200 parcels"),
        quiet(8),
        Night(
            number=9, happens="400 more parcels, and the bucket is down", answers=(FAILED,),
            why="in s3://models at .*: no answer",
            evening=lambda project: project.deliver(9, 400), fault=Fault.BUCKET, mark="bucket down",
        ),
        Night(number=10, happens="the bucket is back", answers=(PROMOTED,), why=BETTER),
        quiet(11),
        quiet(12),
        Night(
            number=13, happens="800 more parcels, and MLflow is down", answers=(FAILED,),
            why="MLflow at .* does not answer", evening=lambda project: project.deliver(13, 800),
            fault=Fault.MLFLOW, mark="MLflow down",
        ),
        Night(number=14, happens="MLflow is back", answers=(PROMOTED,), why=BETTER),
        quiet(15),
        grows(16, 1600, "1,600 more parcels; killed at 03:00, retried", Fault.KILLED, "killed at 03:00"),
        quiet(17),
        Night(
            number=18, happens="somebody loses zeros of the learning rate", answers=(KEPT,),
            why="release.policy: better needs it above 0.003",
            evening=lambda project: project.set_job("train", learning_rate=0.00001), mark="worse model",
        ),
        Night(number=19, happens="the mistake is still there", answers=(SKIPPED,), why=TRIED),
        Night(
            number=20, happens="the mistake is mended", answers=(SKIPPED,), why=NOTHING_NEW,
            evening=lambda project: project.set_job("train", learning_rate=0.01),
        ),
        Night(
            number=21, happens="the source sends miles instead of kilometres", answers=(FAILED,),
            why=r"psi of parcel\[0\]: .*expected at most 0.25",
            evening=lambda project: project.measure_in(miles=True),
            morning=lambda project: project.measure_in(miles=False), mark="drift",
        ),
        quiet(22),
        Night(
            number=23, happens="an upload is cut off", answers=(FAILED,), why="the data is not what its manifest says",
            evening=lambda project: project.deliver_half(23, 64),
            morning=lambda project: project.take_back(23), mark="half an upload",
        ),
        Night(
            number=24, happens="64 more parcels, which teach nothing new", answers=(KEPT,),
            why="release.policy: better needs it above 0.003",
            evening=lambda project: project.deliver(24, 64), mark="not better",
        ),
        Night(number=25, happens="no more parcels", answers=(SKIPPED,), why=TRIED),
        grows(26, 6400, "6,400 more parcels; MLflow dies before the promotion", Fault.MLFLOW_LATE, "MLflow dies"),
        quiet(27),
        Night(
            number=28, happens="a comment in the code", answers=(KEPT,),
            why=r"improvement \+0, 95% interval \+0 to \+0", evening=lambda project: project.comment(),
            mark="no difference",
        ),
        Night(number=29, happens="nothing new", answers=(SKIPPED,), why=TRIED),
        Night(number=30, happens="nothing new", answers=(SKIPPED,), why=TRIED),
    ]  # fmt: skip
