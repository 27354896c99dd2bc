"""A project whose files have the same names as ours. Its code must see its own, and ours must see ours."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import write_project
from torchworker.contract import ExportRequest, TrainRequest
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings
from train_and_ship.tasks.worker import call_worker

NAMES = ("tasks", "registry", "flows", "infra", "ship")

EXTRA = """
    import tasks, registry, flows, infra, ship, train
    assert {tasks.OWNER, registry.OWNER, flows.OWNER, infra.OWNER, ship.OWNER, train.OWNER} == {"theirs"}
    import tasks.losses
    def loss(outputs, target):
        return tasks.losses.cross_entropy(outputs, target)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    job = write_project(
        folder,
        extra=EXTRA,
        train={"epochs": 1, "processes": 2, "batch_size": 32, "loss": {"factory": "heavy:loss"}},
        export={"formats": ["onnx"]},
    )
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('OWNER = "theirs"\n')
    (folder / "tasks" / "losses.py").write_text("from torch.nn.functional import cross_entropy\n")
    (folder / "heavy.py").write_text("import scipy.special\nfrom plain import loss\n")
    (folder / "train.py").write_text('OWNER = "theirs"\n')
    return job


def test_their_modules_win_in_their_code_and_lose_in_ours(hostile: Path, tmp_path: Path) -> None:
    job, folder = load_job(hostile)
    project = project_of(job, folder)
    # Started from inside their folder, as people do.
    before = Path.cwd()
    os.chdir(folder)
    fork_server = ForkServer(tmp_path / "host.log")
    os.chdir(before)
    try:
        for stage, request in (
            (
                "train",
                TrainRequest(
                    project=project,
                    train=train_settings(job),
                    folder=str(tmp_path / "train"),
                    checkpoints=str(tmp_path / "c"),
                ),
            ),
            (
                "export",
                ExportRequest(
                    project=project,
                    folder=str(tmp_path / "export"),
                    weights=str(tmp_path / "train" / "weights.safetensors"),
                    formats=["onnx"],
                    batch=8,
                    seed=0,
                    validation_limit=10,
                ),
            ),
        ):
            (tmp_path / stage).mkdir()
            asyncio.run(call_worker(fork_server, stage, request, tmp_path / stage))
        # Once, and not in every stage and rank.
        assert "/scipy/special/" in Path(f"/proc/{fork_server.pid}/maps").read_text()
    finally:
        fork_server.close()
    assert (tmp_path / "export" / "model.onnx").stat().st_size > 0


def test_the_command_line_works_from_inside_their_folder(hostile: Path) -> None:
    ship = Path(sys.executable).with_name("ship")
    done = subprocess.run([ship, "check", hostile.name], cwd=hostile.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain:build_model" in done.stdout
