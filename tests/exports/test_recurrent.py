"""LSTM and GRU in ONNX: right at every length and at every size of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.subject import Subject
from torchworker.runtimes.load import Call, load_artifact


class Tagger(nn.Module):
    """sequence [B, T, 3] and state [2·layers, B, 5] → what the layers say [B, T, 10], and their states."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, sequence: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        given = (state, 2 * state) if isinstance(self.cells, nn.LSTM) else state
        said, left = self.cells(sequence, given)
        return said, left[1] if isinstance(left, tuple) else left


class Last(nn.Module):
    """sequence [B, T, 3] → the state that one layer ends with [1, B, 5], as the operator gives it."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells = kind(3, 5, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        left = self.cells(sequence)[1]
        return left[0] if isinstance(left, tuple) else left


def loaded(model: nn.Module, folder: Path, outputs: list[str], **axes: int) -> Call:
    nothing = Reference(target="a:b", where="model.factory")
    shapes = {"sequence": torch.randn(3, 7, 3), "state": torch.randn(4, 3, 5)}
    subject = Subject(
        model=model.eval().requires_grad_(False),
        inputs={name: shapes[name] for name in axes},
        outputs=outputs,
        dims=[
            DynamicDim(name="batch", min=1, max=20, axes={name: (axis,) for name, axis in axes.items()}),
            DynamicDim(name="length", min=1, max=50, axes={"sequence": (1,)}),
        ],
        project=Project(
            name="plain", folder="/nowhere", model=nothing, data=nothing, collate=None, loss="mse_loss", metrics=[]
        ),
    )  # fmt: skip
    onnx_model(subject, folder / "model.onnx")
    return load_artifact("onnx", folder / "model.onnx", 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_answer_as_the_model_at_every_length_and_every_size_of_a_batch(
    tmp_path: Path, kind: type[nn.LSTM] | type[nn.GRU]
) -> None:
    torch.manual_seed(0)
    model = Tagger(kind)
    call = loaded(model, tmp_path, ["said", "left"], sequence=0, state=1)
    for batch, length in ((1, 1), (3, 7), (20, 50), (0, 7), (2, 1)):
        sequence, state = torch.randn(batch, length, 3), torch.randn(4, batch, 5)
        got, expected = call({"sequence": sequence, "state": state}), model(sequence, state)
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_state_that_is_an_output_itself_keeps_its_name(tmp_path: Path, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    torch.manual_seed(0)
    model = Last(kind)
    call = loaded(model, tmp_path, ["left"], sequence=0)
    for batch in (2, 0):
        sequence = torch.randn(batch, 4, 3)
        torch.testing.assert_close(call({"sequence": sequence})[0], model(sequence), rtol=1e-5, atol=1e-6)
