"""How ranks share a model, at which precision, and with which switches."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from tests.support.processes import PATIENCE
from tests.support.projects import DIGITS, REPOSITORY, RESIDUAL, write_project
from tests.support.training import Train
from torchworker.contract import ExportRequest, ExportResult, decode
from torchworker.training.device import half_precision_is_native
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.check import check
from train_and_ship.tasks.requests import project_of
from train_and_ship.tasks.worker import call_worker

# A model with layers, a tied weight and a running statistic: what sharding has to get right.
LAYERS = (
    RESIDUAL
    + """
    class Layered(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.inlet = nn.Linear(4, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(3))
            self.outlet, self.again = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
            self.again.weight = self.outlet.weight
            self.head = nn.Linear(width, 3)
        def forward(self, x):
            x = self.inlet(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.again(torch.relu(self.outlet(x))))
    def build_model():
        return Layered()
"""
)
PLAN: dict[str, Any] = {"epochs": 2, "processes": 2, "batch_size": 32}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def test_fsdp_trains_to_the_weights_that_ddp_trains_to(train: Train, tmp_path: Path) -> None:
    # 90 of the 96 validation samples: unequal shares, and a forward pass that needs all ranks.
    extra = (
        LAYERS
        + """
    original = build_dataset
    def build_dataset(split):
        return original(split) if split == "train" else TensorDataset(*original(split)[:91])
    """
    )
    plan = {**PLAN, "optimizer": "sgd", "accumulate": 2, "clip_norm": 0.5}
    ddp = train(write_project(tmp_path / "ddp", extra=extra, train=plan))
    fsdp = train(write_project(tmp_path / "fsdp", extra=extra, train={**plan, "strategy": "fsdp"}))

    whole, gathered = weights(tmp_path / "train0"), weights(tmp_path / "train1")
    assert whole.keys() == gathered.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert fsdp.history[-1]["validation_loss"] == pytest.approx(ddp.history[-1]["validation_loss"], rel=1e-4)
    assert fsdp.validation_samples == ddp.validation_samples == 91
    assert fsdp.environment["strategy"] == "fsdp"


def test_what_fsdp_trained_is_exported_like_any_other(train: Train, fork_server: ForkServer, tmp_path: Path) -> None:
    path = write_project(tmp_path / "p", extra=LAYERS, train={**PLAN, "strategy": "fsdp"})
    train(path)
    job, folder = load_job(path)
    out = tmp_path / "out"
    out.mkdir()
    request = ExportRequest(
        project=project_of(job, folder),
        folder=str(out),
        weights=str(tmp_path / "train0" / "weights.safetensors"),
        formats=["torchscript"],
        batch=16,
        seed=0,
        validation_limit=96,
    )
    exported = decode(ExportResult, asyncio.run(call_worker(fork_server, "export", request, out)))
    assert list(exported.artifacts) == ["torchscript"]


@pytest.mark.parametrize("options", [{"strategy": "fsdp"}, pytest.param({"precision": "fp16"}, marks=pytest.mark.soak)])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    train: Train, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = {**PLAN, "epochs": 4, "checkpoint": {"steps": 2}, **options}
    train(write_project(tmp_path / "whole", extra=LAYERS, train=plan))
    shutil.rmtree(tmp_path / "checkpoints")
    killed: list[int] = []

    def kill_a_rank(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2 and not killed:
            (tmp_path / "kill").touch()
            killed.append(1)

    extra = (
        LAYERS
        + f"""
    import os, signal
    from pathlib import Path
    class Dies(Layered):
        def forward(self, x):
            flag = Path({str(tmp_path / "kill")!r})
            if self.training and os.environ["RANK"] == "1" and flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)
    def build_model():
        return Dies()
    """
    )
    result = train(write_project(tmp_path / "killed", extra=extra, train=plan), kill_a_rank)

    assert any(note.startswith("resumed from step") for note in result.notes)
    whole, resumed = weights(tmp_path / "train0"), weights(tmp_path / "train1")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


# Of ddp it is asked in distributed/test_resume.py.
@pytest.mark.soak
def test_fsdp_resumes_at_another_number_of_processes_and_says_that_bits_may_differ(
    train: Train, tmp_path: Path
) -> None:
    plan = {**PLAN, "strategy": "fsdp", "checkpoint": {"steps": 2, "keep": 9}}
    train(write_project(tmp_path / "two", extra=LAYERS, train=plan))
    result = train(write_project(tmp_path / "four", extra=LAYERS, train={**plan, "processes": 4}))

    assert any("written by 2 processes and read by 4: bits may differ" in note for note in result.notes)


def test_gradients_exchanged_in_half_precision_train_almost_the_same(train: Train, tmp_path: Path) -> None:
    plain = train(write_project(tmp_path / "plain", extra=LAYERS, train=PLAN))
    hooked = train(write_project(tmp_path / "hooked", extra=LAYERS, train={**PLAN, "comm_hook": "fp16"}))

    first, second = plain.history[-1]["train_loss"], hooked.history[-1]["train_loss"]
    assert first != second
    assert second == pytest.approx(first, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_half_precision_and_keeps_the_weights_in_their_own(
    train: Train, tmp_path: Path, precision: str
) -> None:
    extra = """
        class Looks(nn.Linear):
            def forward(self, x):
                out = super().forward(x)
                wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[PRECISION]
                if self.training != (out.dtype == wanted):
                    raise AssertionError(f"{out.dtype} in training={self.training}")
                return out
        def build_model():
            return Looks(4, 3)
    """.replace("PRECISION", repr(precision))
    result = train(write_project(tmp_path / "p", extra=extra, train={**PLAN, "precision": precision}))

    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "train0").values())
    assert result.environment["precision"] == precision
    native = half_precision_is_native({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    assert any("no instructions for" in note for note in result.notes) is not native


def test_a_fused_optimizer_and_channels_last_train_to_the_loss_without_them(train: Train, tmp_path: Path) -> None:
    extra = """
        class Pictures(nn.Conv2d):
            def forward(self, x):
                return super().forward(x.reshape(-1, 1, 2, 2)).flatten(1)
        def build_model():
            return Pictures(1, 3, 2)
    """
    plan = {**PLAN, "processes": 1}
    plain = train(write_project(tmp_path / "plain", extra=extra, train=plan))
    switched = train(write_project(tmp_path / "on", extra=extra, train={**plan, "fused": True, "channels_last": True}))

    assert switched.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"], rel=1e-5)


# With autocast besides, which is asked above.
@pytest.mark.soak
def test_the_switches_train_the_digits_too(train: Train, tmp_path: Path) -> None:
    shutil.copytree(DIGITS.parent, tmp_path / "digits")
    path = tmp_path / "digits" / "job.yaml"
    document = path.read_text().replace("train: {", "train: {fused: true, channels_last: true, precision: bf16, ")
    assert "fused" in document
    path.write_text(document)
    result = train(path)

    assert result.history[-1]["validation_accuracy"] >= 0.95


def test_a_compiled_model_trains_to_about_the_same_loss(train: Train, tmp_path: Path) -> None:
    plan = {**PLAN, "epochs": 1, "optimizer": "sgd"}
    eager = train(write_project(tmp_path / "eager", train=plan))
    compiled = train(write_project(tmp_path / "compiled", train={**plan, "compile": True}))

    assert compiled.history[-1]["train_loss"] == pytest.approx(eager.history[-1]["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, "train.device: expected a CUDA device for each process, found none"),
        ({"backend": "nccl"}, "train.backend: nccl exchanges between CUDA devices, and the device is cpu"),
        ({"comm_hook": "bf16"}, "train.comm_hook: bf16 needs the backend nccl, and this is gloo; use fp16"),
        ({"cudnn_benchmark": True}, "train.cudnn_benchmark: is for CUDA devices, and the device is cpu"),
    ],
)
def test_what_this_machine_does_not_have_is_told_before_and_in_training(
    train: Train, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    path = write_project(tmp_path / "p", train={**PLAN, **options})
    with pytest.raises(JobError) as checked:
        check(path)
    assert said in str(checked.value)
    with pytest.raises(JobError) as trained:
        train(path)
    assert said in str(trained.value)


def test_compiling_without_a_compiler_is_told_before_training(tmp_path: Path) -> None:
    path = write_project(tmp_path / "p", train={**PLAN, "compile": True})
    bare = {**os.environ, "PATH": str(Path(sys.executable).parent), "CXX": "/nowhere/c++"}
    done = subprocess.run(
        [Path(sys.executable).with_name("ship"), "check", str(path)],
        cwd=REPOSITORY, env=bare, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "train.compile: expected a C++ compiler (g++ or CXX), found none" in done.stderr


def test_a_metric_of_ones_own_sees_the_whole_validation_set_once_in_order(train: Train, tmp_path: Path) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            return original(split) if split == "train" else TensorDataset(*original(split)[:91])
        def in_order(outputs, target):
            expected = original("validation").tensors[1][:91]
            return float(torch.equal(target, expected) and outputs.shape == (91, 3))
        class Share:
            def __init__(self, of):
                self.of = of
            def __call__(self, outputs, target):
                return (outputs.argmax(1) == self.of).double().mean()
    """
    metrics = [
        "accuracy",
        {"factory": "plain:in_order", "better": "higher"},
        {"factory": "plain:Share", "args": {"of": 1}, "better": "lower", "name": "ones"},
    ]
    job = {"extra": extra, "train": {**PLAN, "learning_rate": 1e-30, "metrics": metrics}}
    two = train(write_project(tmp_path / "two", **job))
    job["train"] = {**job["train"], "processes": 1}
    one = train(write_project(tmp_path / "one", **job))

    assert two.history[-1]["validation_in_order"] == 1
    assert two.history[-1]["validation_ones"] == one.history[-1]["validation_ones"]
    assert "validation_accuracy" in two.history[-1]


@pytest.mark.soak
def test_a_metric_by_name_is_of_all_samples_at_once_and_not_a_mean_over_ranks(train: Train, tmp_path: Path) -> None:
    extra = """
        original = build_dataset
        def build_dataset(split):
            return original(split) if split == "train" else TensorDataset(*original(split)[:91])
    """
    plan = {**PLAN, "epochs": 3, "learning_rate": 0.05, "metrics": ["f1_score"]}
    result = train(write_project(tmp_path / "p", extra=extra, train=plan))

    trained = weights(tmp_path / "train0")
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))[:91]
    target = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long()
    hidden = torch.relu(inputs @ trained["0.weight"].T + trained["0.bias"])
    best = (hidden @ trained["2.weight"].T + trained["2.bias"]).argmax(1)
    expected = f1_score(target, best, average="macro")
    assert result.history[-1]["validation_f1_score"] == pytest.approx(expected, abs=1e-6) and expected > 0.3
