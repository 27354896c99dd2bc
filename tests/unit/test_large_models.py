"""What is done otherwise with a large model gives what it gives with a small one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchworker.project import answers, kept_state
from torchworker.project.answers import in_float64
from torchworker.project.kept_state import changed, state_of


class Tied(nn.Module):
    """Two names of one weight, a list of weights, whole numbers among the buffers, and a scale of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.back = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.back.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(0.3), requires_grad=False)
        self.recur, self.norm = nn.LSTM(4, 4), nn.BatchNorm1d(6)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recur(self.embed(tokens))
        answer: Tensor = self.norm(self.back(states) * self.scale)
        return answer


def test_a_copy_in_float64_that_lies_in_a_file_is_the_copy_in_memory_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.arange(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_memory = in_float64(model, tmp_path)
    monkeypatch.setattr(answers, "LARGEST_DOUBLE", 0)
    in_file = in_float64(model, tmp_path)
    # Where nothing can be written memory has to do.
    for double in (in_file, in_float64(model, tmp_path / "none"), in_float64(model, None)):
        assert isinstance(double, Tied) and double.back.weight is double.embed.weight
        for name, tensor in in_memory.state_dict().items():
            assert torch.equal(double.state_dict()[name], tensor) and double.state_dict()[name].dtype == tensor.dtype
        assert [p.requires_grad for p in double.parameters()] == [p.requires_grad for p in model.parameters()]
        assert torch.equal(double(tokens), in_memory(tokens))
    # It is written to, and keeps that to itself; nothing is left in the folder.
    in_file.scale.data.fill_(7.0)
    assert float(in_float64(model, tmp_path).scale) == float(torch.tensor(0.3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_which_hashes_are_kept_has_changed_where_the_state_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1).to(memory_format=torch.channels_last), nn.BatchNorm2d(3), nn.Linear(1, 1))
    monkeypatch.setattr(kept_state, "LARGEST_COPY", 0)
    before = state_of(model)
    assert not any(isinstance(value, Tensor) for value in before.values()) and changed(before, model) == []
    with torch.no_grad():
        model[0].weight[2, 1] += 1e-6
        model[1].num_batches_tracked += 1
        model[2].weight = nn.Parameter(model[2].weight.double())
    assert changed(before, model) == ["0.weight", "2.weight", "1.num_batches_tracked"]
