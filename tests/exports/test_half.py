"""Models whose weights are float16 or bfloat16, through export and clean room."""

from __future__ import annotations

import pytest

from tests.support.worker_stages import ONE, OpenStages
from train_and_ship.infra.errors import JobError

SCORE = """
    class Binary(torch.utils.data.Dataset):
        def __init__(self, split):
            self.x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0 if split == "train" else 1))
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return self.x[index], (self.x[index].sum() > 0).float()
    def build_dataset(split):
        return Binary(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Parameter(torch.randn(8, 32) / 3), nn.LayerNorm(32)
            self.second = nn.Parameter(torch.randn(32) / 6)
        def forward(self, x):
            return (self.norm(x.to(self.first.dtype) @ self.first).relu() @ self.second).float()
    def build_model():
        torch.manual_seed(0)
        return M().to(torch.DTYPE)
    def loss(outputs, target):
        return nn.functional.binary_cross_entropy_with_logits(outputs, target)
"""
TRAIN = {"train": {**ONE, "loss": {"factory": "plain:loss"}}, "gates": {"accuracy": {"min": 0.0}}}


def test_a_score_computed_in_float16_ships_in_all_formats_though_onnx_runtime_rounds_otherwise(
    stages: OpenStages,
) -> None:
    opened = stages(SCORE.replace("DTYPE", "float16"), trained=False, **TRAIN)
    assert set(opened.export("torchscript", "onnx", "pt2")) == {"torchscript", "onnx", "pt2"}
    result = opened.validate()
    assert result.passed, [verdict.note for verdict in result.verdicts if not verdict.passed]
    assert result.reference == "the model in float64"


def test_bfloat16_ships_but_for_onnx_which_names_the_operator_that_its_runtime_lacks(stages: OpenStages) -> None:
    opened = stages(SCORE.replace("DTYPE", "bfloat16"), trained=False, **TRAIN)
    with pytest.raises(JobError, match="ONNX Runtime's CPU provider has no MatMul for bfloat16") as refused:
        opened.export("onnx")
    assert "(.float()), or leave onnx out of export.formats" in str(refused.value)
    assert not (opened.folder / "export" / "model.onnx").exists()
    opened.export("torchscript", "pt2")
    result = opened.validate()
    assert result.passed and result.reference == "the model in float64"
