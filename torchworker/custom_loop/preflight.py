"""What a custom loop will need before and after it, built and tried without running it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from torchworker.contract import CheckResult, DynamicDim, Entrypoint, Project
from torchworker.data.fingerprint import Fingerprint
from torchworker.data.groups import SampleGroups
from torchworker.data.loading import reading
from torchworker.data.sharding import NamedDataset, StreamShare, sample_seed
from torchworker.process.failure import UserError
from torchworker.project import user_code
from torchworker.project.first_batch import Shipped, try_batch, try_served
from torchworker.project.independence import require_independent
from torchworker.project.randomness import seed_everything
from torchworker.project.signature import (
    dims_of,
    input_specs,
    of_one_sample,
    output_specs,
    require_batches_alike,
    without_batch,
)
from torchworker.training.results import try_weights

BATCH = 64
"""Of validation samples that are tried; two batches, of which the model sees one."""


def name_of(entry: Entrypoint) -> str:
    """The loop's name in messages: `train.entrypoint: module:function`."""
    return f"{entry.function.where}: {entry.function.target}"


def resolve_main(entry: Entrypoint, project: Project) -> Callable[..., Any]:
    """The function. Raises UserError unless it takes a context and the job's `train.args`."""
    main = user_code.resolve(entry.function, project)
    arguments = ", ".join(["context", *(f"{name}=…" for name in entry.function.args)])
    try:
        inspect.signature(main).bind(None, **entry.function.args)
    except TypeError as error:
        raise UserError(
            f"{name_of(entry)} is called as {entry.function.target.rpartition(':')[2]}({arguments}), but takes "
            f"{inspect.signature(main)}: {error}; the arguments are train.args"
        ) from None
    return main


@torch.no_grad()
def try_parts(
    project: Project, dynamic: Sequence[DynamicDim] = (), max_batch: int | None = None, formats: Sequence[str] = ()
) -> CheckResult:
    """Model and data, one validation batch, the first training item, and the weights to a file and back.

    Args:
        project: what is tried.
        dynamic: declared dimensions beside the batch.
        max_batch: largest batch; None for no limit.
        formats: that the release must have.

    Raises UserError for what would otherwise fail after training.
    """
    model = user_code.build_model(project).eval()
    validation_set = user_code.build_dataset(project, "validation")
    groups = SampleGroups(project)
    some = list(itertools.islice(user_code.batches(validation_set, BATCH, project, see=groups.add), 2))
    require_batches_alike(model, (some[0], some[-1]), dynamic, project)
    inputs, target = some[0]
    itself = project.serving is None
    outputs, _ = try_batch(model, None, (inputs, target), project, formats if itself else None)
    shipped = (
        Shipped(model, inputs, target, project, require_independent(model, inputs, project, outputs))
        if itself
        else try_served(model, validation_set, outputs, BATCH, project, formats, dynamic)
    )
    train_set = user_code.build_dataset(project, "train")
    fingerprint_share(train_set, project, 0, rank=0, world=1, only_first=True)
    try_weights(model, project)
    return facts_of(
        shipped, dynamic, model, train_samples=user_code.length_of(train_set),
        validation_samples=user_code.length_of(validation_set), loss=None, max_batch=max_batch,
    )  # fmt: skip


@torch.no_grad()
def facts_of(
    shipped: Shipped,
    dynamic: Sequence[DynamicDim],
    trained: nn.Module,
    *,
    train_samples: int | None,
    validation_samples: int | None,
    loss: float | None,
    max_batch: int | None = None,
    notes: Sequence[str] = (),
) -> CheckResult:
    """What `ship check` says of a model in eval() and of a batch.

    Args:
        shipped: what is exported, and the batch.
        dynamic: declared dimensions beside the batch.
        trained: the model, whose parameters are counted.
        train_samples, validation_samples: None for a stream that does not say.
        loss: of the untrained model; None with an entrypoint.
        max_batch: largest batch; None for no limit.
        notes: what else a person should know.

    Raises:
        UserError: a declared dimension does not fit the data.
    """
    model, inputs, target, project, independence = shipped
    trainable = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    named = user_code.name_inputs(model, inputs, project)
    dims = dims_of(named, dynamic, project, max_batch)
    inputs_of, outputs_of = input_specs(named, dims), output_specs(model, named, dims, project)
    if project.coupled:
        inputs_of, outputs_of, dims = of_one_sample(inputs_of), of_one_sample(outputs_of), without_batch(dims)
    return CheckResult(
        parameters=sum(parameter.numel() for parameter in trainable),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trainable),
        inputs=inputs_of,
        outputs=outputs_of,
        target=input_specs({"target": target}, dims_of({"target": target}, (), project))[0],
        dims=dims,
        train_samples=train_samples,
        validation_samples=validation_samples,
        loss=loss,
        notes=notes,
        independence=independence,
    )


def fingerprint_share(
    dataset: Dataset[Any], project: Project, seed: int, rank: int, world: int, only_first: bool = False
) -> Fingerprint:
    """Of this rank's share of the training data as data.factory gives it, each sample read once.

    Random draws depend on the seed and on the sample's place alone.

    Args:
        dataset: of the training split.
        project: for messages.
        seed: of the job.
        rank, world: which share of how many; sample i belongs to rank i modulo world.
        only_first: try the first sample and no more.

    Raises:
        UserError: a sample cannot be read or has no known bytes, or a stream has no len().
    """
    fingerprint = Fingerprint()
    with reading("a training", project):
        for item in itertools.islice(_items(dataset, project, seed, rank, world), 1 if only_first else None):
            fingerprint.add(item)
    return fingerprint


def _items(dataset: Dataset[Any], project: Project, seed: int, rank: int, world: int) -> Iterator[Any]:
    where = project.data.where
    if isinstance(dataset, IterableDataset):
        size = user_code.length_of(dataset)
        if size is None:
            raise UserError(
                f"{where}: with train.entrypoint a stream of training data needs a len(): it is read once more after "
                "training, to its end, for the data fingerprint"
            )
        stream = StreamShare(dataset, where, seed=seed, world=world, rank=rank, size=size, most=None)
        yield from (read.item for read in stream if read.hashed)
        return
    share = NamedDataset(dataset, world, rank)
    for place in range(len(share)):
        seed_everything(sample_seed(seed, place * world + rank))
        yield share[place]
