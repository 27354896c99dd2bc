"""An example that is trained twice, the second time with a rank that is killed in the second of its three epochs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import yaml

from tests.support.training import Train
from torchworker.contract import TrainResult


def whole_and_killed(train: Train, folder: Path, example: Path, epoch_steps: int) -> tuple[TrainResult, TrainResult]:
    """What both trainings gave, which wrote `train0` and `train1` into the folder.

    Args:
        train: of that folder, new.
        folder: for everything that is written.
        example: folder with its job.yaml, which has `train.args.epochs` and writes a checkpoint each epoch.
        epoch_steps: of one epoch.
    """
    document = yaml.safe_load((example / "job.yaml").read_text()) | {"project": str(example)}
    document["train"]["args"]["epochs"] = 3
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(document))
    whole = train(job)
    (folder / "checkpoints").rename(folder / "others")
    restarts: list[str] = []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "restarting":
            restarts.append(event["checkpoint"])
        if event["event"] == "checkpoint" and event["step"] == 2 * epoch_steps and not restarts:
            os.kill(int((folder / "train1" / "heartbeat-rank1").read_text()), signal.SIGKILL)

    killed = train(job, kill)
    # That of the second epoch may still have been being written.
    assert len(restarts) == 1 and restarts[0] in (f"step-{epoch_steps:08}", f"step-{2 * epoch_steps:08}"), restarts
    return whole, killed
