"""Artifacts run without Python, by the real runner, which is built once a machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchworker.contract import CppRequest, CppResult
from torchworker.runtimes.cpp_runner import TYPES, RunnerEndedError, running
from torchworker.stages import cpp
from train_and_ship.tasks.cpp import cache_folder


class Everything(nn.Module):
    """One output of each dtype, in a nested structure."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        if bool(y.min() < 0):
            raise ValueError("no negative index")
        return (
            x + 1,
            {"b": x.double(), "a": y * 2},
            [x > 0, x.half(), x.to(torch.bfloat16), y.to(torch.int32), y.to(torch.uint8)],
        )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "model.torchscript"
    torch.jit.script(Everything().eval()).save(str(path))
    return path


def test_every_dtype_and_nested_outputs_come_back_bit_for_bit(runner: Path, artifact: Path, tmp_path: Path) -> None:
    x, y = torch.randn(3, 2, 4), torch.arange(6).view(2, 3)
    with running(runner, "torchscript", artifact, 1, tmp_path / "log") as call:
        got = call({"x": x, "y": y})
    first, named, listed = Everything()(x, y)
    expected = [first, named["b"], named["a"], *listed]
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    assert {tensor.dtype for tensor in expected} <= set(TYPES)


def test_empty_and_scalar_tensors_and_other_strides_pass(runner: Path, artifact: Path, tmp_path: Path) -> None:
    with running(runner, "torchscript", artifact, 1, tmp_path / "log") as call:
        assert call({"x": torch.zeros(0, 4), "y": torch.ones(1, dtype=torch.long)})[0].shape == (0, 4)
        assert call({"x": torch.tensor(2.0), "y": torch.tensor(3)})[0].item() == 3
        x = torch.arange(6.0).view(2, 3).T
        assert torch.equal(call({"x": x, "y": torch.tensor(3)})[0], x + 1)
        # One sample of a column: a single element with a gap behind it.
        assert call({"x": torch.ones(3, 5)[:1, 0], "y": torch.tensor(3)})[0].tolist() == [2.0]


class Optional(nn.Module):
    def forward(self, x: Tensor, weights: Tensor | None = None, y: Tensor | None = None) -> Tensor | None:
        if weights is None and y is not None:
            return x + y
        return None


def test_inputs_that_are_left_out_are_given_by_name(runner: Path, tmp_path: Path) -> None:
    torch.jit.script(Optional()).save(str(tmp_path / "model"))
    with running(runner, "torchscript", tmp_path / "model", 1, tmp_path / "log") as call:
        assert call({"x": torch.tensor(1.0), "y": torch.tensor(2.0)})[0].item() == 3
        assert call({"x": torch.tensor(1.0)}) == []


def test_an_error_of_the_model_is_told_and_the_next_call_works(runner: Path, artifact: Path, tmp_path: Path) -> None:
    with running(runner, "torchscript", artifact, 1, tmp_path / "log") as call:
        with pytest.raises(RuntimeError, match="no negative index"):
            call({"x": torch.zeros(2), "y": torch.tensor([-1])})
        assert len(call({"x": torch.zeros(2), "y": torch.tensor([1])})) == 8


def test_a_runner_that_dies_is_named_with_its_signal(runner: Path, artifact: Path, tmp_path: Path) -> None:
    with running(runner, "torchscript", artifact, 1, tmp_path / "log") as call:
        call({"x": torch.zeros(2), "y": torch.tensor([1])})
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        (pid,) = [int(child) for child in children if "ship_runner" in Path(f"/proc/{child}/cmdline").read_text()]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RunnerEndedError, match="killed by signal 9"):
            call({"x": torch.zeros(2), "y": torch.tensor([1])})


def test_what_is_no_model_is_refused_when_it_is_loaded(runner: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"not a model")
    with (
        pytest.raises(RunnerEndedError, match="does not load"),
        running(runner, "torchscript", tmp_path / "model", 1, tmp_path / "log"),
    ):
        pass


def test_the_second_build_is_the_first_one(runner: Path) -> None:
    before = runner.stat().st_mtime_ns
    assert cpp.build(CppRequest(cache=str(cache_folder()))) == CppResult(runner=str(runner))
    assert runner.stat().st_mtime_ns == before


def test_without_a_compiler_there_is_a_reason_and_no_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    built = cpp.build(CppRequest(cache=str(tmp_path / "cache")))
    assert built == CppResult(runner="", reason="no C++ compiler on this machine")


def test_sources_that_do_not_compile_leave_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpp.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "runner.cpp").write_text("int main() { return nothing; }")
    monkeypatch.setattr(cpp, "SOURCE", tmp_path / "runner.cpp")
    built = cpp.build(CppRequest(cache=str(tmp_path / "cache")))
    assert built.runner == "" and "does not build here" in built.reason and "error" in built.reason
    assert list((tmp_path / "cache").iterdir()) == []
