"""A release with an ExecuTorch program: through the whole flow, to a device that pulls it and asks it alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fixture_types import Ship
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import read_manifest
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer

if importlib.util.find_spec("executorch") is None:
    pytest.skip("ExecuTorch is not installed: pip install executorch==1.5.1", allow_module_level=True)

ON_THE_DEVICE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from executorch.runtime import Runtime
from safetensors.torch import load_file
folder = Path(sys.argv[1])
program = Runtime.get().load_program(folder / "model.pte")
(signature,) = program.load_method("signature").execute([])
golden = load_file(folder / "golden.safetensors")
(got,) = program.load_method("forward").execute([golden["batch_20.input.input"]])
off = (got - golden["batch_20.eager.output"]).abs().max()
print(json.dumps({"signature": json.loads(signature), "off": float(off)}))
"""
"""What somebody writes who has ExecuTorch and nothing of ours."""


@pytest.mark.soak
def test_a_program_for_devices_is_proven_measured_rehearsed_and_pulled(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    job = write_project(
        tmp_path / "project",
        name="edge",
        train={"epochs": 5, "processes": 1, "batch_size": 32},
        export={"formats": ["executorch"], "batch": 8, "max_batch": 20},
        gates={"accuracy": {"min": 0.3}, "size_mb": {"max": 1}},
    )
    ended = ship("check", str(job), "--no-export")
    assert ended.status == 0, ended.text
    assert "batch: 1 to 20" in ended.output and "executorch: model.pte" in ended.output
    ended = ship("run", str(job))
    assert ended.status == 0, ended.text
    pointer = read_pointer(Channel(store, "edge", "prod"))
    assert pointer is not None
    manifest = read_manifest(store, "edge", pointer.release)
    assert manifest.formats == {"executorch": "model.pte"}
    assert manifest.serve == {"latency": "executorch", "throughput": "executorch"}
    assert manifest.signature["dims"] == [{"name": "batch", "min": 1, "max": 20}]

    ended = ship("pull", "edge", "--to", str(tmp_path / "device"))
    assert ended.status == 0, ended.text
    folder = tmp_path / "device" / "current"
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    assert all(item["passed"] and item["format"] == "executorch" for item in verdicts)
    assert {"parity", "accuracy", "size_mb"} == {item["gate"] for item in verdicts}
    told = json.loads(
        subprocess.check_output([sys.executable, "-P", "-c", ON_THE_DEVICE, str(folder)], text=True).splitlines()[-1]
    )
    assert told["signature"]["dims"] == {"batch": [1, 20]} and told["off"] < 1e-5
