"""The module that `export.serving` makes of a trained model, exported for real and asked in the clean room."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.worker_stages import ONE, OpenStages
from torchworker.contract import FORMAT_FILES
from torchworker.parity.compare import same_weights
from torchworker.runtimes.load import load_with_weights

PIXELS = """
    class Served(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.register_buffer("scale", torch.tensor(63.75))
        def forward(self, pixels):
            probability = self.model(pixels / self.scale - 2).softmax(1)
            best = probability.topk(2, 1)
            return {"probability": probability, "best": best.values, "place": best.indices}

    def build_raw(split):
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        pixels = torch.randint(0, 256, (96, 4), generator=generator, dtype=torch.uint8)
        return TensorDataset(pixels, (pixels[:, 0] > 127).long() + (pixels[:, 1] > 191).long())

    def build_dataset(split):
        pixels, labels = build_raw(split).tensors
        return TensorDataset(pixels / 63.75 - 2, labels)
"""
LEARNS = {**ONE, "epochs": 40, "learning_rate": 0.05}


@pytest.mark.soak
def test_a_model_with_normalisation_softmax_and_top_k_around_it_is_proven_on_raw_inputs(stages: OpenStages) -> None:
    opened = stages(
        PIXELS, trained=False, train=LEARNS, gates={"accuracy": {"min": 0.8}},
        data={"factory": "plain:build_dataset", "raw": "plain:build_raw"}, export={"serving": "plain:Served"},
    )  # fmt: skip
    history, kinds = opened.train().history[-1], ("torchscript", "onnx", "pt2")
    opened.export(*kinds)
    exported, folder = opened.result, opened.folder / "export"
    assert exported is not None
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in exported.inputs] == [
        ("pixels", "uint8", ["batch", 4])
    ]
    assert [(spec.name, spec.dtype, list(spec.shape)) for spec in exported.outputs] == [
        ("probability", "float32", ["batch", 3]),
        ("best", "float32", ["batch", 2]),
        ("place", "int64", ["batch", 2]),
    ]
    result = opened.validate()
    assert result.passed, [item for item in result.verdicts if not item.passed]
    # Softmax decides as the model does, on the same samples as training's.
    assert [values["accuracy"] for values in result.metrics.values()] == [history["validation_accuracy"]] * 3
    kept = load_file(folder / "golden.safetensors")
    assert str(kept["batch_8.input.pixels"].dtype) == "torch.uint8"

    # What the files hold by name is what was trained, under the names of the training.
    assert exported.weight_names == {f"model.{name}": name for name in load_file(opened.weights)}
    for kind in kinds:
        loaded = load_with_weights(kind, folder / FORMAT_FILES[kind], 1)
        (verdict,) = same_weights(kind, loaded, Path(opened.weights), exported.weight_names)
        assert verdict.passed and verdict.note.endswith("of 4 tensors held bit for bit"), verdict
    other = load_file(opened.weights)
    other["2.bias"][0] += 1e-6
    save_file(other, opened.folder / "other.safetensors")
    (verdict,) = same_weights("pt2", loaded, opened.folder / "other.safetensors", exported.weight_names)
    assert not verdict.passed and verdict.note == "other values than were trained: model.2.bias"


def test_a_preprocessing_that_is_not_that_of_the_training_is_seen_at_the_gates(stages: OpenStages) -> None:
    opened = stages(
        PIXELS + "\n    Served.forward = lambda self, pixels: self.model(pixels / self.scale - 20).softmax(1)\n",
        trained=False, train=LEARNS, gates={"accuracy": {"min": 0.8}},
        data={"factory": "plain:build_dataset", "raw": "plain:build_raw"}, export={"serving": "plain:Served"},
    )  # fmt: skip
    assert opened.train().history[-1]["validation_accuracy"] > 0.8
    opened.export("pt2")
    result = opened.validate()
    failed = [(item.format, item.gate) for item in result.verdicts if not item.passed]
    assert failed == [("pt2", "accuracy")], result.verdicts
