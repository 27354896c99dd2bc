"""What `ship check` finds in a model is found by a run before its first step, and what it can handle it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from tests.support.training import Train
from train_and_ship.infra.errors import JobError
from train_and_ship.ship.check import check

LAYERS = """
    import random
    class Layers(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.way, self.calls = way, 0
        def forward(self, x):
            x = self.first(x)
            self.calls += self.training
            skipped = self.training and (random.random() < 0.5 if self.way == "chance" else self.calls % 3 == 0)
            return self.last(x if skipped else self.second(x))
    def build_model(way):
        return Layers(way)
    def main(context):
        raise RuntimeError("is not begun")
    def drops():
        class Drops(nn.Linear):
            def forward(self, x):
                return nn.functional.dropout(super().forward(x), 0.5)
        return Drops(4, 3)
    def normal():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
"""
TWO: dict[str, Any] = {"epochs": 2, "processes": 2, "batch_size": 8}


def layers(folder: Path, way: str, **train: Any) -> Path:
    model = {"factory": "plain:build_model", "args": {"way": way}}
    return write_project(folder, extra=LAYERS, model=model, train={**TWO, **train})


@pytest.mark.parametrize("processes", [1, 2])
def test_layers_that_are_left_out_by_chance_train(train: Train, tmp_path: Path, processes: int) -> None:
    result = train(layers(tmp_path / "p", "chance", processes=processes))
    assert len(result.history) == 2
    told = [note for note in result.notes if "so ddp looks in each step for parameters" in note]
    assert len(told) == (processes == 2), "one process waits for nobody"


def test_a_module_that_is_left_out_unforeseen_names_the_key_that_allows_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"did not use second\.weight, second\.bias.*find_unused_parameters: true"):
        train(layers(tmp_path / "p", "count"))
    assert len(train(layers(tmp_path / "q", "count", find_unused_parameters=True)).history) == 2


@pytest.mark.parametrize("loop", [{}, {"entrypoint": "plain:main"}], ids=["built in", "custom"])
def test_functional_dropout_is_refused_by_check_and_before_the_first_step(
    train: Train, tmp_path: Path, loop: dict[str, Any]
) -> None:
    plan = (loop and {"processes": 1, **loop}) or {**TWO, "processes": 1}
    job = write_project(tmp_path / "p", extra=LAYERS, model={"factory": "plain:drops"}, train=plan)
    for asked in (check, train):
        with pytest.raises(JobError, match=r"dropout is on there \(plain\.py:\d+, in forward: .*=self\.training"):
            asked(job)


def test_check_says_that_a_last_batch_of_one_is_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"factory": "plain:build_dataset", "args": {"size": 97}}
    plan = {"epochs": 1, "processes": 1, "batch_size": 32}
    check(write_project(tmp_path, extra=LAYERS, model={"factory": "plain:normal"}, data=data, train=plan))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "would be of one sample" in said and "joined to the batch before it, which has 33" in said
