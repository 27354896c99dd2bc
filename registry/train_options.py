"""The part of a job file that says how a model is trained: `train`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from registry.launcher_options import LOCAL, LauncherOption, check_train
from registry.parts import Factory, Part

Loss = Literal["cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"]
Optimizer = Literal["adam", "adamw", "sgd", "rmsprop"]
Schedule = Literal["constant", "cosine", "linear"]
Metric = Literal["accuracy", "mean_squared_error", "mean_absolute_error"]


class Checkpoint(Part):
    """When training saves its state. A run that dies goes on from its newest sound checkpoint."""

    seconds: float = Field(300, gt=0, description="about how far apart checkpoints are")
    steps: int | None = Field(None, ge=1, description="optimizer steps between checkpoints, instead of a time")
    keep: int = Field(2, ge=1, description="complete checkpoints that stay")


class Train(Part):
    """How the model is trained."""

    epochs: int = Field(ge=1, description="passes over the training data")
    processes: int = Field(1, ge=1, le=1024, description="ranks over all machines, data-parallel with gloo")
    batch_size: int = Field(64, ge=1, description="samples per optimizer step over all processes")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds torch: initialisation, shuffling and dropout")
    loss: Loss | Factory = Field("cross_entropy", description="a torch.nn.functional loss, or loss(outputs, target)")
    optimizer: Optimizer | Factory = Field("adam", description="a torch.optim class, or factory(parameters, lr=…)")
    learning_rate: float = Field(1e-3, gt=0, description="given to the optimizer as lr")
    metrics: tuple[Metric, ...] | None = Field(
        None, strict=False, description="measured on the validation data; the loss decides when absent"
    )
    threads: int | None = Field(None, ge=1, description="torch threads of each process; cores ÷ processes when absent")
    data_workers: int = Field(0, ge=0, description="DataLoader worker processes of each rank")
    schedule: Schedule | Factory = Field(
        "constant", description="learning rate by optimizer step: flat, to 0 by cosine or by a line, or a reference"
    )
    accumulate: int = Field(1, ge=1, description="forward and backward passes that make one optimizer step")
    clip_norm: float | None = Field(None, gt=0, description="largest L2 norm of the gradients")
    early_stopping: int | None = Field(
        None, ge=1, description="epochs without a lower validation loss after which training stops"
    )
    checkpoint: Checkpoint = Checkpoint()
    restarts: int = Field(
        3, ge=0, description="launches in a row that may die without a new checkpoint before the run gives up"
    )
    hang_seconds: float = Field(30, gt=0, description="a rank that is silent for longer is handled as dead")
    collective_seconds: float = Field(
        600, gt=0, description="an exchange between ranks that takes longer is a lost connection"
    )

    launcher: LauncherOption = Field(
        LOCAL, description="where ranks run: local, or torchrun, slurm or kubernetes with options; see launchers.md"
    )

    @model_validator(mode="after")
    def _fits_the_machines(self) -> Self:
        check_train(self.launcher, self.processes, self.restarts)
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch_size % (self.processes * self.accumulate):
            passes = f" × accumulate {self.accumulate}" if self.accumulate > 1 else ""
            raise ValueError(
                f"a batch_size that the processes can share evenly: {self.batch_size} is not a multiple of "
                f"{self.processes}{passes}"
            )
        return self
