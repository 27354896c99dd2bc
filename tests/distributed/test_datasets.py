"""What a dataset may be: a list or a stream, with a collate function and a loss of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.projects import write_project
from tests.support.training import Train
from torchworker.contract import WEIGHTS
from train_and_ship.infra.errors import JobError
from train_and_ship.ship.check import check

# A stream over the samples of the plain project; SIZE says how long it claims to be.
STREAM = """
    from torch.utils.data import IterableDataset
    listed = build_dataset
    class Stream(IterableDataset):
        def __init__(self, split):
            self.samples = list(listed(split))
        def __iter__(self):
            return iter(self.samples)
    class Sized(Stream):
        size = 96
        def __len__(self):
            return self.size
    def build_dataset(split, kind="Sized"):
        return globals()[kind](split)
"""


def test_a_stream_trains_and_has_the_fingerprint_of_the_same_samples_in_a_list(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 1, "processes": 2, "batch_size": 32}
    listed = train(write_project(tmp_path / "list", train=plan))
    stream = train(write_project(tmp_path / "stream", extra=STREAM, train=plan))
    unsized = train(
        write_project(
            tmp_path / "unsized",
            extra=STREAM,
            data={"factory": "plain:build_dataset", "args": {"kind": "Stream"}},
            train={**plan, "steps_per_epoch": 3},
        )
    )

    assert stream.data_fingerprint == unsized.data_fingerprint == listed.data_fingerprint
    assert (stream.train_samples, stream.validation_samples) == (96, 96)


@pytest.mark.parametrize("processes", [1, 5])
def test_validation_on_a_stream_is_exact_at_every_number_of_processes(
    train: Train, tmp_path: Path, processes: int
) -> None:
    # A learning rate this small leaves the model as it was initialised.
    plan = {"epochs": 1, "learning_rate": 1e-30, "batch_size": 10}
    listed = train(write_project(tmp_path / "list", train={**plan, "processes": 1}))
    stream = train(write_project(tmp_path / "stream", extra=STREAM, train={**plan, "processes": processes}))

    for name in ("validation_loss", "validation_accuracy"):
        assert stream.history[0][name] == pytest.approx(listed.history[0][name], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "train_options", "said"),
    [
        ("Stream", {}, "train.steps_per_epoch: expected the optimizer steps of an epoch"),
        ("Sized", {"steps_per_epoch": 3}, "is for iterable datasets without len(); the one of data.factory has 96"),
        ("Sized", {"data_workers": 2}, "train.data_workers: expected 0 or 1 for an iterable dataset"),
        ("Stream", {"steps_per_epoch": 4}, "the stream ended after 96 samples; steps_per_epoch asks for 128"),
        ("Short", {}, "the stream ended after 96 samples; its len() says 97"),
        ("Long", {}, "the stream gives more samples than the 90 that its len() says"),
        ("Empty", {}, "returned an empty dataset"),
        ("Breaks", {}, "reading a training item failed (sample 40 of the stream): KeyError: 'no such file'"),
        ("Sharded", {}, "the stream begins with another sample in rank 1 than in rank 0, so it divides itself"),
        ("ByFile", {"steps_per_epoch": 1}, "the stream begins with another sample in rank 1 than in rank 0"),
        ("HeldOutSharded", {}, "the stream begins with another sample in rank 1 than in rank 0"),
    ],
)
def test_a_stream_that_is_not_what_it_says_is_refused(
    train: Train, tmp_path: Path, kind: str, train_options: dict[str, Any], said: str
) -> None:
    extra = (
        STREAM
        + """
    class Short(Sized):
        size = 97
    class Long(Sized):
        size = 90
    class Empty(Sized):
        def __iter__(self):
            return iter(())
    class Breaks(Sized):
        def __iter__(self):
            for position, sample in enumerate(self.samples):
                if position == 40:
                    raise KeyError("no such file")
                yield sample
    class Sharded(Sized):
        # As recipes for DistributedDataParallel say.
        def __iter__(self):
            return iter(self.samples[torch.distributed.get_rank() :: 2])
    class ByFile(Stream):
        # As libraries that split by node.
        def __iter__(self):
            import os
            return iter(self.samples[48 * int(os.environ["RANK"]) :][:48])
    class HeldOutSharded(Sized):
        def __init__(self, split):
            super().__init__(split)
            self.step = 2 if split == "validation" else 1
        def __iter__(self):
            return iter(self.samples[torch.distributed.get_rank() % self.step :: self.step])
    """
    )
    data = {"factory": "plain:build_dataset", "args": {"kind": kind}}
    plan = {"epochs": 1, "processes": 2, "batch_size": 32, **train_options}
    with pytest.raises(JobError) as caught:
        train(write_project(tmp_path / "p", extra=extra, data=data, train=plan))
    assert said in str(caught.value)


def test_a_shuffling_stream_gives_every_rank_the_same_order_and_each_epoch_another(
    train: Train, tmp_path: Path
) -> None:
    extra = (
        STREAM
        + """
    import os, random
    from pathlib import Path
    class Sized(Sized):
        def __iter__(self):
            order = random.sample(range(96), 96)
            with (Path(__file__).parent / f"orders-{os.environ['RANK']}").open("a") as file:
                file.write(f"{order}\\n")
            torch.rand(3)
            return iter([self.samples[index] for index in order])
    """
    )
    job = write_project(tmp_path / "p", extra=extra, train={"epochs": 2, "processes": 2, "batch_size": 32})
    result = train(job)
    orders = [(tmp_path / "p" / f"orders-{rank}").read_text().splitlines() for rank in (0, 1)]

    # Besides two epochs: looks at the first item, and validation; rank 0 looks once more at the end.
    assert orders[0][:-1] == orders[1]
    assert len(set(orders[0])) > 2
    listed = train(write_project(tmp_path / "list", train={"epochs": 1, "processes": 2, "batch_size": 32}))
    assert result.data_fingerprint == listed.data_fingerprint


def test_a_stream_with_generators_of_its_own_is_told_that_ranks_see_other_orders(train: Train, tmp_path: Path) -> None:
    extra = (
        STREAM
        + """
    import random
    class Sized(Sized):
        def __iter__(self):
            return iter(random.SystemRandom().sample(self.samples, 96))
    """
    )
    result = train(write_project(tmp_path / "p", extra=extra, train={"epochs": 1, "processes": 2, "batch_size": 32}))
    assert any("draws from generators of its own: 2 processes each keep one of 2" in note for note in result.notes)


SHARDED = (
    STREAM
    + """
    import os
    class Sharded(Stream):
        def __iter__(self):
            rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            # Whole runs of samples, as files of them are.
            return iter(self.samples[rank * 96 // world : (rank + 1) * 96 // world])
    class Uneven(Sharded):
        def __iter__(self):
            return iter(self.samples[:60] if os.environ.get("RANK", "0") == "0" else self.samples[60:])
    class Same(Stream):
        pass
"""
)


def test_a_stream_that_says_that_it_divides_itself_gives_each_rank_its_part(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-30}
    listed = train(write_project(tmp_path / "list", train={**plan, "processes": 1}))
    data = {"factory": "plain:build_dataset", "args": {"kind": "Sharded"}, "sharded": True}
    how = {**plan, "processes": 2, "steps_per_epoch": 3}
    parts = train(write_project(tmp_path / "parts", extra=SHARDED, data=data, train=how))

    # Each sample once, in training as in validation.
    assert parts.data_fingerprint == listed.data_fingerprint and parts.read["validation"] == listed.read["validation"]
    assert "train" not in parts.read, "some steps of each part are not the first ones of the whole stream"
    assert parts.validation_samples == parts.train_samples == 96
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        assert parts.history[0][name] == pytest.approx(listed.history[0][name], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Same", "data.sharded: a stream of data.factory begins with the same sample in all 2 ranks, so it does not"),
        ("Uneven", "the stream ended after 36 samples; steps_per_epoch asks for 48"),
        (None, "data.sharded: data.factory gives a map-style dataset for training"),
    ],
)
def test_a_stream_that_does_not_divide_itself_as_it_says_is_refused(
    train: Train, tmp_path: Path, kind: str | None, said: str
) -> None:
    data = {"factory": "plain:build_dataset", "sharded": True, **({"args": {"kind": kind}} if kind else {})}
    plan = {"epochs": 1, "processes": 2, "batch_size": 32, "steps_per_epoch": 3}
    with pytest.raises(JobError) as caught:
        train(write_project(tmp_path / "p", extra=SHARDED if kind else "", data=data, train=plan))
    assert said in str(caught.value)


WEIGHTED = """
    class Weighted(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__(weight=torch.tensor([1.0, 30.0, 5.0]))
    def padded(outputs, target):
        return nn.functional.cross_entropy(outputs, target)
    def own(outputs, target):
        weight = torch.tensor([1.0, 30.0, 5.0])[target]
        return (weight * nn.functional.cross_entropy(outputs, target, reduction="none")).sum() / weight.sum()
    plain = build_dataset
    def build_dataset(split, padding=False):
        dataset = plain(split)
        if padding:
            # In order of their labels, so that ranks and batches have unequally many that count.
            dataset.tensors[1][::3] = -100
            dataset.tensors[1][:32] = -100
        return dataset
"""


@pytest.mark.parametrize(
    ("loss", "padding", "parts"),
    [
        ({"factory": "plain:Weighted"}, False, {"processes": 2}),
        ("cross_entropy", True, {"processes": 2, "accumulate": 2}),
        ({"factory": "plain:Weighted"}, True, {"processes": 1, "accumulate": 4}),
        ({"factory": "plain:padded"}, True, {"processes": 2, "accumulate": 2}),
    ],
)
def test_parts_of_a_step_weigh_what_they_count_for(
    train: Train, tmp_path: Path, loss: Any, padding: bool, parts: dict[str, int]
) -> None:
    plan = {"epochs": 2, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.1, "loss": loss}
    data = {"factory": "plain:build_dataset", "args": {"padding": padding}}
    found = []
    for name, how in (("whole", {"processes": 1}), ("parts", parts)):
        result = train(write_project(tmp_path / name, extra=WEIGHTED, data=data, train={**plan, **how}))
        weights = load_file(next(tmp_path.glob(f"train{len(found)}")) / WEIGHTS)
        found.append((weights, result.history[-1]))
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (whole, history), (others, theirs) = found
    for name, tensor in whole.items():
        assert torch.allclose(tensor, others[name], atol=1e-5), name
    for name in ("train_loss", "validation_loss"):
        assert theirs[name] == pytest.approx(history[name], rel=1e-4)


def test_a_loss_that_is_no_mean_over_samples_is_told_where_a_step_has_parts(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 1, "batch_size": 32, "loss": {"factory": "plain:own"}}
    job = write_project(tmp_path / "p", extra=WEIGHTED, train={**plan, "processes": 2})
    said = "train.loss: plain:own of a batch is not the mean of those of its halves, so 2 processes train by other"
    assert any(note.startswith(said) for note in train(job).notes)


def test_samples_that_are_used_twice_to_fill_the_ranks_are_told(train: Train, tmp_path: Path) -> None:
    plan = {"epochs": 1, "processes": 5, "batch_size": 10}
    listed = train(write_project(tmp_path / "list", train=plan))
    stream = train(write_project(tmp_path / "stream", extra=STREAM, train=plan))

    said = "4 of 96 training samples are used twice an epoch, so that 5 processes get equally many"
    assert said in listed.notes and said in stream.notes
    assert listed.data_fingerprint == stream.data_fingerprint


def test_a_collate_function_makes_the_batches_everywhere(train: Train, tmp_path: Path) -> None:
    extra = """
        class Ragged:
            # Items are of unequal lengths: only the collate function can make a batch of them.
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
            def __getitem__(self, index):
                x, y = self.inner[index]
                return {"values": x[: 2 + index % 3], "name": f"sample {index}", "label": int(y)}
        original = build_dataset
        def build_dataset(split):
            return Ragged(original(split))
        def pad(items, fill):
            rows = [nn.functional.pad(item["values"], (0, 4 - len(item["values"])), value=fill) for item in items]
            return torch.stack(rows), torch.tensor([item["label"] for item in items])
    """
    data = {"factory": "plain:build_dataset", "collate": {"factory": "plain:pad", "args": {"fill": 0.0}}}
    two = train(write_project(tmp_path / "two", extra=extra, data=data))
    one = train(
        write_project(tmp_path / "one", extra=extra, data=data, train={"epochs": 1, "processes": 1, "batch_size": 7})
    )

    assert 0 <= two.history[-1]["validation_accuracy"] <= 1
    # The fingerprint is of the items, so padding and batches do not change it.
    assert one.data_fingerprint == two.data_fingerprint


def test_a_collate_function_may_pad_training_batches_to_their_longest_and_validation_to_one_length(
    train: Train, tmp_path: Path
) -> None:
    extra = """
        from pathlib import Path
        class Ragged:
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
            def __getitem__(self, index):
                x, y = self.inner[index]
                return x[: 1 + index % 4], y
        original = build_dataset
        def build_dataset(split):
            return Ragged(original(split))
        def pad(items, split):
            length = max(len(x) for x, _ in items) if split == "train" else 4
            rows = [nn.functional.pad(x, (0, length - len(x))) for x, _ in items]
            return torch.stack(rows), torch.stack([y for _, y in items])
        class Sums(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, 3)
            def forward(self, x):
                if self.training:
                    Path(__file__).with_name(f"trained-{x.shape[1]}").touch()
                elif x.shape[1] != 4:
                    raise ValueError(f"asked with {x.shape[1]}")
                return self.linear(torch.stack([x.sum(1), x.abs().sum(1)], 1))
        def build_model():
            return Sums()
    """
    data = {"factory": "plain:build_dataset", "collate": "plain:pad"}
    plan = {"epochs": 1, "processes": 2, "batch_size": 4}
    path = write_project(tmp_path / "p", extra=extra, data=data, train=plan)
    check(path, export=False)
    train(path)
    assert {file.name for file in path.parent.glob("trained-*")} >= {"trained-2", "trained-3", "trained-4"}


def test_validation_batches_of_different_shapes_are_refused_before_training_unless_the_job_says_that_they_vary(
    train: Train, tmp_path: Path
) -> None:
    extra = """
        from torch.nn.utils.rnn import pad_sequence
        class Ragged:
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
            def __getitem__(self, index): return self.inner[index][0][: 4 if index == 40 else 3], self.inner[index][1]
        original = build_dataset
        def build_dataset(split):
            return Ragged(original(split))
        def pad(items):
            return pad_sequence([item[0] for item in items], batch_first=True), torch.stack([item[1] for item in items])
        class Sums(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(1, 3)
            def forward(self, x):
                return self.linear(x.sum(1, keepdim=True))
        def build_model():
            return Sums()
    """
    data = {"factory": "plain:build_dataset", "collate": "plain:pad"}
    plan = {"epochs": 1, "processes": 1, "batch_size": 32}
    path = write_project(tmp_path / "p", extra=extra, data=data, train=plan)
    said = (
        r"validation batches are of different shapes: samples of \[\[3\], \[\]\] and of \[\[4\], \[\]\]; pad them all"
        r" .*say that they may vary.*export: \{dynamic: \{length_1: \{axes: \{x: 1\}\}\}\}"
    )
    with pytest.raises(JobError, match=said):
        check(path)
    with pytest.raises(JobError, match=said):
        train(path)
    # Doing what was said; then a range that the second batch is outside of.
    export = {"dynamic": {"length_1": {"axes": {"x": 1}}}}
    train(write_project(tmp_path / "declared", extra=extra, data=data, train=plan, export=export))
    export["dynamic"]["length_1"]["max"] = 3
    narrow = write_project(tmp_path / "narrow", extra=extra, data=data, train=plan, export=export)
    for ask in (check, train):
        with pytest.raises(JobError, match=r"export.dynamic.length_1: expected .* got 1 to 3, and the data has 4"):
            ask(narrow)


def test_an_item_that_cannot_be_fingerprinted_is_named_by_its_type(train: Train, tmp_path: Path) -> None:
    extra = """
        class Odd: ...
        original = build_dataset
        class Odds:
            def __init__(self, inner): self.inner = inner
            def __len__(self): return len(self.inner)
            def __getitem__(self, index): return (*self.inner[index], Odd())
        def build_dataset(split):
            return Odds(original(split))
        def drop(items):
            return torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
    """
    data = {"factory": "plain:build_dataset", "collate": "plain:drop"}
    with pytest.raises(JobError, match="a sample holds a Odd, which cannot be fingerprinted"):
        train(write_project(tmp_path / "p", extra=extra, data=data))


def test_a_collate_function_that_fails_is_named_with_its_line(train: Train, tmp_path: Path) -> None:
    extra = """
        def collate(items):
            raise ValueError("ragged")
    """
    data = {"factory": "plain:build_dataset", "collate": "plain:collate"}
    with pytest.raises(
        JobError, match=r"data.collate: plain:collate failed on 16 items: ValueError: ragged \(plain.py"
    ):
        train(write_project(tmp_path / "p", extra=extra, data=data))


def test_a_validation_item_that_raises_is_named_by_its_index(train: Train, tmp_path: Path) -> None:
    extra = """
        class Broken(TensorDataset):
            def __getitem__(self, index):
                if index == 77:
                    raise OSError("torn file")
                return super().__getitem__(index)
        original = build_dataset
        def build_dataset(split):
            return original(split) if split == "train" else Broken(*original(split).tensors)
    """
    with pytest.raises(JobError, match=r"reading a validation item failed \(sample 77 of 96\): OSError: torn file"):
        train(write_project(tmp_path / "p", extra=extra))


def test_a_loss_may_be_a_class_that_is_made_with_its_arguments(train: Train, tmp_path: Path) -> None:
    extra = """
        class Scaled(nn.Module):
            def __init__(self, factor):
                super().__init__()
                self.factor = factor
            def forward(self, outputs, target):
                return self.factor * nn.functional.cross_entropy(outputs, target)
        def scaled(outputs, target, factor):
            return factor * nn.functional.cross_entropy(outputs, target)
    """
    plan = {"epochs": 1, "processes": 1, "batch_size": 96, "learning_rate": 1e-30}
    plain = train(write_project(tmp_path / "plain", train=plan))
    for name in ("Scaled", "scaled"):
        loss = {"factory": f"plain:{name}", "args": {"factor": 3.0}}
        tripled = train(write_project(tmp_path / name, extra=extra, train={**plan, "loss": loss}))
        assert tripled.history[0]["validation_loss"] == pytest.approx(3 * plain.history[0]["validation_loss"])
