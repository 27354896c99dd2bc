"""The power goes off at every operation on checkpoints: training goes on from the newest that was complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.power_cut import cut_everywhere
from tests.support.projects import REPOSITORY

TRAIN = """
import os, sys, tempfile
from pathlib import Path
import torch
import torch.distributed as dist
from tests.support.power_cut import promise
from torchworker.contract import Launches
from torchworker.training.checkpoint import Checkpoints

folder = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as meeting:
    dist.init_process_group("gloo", init_method=f"file://{meeting}/ranks", rank=0, world_size=1)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    assert checkpoints.latest() == (None, [])
    (folder / "checkpoints" / "reports.jsonl").write_text("reported")
    for step in (1, 2, 3):
        weights = {"weights": torch.full((1000,), float(step)), "step": step}
        checkpoints.save(step, weights, {"world": 1, "step": step}, lambda work: (work / "more").write_text("more"))
        checkpoints.wait()
        assert not checkpoints.failures
        promise(folder, str(step))
    dist.destroy_process_group()
"""
GO_ON = """
import json, sys, tempfile
from pathlib import Path
import torch
import torch.distributed as dist
from torchworker.training.checkpoint import Checkpoints, find_latest

found = []
with tempfile.TemporaryDirectory() as meeting:
    dist.init_process_group("gloo", init_method=f"file://{meeting}/ranks", rank=0, world_size=1)
    for folder in map(Path, sys.stdin.read().split()):
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        latest, _ = checkpoints.latest()
        step, values = 0, []
        if latest is not None:
            state = {"weights": torch.zeros(1000), "step": 0}
            checkpoints.load(latest, state)
            step, values = checkpoints.own(latest, 0)["step"], state["weights"].unique().tolist()
            assert state["step"] == step and (latest / "more").read_text() == "more"
        reports = folder / "checkpoints" / "reports.jsonl"
        reported = reports.read_text() if reports.exists() else ""
        checkpoints.save(step + 1, {"weights": torch.full((1000,), step + 1.0), "step": step + 1}, {"world": 1})
        checkpoints.wait()
        after, problems = find_latest(folder / "checkpoints")
        found.append([step, values, reported, after.name if after else "", [*problems, *checkpoints.failures]])
    dist.destroy_process_group()
print(json.dumps(found))
"""


# `unit/test_torn_files.py` has one damaged checkpoint of each kind.
@pytest.mark.soak
def test_the_newest_checkpoint_that_was_complete_is_gone_on_from(tmp_path: Path) -> None:
    states = cut_everywhere(TRAIN, tmp_path / "cut")
    folders = [str(state.put(tmp_path / "states" / str(number))) for number, state in enumerate(states)]
    done = subprocess.run(
        [sys.executable, "-c", GO_ON],
        cwd=REPOSITORY, env=dict(os.environ), input="\n".join(folders), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for state, (step, values, reported, after, problems) in zip(states, json.loads(done.stdout), strict=True):
        least = max(map(int, state.promised), default=0)
        assert step >= least and values == ([step] if step else []), state
        assert reported == "reported" or not step, state
        # The next one is the one that stays: what is damaged is not counted.
        assert (after, problems) == (f"step-{step + 1:08d}", []), state
