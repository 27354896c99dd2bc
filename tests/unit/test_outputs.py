"""What forward may return, taken apart and put together again."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from torchworker.contract import Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.metrics import first_output
from torchworker.project.outputs import is_plain, mapped
from torchworker.project.pairing import with_first
from torchworker.project.user_code import copied, name_outputs

NOTHING = Reference(target="a:b", where="model.factory")
PROJECT = Project(name="p", folder="/nowhere", model=NOTHING, data=NOTHING, loss="mse_loss", metrics=[])
A, B, C = (torch.full((2, 3), float(value)) for value in (1, 2, 3))


@dataclass(frozen=True)
class Found:
    """Frozen, with a field that its constructor does not take."""

    loss: Tensor | None
    logits: Tensor
    state: tuple[Tensor, ...] = ()
    count: Tensor = field(init=False, default=C)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Output(OrderedDict[str, Any]):
    """As transformers' ModelOutput, it refuses update()."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("no update")


def output(**items: Any) -> Output:
    made = Output()
    for name, item in items.items():
        made[name] = item
    return made


CASES: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "a tensor": (A, {"output": A}),
    "a tuple": ((A, (B, C)), {"output_0": A, "output_1_0": B, "output_1_1": C}),
    "a dict": ({"logits": A, "state": (B, C)}, {"logits": A, "state_0": B, "state_1": C}),
    "a named tuple": (Pair(A, B), {"left": A, "right": B}),
    "a named tuple in a dict": ({"pair": Pair(A, B)}, {"pair_left": A, "pair_right": B}),
    "a dataclass": (Found(None, A, (B,)), {"logits": A, "state_0": B, "count": C}),
    "a dataclass in a tuple": ((A, Found(B, C)), {"output_0": A, "output_1_loss": B, "output_1_logits": C,
                                                  "output_1_count": C}),
    "a class of somebody's own": (output(logits=A, hidden=(B, C)), {"logits": A, "hidden_0": B, "hidden_1": C}),
}  # fmt: skip
EACH = pytest.mark.parametrize(("outputs", "named"), CASES.values(), ids=CASES)


@EACH
def test_outputs_are_named_by_keys_fields_and_places(outputs: Any, named: dict[str, Tensor]) -> None:
    found = name_outputs(outputs, PROJECT)
    assert list(found) == list(named)
    assert all(found[name] is tensor for name, tensor in named.items())


@EACH
def test_a_copy_has_the_same_classes_and_memory_of_its_own(outputs: Any, named: dict[str, Tensor]) -> None:
    twice = mapped(lambda tensor: tensor * 2, outputs)
    assert type(twice) is type(outputs)
    assert [tensor.tolist() for tensor in name_outputs(twice, PROJECT).values()] == [
        (tensor * 2).tolist() for tensor in named.values()
    ]
    assert all(torch.equal(tensor, named[name]) for name, tensor in name_outputs(outputs, PROJECT).items())
    apart = name_outputs(copied(outputs), PROJECT)
    assert all(apart[name] is not tensor and torch.equal(apart[name], tensor) for name, tensor in named.items())


@EACH
def test_metrics_see_the_first_tensor_and_another_can_be_put_in_its_place(
    outputs: Any, named: dict[str, Tensor]
) -> None:
    first = next(iter(named))
    assert first_output(outputs) is named[first]
    before = copy.copy(named)
    found = name_outputs(with_first(outputs, B + 7), PROJECT)
    assert list(found) == list(named) and torch.equal(found[first], B + 7)
    assert all(found[name] is tensor for name, tensor in before.items() if name != first)


@pytest.mark.parametrize("first", [lambda: {"loss": None, "logits": A}, lambda: (None, A), lambda: Found(None, A)])
def test_none_in_the_place_of_a_tensor_is_no_output_of_metrics(first: Callable[[], Any]) -> None:
    assert first_output(first()) is A


@pytest.mark.parametrize(
    ("outputs", "plain"),
    [(A, True), ((A, [B, {"c": C}], None), True), (OrderedDict(a=A), True), ({"pair": Pair(A, B)}, False),
     (Found(None, A), False), (output(logits=A), False), ((A, Found(None, A)), False)],
)  # fmt: skip
def test_plain_outputs_have_no_class_but_pythons_own(outputs: Any, plain: bool) -> None:
    assert is_plain(outputs) is plain


@pytest.mark.parametrize(
    ("outputs", "told"), [({"a": 1.0}, "got float at a"), (Found, "got type"), ("text", "got str")]
)
def test_what_holds_no_tensors_is_refused_with_its_place(outputs: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"tuples, lists, dicts or dataclasses if they are several, {told}"):
        name_outputs(outputs, PROJECT)
