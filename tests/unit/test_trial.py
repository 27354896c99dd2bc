"""What a training does otherwise because of the model, found out before its first step."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchworker.contract import Project, Reference
from torchworker.project.shippable import require_shippable
from torchworker.project.user_code import uncompiled
from torchworker.training.trial import deciding_line, refusal_of_one

NOTHING = Reference(target="a:b", where="model.factory")
FOLDER = str(Path(__file__).parent)
PROJECT = Project(name="plain", folder=FOLDER, model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[])
BATCH = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)


class Layers(nn.Module):
    """Uses its second layer now and then."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.second, self.by, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), by, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        if self.by == "torch" and self.training and torch.rand([]) < 0.5:
            return x
        if self.by == "python" and self.training and random.random() < 0.5:
            return x
        if self.by == "numpy" and self.training and np.random.uniform() < 0.5:
            return x
        if self.by == "router":
            chosen = (x.argmax(1) > 1).nonzero()[:, 0]
            return x.index_add(0, chosen, self.second(x[chosen])) if len(chosen) else x
        return self.second(x)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("torch", 'in forward: if self.by == "torch" and self.training and torch.rand([]) < 0.5:, module 0 (Layers)'),
        ("python", "random numbers of Python or NumPy"),
        ("numpy", "random numbers of Python or NumPy"),
        ("router", "in forward: chosen = (x.argmax(1) > 1).nonzero()[:, 0]"),
    ],
)
def test_a_model_that_uses_modules_now_and_then_is_found_with_the_line(by: str, expected: str) -> None:
    model = nn.Sequential(Layers(by))
    assert expected in deciding_line(model, BATCH[0], PROJECT)
    assert model[0].calls == 0, "a copy is asked"


@pytest.mark.parametrize("draw", [random.random, np.random.uniform])
def test_a_thread_of_somebody_else_that_draws_during_the_pass_is_not_the_model(draw: Callable[[], float]) -> None:
    def draw_elsewhere(model: nn.Module, inputs: object) -> None:
        if not passes:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        passes.append(model)

    passes: list[nn.Module] = []
    model = nn.Linear(4, 4)
    model.register_forward_pre_hook(draw_elsewhere)
    assert deciding_line(model, BATCH[0], PROJECT) == ""
    assert len(passes) > 1, "it was asked again"


def test_usual_layers_decide_nothing() -> None:
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.TransformerEncoderLayer(4, 2)]
    assert deciding_line(nn.Sequential(*layers), BATCH[0], PROJECT) == ""
    assert deciding_line(Layers("nothing"), BATCH[0], PROJECT) == ""


class Asks(nn.Module):
    """Looks at values to spare work, as a mask of padding is left out where there is no padding."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        mask = x > -1e9
        if self.way == "mask":
            return self.second(self.first(x) if mask.all() else self.first(x * mask))
        if self.way == "assertion":
            assert mask.all()
            return self.second(self.first(x))
        if self.way == "layer":
            return self.second(self.first(x)) if mask.all() else self.first(x)
        if self.way == "drawn":
            return self.second(self.first(x)) if torch.rand([]) < 0.5 else self.first(x)
        if self.way == "endless":
            while self.first(x).isfinite().all():
                if mask.all():
                    return self.second(self.first(x))
                mask = torch.zeros_like(mask)
        return self.second(self.first(x * float(mask.sum())))


@pytest.mark.parametrize(
    ("way", "decides"),
    [
        ("mask", False),
        ("assertion", False),
        ("layer", True),
        ("drawn", True),
        ("endless", True),
        ("number", True),
    ],
)
def test_a_look_at_values_decides_nothing_where_the_other_answer_uses_the_same_parameters(
    way: str, decides: bool
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        assert bool(deciding_line(Asks(way), BATCH[0], PROJECT)) is decides


def test_a_branch_that_torch_takes_cannot_be_watched_and_is_no_matter() -> None:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.warm, self.cold = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.warm, self.cold, (x,))  # type: ignore[no-any-return]

    model = Cond().eval()
    assert require_shippable(model, BATCH[0], PROJECT, ["onnx"]).shape == (8, 3)
    assert deciding_line(model, BATCH[0], PROJECT) == ""
    assert model(BATCH[0]).shape == (8, 3), "and nothing of it is left behind"


def test_batch_norm_refuses_one_sample_and_stays_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    told = refusal_of_one(model, nn.functional.cross_entropy, BATCH, PROJECT)
    assert told.startswith("ValueError: Expected more than 1 value per channel when training")
    assert model[0].num_batches_tracked == 0
    assert refusal_of_one(model[1], nn.functional.cross_entropy, BATCH, PROJECT) == ""


def test_a_compiled_model_is_taken_out_of_torch_compile_with_its_parts() -> None:
    class Inner(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    parts = nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.ModuleList([torch.compile(Inner())]))
    parts.compile()
    model = uncompiled(torch.compile(parts))  # type: ignore[arg-type]
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.0.bias", "1.0.weight"]
    assert model is parts and model._compiled_call_impl is None
    assert [type(module).__name__ for module in model.modules()] == ["Sequential", "Linear", "ModuleList", "Inner"]
    assert "forward" not in vars(model[1][0])
    torch.jit.script(model[0])
