"""Releases that can be run, as small as they get: a linear classifier as ONNX, with golden outputs and a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from torchworker.contract import EXTERNAL_DATA, GOLDEN, PROBES, VALIDATION
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.release.manifest import JOB, Manifest, build_manifest

FEATURES, CLASSES, SAMPLES = 4, 3, 60
ARTIFACT = "model.onnx"


def classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES).eval()


def write_onnx(path: Path, model: nn.Module) -> None:
    """A linear layer, of [batch, FEATURES] to [batch, CLASSES]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])
    held = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in model.state_dict().items()]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["output"], transB=1)], "linear", [x], [y], held
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(proto.SerializeToString())


def samples_of(seed: int) -> dict[str, torch.Tensor]:
    """Held-out samples that the classifier of this seed gets right, all of them."""
    inputs = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return {"input.x": inputs, "target": classifier(seed)(inputs).argmax(1)}


def move_weights(path: Path, location: str) -> None:
    """All tensors of an ONNX file go into another file beside it."""
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=0)


def write_release(
    folder: Path,
    seed: int,
    model: str,
    vs_live: float = 0.0,
    golden_seed: int | None = None,
    external_data: bool = False,
) -> None:
    """The files.

    Args:
        folder: where to; new.
        seed: of the weights.
        model: its name.
        vs_live: of its gate.
        golden_seed: of the model whose answers are said to be this one's, when they are not its own.
        external_data: whether the weights are in a file beside the artifact.
    """
    folder.mkdir(parents=True)
    made = classifier(seed)
    write_onnx(folder / ARTIFACT, made)
    if external_data:
        move_weights(folder / ARTIFACT, ARTIFACT + EXTERNAL_DATA)
    asked = made if golden_seed is None else classifier(golden_seed)
    golden = {}
    for size in (1, 8):
        inputs = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            golden |= {f"batch_{size}.input.x": inputs, f"batch_{size}.eager.output": asked(inputs)}
            golden[f"batch_{size}.float64.output"] = nn.functional.linear(
                inputs.double(), *(parameter.double() for parameter in asked.parameters())
            )
    save_file(golden, folder / GOLDEN)
    job: dict[str, Any] = {
        "name": model,
        "model": {"factory": "plain:build"},
        "data": {"factory": "plain:data"},
        "train": {"epochs": 1},
        "gates": {"accuracy": {"vs_live": vs_live}},
    }
    (folder / JOB).write_text(json.dumps(job))


def publish_folder(
    store: ObjectStore,
    folder: Path,
    model: str,
    accuracy: float,
    input_name: str = "x",
    metric: str = "accuracy",
    max_batch: int | None = None,
) -> Manifest:
    """accuracy: what the release says of itself."""
    signature = {
        "inputs": [{"name": input_name, "dtype": "float32", "shape": ["batch", FEATURES]}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", CLASSES]}],
        "dims": [{"name": "batch", "min": 1, "max": max_batch}],
    }
    manifest = build_manifest(
        folder, model=model, formats={"onnx": ARTIFACT}, signature=signature, metrics={metric: accuracy}
    )
    publish(store, folder, manifest)
    return manifest


def runnable(
    store: ObjectStore, folder: Path, accuracy: float, seed: int, model: str = "digits", **options: Any
) -> Manifest:
    """A published release. options: of `write_release`."""
    write_release(folder, seed, model, **options)
    return publish_folder(store, folder, model, accuracy)


def run_that_made(runs: Path, folder: Path, right: int) -> None:
    """The export stage of a run on this machine, whose held-out samples the classifier of seed `right` gets right."""
    stage = StageFolder(runs / f"run-{folder.name}", "export", inputs="")
    work = stage.begin()
    (work / GOLDEN).write_bytes((folder / GOLDEN).read_bytes())
    save_file(samples_of(right), work / VALIDATION)
    save_file({"batch_1/moved/output": torch.zeros(1)}, work / PROBES)
    stage.finish()
