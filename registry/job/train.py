"""The part of a job file that says how a model is trained: `train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from torchworker.contract import SPEED_GATES, TORCHMETRICS
from train_and_ship.registry.job.base import Factory, Part, Target
from train_and_ship.registry.job.launcher import LOCAL, LauncherOption, check_train

Loss = Literal["cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"]
Optimizer = Literal["adam", "adamw", "sgd", "rmsprop"]
Schedule = Literal["constant", "cosine", "linear", "warmup_cosine"]
Metric = Literal["accuracy", "mean_squared_error", "mean_absolute_error"]
TorchMetric = Literal[
    "f1_score", "precision", "recall", "specificity", "auroc", "average_precision", "matthews_corrcoef", "cohen_kappa",
    "jaccard_index", "r2_score", "pearson_corrcoef", "spearman_corrcoef", "mean_absolute_percentage_error",
]  # fmt: skip
"""Of torchmetrics, by its names."""


TORCHMETRIC = "torchworker.project.named_metrics:measure"
MOST_METRICS = 1_000
"""A move records one verdict for each of at most so many."""
WARMUP = 0.05
"""Share of the steps, where `warmup_cosine` does not say it."""
FOR_ANY_LOOP = frozenset({
    "entrypoint", "args", "processes", "seed", "metrics", "threads", "checkpoint", "restarts", "hang_seconds",
    "build_seconds", "collective_seconds", "device", "backend", "launcher",
})  # fmt: skip
"""What also holds for a custom loop; the other keys are read by the built-in one."""


def _is_steps_or_share(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError("a whole number of optimizer steps, or a share of all of them, such as 0.05")
    return value


class CustomMetric(Factory):
    """A metric in your code: metric(outputs, target) over the whole validation set returns one number."""

    better: Literal["higher", "lower"]
    """which direction is an improvement"""
    name: str | None = Field(None, pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """in gates and curves; the attribute's name when absent"""

    @property
    def label(self) -> str:
        """What the metric is called: its `name`, else the name of what is referred to."""
        return self.name or self.factory.rpartition(":")[2].rpartition(".")[2].lower()


class Checkpoint(Part):
    """When training saves its state. A run that dies goes on from its newest sound checkpoint."""

    seconds: float = Field(300, gt=0)
    """about how far apart checkpoints are"""
    steps: int | None = Field(None, ge=1)
    """optimizer steps between checkpoints, instead of a time"""
    keep: int = Field(2, ge=1)
    """complete checkpoints that stay"""


class Group(Part):
    """Parameters that the optimizer treats otherwise than the rest."""

    names: tuple[Annotated[str, Field(min_length=1)], ...] = Field(strict=False, min_length=1)
    """patterns of their names, such as ["*.bias", "*norm*"]; see training.md"""
    learning_rate: float | None = Field(None, gt=0)
    """in place of train.learning_rate; the schedule scales it alike"""
    weight_decay: float | None = Field(None, ge=0)
    """as the optimizer has it"""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """other options of the optimizer, such as {betas: [0.9, 0.98]}"""

    @property
    def options(self) -> dict[str, Any]:
        """By the names that torch has for them."""
        given = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        return {**self.args, **{name: value for name, value in given.items() if value is not None}}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        named = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": "names"}
        for name in sorted(named.keys() & self.args.keys()):
            raise ValueError(f"no {name} in args: it has a key of its own, {named[name]}")
        if not self.options:
            raise ValueError("learning_rate, weight_decay or args: what is otherwise for these parameters")
        return self


class Train(Part):
    """How the model is trained."""

    came_later: ClassVar[frozenset[str]] = frozenset({
        "weights", "ema", "find_unused_parameters", "build_seconds", "freeze", "groups", "warmup",
        "drop_last",
    })  # fmt: skip
    most: ClassVar[Mapping[str, int]] = {"metrics": MOST_METRICS}

    epochs: int | None = Field(None, ge=1)
    """passes over the training data; required without entrypoint"""
    entrypoint: Target | None = None
    """a loop of your own, main(context, **args), in place of the built-in one; see custom-loops.md"""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """keyword arguments of the entrypoint"""
    steps_per_epoch: int | None = Field(None, ge=1)
    """optimizer steps of an epoch, for an iterable dataset that has no len()"""
    processes: int = Field(1, ge=1, le=1024)
    """ranks over all machines"""
    batch_size: int = Field(64, ge=1)
    """samples per optimizer step over all processes"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of torch, NumPy and Python: initialisation, shuffling, dropout"""
    loss: Loss | Factory = "cross_entropy"
    """a torch.nn.functional loss, or loss(outputs, target)"""
    optimizer: Optimizer | Factory = "adam"
    """a torch.optim class, or factory(parameters, lr=…), which may ask for named_parameters or the model instead"""
    learning_rate: float = Field(1e-3, gt=0)
    """given to the optimizer as lr"""
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """patterns of names of parameters that are not trained, such as [backbone.*]; see training.md"""
    groups: tuple[Group, ...] = Field((), strict=False)
    """parameters with options of their own; of several that say the same of a parameter the first one counts"""
    metrics: tuple[Metric | TorchMetric | CustomMetric, ...] | None = Field(None, strict=False)
    """measured on the validation data; the loss decides when absent. Those from f1_score on are torchmetrics' and need
    the extra metrics; see training.md"""
    threads: int | None = Field(None, ge=1)
    """torch threads of each process; cores ÷ processes when absent, so that machines differ. Other threads give
    other last bits; a run that goes on keeps those that it began with"""
    data_workers: int = Field(0, ge=0)
    """DataLoader worker processes of each rank"""
    drop_last: bool = False
    """leave out of each epoch the samples that do not fill a batch of batch_size"""
    schedule: Schedule | Factory = "constant"
    """learning rate by optimizer step: flat, to 0 by cosine or by a line, with a warm-up before the cosine, or a
    reference"""
    warmup: Annotated[float, AfterValidator(_is_steps_or_share)] | None = Field(None, ge=0)
    """the first optimizer steps, in which the rate of a schedule by name rises in a line: their number, or a share of
    all steps such as 0.05; none when absent, and 0.05 with warmup_cosine"""
    accumulate: int = Field(1, ge=1)
    """forward and backward passes that make one optimizer step"""
    clip_norm: float | None = Field(None, gt=0)
    """largest L2 norm of the gradients"""
    early_stopping: int | None = Field(None, ge=1)
    """epochs without a better release.metric (without metrics: validation loss) after which training stops"""
    weights: Literal["last", "best"] | None = None
    """of which epoch the weights ship; when absent, best with early_stopping and else last; see which-epoch.md"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of a moving average of the weights over the steps, such as 0.999; it is validated and ships"""
    checkpoint: Checkpoint = Checkpoint()
    restarts: int = Field(3, ge=0)
    """how often ranks are launched again, whatever ended them, until there is a new checkpoint, which renews the
    number: at most 1 + restarts × (1 + new checkpoints) launches of a run"""
    hang_seconds: float = Field(30, gt=0)
    """a rank that is silent for longer is handled as dead"""
    build_seconds: float = Field(1800, gt=0)
    """the same while model and data are made, and while a rank computes in one call that holds the interpreter"""
    collective_seconds: float = Field(600, gt=0)
    """an exchange between ranks that takes longer is a lost connection"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each process where the machine has any, else the CPU"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """each process has the whole model, or a part of it (FSDP2)"""
    backend: Literal["gloo", "nccl"] | None = None
    """of the exchange between processes; nccl on GPUs and gloo on CPUs when absent"""
    comm_hook: Literal["fp16", "bf16"] | None = None
    """exchange ddp's gradients in half precision; bf16 needs nccl"""
    find_unused_parameters: bool | None = None
    """ddp looks in each step for parameters that take no part in it, as with LayerDrop; when absent, it does so where
    forward decides something by chance or by values, and the other answer may use other ones"""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """autocast in training; weights and validation stay in float32"""
    fused: bool = False
    """fused kernels of adam, adamw or sgd"""
    channels_last: bool = False
    """NHWC order for images and convolutions"""
    compile: bool = False
    """torch.compile; needs a C++ compiler"""
    cudnn_benchmark: bool = False
    """let cuDNN time its algorithms; for inputs of one shape, on GPUs"""

    launcher: LauncherOption = LOCAL
    """where ranks run: local, or torchrun, slurm or kubernetes with options; see launchers.md"""

    @model_validator(mode="after")
    def _fits_the_machines(self) -> Self:
        check_train(self.launcher, self.processes, self.restarts)
        return self

    @model_validator(mode="after")
    def _one_loop(self) -> Self:
        if self.entrypoint is None:
            if self.epochs is None:
                raise ValueError("epochs, the passes over the training data, or entrypoint, a loop of your own")
            if self.args:
                raise ValueError("args only with entrypoint, the loop of your own that they are given to")
        elif ignored := sorted(self.model_fields_set - FOR_ANY_LOOP):
            raise ValueError(
                f"no {' or '.join(ignored)} with entrypoint: only the built-in loop reads "
                f"{'it' if len(ignored) == 1 else 'them'}; give your loop what it needs as args"
            )
        return self

    def recorded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Without the keys that the chosen loop does not read."""
        values = super().recorded(values)
        if self.entrypoint is None:
            return {name: value for name, value in values.items() if name not in ("entrypoint", "args")}
        return {name: value for name, value in values.items() if name in FOR_ANY_LOOP}

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.entrypoint is None and self.batch_size % (self.processes * self.accumulate):
            passes = f" × accumulate {self.accumulate}" if self.accumulate > 1 else ""
            raise ValueError(
                f"a batch_size that the processes can share evenly: {self.batch_size} is not a multiple of "
                f"{self.processes}{passes}"
            )
        return self

    @property
    def warms_up(self) -> float:
        """Optimizer steps with a rising learning rate, or below 1 their share."""
        return self.warmup if self.warmup is not None else WARMUP if self.schedule == "warmup_cosine" else 0

    @property
    def ships(self) -> Literal["last", "best"]:
        """Of which epoch the weights ship."""
        return self.weights or ("best" if self.early_stopping is not None else "last")

    @property
    def custom_metrics(self) -> tuple[CustomMetric, ...]:
        """Metrics that are functions: in the user's code, and those of torchmetrics."""
        return tuple(
            CustomMetric(factory=TORCHMETRIC, args={"name": item}, better=TORCHMETRICS[item], name=item)
            if isinstance(item, str)
            else item
            for item in self.metrics or ()
            if not isinstance(item, str) or item in TORCHMETRICS
        )

    @property
    def torchmetrics(self) -> tuple[str, ...]:
        """Names of the metrics that need the library."""
        return tuple(item for item in self.metrics or () if isinstance(item, str) and item in TORCHMETRICS)

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup is not None and not isinstance(self.schedule, str):
            raise ValueError(f"no warmup with a schedule of your own, {self.schedule.factory}, which has one or not")
        if self.warmup == 0 and self.schedule == "warmup_cosine":
            raise ValueError("schedule: cosine with warmup: 0")
        return self

    @model_validator(mode="after")
    def _switches_fit(self) -> Self:
        if self.fused and (not isinstance(self.optimizer, str) or self.optimizer == "rmsprop"):
            raise ValueError("fused: false for this optimizer; a factory takes it in its args")
        if self.strategy == "fsdp":
            self._require_fsdp()
        if self.device == "cpu" and self.backend == "nccl":
            raise ValueError("backend: gloo with device: cpu, because nccl exchanges between GPUs")
        return self

    def _require_fsdp(self) -> None:
        if self.processes < 2:
            raise ValueError("at least 2 processes with strategy: fsdp, which spreads the model over them")
        if self.comm_hook is not None:
            raise ValueError("no comm_hook with strategy: fsdp; it is ddp's")
        if self.precision == "fp16":
            raise ValueError("precision: bf16 or float32 with strategy: fsdp")
        if self.compile:
            raise ValueError("compile: false with strategy: fsdp")
        if self.find_unused_parameters:
            raise ValueError("no find_unused_parameters with strategy: fsdp; it is ddp's")

    @model_validator(mode="after")
    def _metrics_have_names(self) -> Self:
        names = [item if isinstance(item, str) else item.label for item in self.metrics or ()]
        taken = [name for name in ("loss", "learning_rate", *SPEED_GATES) if name in names]
        twice = [name for name, times in Counter(names).items() if times > 1]
        if taken or twice:
            raise ValueError(f"metrics with names of their own: give {(taken or twice)[0]} another `name`")
        return self
