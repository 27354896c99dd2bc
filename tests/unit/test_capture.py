"""Small parts of capture and of the clean room that need no training."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from torchworker.contract import DynamicDim
from torchworker.process.fork import ChildDiedError, CrashNote, run_in_fork
from torchworker.project.signature import other_sizes, resized, sizes_of
from torchworker.runtimes.load import _require_signature, ignore_script_deprecation

BATCH = DynamicDim(name="batch", min=1, max=None, axes={"tokens": (0,), "pairs": (0,)})
LENGTH = DynamicDim(name="length", min=1, max=7, axes={"tokens": (1,), "pairs": (1, 2)})
INPUTS = {"tokens": torch.arange(12).reshape(2, 6), "pairs": torch.zeros(2, 6, 6)}


def test_inputs_are_cut_and_repeated_on_every_axis_of_a_dimension() -> None:
    changed = resized(INPUTS, [BATCH, LENGTH], {"batch": 3, "length": 4})
    assert changed["tokens"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert changed["pairs"].shape == (3, 4, 4)
    assert sizes_of(changed, [BATCH, LENGTH]) == {"batch": 3, "length": 4}
    assert resized(INPUTS, [BATCH], {"batch": 0})["tokens"].shape == (0, 6)


def test_other_sizes_are_inside_the_declared_ranges_and_tell_dimensions_apart() -> None:
    sizes = other_sizes(INPUTS, [BATCH, LENGTH])
    assert sizes["batch"] not in (2, 6) and 1 <= sizes["length"] <= 7 and sizes["length"] not in (2, 6)
    assert sizes["batch"] != sizes["length"]


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(2, 6), None),
        (torch.zeros(2, 6, dtype=torch.float64), "expected float32 .* got float64"),
        (torch.zeros(2, 8), r"got float32 \[2, 8\]"),
        (torch.zeros(2, 6, 1), r"got float32 \[2, 6, 1\]"),
    ],
)
def test_a_compiled_package_refuses_what_it_was_not_compiled_for(tensor: torch.Tensor, told: str | None) -> None:
    spec = {"name": "x", "dtype": "float32", "shape": ["batch", "length"]}
    signature = {"inputs": [spec], "dims": {"batch": [1, None], "length": [1, 7]}}
    if told is None:
        _require_signature({"x": tensor}, signature)
    else:
        with pytest.raises(ValueError, match=told):
            _require_signature({"x": tensor}, signature)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_that_torchscript_is_deprecated_is_not_said_at_every_call_and_other_warnings_are(
    category: type[Warning],
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignore_script_deprecation()
        warnings.warn("`torch.jit.load` is deprecated. Please switch to `torch.export`.", category, stacklevel=1)
        warnings.warn("`torch.linalg` is something else", category, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["`torch.linalg` is something else"]


def test_without_a_compiler_aoti_is_refused_with_the_way_out() -> None:
    script = (
        "from torchworker.exporters.aoti import compiler\n"
        "try:\n    compiler()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "CXX": "/nowhere/g++"}
    said = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
    assert said.startswith("UserError") and "this machine has none; install g++" in said


def test_what_dies_in_a_fork_says_what_it_was_asked() -> None:
    note = CrashNote()

    def work() -> int:
        note.write("tokens [3, 7]")
        faulthandler.disable()  # pytest's: this death is meant
        os.kill(os.getpid(), signal.SIGABRT)
        return 1

    with pytest.raises(ChildDiedError, match=r"ended by signal 6 while it was asked tokens \[3, 7\]"):
        run_in_fork(work, note)
    assert run_in_fork(lambda: nn.Linear(1, 1).in_features, CrashNote()) == 1
    with pytest.raises(ValueError, match="mine"):
        run_in_fork(_failing, CrashNote())


def test_a_process_with_more_than_a_thousand_files_open_forks_too() -> None:
    """As a server's or a training's may have; select() refuses descriptors above 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(2048, before[1])), before[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_in_fork(lambda: 7, CrashNote(), seconds=60.0) == 7
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _failing() -> None:
    raise ValueError("mine")
