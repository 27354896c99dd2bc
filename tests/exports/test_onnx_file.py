"""What an ONNX file says of itself: operator set, IR version, names of dimensions; and attention with a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper

from tests.support.capture_subject import subject
from tests.support.worker_stages import ONE, OpenStages
from torchworker.contract import EXTERNAL_DATA
from torchworker.exporters import onnx_export
from torchworker.runtimes.load import load_artifact
from train_and_ship.registry.release.onnx_header import require_one_model

SOME = {"gates": {"accuracy": {"min": 0.0}}}
MASKED = """
    class Words(torch.utils.data.Dataset):
        def __init__(self, split):
            random = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.tokens = torch.randint(1, 9, (40, 6), generator=random)
            self.tokens[:, 4:] *= torch.randint(0, 2, (40, 1), generator=random)
        def __len__(self):
            return 40
        def __getitem__(self, index):
            return {"tokens": self.tokens[index]}, self.tokens[index].sum() % 3
    def build_dataset(split):
        return Words(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.classify = nn.Embedding(9, 8), nn.Linear(8, 3)
            self.normed = nn.GroupNorm(2, 8)
            with torch.no_grad():
                # A row without differences, as of a white picture.
                self.embed.weight[8] = 100.1
        def forward(self, tokens):
            states = self.normed(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
            states = states.unflatten(2, (2, 4)).transpose(1, 2)
            keys = states[:, :1] if ONE_HEAD else states
            mask = tokens.ne(0)[:, None, None]
            heads = nn.functional.scaled_dot_product_attention(states, keys, keys, mask)
            return self.classify(heads.transpose(1, 2).flatten(2).mean(1))
    def build_model():
        torch.manual_seed(0)
        return M()
"""
CACHED = """
    class Steps(torch.utils.data.Dataset):
        def __init__(self, split):
            random = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.x, self.past = torch.randn(40, 1, 4, generator=random), torch.randn(40, 5, 4, generator=random)
        def __len__(self):
            return 40
        def __getitem__(self, index):
            return {"x": self.x[index], "past": self.past[index]}, (self.x[index].sum() > 0).long()
    def build_dataset(split):
        return Steps(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.classify = nn.Linear(4, 40)
        def forward(self, x, past):
            states = torch.cat([past, x], 1)
            return {"logits": self.classify(states.mean(1)), "states": states}
    def build_model():
        return M()
    def loss(outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target)
"""
OUTSIDE = {"external_data": "always"}
LENGTH = {"export": {"formats": ["onnx"], "dynamic": {"length": {"axes": {"tokens": 1}, "min": 1, "max": 12}}}}


@pytest.mark.parametrize(
    ("one_head", "opset", "ir_version"), [(False, 23, 10), pytest.param(True, 20, 9, marks=pytest.mark.soak)]
)
def test_a_sample_that_is_all_padding_gets_what_the_model_gives_at_opset_23_and_a_note_at_20(
    stages: OpenStages, one_head: bool, opset: int, ir_version: int
) -> None:
    opened = stages(MASKED.replace("ONE_HEAD", str(one_head)), trained=False, **SOME, **LENGTH)
    both = opened.export("onnx", "pt2")
    made = both["onnx"]
    assert made.method.endswith(f"ONNX opset {opset}")
    file = opened.folder / "export" / made.file
    model = onnx.load(file)
    assert [(item.domain, item.version) for item in model.opset_import if not item.domain] == [("", opset)]
    assert model.ir_version == ir_version
    onnx.checker.check_model(model, full_check=True)
    assert opened.validate().passed

    tokens = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [5, 0, 0, 0]])
    (wanted,) = load_artifact("pt2", file.with_name(both["pt2"].file), 1)({"tokens": tokens})
    (got,) = load_artifact("onnx", file, 1)({"tokens": tokens})
    assert torch.allclose(got[[0, 2]], wanted[[0, 2]], atol=1e-6)
    # No sample of the data is all padding, so no gate would tell.
    assert torch.allclose(got[1], wanted[1], atol=1e-6) == (opset == 23)
    # ONNX Runtime's GroupNormalization, which opset 23 has, gives NaN.
    flat = torch.full((1, 12), 8)
    (same,) = load_artifact("pt2", file.with_name(both["pt2"].file), 1)({"tokens": flat})
    assert torch.allclose(load_artifact("onnx", file, 1)({"tokens": flat})[0], same, atol=0.05)
    assert [note.partition(" (")[0] for note in made.notes] == [
        "scaled_dot_product_attention with a mask" for _ in range(opset == 20)
    ]


def test_a_dimension_has_its_name_in_sums_too_and_a_file_without_masks_is_for_the_oldest_readers(
    stages: OpenStages,
) -> None:
    dims = {"past": {"axes": {"past": 1}, "min": 1, "max": 30}}
    opened = stages(
        CACHED,
        train={**ONE, "loss": {"factory": "plain:loss"}},
        export={"formats": ["onnx"], "dynamic": dims, **OUTSIDE},
        **SOME,
    )
    made = opened.export("onnx")["onnx"]
    # Also with the weights in a file beside it, which validation reads with it.
    require_one_model(opened.folder / "export" / made.file, opened.folder / "export" / f"{made.file}.data")
    assert (opened.folder / "export" / f"{made.file}.data").stat().st_size == 4 * 4 * 40
    assert made.method.endswith("ONNX opset 20")
    model = onnx.load(opened.folder / "export" / made.file)
    assert model.ir_version == 9
    shapes = {
        item.name: [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim]
        for item in [*model.graph.input, *model.graph.output, *model.graph.value_info]
    }
    assert shapes["past"] == ["batch", "past", 4] and shapes["states"] == ["batch", "past + 1", 4]
    assert not any(
        str(size).startswith("s") and str(size)[1:2].isdigit() for shape in shapes.values() for size in shape
    )
    assert opened.validate().passed


def test_weights_are_beside_the_file_from_a_size_on_and_nothing_of_an_earlier_attempt_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, beside = tmp_path / "model.onnx", tmp_path / f"model.onnx{EXTERNAL_DATA}"
    weight = onnx_ir.Value(name="weight", const_value=onnx_ir.tensor(np.ones((8, 8), np.float32), name="weight"))
    graph = onnx_ir.Graph([], [weight], nodes=[], initializers=[weight], opset_imports={"": 20})
    model, small = onnx_ir.Model(graph, ir_version=9), subject()
    for most, outside in ((255, True), (256, False)):
        monkeypatch.setattr(onnx_export, "LARGEST_WEIGHTS", most)
        onnx_export._save(model, small, path)
        assert beside.exists() == outside
        assert numpy_helper.to_array(onnx.load(path).graph.initializer[0]).sum() == 64
