"""Jobs whose samples are coupled: refused before anything is trained, or gated and served one sample at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shipreader.mlserver import can_batch
from tests.support.projects import write_project
from tests.support.worker_stages import WorkerStages
from torchworker.contract import (
    FORMAT_FILES,
    VALIDATION,
    CheckRequest,
    CheckResult,
    MeasureRequest,
    MeasureResult,
    Timed,
    decode,
)
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.tasks.requests import dynamic_dims, train_settings, user_modules
from train_and_ship.tasks.worker import call_worker

BY_THE_BATCH = """
    def build_model():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2),
        )

    def build_dataset(split):
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        target = torch.randint(0, 2, (256 if split == "train" else 128,), generator=generator)
        images = torch.randn(len(target), 1, 8, 8, generator=generator) + target[:, None, None, None]
        return TensorDataset(images, target)

    def main(context):
        raise AssertionError("nothing was to be trained")
"""
"""As some GAN and meta-learning code has it: in batches it is right, one by one it is not."""
TRAIN: dict[str, Any] = {"epochs": 6, "processes": 1, "batch_size": 64, "learning_rate": 0.02}
CAUSE = (
    r"depends on the other samples of its batch: .* alone.* It comes from 1 \(BatchNorm2d\(track_running_stats=False"
)


def opened(fork_server: ForkServer, folder: Path, **job: Any) -> WorkerStages:
    job_file = write_project(folder / "project", extra=BY_THE_BATCH, **{"train": TRAIN, **job})
    return WorkerStages(fork_server, job_file, folder / "run")


def checked(stages: WorkerStages) -> CheckResult:
    folder = stages.folder / "check"
    folder.mkdir()
    request = CheckRequest(
        project=stages.project, train=train_settings(stages.job), ranks_here=1, dynamic=dynamic_dims(stages.job)
    )
    result: CheckResult = decode(CheckResult, asyncio.run(call_worker(stages.fork_server, "check", request, folder)))
    return result


@pytest.mark.parametrize("train", [TRAIN, {"entrypoint": "plain:main", "processes": 1}])
def test_coupled_samples_are_refused_by_check_and_before_the_first_step(
    train: dict[str, Any], fork_server: ForkServer, tmp_path: Path
) -> None:
    stages = opened(fork_server, tmp_path, train=train)
    with pytest.raises(JobError, match=CAUSE):
        checked(stages)
    with pytest.raises(JobError, match=CAUSE):
        stages.train()


def test_what_only_the_trained_model_shows_is_refused_before_anything_is_exported(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """A factor that is 0 until it is trained."""
    late = """
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.share = nn.Linear(4, 3), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            states = self.first(x)
            return states + self.share * states.cumsum(0)

    def build_model():
        return Late()
    """
    job_file = write_project(tmp_path / "project", extra=late, train={"epochs": 1, "processes": 1, "batch_size": 32})
    stages = WorkerStages(fork_server, job_file, tmp_path / "run")
    stages.train()
    with pytest.raises(JobError, match=r"its call of cumsum, plain.py:\d+: return states \+ self.share"):
        stages.export("pt2")
    assert not (stages.folder / "export" / FORMAT_FILES["pt2"]).exists()


def test_coupled_samples_that_are_allowed_are_gated_and_measured_one_by_one_and_not_batched(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    stages = opened(fork_server, tmp_path, parity={"coupled": "allowed"}, gates={"accuracy": {"min": 0.9}})
    trained = stages.train()
    in_batches = trained.history[-1]["validation_accuracy"]
    stages.export("onnx")
    assert stages.result is not None
    validated = stages.validate()
    one_by_one = validated.metrics["onnx"]["accuracy"]
    assert in_batches > 0.95
    assert one_by_one < 0.75
    assert "accuracy" in {item.gate for item in validated.verdicts if not item.passed}
    assert [item for item in validated.verdicts if item.gate == "parity" and not item.passed] == []
    assert validated.independence.startswith("Answers depend on the other samples of a batch, as the job allows")
    # The model's own answers, each to one sample.
    answers = load_file(stages.folder / "export" / VALIDATION)
    right = sum(int(answers[f"eager.output/{row}"].argmax() == answers["target"][row]) for row in range(128))
    assert one_by_one == pytest.approx(right / 128)
    signature = {side: [vars(spec) for spec in getattr(stages.result, side)] for side in ("inputs", "outputs")}
    assert [list(item["shape"]) for side in signature.values() for item in side] == [[1, 1, 8, 8], [1, 2]]
    assert list(stages.result.dims) == []
    assert not can_batch(signature)
    folder = stages.folder / "measure"
    folder.mkdir()
    artifact = Timed(name="onnx", format="onnx", file=str(stages.folder / "export" / FORMAT_FILES["onnx"]))
    request = MeasureRequest(
        subjects=[artifact],
        golden=str(stages.folder / "export" / "golden.safetensors"),
        inputs=stages.result.inputs,
        batches=(1, 8, 64),
        threads=1,
        serve="auto",
        gates=[],
        forbidden_modules=user_modules(stages.job, stages.project_folder),
        forbidden_folder=str(stages.project_folder),
    )
    speed = decode(MeasureResult, asyncio.run(call_worker(fork_server, "measure", request, folder)))
    assert [item.batch for item in speed.measured["onnx"].speeds] == [1]
