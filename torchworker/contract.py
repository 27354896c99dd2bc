"""What the Prefect side and a worker process say to each other: plain dataclasses, one JSON file each way.

The request is written to `request.json` in the stage's folder, the worker answers with `result.json` (a
`Reply`) and, while it works, appends one JSON object a line to `events.jsonl`. Nothing here imports torch, so
both sides can afford it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from torchworker import situations
from torchworker.durable import make_folders, set_aside, write_durably
from torchworker.protocol import PROTOCOL

REQUEST = "request.json"
RESULT = "result.json"
EVENTS = "events.jsonl"
WARNINGS = "warnings.jsonl"
"""In a stage's folder, where something was shown: one ShownWarning a line."""
FAILURE_FILES = "failure-rank*.json"
HUNG_FILES = "hung-rank*"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.safetensors"
VALIDATION = "validation.safetensors"
PROBES = "probes.safetensors"
PROBE = "probe.safetensors"
LIVE_VALIDATION = "validation-live.safetensors"
"""The samples of VALIDATION as the live release takes them."""
PLACES = "places"
"""In VALIDATION: the place of each sample in its split, [samples] int64. Samples lie there in a drawn order."""
EXTRAS = "extras"
"""In the folder of an export: what `export.extras` of the job has written."""
CHECKPOINT = "CHECKPOINT.json"
"""Manifest of a checkpoint, which is complete when it has one."""
LAUNCHES = "launches.json"
"""Beside the checkpoints of a run: Launches."""

FORMAT_FILES: Mapping[str, str] = {
    "torchscript": "model.torchscript",
    "onnx": "model.onnx",
    "pt2": "model.pt2",
    "aoti": "model.aoti.pt2",
    "executorch": "model.pte",
}
"""Artifact file of each format."""

INT8_FILES: Mapping[str, str] = {
    "onnx-int8-dynamic": "model.int8-dynamic.onnx",
    "onnx-int8-static": "model.int8-static.onnx",
    "pt2e-int8": "model.int8.aoti.pt2",
}
"""Artifact file of each int8 variant; a release has those that are smaller and faster and as good."""

INT8_OF: Mapping[str, str] = {"onnx-int8-dynamic": "onnx", "onnx-int8-static": "onnx", "pt2e-int8": "aoti"}
"""The float format that each variant has to be faster than, and whose runtime loads it."""

TOGETHER = "samples together"
"""The case of verdicts on whether samples of different callers see one another."""

EXTERNAL_DATA = ".data"
"""Behind the name of an ONNX artifact: the file beside it with its weights, where they are not in it."""

WITHOUT_CODE = ("onnx", "onnx-int8-dynamic", "onnx-int8-static")
"""Formats that are data. Whoever loads another one runs a program of whoever made it, some of it native code."""

METRICS: Mapping[str, Literal["higher", "lower"]] = {
    "accuracy": "higher",
    "mean_squared_error": "lower",
    "mean_absolute_error": "lower",
}
"""Quality metrics that need no user code, and which direction is better."""

TORCHMETRICS: Mapping[str, Literal["higher", "lower"]] = {
    "f1_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "specificity": "higher",
    "auroc": "higher",
    "average_precision": "higher",
    "matthews_corrcoef": "higher",
    "cohen_kappa": "higher",
    "jaccard_index": "higher",
    "r2_score": "higher",
    "pearson_corrcoef": "higher",
    "spearman_corrcoef": "higher",
    "mean_absolute_percentage_error": "lower",
}
"""The same of torchmetrics, which is an extra."""

SPEED_GATES: Mapping[str, str] = {
    "p50_ms": "median milliseconds of a call at batch 1",
    "p99_ms": "99th percentile of the same",
    "load_ms": "milliseconds from the file to the first answer",
    "size_mb": "megabytes of the file",
    "memory_mb": "megabytes of memory that loading and calling it takes",
}
"""What a gate can be put on beside metrics, of the formats that the release recommends; lower is better."""

RUN_IN_CPP = ("torchscript", "aoti")
"""Formats that are also run without Python, by the C++ runner."""
IN_CPP = "in C++"
"""Said behind a format's name in the verdicts of the C++ runner."""

LATENCY, THROUGHPUT = "latency", "throughput"
"""What a format can be recommended for."""

LOST_CONNECTION = "LostConnection"
"""A rank's failure message starts with this when all it knows is that another rank went away."""

LOSSES = ("cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits")
"""Well-known losses: functions of `torch.nn.functional`, called as loss(outputs, targets)."""

OPTIMIZERS: Mapping[str, str] = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}
"""Well-known optimizers: classes of `torch.optim`."""


SCHEDULES = ("constant", "cosine", "linear", "warmup_cosine")
"""Well-known learning rate schedules, advanced every optimizer step: flat, half a cosine to 0, a line to 0, and the
cosine with a warm-up."""


def read_with(artifact: str, names: Collection[str]) -> list[str]:
    """The files that are read where an artifact is loaded: itself, and its EXTERNAL_DATA where `names` has it."""
    return [name for name in (artifact, artifact + EXTERNAL_DATA) if name == artifact or name in names]


class Message:
    """A dataclass that crosses a process boundary as JSON."""

    def write(self, path: Path, *, durably: bool = False) -> None:
        """Write atomically: a reader sees the whole message or none.

        durably: also after a power cut. What lies in the work folder of a stage is synced with it when the stage is
        complete, and thrown away when it is not.
        """
        content = json.dumps(dataclasses.asdict(self), indent=1).encode()  # type: ignore[call-overload]
        if durably:
            write_durably(path, content)
            return
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote. Raises TypeError for missing or unknown fields, ValueError for what is no JSON."""
        return cls.decoded(path.read_bytes())

    @classmethod
    def decoded(cls, content: bytes) -> Self:
        """The same of a file's content."""
        decoded: Self = decode(cls, json.loads(content))
        return decoded


def decode(kind: Any, value: Any, *, lenient: bool = False) -> Any:
    """Rebuild a (nested) dataclass from what `dataclasses.asdict` made of it.

    Args:
        kind: The dataclass, or the type of a field.
        value: Plain values, as JSON gives them.
        lenient: Leave unknown fields out, as of a file that another version wrote, or somebody else: numbers, texts and
            lists have to be some.

    Raises:
        TypeError: A field is missing that has no default, or is unknown. Both sides of a request are one version of one
            package, so there a mismatch is a bug, not something to guess about.
        AttributeError: A mapping is none.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(Any, kind))
        fields: dict[str, Any] = {
            name: decode(hints.get(name, Any), item, lenient=lenient)
            for name, item in value.items()
            if name in hints or not lenient
        }
        return kind(**fields)  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in arguments if option is not type(None)]
        # `str | Reference`: only a dataclass was turned into a mapping.
        fits = [option for option in options if dataclasses.is_dataclass(option) == isinstance(value, dict)]
        if len(fits) > 1:
            # A number or a text.
            return value
        return decode((fits or options)[0], value, lenient=lenient)
    if origin in (tuple, list, Sequence) or getattr(origin, "__name__", "") == "Sequence":
        if lenient and not isinstance(value, list | tuple):
            raise TypeError(f"expected a list, got {type(value).__name__}")
        return tuple(decode(arguments[0], item, lenient=lenient) for item in value)
    if origin is dict or getattr(origin, "__name__", "") == "Mapping":
        return {key: decode(arguments[1], item, lenient=lenient) for key, item in value.items()}
    if lenient and kind in _PLAIN and not isinstance(value, _PLAIN[kind]):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """Types of the fields of a dataclass: to find them takes longer than all else."""
    return typing.get_type_hints(kind)


_PLAIN: Mapping[Any, tuple[type, ...]] = {int: (int, float), float: (int, float), str: (str,), bool: (bool,)}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A thing in user code."""

    target: str
    """`module:attribute`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments it is called with."""
    where: str
    """The job key that named it, for messages: `model.factory`."""


@dataclass(frozen=True, kw_only=True)
class CustomMetric:
    """A metric in user code, called once with all outputs and targets of the validation set."""

    name: str
    reference: Reference
    """A callable metric(outputs, target) -> number."""
    better: Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Project(Message):
    """The user code that a job trains. Everything a process needs to rebuild model and data."""

    name: str
    folder: str
    """Absolute folder put first on the import path of worker processes."""
    model: Reference
    data: Reference
    collate: Reference | None = None
    """A callable collate(items) -> (inputs, target); torch's own when None."""
    sampler: Reference | None = None
    """A callable sampler(dataset) -> torch Sampler, or one weight a sample; all samples, shuffled, when None."""
    sharded: bool = False
    """Whether streams divide themselves among the ranks; else the ranks take turns through them."""
    group: Reference | None = None
    """A callable group(item) -> what an item of the dataset belongs to; None where samples are independent."""
    loss: str | Reference
    """A name in LOSSES or a reference to a callable loss(outputs, targets) -> scalar tensor."""
    metrics: Sequence[str]
    """Names in METRICS."""
    custom_metrics: Sequence[CustomMetric] = ()
    snapshot: str = ""
    """Absolute folder of verified data that the data factory is given; empty when the job has no snapshot."""
    coupled: bool = False
    """Whether answers may depend on the other samples of a batch: gates are then measured one sample at a time."""
    env: Sequence[str] = ()
    """Names of environment variables that the user's code is given; their values are in no message."""
    extras: Reference | None = None
    """A callable extras(folder) that writes files for whoever serves the model; None where there is none."""
    serving: Reference | None = None
    """A callable serving(model) -> the module that is exported in place of the trained model; None for the model."""
    raw: Reference | None = None
    """What gives the same samples as `data` with the inputs that `serving` takes; None where these are `data`'s own."""
    for_live: Reference | None = None
    """What gives the validation samples as a live release takes them, of the folder of its files; None where these are
    the candidate's."""
    labels: Sequence[str] = ()
    """What the columns of the first output are called, in their order; empty where the job does not say."""


@dataclass(frozen=True, kw_only=True)
class Entrypoint:
    """A loop of the user's own, in place of the built-in one."""

    function: Reference
    """Called in every rank as function(context, **args); returns the trained model."""
    job: Mapping[str, Any]
    """The whole job as plain values, for context.job."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with options of their own."""

    names: Sequence[str]
    """Patterns of their names."""
    options: Mapping[str, Any]
    """As the optimizer calls them: lr, weight_decay, …"""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. With an entrypoint, what the built-in loop alone reads has no meaning."""

    entrypoint: Entrypoint | None
    processes: int
    """World size: one process a rank."""
    epochs: int
    """0 with an entrypoint."""
    steps_per_epoch: int | None
    """Optimizer steps of an epoch of an iterable dataset without a length."""
    batch_size: int
    """Samples per optimizer step over all processes."""
    seed: int
    optimizer: str | Reference
    learning_rate: float
    threads: int
    """torch intra-op threads of each rank."""
    data_workers: int
    """DataLoader worker processes of each rank."""
    schedule: str | Reference
    """A name in SCHEDULES or a reference to factory(optimizer, total_steps=…)."""
    warmup: float = 0.0
    """Steps in which the rate of a well-known schedule rises to its full height; below 1, their share of all steps."""
    accumulate: int
    """Forward and backward passes an optimizer step is made of."""
    clip_norm: float | None
    """Largest L2 norm of the gradients, None for no limit."""
    early_stopping: int | None
    """Epochs without a better watched number after which training stops, None for never."""
    weights: Literal["last", "best"]
    """Of which epoch they ship: the last, or the one whose watched number is best."""
    freeze: Sequence[str] = ()
    """Patterns of names of parameters that are not trained."""
    drop_last: bool = False
    """Whether an epoch leaves out samples that do not fill an optimizer step's batch."""
    groups: Sequence[ParameterGroup] = ()
    """Of several that say the same of a parameter the first one counts."""
    watched: str
    """The key of the history that early stopping and `best` go by: `validation_loss`, `validation_accuracy`."""
    watched_better: Literal["higher", "lower"]
    ema: float | None
    """Decay of the moving average of the weights, which is validated and ships; None for the weights themselves."""
    checkpoint_seconds: float
    """About how far apart checkpoints are."""
    checkpoint_steps: int | None
    """Optimizer steps between checkpoints, instead of a time."""
    checkpoint_keep: int
    """How many complete checkpoints stay."""
    restarts: int
    """Launches in a row, after the first, that may die without a new checkpoint before the run gives up."""
    hang_seconds: float
    """A rank that is silent for longer is killed and handled as dead."""
    build_seconds: float = 1800.0
    """The same while model and data are made, and while the rank computes in one call that holds the interpreter."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto`: a CUDA device for each rank where there is one, else the CPU."""
    backend: Literal["gloo", "nccl"] | None
    """Of the exchange between ranks; None for what the device is made for."""
    strategy: Literal["ddp", "fsdp"]
    comm_hook: Literal["fp16", "bf16"] | None
    """Precision in which DDP exchanges gradients; None for their own."""
    find_unused_parameters: bool | None = None
    """Whether DDP looks for parameters that a step does not use; None to find out whether it has to."""
    precision: Literal["float32", "bf16", "fp16"]
    """Of autocast in the forward pass and the loss; weights stay in their own."""
    fused: bool
    """The optimizer's fused kernels."""
    channels_last: bool
    """Images and convolution weights in NHWC order."""
    compile: bool
    """torch.compile around the training step's model."""
    cudnn_benchmark: bool
    collective_seconds: float
    """A collective operation that takes longer is a lost connection."""


@dataclass(frozen=True, kw_only=True)
class DynamicDim:
    """A dimension of the inputs whose size may change from call to call."""

    name: str
    min: int
    """Smallest size."""
    max: int | None
    """Largest size; None for no limit."""
    axes: Mapping[str, Sequence[int]]
    """Where it is: input name to axes, from 0."""


@dataclass(frozen=True, kw_only=True)
class CheckRequest(Message):
    """Ask whether everything that the job refers to can be built, and tried once."""

    project: Project
    train: TrainSettings
    ranks_here: int
    """Ranks that will run on this machine; 0 when it trains on others."""
    dynamic: Sequence[DynamicDim] = ()
    """Declared dimensions beside the batch."""
    max_batch: int | None = None
    """Largest batch; None for no limit."""
    formats: Sequence[str] = ()
    """That the release must have: what one of them cannot hold is refused."""
    glance: bool = False
    """Whether to look for validation samples that are training samples."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Facts about the job, measured by building it."""

    parameters: int
    """Number of trainable scalar parameters."""
    parameter_bytes: int
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    target: TensorSpec
    dims: Sequence[DynamicDim]
    """The batch and the declared dimensions."""
    train_samples: int | None
    """None for a stream that does not say."""
    validation_samples: int | None
    loss: float | None
    """Loss of the untrained model on one batch; None with an entrypoint, which has its own."""
    notes: Sequence[str] = ()
    """What a person should know."""
    shared: Sequence[int] = (0, 0)
    """Validation samples that are training samples, of how many that were looked at; nobody looks where the data has
    checks, which look at all."""
    independence: str = ""
    """Whether answers depend on the other samples of a batch, in words."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Message):
    """Ask for trained weights."""

    project: Project
    train: TrainSettings
    folder: str
    """Absolute output folder, which holds nothing at the start but this request."""
    checkpoints: str
    """Absolute folder of checkpoints, which outlives attempts; training goes on from the newest sound one."""
    start: str = ""
    """Absolute path of the weights that training starts from; empty for the model as its factory makes it."""
    start_sha256: str = ""
    """Hexadecimal; what these weights must have when a rank loads them."""
    formats: Sequence[str] = ()
    """That the release must have: what one of them cannot hold is refused before the first step."""
    dynamic: Sequence[DynamicDim] = ()
    """Dimensions beside the batch: validation batches may differ there."""
    protocol: int = PROTOCOL
    """Of whoever asks: a machine of a launcher may have another version of this package."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of one split, each sample counted once."""

    samples: int
    fingerprint: str
    """Order-independent hash of every sample as data.factory gives it."""


@dataclass(frozen=True, kw_only=True)
class OpenedFile:
    """A file that the user's code read."""

    path: str
    """Absolute."""
    identity: Sequence[int] = ()
    """Inode, size, times of modification and of change in nanoseconds, when it was opened; empty when it was looked for
    and not there."""
    native: bool = False
    """It was opened while code was built, below Python, so perhaps by another process."""


@dataclass(frozen=True, kw_only=True)
class Launches(Message):
    """What a run has used up of `train.restarts`, kept beside its checkpoints: one budget, whoever launches again."""

    deaths: int = 0
    """Launches in a row that ended without a result and without a new checkpoint."""
    checkpoint: str = ""
    """The newest one when the last of them ended."""
    place: str = ""
    """Of the failure that ended it."""
    repeated: bool = False
    """Whether the one before it ended at the same place."""

    @classmethod
    def so_far(cls, checkpoints: Path) -> Self:
        """What the folder of checkpoints says; nothing is used up in a new one."""
        path = checkpoints / LAUNCHES
        try:
            return cls.read(path)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError) as error:
            set_aside(path, f"it cannot be read ({error}), and launches are counted anew")
            return cls()

    def died(self, checkpoints: Path, place: str) -> Self:
        """With one more launch that ended without a result. place: of its failure."""
        newest = _newest_checkpoint(checkpoints)
        fruitless = newest == self.checkpoint
        return dataclasses.replace(
            self,
            deaths=self.deaths + 1 if fruitless else 1,
            checkpoint=newest,
            place=place,
            repeated=fruitless and bool(place) and place == self.place,
        )

    def keep(self, checkpoints: Path) -> None:
        """For whoever launches next."""
        make_folders(checkpoints)
        # A training may be what cuts the power.
        self.write(checkpoints / LAUNCHES, durably=True)

    def end(self, failure: Failure, restarts: int) -> Failure | None:
        """What the run ends with; None when it may launch again.

        failure: of the launch that was counted last; restarts: of the job.
        """
        if failure.kind == "user" and not failure.passing:
            return failure
        if self.repeated:
            again = f"{failure.message} (twice, {failure.place.partition(' < ')[0]}, {situations.COMES_BACK})"
            return dataclasses.replace(failure, kind="user", message=again, traceback="")
        if self.deaths > restarts:
            count = f"{self.deaths} launches" if self.deaths > 1 else "a launch"
            said = f"{failure.message}; {count} without a new checkpoint is what train.restarts: {restarts} allows"
            return dataclasses.replace(failure, message=said, spent=True)
        return None


def _newest_checkpoint(folder: Path) -> str:
    """Its name, which says its step: one that is written again is no progress."""
    return max((path.parent.name for path in folder.glob(f"step-????????/{CHECKPOINT}")), default="")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training left in its folder, and how it went."""

    weights: str
    history: Sequence[Mapping[str, float]]
    """One mapping an epoch: epoch, train_loss, validation_loss, validation_<metric>, samples_per_second,
    seconds, time (unix seconds). Of a custom loop one a report: step, time and what it reported."""
    train_samples: int
    validation_samples: int
    data_fingerprint: str
    """Order-independent hash of every training sample as it was fed to the model in the first epoch."""
    environment: Mapping[str, str]
    """Versions and thread counts that can change the bits."""
    notes: Sequence[str]
    """What a person should know: resumed from where, with which doubts."""
    cpu_seconds: float = 0.0
    """Of all ranks and what they started, in the launch that ended well."""
    read: Mapping[str, Reading] = field(default_factory=dict)
    """Split to what all ranks together have read of it: of the training data in the first epoch, of the validation data
    when it was first evaluated. A custom loop's own reading is not seen; there it is the data once more, after it."""
    ignored: Sequence[int] = ()
    """Labels among the model's classes that mean nothing to the loss, and so to accuracy."""
    opened: Sequence[OpenedFile] = ()
    """What model.factory, the references and their imports read in rank 0, without what is data."""
    listed: Sequence[str] = ()
    """Absolute folders of the project whose content they asked for."""
    shipped_epoch: int = 0
    """The epoch (from 1) whose weights these are, and whose row of the history is theirs; 0 where that is not known, as
    of a custom loop."""
    chosen_by: str = ""
    """The key of the history where that epoch is the best; empty when the last one ships whatever it is like."""

    @property
    def shipped(self) -> Mapping[str, float]:
        """The row of the history that is of these weights; the last one where that is not known."""
        return self.history[self.shipped_epoch - 1] if self.shipped_epoch else self.history[-1]


@dataclass(frozen=True, kw_only=True)
class InspectRequest(Message):
    """Ask what the data is like: read once, before training."""

    project: Project
    train: TrainSettings
    ranges: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Tensor to the smallest and largest value that it may have; None for no limit."""
    most: int | None = None
    """At most this many validation samples are drawn for the gates; None for all."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """The distribution of one number of each sample, or of all numbers of a tensor."""

    quantiles: Sequence[float]
    """Of finite values at 0, 1 … 100 %; values that occur, ascending. Empty when no value is finite."""
    values: int
    """How many values they stand for."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor of the batches, over all samples of a split."""

    dtype: str
    shapes: Sequence[Sequence[int]]
    """Of one sample, each that occurs, up to a few."""
    values: int
    missing: int
    """NaN and infinite values."""
    outside: int
    """Values outside the given range."""
    low: float | None
    """Smallest finite value; None when there is none."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What one split of the data is like."""

    samples: int
    fingerprint: str
    """Order-independent hash of every sample as data.factory gives it."""
    tensors: Mapping[str, TensorFacts]
    """By input name, and `target`."""
    columns: Mapping[str, Column]
    """By name: `x` or `x[3]`; of large tensors `x`, `x: mean of a sample`, `x: spread of a sample`."""
    labels: Mapping[str, int]
    """Samples by label; empty when the target is no label."""
    repeated: int
    """Samples whose inputs occurred before in this split."""
    varies: bool = False
    """Whether a sample that is read twice under different random states differs, as with random augmentation."""


@dataclass(frozen=True, kw_only=True)
class InspectResult(Message):
    """What both splits of the data are like."""

    train: SplitFacts
    validation: SplitFacts
    overlap: int
    """Validation samples whose inputs are those of a training sample, bit by bit."""
    seconds: float
    """What reading took."""
    drawn: Sequence[int] | None = None
    """Places of the validation samples that gates look at, ascending; None for all of them."""
    classes: Sequence[str] = ()
    """Names of the classes in the order of their labels, where the training data has them as its `classes`."""
    groups: int = 0
    """Groups that the validation samples come in, by the job's `data.group`; 0 where it names none."""
    shared_groups: int = 0
    """Those of them that training samples are of too."""


@dataclass(frozen=True, kw_only=True)
class RereadRequest(Message):
    """Ask whether a split of the data is the same each time that it is read, by one process without workers."""

    project: Project
    train: TrainSettings
    split: Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class RereadResult:
    """A split that was read twice, sample after sample, under the random states that training gives its samples."""

    same: bool
    """Whether both times gave the same; if not, what is drawn at random is drawn anew each time."""
    read: Reading | None
    """What it was; None when it was not the same."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named tensor of a signature."""

    name: str
    dtype: str
    """Without the torch prefix: `float32`."""
    shape: Sequence[int | str]
    """A string is a dynamic dimension's name."""


def label_counts(shape: Sequence[int | str]) -> list[int]:
    """How many labels an output may have: one for each column, or two where one column tells yes from no.

    shape: `[batch, …]`, where a string is a dynamic dimension's name. Of more than two dimensions the columns are the
    second one, as losses of torch have it, or the last.
    """
    columns = shape[1:] or (1,)
    counts = {size for size in (columns[0], columns[-1]) if isinstance(size, int)}
    return sorted(counts | {2} if 1 in counts else counts)


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Message):
    """Ask for artifacts in several formats, and for what the model itself answers."""

    project: Project
    folder: str
    """Absolute output folder."""
    weights: str
    """Absolute path of the trained weights; empty for a trial with the model as its factory makes it."""
    formats: Sequence[str]
    """Keys of FORMAT_FILES."""
    auto: bool = False
    """Leave out, and explain, formats that cannot capture the model, instead of giving up."""
    batch: int
    """Batch size at which the model is captured."""
    seed: int
    validation_limit: int
    """At most this many validation samples are kept for the quality gate: the first, unless others are drawn."""
    drawn: Sequence[int] | None = None
    """Places of the validation samples to keep, ascending; None for all up to the limit."""
    parity_seconds: float | None = None
    """The model is asked about validation samples for so long, in the order that the seed draws; None for all."""
    ignored: Sequence[int] = ()
    """Labels among the model's classes that accuracy does not count."""
    dynamic: Sequence[DynamicDim] = ()
    """Declared dimensions beside the batch."""
    max_batch: int | None = None
    """Largest batch; None for no limit."""
    libraries: Sequence[str] = ()
    """Absolute paths of shared libraries with custom operators; they become part of the release."""
    int8: Sequence[str] = ()
    """Keys of INT8_FILES to try; those that cannot be made are left out."""
    calibration_samples: int = 256
    """Training samples that int8 ranges are taken from."""
    only: str | None = None
    """Make this one format, in this process and without reference data."""
    external_data: Literal["auto", "always"] = "auto"
    """Whether the weights of ONNX are in a file beside it however few there are."""


@dataclass(frozen=True, kw_only=True)
class Artifact(Message):
    """One format, captured."""

    file: str
    """File name in the folder."""
    method: str
    """How it was captured, in words for the report."""
    seconds: float
    notes: Sequence[str] = ()
    """What it computes otherwise than the model, on inputs that samples may not show."""

    @property
    def said(self) -> str:
        """How it was captured, and the notes."""
        return "; note: ".join([self.method, *self.notes])


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The artifacts, and the signature that they have in common."""

    artifacts: Mapping[str, Artifact]
    """By format."""
    left_out: Mapping[str, str]
    """Formats that `auto` tried in vain, and int8 variants that could not be made, and why."""
    libraries: Sequence[str]
    """File names of the libraries with custom operators."""
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    dims: Sequence[DynamicDim]
    """The dynamic dimensions that the shapes of inputs and outputs name: the batch, then the declared ones. The batch
    is 1, and none of them, where the project's samples are coupled."""
    reference: str
    """How the reference outputs were made, in words."""
    validation: Reading | None = None
    """The validation samples that gates look at."""
    weight_names: Mapping[str, str] | None = None
    """Name of a tensor in what was exported to its name in the trained model; None where they are the same."""
    touched: Sequence[str] = ()
    """Absolute files of the project that anybody opened, natively or not, while model.factory was called."""


@dataclass(frozen=True, kw_only=True)
class CppRequest(Message):
    """Ask for the C++ runner."""

    cache: str
    """Absolute folder that keeps runners, one for each torch."""


@dataclass(frozen=True, kw_only=True)
class CppResult:
    """The C++ runner, or why there is none."""

    runner: str
    """Absolute path of the program; empty when it cannot be built here."""
    reason: str = ""
    """Why not."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One fixed limit on a quality metric, or on one of SPEED_GATES."""

    name: str
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class Int8Limits:
    """What an int8 variant has to keep to. In the job file: `export.quantize`."""

    sqnr_db: float
    """Smallest ratio of signal to quantization noise, in decibels."""
    agreement: float
    """Smallest share of predictions that are the model's own."""
    flip_margin: float
    """How sure the model may have been of a prediction that differs, in units of its median margin."""
    metric_loss: float
    """Largest loss of a quality metric: of accuracy its difference, of an error a share of it."""
    speedup: float
    """How many times as fast as its float format it has to be, at batch 1 or at the largest that is measured."""


@dataclass(frozen=True, kw_only=True)
class Int8:
    """What came of one int8 variant."""

    reason: str = ""
    """Why it is not in the release; empty when it is."""
    sqnr_db: float = 0.0
    """Over the validation samples; infinite where nothing differs."""
    golden_sqnr_db: float = 0.0
    """Over the golden inputs, which a rehearsal asks again."""
    agreement: float | None = None
    """None where the model makes no predictions."""
    flip_margin: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    """Metric to how much worse it is than the model's own."""
    speedups: Mapping[str, float] = field(default_factory=dict)
    """Batch size to how many times as fast as its float format it is."""


@dataclass(frozen=True, kw_only=True)
class Artifacts(Message):
    """Artifacts in a folder of this machine; some requests want reference tensors beside them."""

    folder: str
    """Absolute."""
    formats: Mapping[str, str]
    """Format to file name."""
    libraries: Sequence[str] = ()
    """File names of libraries with custom operators, loaded before any artifact."""
    inputs: Sequence[TensorSpec]
    hashes: Mapping[str, str] = field(default_factory=dict)
    """File name to the hexadecimal SHA-256 that it must have where it is loaded; of a release, every file that is."""


@dataclass(frozen=True, kw_only=True)
class CleanRoom(Message):
    """What is asked where the user's code cannot be imported."""

    forbidden_modules: Sequence[str]
    """Top-level modules of user code, which the process must not be able to import."""
    forbidden_folder: str
    """Nor anything from here."""
    threads: int
    """Intra-op threads of every runtime."""


@dataclass(frozen=True, kw_only=True)
class ValidateRequest(Artifacts, CleanRoom):
    """Ask whether artifacts are the model. Beside them lie golden and validation tensors."""

    outputs: Sequence[TensorSpec]
    metrics: Sequence[str]
    gates: Sequence[Gate]
    not_finite: str = "contained"
    """What is asked of NaN and infinity: `contained`, `same` or `off`."""
    refusals: str = "known"
    """What is asked where the model refuses an input: `known`, `same` or `off`."""
    relative: bool = False
    """Whether outputs that are never negative are compared in units of each element too."""
    min_samples: int = 0
    """Fewer validation samples that the model was asked about are a failure, unless there are no more."""
    max_batch: int | None = None
    """Largest batch of the signature; None for no limit."""
    weights: str = ""
    """Absolute file of the trained weights, which artifacts that hold them by name must have bit by bit; empty where
    there is none."""
    weight_names: Mapping[str, str] | None = None
    """Name of a tensor in the artifacts to its name in that file; None where they are the same."""
    int8: Int8Limits | None = None
    """What is asked of int8 variants; None when there are none."""
    cpp: str = "off"
    """Whether artifacts are run without Python too: `when_possible`, `required` or `off`."""
    runner: str = ""
    """The C++ runner; empty where there is none."""
    no_runner: str = ""
    """Why there is none."""
    log: str = ""
    """Absolute folder for logs of processes that validation starts."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An artifact whose speed is measured."""

    name: str
    """`onnx`, or `live onnx`."""
    format: str
    """A key of FORMAT_FILES."""
    file: str
    """Absolute."""
    libraries: Sequence[str] = ()
    """Absolute paths of libraries with custom operators, loaded before it."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Absolute path to the hexadecimal SHA-256 that the file must have where it is loaded."""


@dataclass(frozen=True, kw_only=True)
class MeasureRequest(CleanRoom):
    """Ask how fast, large and quick to load artifacts are, side by side."""

    subjects: Sequence[Timed]
    golden: str
    """Absolute file of reference tensors, whose inputs are the ones to call with."""
    inputs: Sequence[TensorSpec]
    batches: Sequence[int]
    """Batch sizes, ascending; those beyond the largest of the reference tensors are left out."""
    serve: str
    """`auto`, the format that the release shall recommend, or `none`."""
    gates: Sequence[Gate]
    """Fixed limits on what is measured here."""
    speedup: float = 1.0
    """How many times as fast as its float format an int8 variant has to be."""
    loads: int = 1
    """Processes in which the time to load each is measured; their median counts."""
    dims: Sequence[DynamicDim] = ()
    """Declared dimensions beside the batch; memory is measured over their sizes."""
    max_batch: int | None = None
    """The largest batch that is declared; None for no limit."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Calls of one artifact at one batch size, in rounds that took turns with those of the others."""

    batch: int
    calls: int
    p50_ms: float
    """Wall clock of a call, median."""
    p99_ms: float
    """Its 99th percentile; of fewer than 100 calls the slowest."""
    thread_ms: float
    """CPU time of the calling thread in a call, in its quickest round: what an idle machine's clock would show."""
    cpu_ms: float
    """CPU time of all threads in a call, in its quickest round."""

    @property
    def samples_per_second(self) -> float:
        """By the median call."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One artifact in a process of its own."""

    format: str
    bytes: int
    """Size of the file."""
    load_ms: float | None = None
    """From the file to the first answer, the runtime being imported; the median of several processes."""
    memory_bytes: int | None = None
    """Largest resident memory until the end, less what the process had before it loaded the file."""
    memory_over: str = ""
    """What was asked before it was read, besides the batches of the speeds: sizes, in words."""
    speeds: Sequence[Speed] = ()
    """One a batch size, ascending."""
    problem: str = ""
    """Why there are no numbers."""

    def value(self, gate: str) -> float | None:
        """What a gate of SPEED_GATES looks at; None when it was not measured."""
        first = self.speeds[0] if self.speeds else None
        found: dict[str, float | None] = {
            "p50_ms": first.p50_ms if first else None,
            "p99_ms": first.p99_ms if first else None,
            "load_ms": self.load_ms,
            "size_mb": self.bytes / 1e6,
            "memory_mb": self.memory_bytes / 1e6 if self.memory_bytes is not None else None,
        }
        if gate not in found:
            raise ValueError(f"expected one of {', '.join(SPEED_GATES)}, got {gate!r}")
        return found[gate]


@dataclass(frozen=True, kw_only=True)
class MeasureResult(Message):
    """How fast, large and quick to load artifacts are, and which to serve with."""

    measured: Mapping[str, Measured]
    """By the subject's name."""
    serve: Mapping[str, str]
    """`latency` and `throughput` to the name of the subject to serve with; empty when nothing is recommended."""
    speedups: Mapping[str, Mapping[str, float]]
    """Int8 variant to batch size to how many times as fast as its float format it is."""
    too_slow: Mapping[str, str]
    """Int8 variants that are not fast enough, and how fast they are."""
    verdicts: Sequence[Verdict]
    """Of the fixed limits."""
    threads: int
    machine: str
    """Processor and how many of it this process may use."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One question on which an artifact is not the model."""

    format: str
    probe: str
    output: str
    """Empty when the artifact gave no outputs to compare."""
    note: str
    """What is wrong, with the worst element: index, expected, got."""
    ratio: float
    """How many times the limit; infinite when it is not a matter of rounding."""
    distribution: Sequence[str]
    """Elements by size of the difference, one line a decade; empty when there is nothing to count."""


ERROR_DECADES = tuple(range(-9, 3))
"""Powers of ten at which the bins of ErrorCounts begin."""


@dataclass(frozen=True, kw_only=True)
class ErrorCounts:
    """Elements of all outputs of one format on one kind of probe, by how far they are from the model's."""

    format: str
    probes: str
    """The kind: `batches`, `drawn`, `real samples`."""
    failed: bool
    """Whether any probe of this kind failed."""
    absolute: Sequence[int]
    """Equal ones, those below the first of ERROR_DECADES, one number a decade, and those where one is not finite."""
    relative: Sequence[int]
    """The same for differences in units of the output's root mean square."""


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """What one format answered on the held-out samples, beside what was right, counted."""

    format: str
    counts: Sequence[Sequence[int]]
    """Of classes: a row for each that was right, a column for each answer. Of numbers: a row for each bin of the
    distance of the answer from what was right, the most negative first, a column for each bin of what was right."""
    numbers: Sequence[float] = ()
    """The smallest and the largest that was right, and the largest distance; empty for classes."""


PARITY = "parity"
"""The gate that holds an artifact against the model that was trained."""
MIN_SAMPLES = "parity.min_samples"
"""The gate on how many held-out samples the model was asked about; its note says what to do."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One gate on one format, with its numbers."""

    format: str
    gate: str
    """`parity`, a metric's name, or one of SPEED_GATES."""
    case: str
    """What it was measured on: `batch 1`, `360 samples`."""
    measured: float | None
    """None when it could not be measured, which is a failure."""
    limit: str
    """The condition in words: `<= 8`."""
    passed: bool
    note: str = ""
    ran: bool = True
    """False when the check was not run because this machine or the model cannot; neither passed nor failed then."""


@dataclass(frozen=True, kw_only=True)
class ValidateResult(Message):
    """The verdicts of the clean room, and what they were made of."""

    verdicts: Sequence[Verdict]
    metrics: Mapping[str, Mapping[str, float]]
    """Format to metric to value."""
    reference: str
    """What parity was measured against, in words."""
    validation_samples: int
    """That metrics are of."""
    asked: int | None = None
    """Of these, the samples on which artifacts were held against the model, in the order that the seed draws; None
    where an older version validated, which asked about all."""
    mismatches: Sequence[Mismatch] = ()
    """Where parity failed, the worst first; empty when it passed."""
    int8: Mapping[str, Int8] = field(default_factory=dict)
    """Every int8 variant that was made, kept or not."""
    standard_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Format to metric to the standard error of its value, where it can be said."""
    speed: MeasureResult | None = None
    """None when the job asks for no measurement, or something failed before it."""
    errors: Sequence[ErrorCounts] = ()
    """How far all formats but int8 variants are from the model, on every kind of probe."""
    independence: str = ""
    """Whether the model's answers depend on the other samples of a batch, in words; empty where an older version
    exported it, which did not ask."""
    answers: AnswerCounts | None = None
    """Of one format, as the others answer alike; None where nothing is measured that tells, or classes are many."""

    @property
    def passed(self) -> bool:
        """Whether something was checked, and all of it passed."""
        ran = [verdict for verdict in self.verdicts if verdict.ran]
        return bool(ran) and all(verdict.passed for verdict in ran)


@dataclass(frozen=True, kw_only=True)
class LocateRequest(Message):
    """Ask where artifacts that failed parity leave the model."""

    project: Project
    folder: str
    """Absolute folder with artifacts and reference data."""
    weights: str
    formats: Mapping[str, str]
    """Format to file name."""
    inputs: Sequence[str]
    """Names in the order of the signature."""
    probes: Mapping[str, str]
    """Format to the probe to look at."""


@dataclass(frozen=True, kw_only=True)
class LocateResult:
    """Where artifacts leave the model."""

    where: Mapping[str, str]
    """Format to the place in words."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How sure one is that two releases differ: a paired bootstrap over the validation samples, or their groups."""

    resamples: int
    confidence: float
    """Part of the resampled differences that the interval holds: 0.95."""
    seed: int


def fewest_groups(confidence: float) -> int:
    """Groups of samples below which no interval over them is so sure: 6 for 0.95.

    The range of k independent draws holds the middle of where they come from with probability 1 − 2^(1−k).
    """
    return math.ceil(1 - math.log2(1 - confidence) - 1e-9)


def in_other_order(labels: Sequence[str], classes: Sequence[str], data: str) -> str:
    """In words, where labels are the classes of the data in another order; empty otherwise.

    Args:
        labels: `export.labels` of the job.
        classes: what the training data has as `classes`.
        data: `data.factory` of the job.
    """
    if list(labels) == list(classes) or sorted(labels) != sorted(classes):
        return ""
    place = next(place for place, label in enumerate(labels) if label != classes[place])
    return (
        f"export.labels has the `classes` of {data} in another order: column {place} is labelled {labels[place]!r}, "
        f"and label {place} of the data is {classes[place]!r}; unless the model itself changes their order, what it "
        "answers has the wrong labels: leave export.labels out, or write them in the order of the data's"
    )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What the improvement over the live release may be, were other validation samples drawn."""

    low: float
    high: float
    """Both positive when the candidate is better, whatever the metric's direction."""


@dataclass(frozen=True, kw_only=True)
class LiveInputsRequest(Message):
    """Ask for the validation samples as the live release takes them."""

    project: Project
    folder: str
    """Absolute output folder."""
    validation: str
    """Absolute file of the samples as the candidate takes them."""
    files: str
    """Absolute folder of the files that the live release ships."""
    own_files: str
    """The same of the candidate: prepared with these the samples are those of `validation`."""
    inputs: Sequence[TensorSpec]
    """Of the live release."""
    own_inputs: Sequence[TensorSpec]
    """Of the candidate."""
    batch: int
    """Samples that are collated at once."""


@dataclass(frozen=True, kw_only=True)
class LiveInputsResult:
    """What LIVE_VALIDATION holds."""

    samples: int
    changed: int
    """Of how many the live release takes other inputs than the candidate."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(Artifacts):
    """Ask for the metrics in user code, of artifacts that passed the clean room. Beside them lie validation tensors."""

    project: Project
    batch: int
    """Samples of one call."""
    gates: Sequence[Gate]
    """Those on custom metrics."""
    threads: int
    live: Artifacts | None = None
    """What is scored beside it, on the same samples."""
    live_validation: str = ""
    """Absolute file of these samples as `live` takes them; empty where they are the candidate's."""
    resampling: Resampling | None = None
    """Asked for when the difference is to be tested against chance."""
    errors: bool = False
    """Whether the standard error of each metric is wanted."""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Metrics in user code of each format, and of the live release's."""

    metrics: Mapping[str, Mapping[str, float]]
    """Format to metric to value."""
    verdicts: Sequence[Verdict]
    live: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same of the live release; empty when it could not be scored."""
    standard_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Format to metric to the standard error of its value, where it was wanted and can be said."""
    live_problem: str = ""
    """Why not."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Metric to what the improvement may be."""


@dataclass(frozen=True, kw_only=True)
class RehearsedRelease(Artifacts):
    """A release on this disk, as it came from the bucket."""

    files: Mapping[str, str]
    """Path in the folder to hexadecimal SHA-256, as its manifest says."""
    outputs: Sequence[TensorSpec]
    dims: Sequence[DynamicDim] = ()
    """Ranges of the dynamic dimensions of its inputs, as its manifest says."""
    rows_together: int = 1
    """How many rows of different requests servers compute together at most, as its manifest says; 1 for none."""
    serve: Mapping[str, str] = field(default_factory=dict)
    """`latency` and `throughput` to the format that it recommends; empty when it recommends none."""


@dataclass(frozen=True, kw_only=True)
class RehearseRequest(CleanRoom):
    """Ask whether files that came back from the bucket still are what was validated, and better than what is live."""

    candidate: RehearsedRelease
    live: RehearsedRelease | None
    """What the candidate is held against; None when nothing is live."""
    validation: str | None
    """File of held-out samples; None when there are none, as in the promotion of an old release."""
    live_validation: str = ""
    """File of the same samples as the live release takes them; empty where they are the candidate's."""
    moved: str | None
    """File of probes; only the model's answers after rounding everything are read, which widen limits."""
    metrics: Sequence[str]
    """Names in METRICS."""
    sqnr_db: float = 0.0
    """What int8 variants of the candidate have to reach on the golden inputs."""
    seed: int = 0
    """Of what is drawn to ask whether samples see one another; whoever tries a release draws it."""
    resampling: Resampling | None = None
    """None when there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class RehearseResult(Message):
    """The last verdicts, and the two releases side by side."""

    verdicts: Sequence[Verdict]
    """Of the candidate: what it gives on the golden inputs."""
    candidate: Mapping[str, Mapping[str, float]]
    """Format to metric to value."""
    live: Mapping[str, Mapping[str, float]]
    """The same of the live release on the same samples; empty when it could not be scored. A label counts for both when
    it is a class of either: a model that has no such class is wrong there."""
    live_own: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same on the labels that are the live release's own classes, as its own record has it; empty where that is
    no other number."""
    live_problem: str
    """Why not; empty when it was, or when nothing is live."""
    samples: int
    candidate_speed: Mapping[str, float] = field(default_factory=dict)
    """Gate of SPEED_GATES to value; only those with a `times_live`, measured beside the live release."""
    live_speed: Mapping[str, float] = field(default_factory=dict)
    """The same of the live release."""
    speed_problem: str = ""
    """Why these could not be measured."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Metric to what the improvement over the live release may be; none where there are too few groups."""
    live_inputs: str = ""
    """In words, whether the live release was asked about inputs that its own files prepare; empty where it is no
    question."""
    groups: int = 0
    """How many groups the samples come in, by the job's `data.group`; 0 where they are taken to be independent."""
    live_spread: Mapping[str, float] = field(default_factory=dict)
    """Metric to the standard deviation of one sample's value, of the live release's format that is worst at it."""
    constant: Mapping[str, float] = field(default_factory=dict)
    """Metric to what the best answer that is always the same scores on these samples."""

    @property
    def passed(self) -> bool:
        """Whether something was checked, and all of it passed."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)


@dataclass(frozen=True, kw_only=True)
class ShownWarning(Message):
    """What Python's warnings module showed, in a stage's log."""

    text: str
    category: str
    """Its class: `DeprecationWarning`."""
    where: str
    """The file and line that it points at: `torch/optim/lr_scheduler.py:143`."""
    package: str
    """The module that says it, which is not always where it points; empty for the user's own code."""
    version: str
    """Of the package; empty where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Failure(Message):
    """Why a worker stopped."""

    kind: Literal["user", "worker"]
    """`user`: their code, data or configuration; a retry cannot help. `worker`: the machine or ours."""
    message: str
    """One message for a person: what, where, expected, got, what to do."""
    traceback: str = ""
    """Frames from the user's code on; empty when the message says it all."""
    rank: int | None = None
    output: Sequence[str] = ()
    """The last lines that this rank printed."""
    place: str = ""
    """The exception's class and where it was raised, which is the same when the same goes wrong again; empty for what
    the machine does (memory, disks, connections) and for a rank that said nothing."""
    passing: bool = False
    """Of memory, a disk or a connection, also in their code: it may not happen again."""
    spent: bool = False
    """Another launch might have helped, and the run has none left."""


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """The worker's answer: exactly one of the two is set."""

    result: Mapping[str, Any] | None = None
    failure: Failure | None = None
