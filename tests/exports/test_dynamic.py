"""Dimensions that are declared dynamic, inputs that may be left out, nested outputs: through export and clean room."""

from __future__ import annotations

import onnx
import pytest
import torch
from safetensors.torch import load_file

from tests.support.worker_stages import EACH_FORMATS, ONE, OpenStages, WorkerStages
from torchworker.contract import FORMAT_FILES, PLACES, VALIDATION, DynamicDim, TensorSpec
from train_and_ship.infra.errors import JobError

SEQUENCES = """
    class Words(torch.utils.data.Dataset):
        def __init__(self, split):
            random = torch.Generator().manual_seed(0 if split == "train" else 1)
            self.tokens = torch.randint(0, 9, (40, 6), generator=random)
        def __len__(self):
            return 40
        def __getitem__(self, index):
            tokens = self.tokens[index]
            return {"tokens": tokens, "padding": tokens.eq(0)}, tokens.sum() % 3
    def build_dataset(split):
        return Words(split)
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.classify = nn.Embedding(9, 4), nn.Linear(4, 3)
            self.position = nn.Parameter(torch.randn(12, 4))
        def forward(self, tokens, weights: torch.Tensor | None = None, padding: torch.Tensor | None = None):
            states = self.embed(tokens) + self.position[:tokens.shape[1]]
            BODY
            if weights is not None:
                states = states * weights.unsqueeze(2)
            if padding is not None:
                states = states.masked_fill(padding.unsqueeze(2), 0.0)
            pooled = states.sum(1)
            return {"logits": self.classify(pooled), "hidden": (states, pooled)}
    def build_model():
        return M()
    def loss(outputs, target):
        return nn.functional.cross_entropy(outputs["logits"], target)
"""
TRAIN = {**ONE, "loss": {"factory": "plain:loss"}, "metrics": ["accuracy"]}
LENGTH = {"axes": {"tokens": 1, "padding": 1}, "min": 1, "max": 12}


def words(stages: OpenStages, body: str = "pass", trained: bool = False, **length: object):
    export = {"batch": 8, "dynamic": {"length": {**LENGTH, **length}}}
    return stages(SEQUENCES.replace("BODY", body), trained=trained, train=TRAIN, export=export)


PADDED = SEQUENCES.replace(
    """            return {"tokens": tokens, "padding": tokens.eq(0)}, tokens.sum() % 3
""",
    """            return tokens[: 1 + index % 6 if index < 8 else 1 + index // 8], tokens.sum() % 3
    def pad(items, split):
        rows = [tokens for tokens, _ in items]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"tokens": tokens, "padding": real.eq(0)}, torch.stack([target for _, target in items])
""",
)


def test_validation_batches_are_padded_one_by_one_where_the_job_declares_their_length(stages: OpenStages) -> None:
    opened = stages(
        PADDED.replace("BODY", "pass"), trained=True,
        data={"factory": "plain:build_dataset", "collate": "plain:pad"},
        train=TRAIN, export={"batch": 8, "dynamic": {"length": LENGTH}}, gates={"accuracy": {"min": 0.0}},
    )  # fmt: skip
    opened.export("onnx", "pt2")
    kept = load_file(opened.folder / "export" / VALIDATION)
    # Batches of eight in the drawn order, each as long as its longest sample.
    lengths = [1 + place % 6 if place < 8 else 1 + place // 8 for place in kept[PLACES].tolist()]
    longest = [max(lengths[start : start + 8]) for start in range(0, 40, 8)]
    assert kept["size.input.tokens"][::8, 0].tolist() == longest == [6, 4, 5, 5, 5]
    assert kept["eager.hidden_0/8"].shape == (8, 4, 4)
    found = opened.validate()
    assert found.passed, [item for item in found.verdicts if not item.passed]
    right = sum(
        int((kept[f"eager.logits/{start}"].argmax(1) == kept["target"][start : start + 8]).sum())
        for start in range(0, 40, 8)
    )
    assert found.metrics == {"onnx": {"accuracy": right / 40}, "pt2": {"accuracy": right / 40}}


@EACH_FORMATS
def test_every_format_takes_other_lengths_left_out_inputs_and_nested_outputs(
    stages: OpenStages, formats: tuple[str, ...]
) -> None:
    opened = words(stages, trained=True)
    opened.export(*formats)
    assert opened.validate().passed
    assert opened.result is not None
    assert opened.result.inputs == (
        TensorSpec(name="tokens", dtype="int64", shape=("batch", "length")),
        TensorSpec(name="padding", dtype="bool", shape=("batch", "length")),
    )
    assert opened.result.outputs == (
        TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="hidden_0", dtype="float32", shape=("batch", "length", 4)),
        TensorSpec(name="hidden_1", dtype="float32", shape=("batch", 4)),
    )
    assert opened.result.dims == (
        DynamicDim(name="batch", min=1, max=None, axes={"tokens": (0,), "padding": (0,)}),
        DynamicDim(name="length", min=1, max=12, axes={"tokens": (1,), "padding": (1,)}),
    )
    if "onnx" in formats:
        _names_what_is_dynamic_and_holds_its_limits(opened)


def _names_what_is_dynamic_and_holds_its_limits(opened: WorkerStages) -> None:
    graph = onnx.load(str(opened.folder / "export" / FORMAT_FILES["onnx"])).graph
    shapes = [[dim.dim_param for dim in item.type.tensor_type.shape.dim] for item in graph.input]
    assert shapes == [["batch", "length"], ["batch", "length"]]
    program = torch.export.load(str(opened.folder / "export" / FORMAT_FILES["pt2"])).module()
    for batch, length in ((1, 1), (1, 12), (9, 7)):
        tokens = torch.ones(batch, length, dtype=torch.long)
        assert program(tokens, padding=tokens.eq(0))["hidden"][0].shape == (batch, length, 4)
    with pytest.raises(AssertionError, match="<= 12"):
        program(torch.ones(1, 13, dtype=torch.long), padding=torch.zeros(1, 13, dtype=torch.bool))


def test_a_decision_on_a_declared_size_is_refused_with_the_line_and_the_condition(stages: OpenStages) -> None:
    opened = words(stages, body="states = states * 2 if tokens.shape[1] > 4 else states")
    with pytest.raises(
        JobError,
        match=r"keeps one side of a decision on sizes: at batch \d+, length [1-4] .*length > 4 \(plain.py:\d+",
    ):
        opened.export("pt2")


def test_a_size_that_the_model_fixes_is_refused_with_the_line(stages: OpenStages) -> None:
    opened = words(stages, body="states = states + torch.ones(6, 4)")
    with pytest.raises(JobError, match=r"torch.export fixes length at 6.*plain.py:\d+.*take sizes from the inputs"):
        opened.export("pt2")


def test_sizes_that_the_model_itself_does_not_take_are_to_be_declared(stages: OpenStages) -> None:
    opened = words(stages, max=None)
    with pytest.raises(JobError, match=r"the model itself fails at batch \d+, length \d+.*plain.py:\d+.*declare"):
        opened.export("pt2")


@pytest.mark.parametrize(
    ("length", "told"),
    [
        ({"axes": {"token": 1}}, "expected inputs among tokens, padding, got 'token'"),
        ({"axes": {"tokens": 2}}, r"expected an axis below 2.*tokens as int64 \[8, 6\]; got 2"),
        ({"min": 7}, "got 7 to 12, and the data has 6"),
    ],
)
def test_a_declaration_that_the_data_contradicts_is_refused(
    stages: OpenStages, length: dict[str, object], told: str
) -> None:
    opened = words(stages, **length)
    with pytest.raises(JobError, match=r"export.dynamic.length.*" + told):
        opened.export("torchscript")


def test_a_declared_size_that_the_model_refuses_is_reported_as_not_asked(stages: OpenStages) -> None:
    opened = words(stages, 'assert tokens.shape[1] < 12, "too long for the table"')
    opened.export("torchscript")
    result = opened.validate()
    (told,) = [verdict for verdict in result.verdicts if not verdict.ran]
    assert (told.format, told.gate, told.case, told.passed) == ("torchscript", "parity", "not asked", False)
    assert told.note.startswith(
        "largest.length, which the model refuses itself (AssertionError: too long for the table"
    )
    assert result.passed
