"""docs/job-file.md: every key of the job file from the models that validate it, in the page of job-file.md."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train_and_ship.registry.job.base import Factory
from train_and_ship.registry.job.data import Checks, Drift, Labels, Snapshot, TensorCheck
from train_and_ship.registry.job.export import Dynamic, Export, Quantize
from train_and_ship.registry.job.gates import Gate
from train_and_ship.registry.job.job import Data, Job, Release, Retrain
from train_and_ship.registry.job.launcher import LOCAL, Kubernetes, Slurm, Torchrun
from train_and_ship.registry.job.load import job_schema
from train_and_ship.registry.job.mistakes import descriptions
from train_and_ship.registry.job.observe import Columns, Observe
from train_and_ship.registry.job.parity import Parity
from train_and_ship.registry.job.rollout import Rollout
from train_and_ship.registry.job.train import CustomMetric, Group, Train


def schema(markdown: bool) -> None:
    """Print the JSON schema, or the page."""
    typer.echo(job_reference() if markdown else json.dumps(job_schema(), indent=2), nl=not markdown)


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
        ("train.groups[…]", Group),
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
        ("release.rollout", Rollout),
        ("retrain", Retrain),
        ("observe", Observe),
        ("observe.columns", Columns),
    ]
    tables = [_table(prefix, part) for prefix, part in sections]
    factory = "\n".join(["## A reference with arguments", "", *_rows("", Factory)])
    page = Path(__file__).with_name("job-file.md").read_text()
    return page.replace("@KEYS@", "\n\n".join([*tables, factory]))


def _table(prefix: str, part: type[BaseModel]) -> str:
    title = f"## `{prefix}`" if prefix else "## Top level"
    return "\n".join([title, "", (part.__doc__ or "").strip(), "", *_rows(prefix, part)])


def _rows(prefix: str, part: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in part.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        cells = (f"`{key}`", _type(field.annotation), _default(field), descriptions(part).get(name, "see below"))
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
        named: dict[type[BaseModel], str] = {
            Factory: "`{factory, args}`",
            Data: "`{factory, args, collate, …}`",
            CustomMetric: "`{factory, args, better, name}`",
            Group: "`{names, learning_rate, …}`",
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
