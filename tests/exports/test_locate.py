"""The place where a wrong artifact leaves the model, in every format that can be looked into."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from torchworker.contract import LocateRequest, Project, Reference
from torchworker.project.recording import record
from torchworker.stages import locate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = torch.relu(self.norm(self.first(x)))
        states = states + self.second(states)
        return self.last(states)


def request(folder: Path) -> LocateRequest:
    nothing = Reference(target="plain:nothing", where="model.factory")
    project = Project(
        name="plain",
        folder=str(Path(__file__).parent),
        model=nothing,
        data=nothing,
        collate=None,
        loss="mse_loss",
        metrics=[],
    )
    return LocateRequest(project=project, folder=str(folder), weights="", formats={}, inputs=["x"], probes={})


def written(model: nn.Module, kind: str, path: Path) -> None:
    x = torch.randn(4, 6)
    if kind == "torchscript":
        torch.jit.script(model).save(str(path))
        return
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    if kind == "pt2":
        torch.export.save(program, str(path))
    else:
        torch.onnx.export(program, (x,), input_names=["x"], verbose=False).save(str(path), external_data=False)


@pytest.mark.parametrize("kind", locate.LOCATABLE)
def test_the_line_of_the_first_layer_that_differs_is_named(kind: str, tmp_path: Path) -> None:
    model = Net().eval().requires_grad_(False)
    wrong = copy.deepcopy(model)
    wrong.second.weight.mul_(1.01)
    written(wrong, kind, tmp_path / "model")
    inputs = {"x": torch.randn(5, 6)}
    with torch.no_grad():
        steps = record(model, inputs, request(tmp_path).project)
        where = locate.first_difference(steps, locate.values_inside(kind, tmp_path / "model", inputs))
    assert "linear in second (Linear), test_locate.py:" in where
    assert "states = states + self.second(states)" in where


def test_an_artifact_that_is_right_inside_and_wrong_outside_is_told_apart(tmp_path: Path) -> None:
    model = Net().eval()
    written(model, "torchscript", tmp_path / "model")
    inputs = {"x": torch.randn(5, 6)}
    with torch.no_grad():
        steps = record(model, inputs, request(tmp_path).project)
        where = locate.first_difference(steps, locate.values_inside("torchscript", tmp_path / "model", inputs))
    assert f"all {len(steps)} steps of the model are found inside" in where


def test_a_value_written_over_in_place_is_compared_as_it_was(tmp_path: Path) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            states = self.first(x)
            states += 1
            return self.last(states.relu_())

    model = InPlace().eval().requires_grad_(False)
    wrong = copy.deepcopy(model)
    wrong.last.bias.add_(0.1)
    written(wrong, "torchscript", tmp_path / "model")
    inputs = {"x": torch.randn(5, 6)}
    with torch.no_grad():
        steps = record(model, inputs, request(tmp_path).project)
        # The graph writes in place as well: what is read after it ran is only the last value.
        where = locate.first_difference(steps, locate.values_inside("torchscript", tmp_path / "model", inputs))
    assert "linear in last (Linear)" in where
