"""What is found out about data before training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tests.support.projects import write_project
from torchworker.contract import InspectRequest, InspectResult, RereadRequest, RereadResult
from torchworker.data.groups import SampleGroups
from torchworker.process.failure import UserError
from torchworker.project.user_code import enter
from torchworker.stages.inspect import _column, inspect
from torchworker.stages.reread import reread
from train_and_ship.registry.data.checks import groups_in_both
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings

NOISY = """
        class Noisy:
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
            def __getitem__(self, index):
                inputs, target = self.inner[index]
                return inputs + torch.randn(4), target
        listed = build_dataset
"""
"""Random augmentation."""


def look(
    folder: Path,
    extra: str = "",
    ranges: dict[str, tuple[float | None, float | None]] | None = None,
    most: int | None = None,
    data_args: dict[str, object] | None = None,
    **job: object,
) -> InspectResult:
    module = f"looked_{folder.name.replace('-', '_')}"
    path = write_project(
        folder, extra=extra, model={"factory": f"{module}:build_model"}, 
        data={"factory": f"{module}:build_dataset", "args": data_args or {}}, **job,
    )  # fmt: skip
    (folder / "plain.py").rename(folder / f"{module}.py")
    one, project = load_job(path)
    return inspect(
        InspectRequest(project=project_of(one, project), train=train_settings(one), ranges=ranges or {}, most=most)
    )


def read_again(folder: Path, split: Literal["train", "validation"], data_workers: int = 0) -> RereadResult:
    job, project = load_job(folder / "job.yaml")
    train = dataclasses.replace(train_settings(job), data_workers=data_workers)
    return reread(RereadRequest(project=project_of(job, project), train=train, split=split))


GROUPED = """
        from torch.utils.data import IterableDataset
        class Visits(IterableDataset):
            def __init__(self, split): self.inner, self.split = build_visits(split), split
            def __len__(self): return len(self.inner)
            def __iter__(self):
                return ((inputs, target) for inputs, target in self.inner)
        build_visits = build_dataset
        def build_stream(split):
            return Visits(split)
        def patient(visit, names=0):
            return names + int(visit[0][0] * 4)
"""


@pytest.mark.parametrize("stream", [False, True])
def test_groups_that_are_in_both_splits_are_counted_and_told(tmp_path: Path, stream: bool) -> None:
    module = f"looked_{tmp_path.name.replace('-', '_')}"
    group = {"factory": f"{module}:patient", "args": {"names": 7}}
    path = write_project(
        tmp_path, extra=GROUPED, model={"factory": f"{module}:build_model"},
        data={"factory": f"{module}:{'build_stream' if stream else 'build_dataset'}", "group": group},
    )  # fmt: skip
    (tmp_path / "plain.py").rename(tmp_path / f"{module}.py")
    job, folder = load_job(path)
    facts = inspect(InspectRequest(project=project_of(job, folder), train=train_settings(job)))
    assert 0 < facts.shared_groups < facts.groups < 40
    told = groups_in_both(facts)
    assert told.startswith(f"{facts.shared_groups} of {facts.groups} groups of validation samples (data.group) have")
    assert groups_in_both(dataclasses.replace(facts, shared_groups=0)) == ""


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ("return None", r"data\.group: .*:patient must return .* a whole number or a text, got NoneType"),
        ("return visit[0]", r"whole number or a text, got float32 \[4\]"),
        ("return visit[9]", r"data\.group: .*:patient failed on an item, a tuple: .*IndexError"),
    ],
)
def test_a_group_that_cannot_be_told_is_refused_by_the_key_s_name(tmp_path: Path, group: str, told: str) -> None:
    module = f"looked_{tmp_path.name.replace('-', '_')}"
    path = write_project(
        tmp_path, extra=f"def patient(visit):\n    {group}\n",
        data={"factory": f"{module}:build_dataset", "group": f"{module}:patient"},
    )  # fmt: skip
    (tmp_path / "plain.py").rename(tmp_path / f"{module}.py")
    job, folder = load_job(path)
    enter(project_of(job, folder))
    groups = SampleGroups(project_of(job, folder))
    with pytest.raises(UserError, match=told):
        groups.add((torch.zeros(4), 1))


def test_groups_are_numbered_as_they_come_whatever_their_keys(tmp_path: Path) -> None:
    module = f"looked_{tmp_path.name.replace('-', '_')}"
    path = write_project(
        tmp_path, extra="def patient(visit):\n    return visit\n",
        data={"factory": f"{module}:build_dataset", "group": f"{module}:patient"},
    )  # fmt: skip
    (tmp_path / "plain.py").rename(tmp_path / f"{module}.py")
    job, folder = load_job(path)
    enter(project_of(job, folder))
    groups = SampleGroups(project_of(job, folder))
    for key in ("ada", 7, torch.tensor(7), np.int64(7), "7", "ada"):
        groups.add(key)
    assert groups.numbers == [0, 1, 1, 1, 2, 0]


def test_a_percentile_is_the_value_of_its_whole_numbered_rank() -> None:
    # Of 1 to 100, the seventh percentile is 7; by 0.07 × 100 = 7.000000000000001 it was 8, and so at five other places.
    assert list(_column(np.arange(100, 0, -1, dtype=np.float64)).quantiles) == [1.0, *map(float, range(1, 101))]
    assert list(_column(np.array([5.0, np.nan])).quantiles) == [5.0] * 101


def test_counts_limits_labels_and_one_column_a_number(tmp_path: Path) -> None:
    facts = look(tmp_path)
    train = facts.train
    assert (train.samples, facts.validation.samples, train.repeated, facts.overlap) == (96, 96, 0, 0)
    assert train.tensors["input"].dtype == "float32" and train.tensors["input"].shapes == [[4]]
    assert list(train.columns) == ["input[0]", "input[1]", "input[2]", "input[3]"]
    assert set(train.labels) == {"0", "1", "2"} and sum(train.labels.values()) == 96
    column = train.columns["input[0]"]
    assert len(column.quantiles) == 101 and list(column.quantiles) == sorted(column.quantiles)
    assert column.quantiles[50] == pytest.approx(0, abs=0.4)


def test_missing_outside_overlap_and_repeated_samples_are_counted_exactly(tmp_path: Path) -> None:
    extra = """
        train = torch.arange(400.0).reshape(100, 4)
        train[3, 0], train[7, 2] = float("nan"), float("inf")
        train[10] = train[11]
        held = torch.cat([train[20:25], -torch.ones(5, 4)])
        SPLITS = {"train": (train, torch.zeros(100)), "validation": (held, torch.zeros(10))}
        def build_dataset(split):
            return TensorDataset(*SPLITS[split])
    """
    facts = look(tmp_path, extra, {"input": (0, 390)}, train={"epochs": 1, "loss": "mse_loss", "batch_size": 32})
    found = facts.train.tensors["input"]
    assert (found.missing, found.outside) == (2, 9)
    assert (found.low, found.high) == (0.0, 399.0)
    assert (facts.train.repeated, facts.overlap) == (1, 5)
    assert facts.validation.tensors["input"].outside == 20
    # A target of fractions is no label.
    assert facts.train.labels == {} and "target" in facts.train.columns


def test_large_tensors_are_told_by_some_of_their_values_and_by_sample(tmp_path: Path) -> None:
    extra = """
        class Wide(nn.Linear):
            def forward(self, image):
                return super().forward(image.flatten(1)[:, :4])
        def build_model():
            return Wide(4, 3)
        def build_dataset(split):
            inputs = torch.linspace(0, 1, 40)[:, None, None, None].expand(40, 3, 10, 10).clone()
            return TensorDataset(inputs, torch.arange(40) % 3)
    """
    facts = look(tmp_path, extra)
    assert list(facts.train.columns) == ["image", "image: mean of a sample", "image: spread of a sample"]
    assert facts.train.columns["image: spread of a sample"].quantiles[100] == pytest.approx(0, abs=1e-9)
    assert facts.train.columns["image: mean of a sample"].quantiles[100] == 1.0
    assert facts.overlap == 40


def test_a_fingerprint_is_of_content_in_any_order(tmp_path: Path) -> None:
    first = look(tmp_path / "one").train.fingerprint
    turned = look(tmp_path / "two", """
        build_in_order = build_dataset
        def build_dataset(split):
            data = build_in_order(split)
            return TensorDataset(*(tensor.flip(0) for tensor in data.tensors))
    """).train.fingerprint  # fmt: skip
    other = look(tmp_path / "three", """
        build_before = build_dataset
        def build_dataset(split):
            inputs, target = build_before(split).tensors
            inputs[0, 0] += 1e-3
            return TensorDataset(inputs, target)
    """).train.fingerprint  # fmt: skip
    assert first == turned != other


def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchworker.stages.inspect.KEPT", 20)
    facts = look(tmp_path)
    column = facts.train.columns["input[0]"]
    assert 10 <= column.values <= 40
    assert facts.train.samples == 96


def test_a_stream_is_read_as_far_as_an_epoch_goes(tmp_path: Path) -> None:
    extra = """
        from torch.utils.data import IterableDataset
        class Numbers(IterableDataset):
            def __iter__(self):
                number = 0
                while True:
                    yield torch.full((4,), float(number)), number % 3
                    number += 1
        build_finite = build_dataset
        def build_dataset(split):
            return Numbers() if split == "train" else build_finite(split)
    """
    endless = {"epochs": 1, "batch_size": 32, "steps_per_epoch": 5}
    assert look(tmp_path / "a", extra, train=endless).train.samples == 160
    with pytest.raises(UserError, match="steps_per_epoch"):
        look(tmp_path / "b", extra, train={"epochs": 1, "batch_size": 32})


def test_random_augmentation_is_seen_and_what_is_drawn_for_gates_is_of_every_label(tmp_path: Path) -> None:
    extra = (
        NOISY
        + """
        def build_dataset(split):
            inputs, targets = listed(split).tensors
            order = targets.argsort()
            dataset = TensorDataset(inputs[order], targets[order])
            return Noisy(dataset) if split == "train" else dataset
    """
    )
    facts = look(tmp_path, extra, most=48)
    assert (facts.train.varies, facts.validation.varies) == (True, False)
    assert facts.drawn is not None and len(facts.drawn) == 48
    labels = facts.validation.labels
    ends = [labels["0"], labels["0"] + labels["1"], 96]
    drawn = [sum(low <= place < high for place in facts.drawn) for low, high in zip([0, *ends], ends, strict=False)]
    assert drawn == [pytest.approx(labels[name] / 2, abs=0.5) for name in ("0", "1", "2")]


def test_data_that_another_process_reads_otherwise_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    extra = """
        class Listed:
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
        READ = set()
        class Scrambled(Listed):
            # The first time, as by workers that move each other's place in a file.
            def __getitem__(self, index):
                inputs, target = self.inner[index]
                place = (float(self.inner.tensors[0].sum()), index)
                known = place in READ
                READ.add(place)
                return (inputs if known else inputs * 0), target
        class Drawn(Listed):
            def __getitem__(self, index):
                import os
                return torch.tensor(list(os.urandom(4))).float(), 0
        listed = build_dataset
        def build_dataset(split, kind="Scrambled"):
            return globals()[kind](listed(split))
    """
    looked = look(tmp_path / "scrambled", extra)
    assert not looked.train.varies
    again = read_again(tmp_path / "scrambled", "train")
    assert again.same and again.read is not None
    assert again.read.samples == 96 and again.read.fingerprint != looked.train.fingerprint
    # Scrambled validation data, and what is drawn from nobody's generator.
    assert read_again(tmp_path / "scrambled", "validation").same
    write = tmp_path / "anew"
    look(write, extra, data_args={"kind": "Drawn"})
    assert not read_again(write, "train").same


def test_augmentation_that_is_seeded_by_sample_is_read_again_as_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = (
        NOISY
        + """
        def build_dataset(split):
            return Noisy(listed(split))
    """
    )
    # As in a DataLoader worker, without one: forks of a process with threads end as they like.
    monkeypatch.setattr("torchworker.data.sharding.get_worker_info", lambda: True)
    looked = look(tmp_path / "seeded", extra)
    again = read_again(tmp_path / "seeded", "train", data_workers=2)
    assert looked.train.varies and again.same and again.read is not None
    assert again.read.fingerprint == looked.train.fingerprint
    # Without workers nobody seeds a sample.
    assert not read_again(tmp_path / "seeded", "train").same


def test_a_dataset_that_fails_is_the_users_mistake_with_the_line(tmp_path: Path) -> None:
    extra = """
        class Broken(TensorDataset):
            def __getitem__(self, index):
                raise KeyError("no such row")
        build_whole = build_dataset
        def build_dataset(split):
            return Broken(*build_whole(split).tensors)
    """
    with pytest.raises(UserError, match="no such row"):
        look(tmp_path, extra)
