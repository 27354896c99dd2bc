"""Parity checks of artifacts that are functions: the questions that export writes, and what fails of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from torchworker.contract import DynamicDim, ExportRequest, Project, Reference, Verdict
from torchworker.parity.compare import Policy, compare
from torchworker.parity.probes import Probe
from torchworker.parity.reference import enlarged, read_probes, write_reference
from torchworker.runtimes.load import Call

CODE = Path(__file__).parent.parent
"""Where the models of tests are."""
NOTHING = Reference(target="plain:nothing", where="model.factory")


def questions(model: nn.Module, folder: Path, *inputs: Tensor, dynamic: Sequence[DynamicDim] = ()) -> list[Probe]:
    """Every probe for the model, with validation data of these inputs."""
    project = Project(
        name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, collate=None, loss="mse_loss", metrics=[]
    )
    request = ExportRequest(
        project=project,
        folder=str(folder),
        weights="",
        formats=[],
        batch=8,
        seed=0,
        validation_limit=100,
        dynamic=dynamic,
    )
    names = ["x", "y"][: len(inputs)]
    dataset: Dataset[object] = TensorDataset(*inputs, torch.zeros(len(inputs[0])))
    if len(inputs) > 1:
        dataset = Pairs(*inputs)
    model.eval()
    torch.set_num_threads(1)
    with torch.no_grad():
        batch = enlarged(dict(zip(names, inputs, strict=True)), 8)
        write_reference(request, model, batch, dataset)
    return read_probes(folder)


class Pairs(Dataset[object]):
    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        return tuple(tensor[index] for tensor in self.inputs), torch.zeros(())


def as_artifact(model: nn.Module) -> Call:
    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [model(*inputs.values())]

    return call


def failed(verdicts: list[Verdict]) -> str:
    return "\n".join(f"{item.case}: {item.note}" for item in verdicts if not item.passed)


def check(probes: list[Probe], call: Call, kind: str = "pt2", policy: Policy | None = None) -> str:
    """What failed, empty when nothing did."""
    return failed(compare(kind, call, probes, ["output"], policy or Policy()).verdicts)
