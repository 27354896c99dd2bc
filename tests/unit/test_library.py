"""References to installed libraries: called as they are meant to be, and nobody's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.projects import write_project
from torchworker.contract import CustomMetric, Project, Reference, TrainSettings
from torchworker.process.failure import UserError
from torchworker.project.user_code import build_loss, build_model, call_metric
from torchworker.training.optimizer import build_optimizer, build_schedule
from train_and_ship.infra import provenance
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings, user_modules

ONE: dict[str, Any] = {"epochs": 1, "processes": 1, "batch_size": 32}


def opened(folder: Path, **train: Any) -> tuple[Project, TrainSettings]:
    model = {"factory": "torch.nn:Linear", "args": {"in_features": 4, "out_features": 3}}
    job, project = load_job(write_project(folder, model=model, train={**ONE, **train}))
    return project_of(job, project), train_settings(job)


def test_what_is_installed_is_nobodys_own_code(tmp_path: Path) -> None:
    document = write_project(
        tmp_path,
        model={"factory": "torch.nn:Linear", "args": {"in_features": 4, "out_features": 3}},
        train={
            **ONE,
            "optimizer": {"factory": "torch.optim:SGD"},
            "loss": {"factory": "torch.nn:CrossEntropyLoss"},
            "schedule": {"factory": "torch.optim.lr_scheduler:OneCycleLR", "args": {"max_lr": 1}},
            "metrics": [{"factory": "sklearn.metrics:r2_score", "better": "higher"}],
        },
    )
    job, folder = load_job(document)
    assert user_modules(job, folder) == ["plain"]
    # What the folder has by a library's name comes first.
    (tmp_path / "sklearn").mkdir()
    assert user_modules(job, folder) == ["plain"], "a folder without code hides nothing"
    (tmp_path / "sklearn" / "__init__.py").touch()
    assert user_modules(job, folder) == ["plain", "sklearn"]
    # Of a project that is not here, as when a release is promoted, everything that is not installed is somebody's own.
    assert user_modules(job, tmp_path / "elsewhere") == ["plain"]


def test_a_package_that_was_installed_from_a_folder_is_somebodys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, origin in (("mine", "dir_info"), ("theirs", "archive_info")):
        (tmp_path / f"{name}.py").touch()
        facts = tmp_path / f"{name}-1.dist-info"
        facts.mkdir()
        (facts / "direct_url.json").write_text(json.dumps({"url": "file:///src", origin: {}}))
        (facts / "RECORD").write_text(f"{name}.py,,\n")
    monkeypatch.setattr(provenance, "site_folders", lambda: [str(tmp_path)])
    monkeypatch.syspath_prepend(tmp_path)
    assert [provenance.is_library(name, tmp_path / "project") for name in ("mine", "theirs", "sys", "nowhere")] == [
        False, True, True, False,
    ]  # fmt: skip


def test_things_of_torch_are_made_from_plain_values(tmp_path: Path) -> None:
    project, settings = opened(
        tmp_path,
        optimizer={"factory": "torch.optim:SGD", "args": {"momentum": 0.9}},
        loss={"factory": "torch.nn:CrossEntropyLoss", "args": {"label_smoothing": 0.1, "weight": [1, 2, 0.5]}},
    )
    loss = build_loss(project)
    assert isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing == 0.1
    assert torch.equal(loss.weight, torch.tensor([1, 2, 0.5]))
    optimizer = build_optimizer(project, settings, build_model(project))
    assert (optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.9, 1e-3)


@pytest.mark.parametrize(
    ("name", "args", "rates"),
    [
        ("OneCycleLR", {"max_lr": 1.0}, 5),
        ("StepLR", {"step_size": 2}, 3),
        ("CosineAnnealingLR", {"T_max": 4}, 5),
        ("PolynomialLR", {"total_iters": 4}, 5),
        ("MultiStepLR", {"milestones": [1, 3]}, 3),
    ],
)
def test_a_schedule_of_torch_gets_the_steps_where_it_takes_them(
    tmp_path: Path, name: str, args: dict[str, Any], rates: int
) -> None:
    project, settings = opened(
        tmp_path,
        optimizer={"factory": "torch.optim:SGD", "args": {"momentum": 0.9}},
        schedule={"factory": f"torch.optim.lr_scheduler:{name}", "args": args},
    )
    optimizer = build_optimizer(project, settings, build_model(project))
    schedule = build_schedule(project, settings, optimizer, steps=4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert len({*seen, optimizer.param_groups[0]["lr"]}) == rates


def test_reduce_lr_on_plateau_is_for_a_loss(tmp_path: Path) -> None:
    plateau = {"factory": "torch.optim.lr_scheduler:ReduceLROnPlateau", "args": {"mode": "max"}}
    project, settings = opened(tmp_path, schedule=plateau)
    optimizer = build_optimizer(project, settings, build_model(project))
    with pytest.raises(UserError, match=r"ReduceLROnPlateau is given the validation loss.*expected mode: min, got max"):
        build_schedule(project, settings, optimizer, steps=4)


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        # With the arguments in torch's order it would be another number for these two.
        ("sklearn.metrics:r2_score", {}, 0.78),
        ("sklearn.metrics:mean_pinball_loss", {"alpha": 1.0}, 0.25),
        ("torch.nn.functional:mse_loss", {}, 0.275),
        ("torchmetrics:MeanSquaredError", {}, 0.275),
        ("torchmetrics.functional:mean_squared_error", {}, 0.275),
    ],
)
def test_a_metric_of_a_library_gets_outputs_and_target_in_its_own_order(
    target: str, args: dict[str, Any], expected: float
) -> None:
    metric = CustomMetric(
        name="m", reference=Reference(target=target, args=args, where="train.metrics.factory"), better="higher"
    )
    nothing = Reference(target="a:b", where="model.factory")
    project = Project(name="p", folder="/nowhere", model=nothing, data=nothing, loss="mse_loss", metrics=[])
    outputs, truth = torch.tensor([1.0, 2.3, 2.0, 4.1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert call_metric(metric, outputs, truth, project) == pytest.approx(expected, abs=1e-6)
