"""Which device a rank gets. The number of GPUs is pretended: the machines of the tests have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.projects import write_project
from torchworker.contract import TrainSettings
from torchworker.process.failure import UserError
from torchworker.stages.train import start_method
from torchworker.training.device import backend_of, choose_device, device_notes
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import train_settings


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    return train_settings(load_job(write_project(tmp_path))[0])


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_gpus_it_is_the_cpu_and_gloo(settings: TrainSettings) -> None:
    device = choose_device(settings, 2)
    assert device.type == "cpu" and backend_of(settings, device) == "gloo"
    assert start_method(settings) == "fork"


@pytest.mark.usefixtures("two_gpus")
def test_each_process_gets_a_gpu_of_its_own_and_nccl(settings: TrainSettings) -> None:
    assert [str(choose_device(settings, 2, rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert backend_of(settings, torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"
    assert choose_device(replace(settings, device="cpu"), 9).type == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_ranks_on_gpus_are_no_forks_which_cuda_refuses(settings: TrainSettings) -> None:
    assert [start_method(replace(settings, device=device)) for device in ("auto", "cuda", "cpu")] == [
        "spawn",
        "spawn",
        "fork",
    ]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        ({}, 3, "train.processes: 3 processes on this machine need as many CUDA devices, found 2; use processes: 2"),
        ({"device": "cuda"}, 3, "need as many CUDA devices, found 2"),
        ({"strategy": "fsdp", "backend": "gloo"}, 2, "fsdp on CUDA devices needs nccl, got gloo"),
        ({"comm_hook": "bf16", "backend": "gloo"}, 2, "bf16 needs the backend nccl"),
    ],
)
def test_what_does_not_fit_the_gpus_is_refused(
    settings: TrainSettings, options: dict[str, Any], ranks: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        choose_device(replace(settings, **options), ranks)


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_that_this_cpu_has_no_instructions_for_is_told(
    settings: TrainSettings, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchworker.training.device.half_precision_is_native", lambda dtype: native)
    said = device_notes(replace(settings, precision="bf16"), torch.device("cpu"))
    assert len(said) == (not native)
    assert all("this CPU has no instructions for bf16" in note for note in said)
    assert device_notes(settings, torch.device("cpu")) == []
    assert device_notes(replace(settings, precision="bf16"), torch.device("cuda", 0)) == []
