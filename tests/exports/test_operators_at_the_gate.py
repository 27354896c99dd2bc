"""What the gate makes of operators that a real runtime computes otherwise, and of models that change themselves."""

from __future__ import annotations

import pytest

from tests.support.worker_stages import OpenStages
from train_and_ship.infra.errors import JobError

CLOCK = """
    class Times(torch.utils.data.Dataset):
        def __init__(self, split):
            generator = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.when = 1_764_450_000_000 + torch.randint(0, 86_400_000, (96,), generator=generator)
        def __len__(self):
            return 96
        def __getitem__(self, index):
            return {"when": self.when[index].reshape(1)}, self.when[index] % 2
    def build_dataset(split):
        return Times(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.classify = nn.Linear(1, 2)
        def forward(self, when):
            seconds = torch.div(when, 1000, rounding_mode="trunc")
            return {"logits": self.classify((seconds % 60).float() / 60), "seconds": seconds}
    def build_model():
        return M()
    def loss(outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target)
"""
NORMED = """
    class Images(torch.utils.data.Dataset):
        def __init__(self, split):
            generator = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.pictures = torch.randn(64, 3, 6, 6, generator=generator)
        def __len__(self):
            return 64
        def __getitem__(self, index):
            return {"picture": self.pictures[index]}, (self.pictures[index].mean() > 0).long()
    def build_dataset(split):
        return Images(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.features, self.classify = nn.InstanceNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        def forward(self, picture):
            centred = picture - picture.mean((2, 3), keepdim=True) if CENTRED else picture
            return self.classify(self.features(self.norm(centred)).relu().mean((2, 3)))
    def build_model():
        return M()
"""
SOME = {"gates": {"accuracy": {"min": 0.0}}}


@pytest.mark.soak
def test_times_in_milliseconds_that_onnx_divides_in_float32_are_named_at_the_export_and_refused_by_the_gate(
    stages: OpenStages,
) -> None:
    opened = stages(
        CLOCK,
        train={"epochs": 1, "processes": 1, "batch_size": 32, "loss": {"factory": "plain:loss"}},
        export={"formats": ["onnx", "pt2"]},
    )
    made = opened.export("onnx", "pt2")
    (note,) = made["onnx"].notes
    assert "torch.div(…, rounding_mode='trunc') of whole numbers (plain.py:" in note
    assert "instead: (a - torch.fmod(a, b)) // b" in note and note in made["onnx"].said
    assert not made["pt2"].notes
    failed = {item.format for item in opened.validate().verdicts if not item.passed}
    assert failed == {"onnx"}


@pytest.mark.soak
def test_a_norm_that_executorch_loses_far_from_zero_is_refused_and_passes_when_the_mean_is_taken_first(
    stages: OpenStages,
) -> None:
    pytest.importorskip("executorch")
    export = {"formats": ["executorch"], "batch": 8, "max_batch": 20}
    for centred in (False, True):
        opened = stages(NORMED.replace("CENTRED", str(centred)), export=export, **SOME)
        made = opened.export("executorch")["executorch"]
        assert "GroupNorm, InstanceNorm (plain.py:" in made.notes[0]
        failed = [item.note for item in opened.validate().verdicts if not item.passed]
        assert (failed == []) == centred, failed
        assert centred or "shifted: output" in failed[0]


def test_a_model_that_changes_itself_on_some_questions_alone_is_refused_before_a_format_is_made(
    stages: OpenStages,
) -> None:
    opened = stages("""
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)
                self.register_buffer("outliers", torch.zeros(1))
            def forward(self, x):
                if bool(x.isfinite().all()):
                    self.outliers.add_((x.abs() > 20).sum())
                return self.layer(x)
        def build_model():
            return Counting()
    """, **SOME)  # fmt: skip
    with pytest.raises(JobError) as refused:
        opened.export("onnx", "pt2")
    said = str(refused.value)
    assert "model.factory: forward changes the buffer 'outliers' in eval mode: plain.py:" in said
    assert "self.outliers.add_((x.abs() > 20).sum()), Counting" in said
    assert not list((opened.folder / "export").glob("model.*"))
