"""The job file: what to train, export, gate and release. YAML, validated before anything starts."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from train_and_ship.infra.errors import JobError
from train_and_ship.registry.bucket.keys import RESERVED_CHANNELS
from train_and_ship.registry.job.base import Factory, Part, Target, digest
from train_and_ship.registry.job.data import Checks, Drift, Labels, Snapshot, TensorCheck
from train_and_ship.registry.job.export import Dynamic, Export, Quantize
from train_and_ship.registry.job.gates import METRIC_DIRECTIONS, SPEED_GATES, Gate, require_fitting
from train_and_ship.registry.job.launcher import Launcher
from train_and_ship.registry.job.parity import Parity
from train_and_ship.registry.job.train import Checkpoint, Train

Policy = Literal["better", "not_worse", "always"]
"""What a candidate must be, beside the live release, to replace it."""


def _is_channel(value: str) -> str:
    if RESERVED_CHANNELS.fullmatch(value):
        taken = "latest, champion, challenger, previous, …-previous or v and digits"
        raise ValueError(f"a channel that MLflow can have as an alias: not {taken}")
    return value


class Release(Part):
    """Where a release goes, and what it takes to replace the one that is there."""

    channel: Annotated[str, AfterValidator(_is_channel)] = Field(
        "prod", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="the pointer that is moved"
    )
    policy: Policy | None = Field(
        None,
        description="better: the interval of the improvement lies above margin; not_worse: above −margin; always: it "
        "is not asked. When absent, always for `ship run` and better for `ship retrain`; see retraining.md",
    )
    approval: Literal["required"] | None = Field(
        None, description="required: a person says yes, in Prefect or with `ship approve`, before the channel moves"
    )
    metric: str | None = Field(None, description="what policy decides on; the first of train.metrics when absent")
    margin: float = Field(0.0, ge=0, description="in units of the metric")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the interval of the improvement")
    resamples: int = Field(
        1000, ge=100, le=100_000, description="how often the validation samples are drawn anew for the interval"
    )


class Retrain(Part):
    """What `ship retrain` does, by hand, at night or on an event."""

    start: Literal["live", "scratch"] = Field(
        "scratch", description="begin with the live release's weights, or as model.factory makes them"
    )


class Data(Factory):
    """The dataset's factory, and how its items become batches."""

    collate: Target | Factory | None = Field(
        None, description="collate(items) returns (inputs, target) of a batch; torch's own when absent"
    )
    snapshot: Snapshot | None = Field(
        None, description="files that are verified before training; the factory gets their folder as snapshot"
    )
    checks: Checks | None = Field(None, description="what is asked of the data before training; see data.md")


def _is_measured(name: str, info: ValidationInfo) -> str:
    """A gate is on a metric of ours, or on one that the job names."""
    train = info.data.get("train")
    if train is None:
        # Its own mistakes are told; which metrics it names is not known.
        return name
    known = [*METRIC_DIRECTIONS, *(item.label for item in train.custom_metrics), *SPEED_GATES]
    if name not in known:
        raise ValueError(f"something that is measured: {', '.join(known)}")
    return name


class Job(Part):
    """One model, from code to serving bucket."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="model name in MLflow and in the bucket")
    project: str = Field(".", description="folder put first on the import path, relative to the job file")
    model: Factory = Field(description="called with args; returns a torch.nn.Module")
    data: Data = Field(description='called with split="train" | "validation"; returns a dataset')
    train: Train
    export: Export = Export()
    parity: Parity = Parity()
    gates: dict[Annotated[str, AfterValidator(_is_measured)], Gate] = Field(
        default_factory=dict, description="limits by metric name, or by p50_ms, p99_ms, load_ms, size_mb, memory_mb"
    )
    release: Release = Release()
    retrain: Retrain = Retrain()

    @model_validator(mode="after")
    def _policy_has_a_metric(self) -> Self:
        known = self._measured
        if self.release.metric is not None and self.release.metric not in known:
            raise ValueError(
                f"release.metric: something that is measured ({', '.join(known) or 'nothing is'}), "
                f"not {self.release.metric}"
            )
        if self.release.policy in ("better", "not_worse") and not known:
            raise ValueError(f"a metric in train.metrics with release.policy: {self.release.policy}")
        return self

    @model_validator(mode="after")
    def _split_is_ours(self) -> Self:
        if "split" in self.data.args:
            raise ValueError("data.args without split, which is given: train, then validation")
        if self.data.snapshot is not None and "snapshot" in self.data.args:
            raise ValueError("data.args without snapshot, which is given: the folder of data.snapshot")
        return self

    @field_validator("gates")
    @classmethod
    def _gates_fit(cls, gates: dict[str, Gate]) -> dict[str, Gate]:
        require_fitting(gates)
        return gates

    @model_validator(mode="after")
    def _knows_what_serves(self) -> Self:
        named = [name for name, gate in self.gates.items() if gate.times_live is not None]
        if named and self.export.serve == "none":
            raise ValueError(f"export.serve: auto or a format, of which {named[0]} is compared with the live release's")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured: what the job names or the loss suggests, and whatever a gate needs."""
        chosen: list[str] = [item for item in self.train.metrics or () if isinstance(item, str)]
        # A custom loop's loss is its own.
        if self.train.metrics is None and self.train.entrypoint is None and isinstance(self.train.loss, str):
            chosen = [_METRIC_OF_LOSS[self.train.loss]]
        return tuple(dict.fromkeys([*chosen, *(gate for gate in self.gates if gate in METRIC_DIRECTIONS)]))

    @property
    def _measured(self) -> tuple[str, ...]:
        """Every metric, in the order of `train.metrics`."""
        named = [item if isinstance(item, str) else item.label for item in self.train.metrics or ()]
        return tuple(dict.fromkeys([*named, *self.metrics]))

    @property
    def decisive_metric(self) -> str | None:
        """What `release.policy` decides on; None when nothing is measured."""
        return self.release.metric or next(iter(self._measured), None)

    def unattended(self) -> Job:
        """The job as it is run when nobody watches: without a policy of its own, only what is better goes live.

        Raises JobError when nothing is measured that could tell.
        """
        if self.release.policy is not None:
            return self
        if self.decisive_metric is None:
            raise JobError(
                f"{self.name}: nothing is measured, so no candidate can be shown to be better than the live release; "
                "name a metric in train.metrics, or write release: {policy: always}"
            )
        return self.model_copy(update={"release": self.release.model_copy(update={"policy": "better"})})

    def direction(self, metric: str) -> Literal["higher", "lower"]:
        """Which direction of a metric is an improvement."""
        named = {item.label: item.better for item in self.train.custom_metrics}
        return named.get(metric) or METRIC_DIRECTIONS[metric]

    @property
    def threads(self) -> int:
        """torch threads of each rank."""
        launcher = self.train.launcher
        cores = launcher.cpus or len(os.sched_getaffinity(0))
        return self.train.threads or max(1, cores * launcher.nodes // self.train.processes)

    @property
    def serve_threads(self) -> int:
        """Threads with which artifacts are measured."""
        return self.export.threads or self.threads

    def digest(self) -> str:
        """16 hexadecimal digits that change when anything in the job changes."""
        return digest(self.model_dump(mode="json"))

    def training_digest(self) -> str:
        """The same for what training depends on: a gate or a format that is changed later needs no new training."""
        kept = self.model_dump(mode="json", include={"name", "project", "model", "data", "train"})
        kept["data"].pop("checks")
        return digest({**kept, "metrics": self.metrics})


_METRIC_OF_LOSS: Mapping[str, str] = {
    "cross_entropy": "accuracy",
    "binary_cross_entropy_with_logits": "accuracy",
    "mse_loss": "mean_squared_error",
    "l1_loss": "mean_absolute_error",
    "smooth_l1_loss": "mean_absolute_error",
}


def load_job(path: Path) -> tuple[Job, Path]:
    """Read and validate a job file; also the absolute project folder.

    Raises JobError with one line a mistake: where, what was expected, what was given.
    """
    if not path.is_file():
        patterns = ("*.yaml", "jobs/*.yaml", "examples/*/job.yaml")
        near = [str(found) for pattern in patterns for found in sorted(Path().glob(pattern)) if _looks_like_job(found)]
        hint = f"; job files here: {', '.join(near[:5])}" if near else ""
        raise JobError(f"job file {path}: expected a YAML file, found none{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"job file {path}: expected UTF-8 text that can be read, got {error}") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise JobError(f"{place}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(document, dict):
        raise JobError(f"{path}: expected keys such as name, model, data, train; got {_shown(document)}")
    try:
        job = Job.model_validate(document)
    except ValidationError as error:
        lines = list(_explain(error, path, text))
        raise JobError("\n".join(lines)) from None
    folder = (path.parent / job.project).resolve()
    if not folder.is_dir():
        raise JobError(f"{path}: project: expected a folder, got {folder}, which does not exist")
    return job, folder


def _looks_like_job(path: Path) -> bool:
    text = path.read_text(errors="replace")
    return all(f"{key}:" in text for key in ("name", "model", "data", "train"))


def _explain(error: ValidationError, path: Path, text: str) -> Iterator[str]:
    # Unions add the name of the alternative that was tried; only the user's keys are shown.
    found = [([part for part in item["loc"] if _in_document(part)], item) for item in error.errors()]
    seen: set[str] = set()
    for keys, item in found:
        key = ".".join(str(part) for part in keys)
        deeper = any(len(other) > len(keys) and other[: len(keys)] == keys for other, _ in found)
        if key in seen or deeper:
            continue
        seen.add(key)
        place = f"{path}:{_line_of(text, keys)}: {key}" if keys else f"{path}"
        given = _shown(item["input"])
        match item["type"]:
            case "extra_forbidden":
                yield f"{place}: unknown key{_did_you_mean(keys)}"
            case "missing":
                yield f"{place}: missing; expected {_describe_key(keys)}"
            case "value_error":
                yield f"{place}: expected {item['ctx']['error']}, got {given}"
            case "string_pattern_mismatch":
                yield f"{place}: expected lower-case letters, digits, dots, dashes or underscores, got {given}"
            case "literal_error" if keys[-1] in ("loss", "optimizer", "schedule"):
                yield f"{place}: expected {item['ctx']['expected']} or {{factory: module:attribute}}, got {given}"
            case "float_type" if isinstance(item["input"], str) and _is_number(item["input"]):
                yield f"{place}: YAML reads {item['input']} as text; write it with a point, such as 1.0e-3 or 0.001"
            case _:
                expected = item["msg"].removeprefix("Input should be ").removeprefix("String should ")
                yield f"{place}: expected {expected}, got {given}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_document(part: int | str) -> bool:
    return isinstance(part, int) or (
        part.isidentifier() and part not in ("Factory", "Quantize") and not part.startswith("literal")
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


def _model_at(keys: list[int | str]) -> type[BaseModel] | None:
    """The part of the job that holds the last key."""
    parts: dict[str, type[BaseModel]] = {
        "model": Factory, "data": Data, "train": Train, "export": Export, "parity": Parity, "release": Release,
        "retrain": Retrain,
    }  # fmt: skip
    if len(keys) == 1:
        return Job
    if keys[0] == "gates":
        return Gate if len(keys) == 3 else None
    if keys[:2] == ["train", "launcher"] and len(keys) > 2:
        return Launcher.part(str(keys[2])) if len(keys) == 4 else Launcher
    if keys[:2] == ["export", "dynamic"]:
        return Dynamic if len(keys) == 4 else None
    if keys[:2] == ["export", "quantize"]:
        return Quantize if len(keys) == 3 else None
    if keys[:2] == ["data", "snapshot"]:
        return Snapshot if len(keys) == 3 else None
    if keys[:2] == ["data", "checks"]:
        inner: dict[str, type[BaseModel]] = {"labels": Labels, "drift": Drift}
        if len(keys) == 3:
            return Checks
        if len(keys) == 4:
            return inner.get(str(keys[2]))
        return TensorCheck if len(keys) == 5 and keys[2] == "tensors" else None
    if keys[0] == "train" and len(keys) == 3:
        return Checkpoint if keys[1] == "checkpoint" else Factory
    return parts.get(str(keys[0])) if len(keys) == 2 else None


def _did_you_mean(keys: list[int | str]) -> str:
    model = _model_at(keys)
    if model is None:
        return ""
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(keys[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def _describe_key(keys: list[int | str]) -> str:
    model = _model_at(keys)
    field = model.model_fields.get(str(keys[-1])) if model else None
    return field.description if field is not None and field.description else "a value"


def _line_of(text: str, keys: list[int | str]) -> int:
    """1-based line of the deepest key that is in the file."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None, "the document was validated, so it is not empty"
    line = node.start_mark.line
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


def job_schema() -> dict[str, Any]:
    """JSON schema of the job file, for editors; kept in `docs/job.schema.json`."""
    schema = Job.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "train-and-ship job", **schema}
