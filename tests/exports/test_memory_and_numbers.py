"""Buffers that are views, outputs that are not contiguous, and one number of the whole batch, in every usual format."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

from shipreader.mlserver import can_batch
from tests.support.worker_stages import EACH_FORMATS, OpenStages
from torchworker.contract import GOLDEN
from torchworker.project.user_code import build_model, enter
from torchworker.project.weights import start_from
from train_and_ship.tasks.register import _specs

SOUND = """
    class Sounds(torch.utils.data.Dataset):
        def __init__(self, split):
            generator = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.x = torch.randn(64, 128, generator=generator)
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return {"x": self.x[index]}, (self.x[index, 0] > 0).long()
    def build_dataset(split):
        return Sounds(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            # Views: cut from something longer, of one row many times, and turned.
            self.register_buffer("window", torch.hann_window(32))
            self.register_buffer("steps", torch.linspace(0.5, 1, 18)[:-1])
            self.register_buffer("floor", torch.full((1, 17), 0.01).expand(3, 17))
            self.register_buffer("mix", torch.randn(3, 17, generator=generator).t())
            self.experts, self.gate = nn.Linear(3, 3), nn.Linear(3, 3)
        def forward(self, x):
            spectrum = torch.fft.rfft(x.unfold(1, 32, 16) * self.window)
            power = torch.view_as_real(spectrum).square().sum(-1).mean(1) * self.steps + self.floor.sum(0)
            features = power @ self.mix
            share = self.gate(features).softmax(-1)
            logits = self.experts(features) * share
            turned = logits[:, :, None].expand(-1, -1, 4).transpose(1, 2)
            balance = share.mean(0).square().sum()
            return {"logits": logits, "turned": turned, "every_other": logits[:, ::2], "balance": balance}
    def build_model():
        return M()
    def loss(outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target) + 0.01 * outputs["balance"]
"""


@EACH_FORMATS
def test_windows_turned_outputs_and_an_auxiliary_loss_ship(stages: OpenStages, formats: tuple[str, ...]) -> None:
    one = {"epochs": 1, "processes": 1, "batch_size": 32, "loss": {"factory": "plain:loss"}}
    opened = stages(SOUND, train=one, gates={"accuracy": {"min": 0.0}}, export={"formats": list(formats)})
    made = opened.export(*formats)
    assert set(made) == set(formats) and opened.result is not None
    shapes = {spec.name: spec.shape for spec in opened.result.outputs}
    assert shapes == {"logits": ("batch", 3), "turned": ("batch", 4, 3), "every_other": ("batch", 2), "balance": ()}
    result = opened.validate()
    assert result.passed, [verdict.note for verdict in result.verdicts if not verdict.passed]
    assert "balance: one number of a whole request, so no server puts requests together" in result.independence
    # Compared as it is, for the batch that it is of.
    golden = load_file(opened.folder / "export" / GOLDEN)
    numbers = [golden[f"batch_{size}.eager.balance"] for size in (1, 8, 17)]
    assert all(number.shape == () for number in numbers) and len({float(number) for number in numbers}) == 3
    signature = {"inputs": _specs(opened.result.inputs), "outputs": _specs(opened.result.outputs)}
    assert not can_batch(signature)
    if "onnx" in formats:
        graph = onnx.load(opened.folder / "export" / "model.onnx").graph
        assert not graph.output[3].type.tensor_type.shape.dim and graph.output[3].name == "balance"


@pytest.mark.soak
def test_the_same_trains_on_after_a_crash_and_starts_the_next_run(stages: OpenStages) -> None:
    train = {
        "epochs": 2,
        "processes": 2,
        "batch_size": 32,
        "checkpoint": {"steps": 1},
        "loss": {"factory": "plain:loss"},
    }
    opened = stages(SOUND, train=train, gates={"accuracy": {"min": 0.0}})
    before = load_file(opened.weights)
    # From its last checkpoint.
    opened.train()
    after = load_file(opened.weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert set(after) >= {"window", "steps", "floor", "mix"} and after["floor"].shape == (3, 17)
    enter(opened.project)
    start_from(fresh := build_model(opened.project), Path(opened.weights))
    assert all(torch.equal(after[name], tensor) for name, tensor in fresh.state_dict().items())
