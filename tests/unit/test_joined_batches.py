"""A last batch of one sample joins the batch before it, where the model cannot be trained on one."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.support.numbered import Stream, listed
from tests.support.projects import write_project
from torchworker.contract import Project, TrainSettings
from torchworker.data.loading import TrainingData
from torchworker.process.failure import UserError
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, TrainSettings]:
    job, folder = load_job(write_project(tmp_path_factory.mktemp("project")))
    return project_of(job, folder), train_settings(job)


def ranks(
    plan: tuple[Project, TrainSettings], dataset: Any, world: int, local: int, accumulate: int = 1, workers: int = 0
) -> list[TrainingData]:
    settings = dataclasses.replace(
        plan[1], processes=world, batch_size=world * local * accumulate, accumulate=accumulate, data_workers=workers
    )
    return [TrainingData(dataset, plan[0], settings, world, rank, pin_memory=False) for rank in range(world)]


def sizes(data: TrainingData, steps: int = 0) -> list[int]:
    return [len(target) for _, target in data.epoch(1, steps)]


@pytest.mark.parametrize("kind", [listed, Stream])
@pytest.mark.parametrize(
    ("size", "world", "local", "accumulate", "expected", "steps"),
    [
        (321, 1, 64, 1, [64, 64, 64, 64, 65], 5),
        (25, 2, 6, 2, [6, 7], 1),  # 13 each: a sample is used twice, and the lone one had a step of its own.
        (50, 2, 4, 4, [4, 4, 4, 4, 4, 5], 2),  # The lone one was the third pass of its step.
        (9, 1, 8, 1, [9], 1),
        (27, 3, 4, 1, [4, 5], 2),
    ],
)
def test_no_batch_is_of_one_sample_and_none_is_lost(
    plan: tuple[Project, TrainSettings],
    kind: Any,
    size: int,
    world: int,
    local: int,
    accumulate: int,
    expected: list[int],
    steps: int,
) -> None:
    seen: list[int] = []
    for data in ranks(plan, kind(size), world, local, accumulate):
        assert data.has_lone_batch and sizes(data)[-1] == 1
        data.join_lone_batch("so it is")
        batches = [target.tolist() for _, target in data.epoch(1, 0)]
        assert [len(batch) for batch in batches] == expected and data.epoch_steps == steps
        seen += [number for batch in batches for number in batch]
        assert f"(so it is): it is joined to the batch before it, which has {local + 1}" in data.notes[-1]
    assert set(seen) == set(range(size))


@pytest.mark.parametrize("kind", [listed, Stream])
def test_the_rest_of_an_epoch_is_the_same_from_any_step(plan: tuple[Project, TrainSettings], kind: Any) -> None:
    require_one_rest(plan, kind, workers=0)


# Workers are interpreters that import torch.
@pytest.mark.soak
def test_the_rest_is_the_same_with_workers_too(plan: tuple[Project, TrainSettings]) -> None:
    # In a process of their own: this one has threads of whatever was imported, which forks do not survive.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kind, workers in ((listed, 2), (Stream, 1)):
            pool.submit(require_one_rest, plan, kind, workers).result()


def require_one_rest(plan: tuple[Project, TrainSettings], kind: Any, workers: int) -> None:
    (data,) = ranks(plan, kind(25), 1, 4, accumulate=2, workers=workers)
    data.join_lone_batch("so it is")
    whole = [target.tolist() for _, target in data.epoch(2, 0)]
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 5] and data.epoch_steps == 3
    for steps in (1, 2):
        assert [target.tolist() for _, target in data.epoch(2, steps)] == whole[2 * steps :]


def test_where_there_is_no_batch_before_it_the_job_is_refused(plan: tuple[Project, TrainSettings]) -> None:
    with pytest.raises(UserError, match=r"batch_size: 4 is one sample for each forward pass .* at least 8"):
        ranks(plan, listed(10), world=2, local=1, accumulate=2)[0].join_lone_batch("so it is")
    with pytest.raises(UserError, match=r"3 training samples are one for each of 3 processes.* at least 6"):
        ranks(plan, listed(3), world=3, local=4)[0].join_lone_batch("so it is")


@pytest.mark.parametrize(("size", "local"), [(24, 4), (26, 4), (3, 4)])
def test_other_epochs_have_no_lone_batch(plan: tuple[Project, TrainSettings], size: int, local: int) -> None:
    (data,) = ranks(plan, listed(size), 1, local)
    assert not data.has_lone_batch and 1 not in sizes(data) and data.notes == []
