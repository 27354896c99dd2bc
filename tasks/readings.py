"""Whether all processes of a run have read the same data; asked again of the data itself where they have not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from prefect import get_run_logger

from torchworker.contract import RereadRequest, RereadResult
from train_and_ship.registry.data.readings import Contradiction, refusal
from train_and_ship.tasks.requests import train_settings
from train_and_ship.tasks.results import Run
from train_and_ship.tasks.worker import ask_worker


async def require_same_data(run: Run, found: Sequence[Contradiction]) -> None:
    """Raises GateError for the first contradiction that is none of chance.

    A dataset that draws at random, and not from the generators that are seeded for it, is another one each time that it
    is read: then nothing can be said, and that is said.
    """
    for item in found:
        again = None if item.counted else await _reread(run, item.split)
        if again is not None and not again.same:
            get_run_logger().info(
                "%s gives other %s samples each time that it is read, so that what each process has read cannot be "
                "compared", run.job.data.factory, item.split,
            )  # fmt: skip
            continue
        raise refusal(run.job, item, again)


async def _reread(run: Run, split: str) -> RereadResult:
    request = RereadRequest(
        project=run.project, train=train_settings(run.job), split=cast(Literal["train", "validation"], split)
    )
    return await ask_worker(run.rooms.project, "reread", request, RereadResult, run.folder / f"reread-{split}")
