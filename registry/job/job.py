"""The job file: what to train, export, gate and release. YAML, validated before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from torchworker.contract import METRICS, RUN_IN_CPP, SPEED_GATES
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.job_environment import VARIABLE, holds_secret
from train_and_ship.registry.identity import RESERVED_CHANNELS, may_be_alias
from train_and_ship.registry.job.base import Factory, Part, Target, digest
from train_and_ship.registry.job.data import Checks, Snapshot
from train_and_ship.registry.job.export import Export
from train_and_ship.registry.job.gates import Gate, require_fitting
from train_and_ship.registry.job.observe import Observe
from train_and_ship.registry.job.parity import Parity
from train_and_ship.registry.job.rollout import Rollout
from train_and_ship.registry.job.train import Train

Policy = Literal["better", "not_worse", "always"]
"""What a candidate must be, beside the live release, to replace it."""
Allowed = Literal["signature", "labels", "formats", "model", "live_score", "runtime"]
"""In what a candidate may be another kind of thing than the live release: registry.kind.KINDS."""


_RECORDED = "recorded"
"""In the context of a validation: the job was validated when it was recorded, by the rules of then."""


def _is_channel(value: str, info: ValidationInfo) -> str:
    if RESERVED_CHANNELS.fullmatch(value):
        taken = "latest, champion, challenger, previous, …-previous or v and digits"
        raise ValueError(f"a channel that MLflow can have as an alias: not {taken}")
    if not may_be_alias(value) and not (info.context or {}).get(_RECORDED):
        raise ValueError(f"a channel that MLflow can have as an alias: no dots, such as {value.replace('.', '-')}")
    return value


class Release(Part):
    """Where a release goes, and what it takes to replace the one that is there."""

    came_later: ClassVar[frozenset[str]] = frozenset({"allow", "rollout"})

    channel: Annotated[str, AfterValidator(_is_channel)] = Field("prod", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """the pointer that is moved"""
    policy: Policy | None = None
    """better: the interval of the improvement lies above margin; not_worse: above −margin; always: it is not asked.
    When absent, always for `ship run` and better for `ship retrain`; see retraining.md"""
    approval: Literal["required"] | None = None
    """required: a person says yes, in Prefect or with `ship approve`, before the channel moves"""
    allow: Annotated[tuple[Allowed, ...], Field(strict=False)] = ()
    """in what a release may be of another kind than the live one and replace it all the same, such as [signature];
    nothing when absent: it takes a person, see releases.md"""
    metric: str | None = None
    """what policy decides on; the first of train.metrics when absent"""
    margin: float = Field(0.0, ge=0)
    """in units of the metric"""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """of the interval of the improvement"""
    resamples: int = Field(1000, ge=100, le=100_000)
    """how often the validation samples are drawn anew for the interval"""
    rollout: Rollout | None = None
    """the release answers a growing share of the requests before it goes live, beside what is live; see rollouts.md.
    It goes live at once when absent, and where nothing is live yet"""


def _is_cron(value: str) -> str:
    if len(value.split()) != 5:
        raise ValueError("five fields as crontab has them: minute, hour, day, month, weekday, such as 0 2 * * *")
    return value


def _is_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (OSError, KeyError, ValueError):
        raise ValueError("the name of a time zone, such as Europe/Berlin") from None
    return value


class Retrain(Part):
    """What `ship retrain` does, by hand, on a schedule or on an event."""

    came_later: ClassVar[frozenset[str]] = frozenset({"code", "files", "cron", "timezone"})

    cron: Annotated[str, AfterValidator(_is_cron)] | None = None
    """when `ship deploy` has it run, as crontab says it: 0 2 * * * is two o'clock each night; as in prefect.yaml when
    absent"""
    timezone: Annotated[str, AfterValidator(_is_zone)] | None = None
    """of cron, such as Europe/Berlin; UTC when absent"""

    start: Literal["live", "scratch"] = "scratch"
    """begin with the live release's weights, or as model.factory makes them"""
    code: tuple[str, ...] | None = Field(None, strict=False, min_length=1)
    """files and folders, relative to the project, whose sources are all that counts as code; every source file when
    absent"""
    files: tuple[str, ...] = Field((), strict=False)
    """further files whose change is a reason to train, as globs relative to the project, ** for any folders; with a !
    in front, files that are none although the code opens them"""


class Deploy(Part):
    """What `ship deploy` sends to workers, beside the files that git knows."""

    files: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """files and folders that git does not know, relative to the job file; all that is sent where there is no git"""
    lock: str | None = None
    """file in pip's requirements format with the packages of the environment of python, relative to the job file; when
    absent, what is installed there, by version"""


class Data(Factory):
    """The dataset's factory, and how its items become batches."""

    came_later: ClassVar[frozenset[str]] = frozenset({"for_live", "group", "raw", "sampler", "sharded"})

    collate: Target | Factory | None = None
    """collate(items), or collate(items, split), returns (inputs, target) of a batch; torch's own when absent"""
    sampler: Target | Factory | None = None
    """sampler(dataset) of the training split returns a torch Sampler, or one weight a sample; all samples, shuffled,
    when absent; see training.md"""
    sharded: bool = False
    """a stream gives each rank a part of its own (by RANK, or a library's split by node), in place of the ranks taking
    turns through it; see training.md"""
    raw: Target | Factory | None = None
    """called as factory is, with arguments of its own; returns the same samples in the same order as export.serving
    takes them: (raw inputs, target). What factory gives when absent; see serving-module.md"""
    for_live: Target | Factory | None = None
    """called with split="validation" and files, the folder of the files that the live release ships; returns the same
    samples as factory, prepared with these in place of what factory fits anew; see serving-module.md"""
    snapshot: Snapshot | None = None
    """files that are verified before training; the factory gets their folder as snapshot"""
    checks: Checks | None = None
    """what is asked of the data before training; see data.md"""
    group: Target | Factory | None = None
    """group(item) returns what one item of the dataset belongs to, such as the patient of a visit or the film of a
    frame: a whole number or a text; the interval of the improvement is then over whole groups. When absent, samples are
    taken to be independent; see data.md"""


def _is_measured(name: str, info: ValidationInfo) -> str:
    """A gate is on a metric of ours, or on one that the job names."""
    train = info.data.get("train")
    if train is None:
        # Its own mistakes are told; which metrics it names is not known.
        return name
    known = [*METRICS, *(item.label for item in train.custom_metrics), *SPEED_GATES]
    if name not in known:
        raise ValueError(f"something that is measured: {', '.join(known)}")
    return name


def _is_variable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise ValueError("the name of an environment variable, such as WANDB_API_KEY")
    if holds_secret(name):
        raise ValueError(
            f"a variable that is not ours: {name} says what this application may do, which no job is given; a service "
            "of your own needs a name and a password of its own"
        )
    return name


class Job(Part):
    """One model, from code to serving bucket."""

    came_later: ClassVar[frozenset[str]] = frozenset({"deploy", "env", "observe", "python"})

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """model name in MLflow and in the bucket"""
    project: str = "."
    """folder put first on the import path, relative to the job file"""
    python: str | None = None
    """interpreter of the environment that your code needs, relative to the job file, such as .venv/bin/python; it has
    torch and torchworker. When absent, .venv/bin/python beside the job or in the project if it has torchworker, else
    the one of train-and-ship; see your-environment.md"""
    model: Factory
    """called with args; returns a torch.nn.Module"""
    data: Data
    """called with split="train" | "validation"; returns a dataset"""
    train: Train
    env: Annotated[tuple[Annotated[str, AfterValidator(_is_variable)], ...], Field(strict=False)] = ()
    """names of environment variables that your code is given beside the usual ones, such as [WANDB_API_KEY]; the values
    are recorded nowhere; see trust.md"""
    export: Export = Export()
    parity: Parity = Parity()
    gates: dict[Annotated[str, AfterValidator(_is_measured)], Gate] = Field(default_factory=dict)
    """limits by metric name, or by p50_ms, p99_ms, load_ms, size_mb, memory_mb"""
    release: Release = Release()
    retrain: Retrain = Retrain()
    deploy: Deploy = Deploy()
    observe: Observe | None = None
    """what servers write down of requests; see observations.md. Nothing when absent"""

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
    def _segments_are_kept(self) -> Self:
        if self.release.rollout is not None:
            self.require_kept(self.release.rollout.by)
        return self

    def require_kept(self, by: str) -> None:
        """Raises ValueError unless servers keep this column of requests, or there is none."""
        columns = self.observe.columns if self.observe is not None else None
        kept = (*columns.inputs, *columns.outputs) if columns is not None else ()
        if by and by not in kept:
            raise ValueError(
                "release.rollout.stop_if.by: a column that observe.columns keeps "
                f"({', '.join(kept) or 'it keeps none'}), not {by}"
            )

    @model_validator(mode="after")
    def _split_is_ours(self) -> Self:
        data = self.data
        for key, factory in (("data", data), ("data.raw", data.raw), ("data.for_live", data.for_live)):
            args = factory.args if isinstance(factory, Factory) else {}
            if "split" in args:
                raise ValueError(f"{key}.args without split, which is given: train, then validation")
            if self.data.snapshot is not None and "snapshot" in args:
                raise ValueError(f"{key}.args without snapshot, which is given: the folder of data.snapshot")
        return self

    @model_validator(mode="after")
    def _raw_is_served(self) -> Self:
        if self.data.raw is not None and self.export.serving is None:
            raise ValueError(
                "export.serving with data.raw, the module that takes raw inputs; the model itself is given what "
                "data.factory gives"
            )
        return self

    @model_validator(mode="after")
    def _live_has_files(self) -> Self:
        if self.data.for_live is None:
            return self
        if self.data.raw is not None:
            raise ValueError("data.raw or data.for_live: raw inputs are prepared by each release itself")
        if not self.export.files and self.export.extras is None:
            raise ValueError("export.files or export.extras with data.for_live, which is given the files of a release")
        if isinstance(self.data.for_live, Factory) and "files" in self.data.for_live.args:
            raise ValueError("data.for_live.args without files, which is given: the folder of the live release's files")
        return self

    @model_validator(mode="after")
    def _samples_for_our_loop(self) -> Self:
        given = [name for name in ("sampler", "sharded") if getattr(self.data, name)]
        if given and self.train.entrypoint is not None:
            raise ValueError(f"no data.{given[0]} with train.entrypoint: a loop of your own reads the data as it likes")
        if self.data.sharded and self.train.steps_per_epoch is None:
            raise ValueError("train.steps_per_epoch with data.sharded: all ranks have to take as many steps")
        return self

    @model_validator(mode="after")
    def _cpp_has_a_format(self) -> Self:
        if self.parity.cpp == "required" and not set(RUN_IN_CPP) & set(self.export.wanted):
            raise ValueError(f"{' or '.join(RUN_IN_CPP)} in export.formats with parity.cpp: required")
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

    @classmethod
    def from_record(cls, document: Any) -> Self:
        """A job as a release or a run keeps it, with today's defaults. Raises ValidationError.

        Its channel may have a dot, which job files may not give any more.
        """
        return cls.model_validate(document, context={_RECORDED: True})

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured: what the job names or the loss suggests, and whatever a gate needs."""
        chosen: list[str] = [item for item in self.train.metrics or () if isinstance(item, str) and item in METRICS]
        # A custom loop's loss is its own.
        if self.train.metrics is None and self.train.entrypoint is None and isinstance(self.train.loss, str):
            chosen = [_METRIC_OF_LOSS[self.train.loss]]
        return tuple(dict.fromkeys([*chosen, *(gate for gate in self.gates if gate in METRICS)]))

    @property
    def _measured(self) -> tuple[str, ...]:
        """Every metric, in the order of `train.metrics`."""
        named = [item if isinstance(item, str) else item.label for item in self.train.metrics or ()]
        return tuple(dict.fromkeys([*named, *self.metrics]))

    @property
    def decisive_metric(self) -> str | None:
        """What `release.policy` decides on; None when nothing is measured."""
        return self.release.metric or next(iter(self._measured), None)

    @property
    def watched(self) -> tuple[str, Literal["higher", "lower"]]:
        """What `early_stopping` and `train.weights: best` go by, as a history calls it, and its better direction."""
        metric = self.decisive_metric
        return ("validation_loss", "lower") if metric is None else (f"validation_{metric}", self.direction(metric))

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
        return named.get(metric) or METRICS[metric]

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

    @property
    def coupled(self) -> bool:
        """Whether answers may depend on the other samples of a batch."""
        return self.parity.coupled == "allowed"

    def digest(self) -> str:
        """16 hexadecimal digits that change when anything in the job changes."""
        return digest(self.model_dump(mode="json"))

    def training_digest(self) -> str:
        """The same for what training depends on: a gate or a format that is changed later needs no new training."""
        kept = self.model_dump(mode="json", include={"name", "project", "model", "data", "train"})
        kept["data"].pop("checks")
        kept["data"].pop("group", None)
        kept["data"].pop("raw", None)
        kept["data"].pop("for_live", None)
        chosen = self.train.early_stopping is not None or self.train.ships == "best"
        return digest({**kept, "metrics": self.metrics, **({"watched": self.watched} if chosen else {})})


_METRIC_OF_LOSS: Mapping[str, str] = {
    "cross_entropy": "accuracy",
    "binary_cross_entropy_with_logits": "accuracy",
    "mse_loss": "mean_squared_error",
    "l1_loss": "mean_absolute_error",
    "smooth_l1_loss": "mean_absolute_error",
}
