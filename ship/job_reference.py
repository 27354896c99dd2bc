"""docs/job-file.md: every key of the job file, written from the models that validate it."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train_and_ship.registry.job.base import Factory
from train_and_ship.registry.job.data import Checks, Drift, Labels, Snapshot, TensorCheck
from train_and_ship.registry.job.export import Dynamic, Export, Quantize
from train_and_ship.registry.job.gates import Gate
from train_and_ship.registry.job.job import Data, Job, Release, Retrain
from train_and_ship.registry.job.launcher import LOCAL, Kubernetes, Slurm, Torchrun
from train_and_ship.registry.job.parity import Parity
from train_and_ship.registry.job.train import CustomMetric, Train

HEAD = """# The job file

YAML. Only `name`, `model`, `data` and `train.epochs` (or `train.entrypoint`)
are required. Unknown keys are errors. A *reference* is `module:attribute`, importable from the project folder.

This page is written by `ship schema --markdown > docs/job-file.md`; a test keeps it current.
"""

AFTER = """
## What your code gets

- `model.factory(**args)` returns a `torch.nn.Module`. It is called in every rank after the seed is set.
- `data.factory(split=…, **args)` returns a dataset for `"train"` and for `"validation"`: map-style, or a torch
  `IterableDataset`. Items are `(inputs, target)`, or what `data.collate` makes that of; inputs are a tensor, a tuple of
  tensors in the order of `forward`'s parameters, or a dict by their names. A parameter with a default may be left out.
  The first dimension of every batch is the batch. It stays dynamic in the artifacts, and so does what
  `export.dynamic` names:
  `dynamic: {length: {axes: {tokens: 1, mask: 1}, min: 1, max: 64}}`.
- With `data.snapshot` the factory is also given `snapshot=`, the path of the verified folder as text.
- `forward` returns a tensor, or tensors in tuples, lists and dicts, also nested: `{"logits": a, "state": (b, c)}`
  becomes the outputs logits, state_0 and state_1.
- Of an iterable dataset every rank reads the whole stream and keeps each n-th sample. It starts anew each epoch, after
  `set_epoch(epoch)` where it has that method; its random draws come from `seed` and the epoch, so all ranks see one
  order. Without a `len()` an epoch is its first `steps_per_epoch` × `batch_size` samples.
- When the samples do not divide by the processes, some are used twice in an epoch, and the run says how many.
  Validation counts each sample once.
- A loss by reference is called as `loss(outputs, target)` and returns one number as a tensor. Where a loss, a metric or
  a collate function is a class, it is made with `args` first; a function gets `args` as further keyword arguments.
- A collate function by reference is called as `collate(items)` and returns `(inputs, target)`.
- A metric by reference is called once, as `metric(outputs, target)`, with all outputs and targets of the validation set
  on the CPU in the order of the dataset, and returns one number. Batches whose outputs differ in size, as decoded
  sequences do, are padded at the end: whole numbers with -100, which no token is, floats with NaN.
- An optimizer by reference is called as `factory(parameters, lr=learning_rate, **args)`.
- A schedule by reference is called as `factory(optimizer, total_steps=…, **args)` and returns a torch `LRScheduler`.
- With `train.entrypoint`, `main(context, **args)` is called in every rank and returns the trained model:
  [custom loops](custom-loops.md). Only `device`, `backend`, `processes`, `threads`, `seed`, `metrics`, `checkpoint`,
  `launcher` and what is about failures hold for it too.
- Metrics are computed on the model's output, or the first of a tuple or dict.
"""


def job_reference() -> str:
    """The page as markdown."""
    sections: list[tuple[str, type[BaseModel]]] = [
        ("", Job),
        ("data", Data),
        ("data.snapshot", Snapshot),
        ("data.checks", Checks),
        ("data.checks.tensors.<name>", TensorCheck),
        ("data.checks.labels", Labels),
        ("data.checks.drift", Drift),
        ("train", Train),
        ("train.metrics[…]", CustomMetric),
        ("train.launcher.torchrun", Torchrun),
        ("train.launcher.slurm", Slurm),
        ("train.launcher.kubernetes", Kubernetes),
        ("export", Export),
        ("export.dynamic.<name>", Dynamic),
        ("export.quantize", Quantize),
        ("parity", Parity),
        ("gates.<metric>", Gate),
        ("release", Release),
        ("retrain", Retrain),
    ]
    tables = [_table(prefix, part) for prefix, part in sections]
    factory = "\n".join(["## A reference with arguments", "", *_rows("", Factory)])
    return "\n\n".join([HEAD.rstrip(), *tables, factory, AFTER.strip()]) + "\n"


def _table(prefix: str, part: type[BaseModel]) -> str:
    title = f"## `{prefix}`" if prefix else "## Top level"
    return "\n".join([title, "", (part.__doc__ or "").strip(), "", *_rows(prefix, part)])


def _rows(prefix: str, part: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in part.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        cells = (f"`{key}`", _type(field.annotation), _default(field), (field.description or "see below"))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(option) for option in arguments if option is not type(None))
    if origin is Annotated and arguments[0] is not str:
        return _type(arguments[0])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        named = {
            Factory: "`{factory, args}`",
            Data: "`{factory, args, collate, …}`",
            CustomMetric: "`{factory, args, better, name}`",
        }
        return named.get(kind, "mapping")
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(kind, "reference" if "Annotated" in str(kind) else str(kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if value in ({}, ()):
        return "none"
    if value == LOCAL:
        return "`local`"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
