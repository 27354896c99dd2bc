"""What becomes of a public architecture in each format: captured as a run would, and held against the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

from tests.support.public import architectures
from tests.support.public.architectures import BY_NAME, Architecture, build_dataset, build_model
from torchworker.contract import VALIDATION, WEIGHTS, DynamicDim, ExportRequest, Project, Reference, Verdict
from torchworker.exporters.agreement import disagreement
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.pt2 import pt2
from torchworker.exporters.subject import Made, Subject
from torchworker.exporters.torchscript import torchscript
from torchworker.parity.compare import Outside, Policy, compare, same_weights
from torchworker.parity.probes import BATCHES as BATCHES_OF_CAPTURE
from torchworker.parity.probes import Probe
from torchworker.parity.reference import other_batches, read_probes, validation_batches, write_reference
from torchworker.process.failure import UserError
from torchworker.process.fork import CrashNote, ForkedCall
from torchworker.project.shippable import cannot_hold
from torchworker.project.signature import input_specs, resized
from torchworker.project.user_code import forward, name_inputs, name_outputs
from torchworker.project.weights import save_weights
from torchworker.runtimes.load import Loaded, load_with_weights
from torchworker.stages.validate import outliving

FORMATS: Mapping[str, Callable[[Subject, Path], Made]] = {"torchscript": torchscript, "pt2": pt2, "onnx": onnx_model}
BATCHES = (1, 2, 3, 16, 63, 64, 130)
"""Asked of each file, up to the largest that is declared."""


def subject_of(name: str, largest: int | None) -> Subject:
    """An architecture as exporters get it. largest: batch; None for no limit."""
    nothing = Reference(target="a:b", where="model.factory")
    folder = str(Path(architectures.__file__).parent)
    project = Project(name="plain", folder=folder, model=nothing, data=nothing, loss="mse_loss", metrics=[])
    torch.manual_seed(0)
    model = build_model(name).eval().requires_grad_(False)
    data = build_dataset("train", name)
    inputs = name_inputs(model, default_collate([data[index][0] for index in range(8)]), project)
    return Subject(
        model=model,
        inputs=inputs,
        outputs=list(name_outputs(forward(model, inputs, project), project)),
        dims=[DynamicDim(name="batch", min=1, max=largest, axes={name: (0,) for name in inputs})],
        project=project,
    )


def mistakes(asked: Architecture, files: Mapping[str, str]) -> list[str]:
    """What is not as it should be: a format that is missing, or one that is there. files: what became of each."""
    found = []
    for kind, what in files.items():
        if kind not in asked.lost and what.startswith("refused: "):
            found.append(f"{kind}: {what}")
        elif kind in asked.lost and not (what.startswith("refused: ") and asked.lost[kind] in what):
            found.append(f"{kind}: expected to be refused with {asked.lost[kind]!r}: {what}")
    return found


def became(name: str, kind: str) -> str:
    """How the architecture was captured; or `refused: ` and why. In a process of its own, as a run does.

    Raises AssertionError where a file is not the model.
    """
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_became, (name, kind))


@torch.no_grad()
def _became(name: str, kind: str) -> str:
    torch.set_num_threads(1)
    largest = BY_NAME[name].max_batch
    subject = subject_of(name, largest)
    outputs = name_outputs(forward(subject.model, subject.inputs, subject.project), subject.project)
    if why := cannot_hold(kind, subject.model, subject.inputs, outputs):
        return f"refused: {why}"
    with tempfile.TemporaryDirectory(prefix="public-") as folder:
        path = Path(folder) / f"model.{kind}"
        # torch prints the graph of what it cannot capture.
        quiet, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(quiet, 2)
        try:
            made = FORMATS[kind](subject, path)
        except UserError as error:
            return f"refused: {error}"
        finally:
            os.dup2(kept, 2)
        loaded = load_with_weights(kind, path, 1)
        call = loaded.call
        assert (differs := disagreement(call, subject)) == "", differs
        for batch in (batch for batch in BATCHES if largest is None or batch <= largest):
            given = resized(subject.inputs, subject.dims, {"batch": batch})
            expected = name_outputs(forward(subject.model, given, subject.project), subject.project)
            for found, wanted in zip(call(given), expected.values(), strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3, equal_nan=True)
        if refused := gate(name, kind, loaded, subject, Path(folder)):
            return f"refused: the gate: {refused}"
    return made.method


def gate(name: str, kind: str, loaded: Loaded, subject: Subject, folder: Path) -> str:
    """What the gate of a run says against a file; empty when nothing. A sound file that it refuses is a false alarm.

    Args:
        name: of the architecture.
        kind: format of the file.
        loaded: the file.
        subject: as the exporter got it.
        folder: an existing one, for what is asked.
    """
    largest, batch = BY_NAME[name].max_batch, len(next(iter(subject.inputs.values())))
    request = ExportRequest(
        project=subject.project, folder=str(folder), weights="", formats=[], batch=batch, seed=0, validation_limit=64,
        max_batch=largest,
    )  # fmt: skip
    write_reference(request, subject.model, subject.inputs, build_dataset("validation", name))
    specs = input_specs(subject.inputs, subject.dims)
    probes = [probe.ordered(specs) for probe in read_probes(folder)]
    samples = validation_batches(load_file(folder / VALIDATION), specs, batch, subject.outputs)
    golden = [probe.size for probe in probes if probe.group == BATCHES_OF_CAPTURE]
    # Where `ship check` says that samples are coupled, a job has to allow it, and nothing is asked row by row.
    other = () if BY_NAME[name].refused else other_batches([probe for probe, _ in samples], golden, largest)
    save_weights(subject.model, folder / WEIGHTS)
    verdicts = same_weights(kind, loaded, folder / WEIGHTS)
    note, outside = CrashNote(), Outside()
    asked = partial(_asked, kind, loaded, [*probes, *other], subject.outputs, outside)
    verdicts += outliving(ForkedCall(asked, note), asked, note, outside)
    return "; ".join(f"{item.case}: {item.note}" for item in verdicts if not item.passed)


def _asked(kind: str, loaded: Loaded, probes: list[Probe], outputs: Sequence[str], outside: Outside) -> list[Verdict]:
    return compare(kind, loaded.call, probes, outputs, Policy(), outside).verdicts
