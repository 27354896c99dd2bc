"""Of all ways to capture a model the best is kept, and of all refusals the one that helps most is shown."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.agreement import disagreement
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.program import capture
from torchworker.exporters.pt2 import pt2
from torchworker.exporters.subject import Subject
from torchworker.exporters.torchscript import torchscript
from torchworker.process.failure import UserError
from torchworker.project.user_code import forward, name_outputs
from torchworker.runtimes.load import load_artifact

HERE = Path(__file__)


def subject_of(
    model: nn.Module, largest: int | None = None, length: tuple[int, int | None] | None = None, **inputs: Tensor
) -> Subject:
    """inputs: each [batch, length, …]; the length is declared when its range is given."""
    nothing = Reference(target="a:b", where="model.factory")
    project = Project(
        name="plain", folder=str(HERE.parent), model=nothing, data=nothing, loss="mse_loss", metrics=[]
    )  # fmt: skip
    dims = [DynamicDim(name="batch", min=1, max=largest, axes={name: (0,) for name in inputs})]
    if length is not None:
        dims.append(DynamicDim(name="length", min=length[0], max=length[1], axes={name: (1,) for name in inputs}))
    model.eval().requires_grad_(False)
    outputs = list(name_outputs(forward(model, inputs, project), project))
    return Subject(model=model, inputs=inputs, outputs=outputs, dims=dims, project=project)


class Decides(nn.Linear):
    """x [batch, length, 4]; adds one where `one` says so of the sizes."""

    def __init__(self, one: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 3)
        self.one = one

    def forward(self, x: Tensor) -> Tensor:
        said = super().forward(x)
        if self.one(x):
            said = said + 1
        return said


def refusal_of(one: Callable[[Tensor], Any], **sizes: Any) -> str:
    with pytest.raises(UserError) as caught:
        capture(subject_of(Decides(one), x=torch.randn(8, 6, 4), **sizes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("one", "sizes", "declare"),
    [
        (lambda x: len(x) < 64, {}, "export.max_batch: 63"),
        (lambda x: x.shape[1] > 4, {"length": (1, None)}, "export.dynamic.length.min: 5"),
        (lambda x: x.shape[1] <= 40, {"length": (1, 100)}, "export.dynamic.length.max: 40"),
        (
            lambda x: x.shape[1] > 3 and x.shape[1] <= 40 and len(x) < 10,
            {"length": (2, 90), "largest": 30},
            "export.max_batch: 9, export.dynamic.length.min: 4, export.dynamic.length.max: 40",
        ),
        (lambda x: x.shape[1] % 2 == 0, {"length": (1, 30)}, "narrower ones in export.dynamic"),
    ],
)  # fmt: skip
def test_a_program_that_takes_fewer_sizes_is_refused_with_what_to_declare(
    one: Callable[[Tensor], Any], sizes: dict[str, Any], declare: str
) -> None:
    told = refusal_of(one, **sizes)
    assert "keeps one side of a decision on sizes: at batch" in told
    assert f"; declare the sizes that the program takes ({declare}), make the decision torch.cond" in told
    assert "test_best_way.py:" in told


@pytest.mark.parametrize(
    ("largest", "length"), [(63, None), (9, (4, 40))], ids=["the batch", "the batch and a dimension"]
)
def test_what_a_refusal_says_to_declare_is_captured(largest: int, length: tuple[int, int] | None) -> None:
    model = Decides(lambda x: len(x) <= largest and (length is None or length[0] <= x.shape[1] <= length[1]))
    # In the other way len() makes a number of the batch.
    assert capture(subject_of(model, largest, length, x=torch.randn(8, 6, 4))).method == "torch.export, strict"


def test_a_decision_on_the_batch_that_no_limit_describes_names_no_dimension_to_declare() -> None:
    told = refusal_of(lambda x: len(x) % 2 == 0)
    assert "would refuse (" in told and "; make the decision torch.cond, or leave" in told
    assert "export.dynamic" not in told and "max_batch" not in told


def test_a_batch_that_the_model_fixes_is_no_dimension_that_could_be_left_out() -> None:
    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(8, 1, 3)

    with pytest.raises(UserError, match=r"torch.export fixes batch at 8, .*take sizes from the inputs") as caught:
        capture(subject_of(Fixed(4, 3), x=torch.randn(8, 6, 4)))
    assert "export.dynamic" not in str(caught.value)


def test_sizes_at_which_the_model_itself_fails_are_named_by_their_key() -> None:
    class Positions(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(12, 3)[: x.shape[1]]

    with pytest.raises(
        UserError, match=r"the model itself fails at batch \d+, length \d+, .*test_best_way.py:\d+"
    ) as c:
        capture(subject_of(Positions(4, 3), length=(1, None), x=torch.randn(8, 6, 4)))
    assert "declare the sizes that it takes (export.dynamic.length.max: 12)" in str(c.value)


def test_a_decision_on_data_is_refused_with_the_line_whatever_other_ways_say_of_it() -> None:
    told = refusal_of(lambda x: x.sum() > 0)
    assert "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 1)" in told
    assert "in forward: if self.one(x):" in told or "in <lambda>" in told


class Joined(nn.Linear):
    """x [batch, 4]: asks whether some rows and all of them are none, which they never are."""

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([x[x[:, 0] > 0], x])
        if joined.numel() == 0:
            return super().forward(x)
        return super().forward(x) + joined.sum()


def test_a_decision_that_only_torchs_own_assumptions_about_sizes_made_ends_nothing() -> None:
    subject = subject_of(Joined(4, 3), x=torch.randn(8, 4))
    captured = capture(subject)
    assert captured.method == "torch.export, non-strict"
    for batch in (1, 2, 70):
        x = torch.randn(batch, 4)
        assert torch.allclose(captured.program.module()(x), subject.model(x))


class Times(nn.Linear):
    """Asserts something of a constant, as torchdiffeq's solvers do of their times."""

    def forward(self, x: Tensor) -> Tensor:
        times = torch.tensor([0.0, 0.5, 1.0])
        times[0] = -1.0
        later = times[1:] > times[:-1]
        assert later.all() or (~later).all()
        if times.min() > -0.5:
            return -super().forward(x)
        return super().forward(x) + (times[1:] - times[:-1]).sum()


class Written(nn.Linear):
    """Decides on a tensor that is made of numbers and then written into."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.tensor([0.0, 0.0])
        total[0] = x.sum()
        return super().forward(x) if total.sum() > 0 else -super().forward(x)


def test_a_decision_on_constants_is_taken_at_capture() -> None:
    subject = subject_of(Times(4, 3), x=torch.randn(8, 4))
    captured = capture(subject)
    assert captured.method == "torch.export, non-strict, with known constants"
    assert torch.allclose(captured.program.module()(torch.ones(1, 4)), subject.model(torch.ones(1, 4)))


def test_a_decision_on_what_was_a_constant_is_a_decision_on_data() -> None:
    with pytest.raises(UserError, match=r"data-dependent.*in forward: return .* if total.sum\(\) > 0 else"):
        capture(subject_of(Written(4, 3), x=torch.randn(8, 4)))


# ---- outputs of classes


class Output(OrderedDict[str, Any]):
    """As transformers' ModelOutput: a dict with attributes, known to torch, and None left out."""

    def __init__(self, **items: Any) -> None:
        super().__init__({name: item for name, item in items.items() if item is not None})
        self.__dict__.update(items)


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(**dict(zip(names, values, strict=True))),
    serialized_type_name="tests.exports.test_best_way.Output",
)


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Classed(nn.Module):
    """Inputs by name, outputs in a class of somebody's own."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> Any:
        hidden = self.first(x)
        if mask is not None:
            hidden = hidden.masked_fill(mask.unsqueeze(2), 0.0)
        return self.answer(self.second(hidden), hidden)


ANSWERS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "one tensor in a class like ModelOutput": (lambda logits, hidden: Output(logits=logits, loss=None), ["logits"]),
    "several in it": (
        lambda logits, hidden: Output(logits=logits, hidden=(hidden, logits * 2)),
        ["logits", "hidden_0", "hidden_1"],
    ),
    "a dataclass": (lambda logits, hidden: Answer(None, logits, (hidden,)), ["logits", "hidden_0"]),
    "a dataclass of one tensor": (lambda logits, hidden: Answer(None, logits), ["logits"]),
}


def classed(answer: Callable[..., Any]) -> Subject:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 4)
    return subject_of(Classed(answer), None, (1, 20), x=x, mask=x[..., 0] > 1)


@pytest.mark.parametrize(("answer", "names"), ANSWERS.values(), ids=ANSWERS)
def test_outputs_of_a_class_are_named_tensors_in_every_file(
    answer: Callable[..., Any], names: list[str], tmp_path: Path
) -> None:
    subject = classed(answer)
    assert list(subject.outputs) == names
    for kind, write in (("pt2", pt2), ("onnx", onnx_model), ("torchscript", torchscript)):
        write(subject, tmp_path / kind)
        assert disagreement(load_artifact(kind, tmp_path / kind, 1), subject) == "", kind
    assert type(forward(subject.model, subject.inputs, subject.project)) in (Output, Answer), "the model stays as it is"


def test_a_pt2_is_loaded_without_the_class_of_its_outputs_and_names_weights_as_the_model_does(tmp_path: Path) -> None:
    subject = classed(ANSWERS["several in it"][0])
    pt2(subject, tmp_path / "model.pt2")
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "assert not any(name.startswith('tests') for name in sys.modules)\n"
        "said = program.module()(torch.ones(2, 5, 4), mask=torch.zeros(2, 5, dtype=torch.bool))\n"
        "print(type(said).__name__, *said, *program.state_dict)\n"
    )
    said = subprocess.check_output(
        [sys.executable, "-P", "-c", script, tmp_path / "model.pt2"], text=True, cwd=tmp_path
    )
    weights = "first.weight first.bias second.weight second.bias"
    assert said.strip() == f"dict logits hidden_0 hidden_1 {weights}"


def test_outputs_that_are_plain_stay_as_they_are(tmp_path: Path) -> None:
    subject = classed(lambda logits, hidden: {"logits": logits, "states": (hidden, [logits])})
    said = capture(subject).program.module()(subject.inputs["x"], mask=subject.inputs["mask"])
    assert [type(said), type(said["states"]), type(said["states"][1])] == [dict, tuple, list]


# ---- lines of libraries


def test_what_fails_inside_a_library_is_named_beside_the_users_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site"
    (installed / "encoders").mkdir(parents=True)
    (installed / "encoders" / "bert.py").write_text("def encode(x):\n    return x if bool(x.sum() > 0) else -x\n")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr("torchworker.process.failure.LIBRARIES", (str(installed),))
    encode = importlib.import_module("encoders.bert").encode

    class Calls(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(encode(x))

    with pytest.raises(UserError) as caught:
        capture(subject_of(Calls(4, 3), x=torch.randn(8, 6, 4)))
    place = "in forward: return super().forward(encode(x)); in encoders/bert.py:2, in encode: return x if bool("
    assert place in str(caught.value)
