"""Distributed supervised training: the agent that launches the ranks, and what each rank does."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from torchworker import rendezvous
from torchworker.contract import EVENTS, WEIGHTS, Failure, Project, TrainRequest, TrainResult, TrainSettings, decode
from torchworker.events import EventLog
from torchworker.failure import Described, UserMistake, failure_of, user_error
from torchworker.fingerprint import Fingerprint
from torchworker.lifeline import die_with_parent
from torchworker.metrics import first_output, metric_sum
from torchworker.project import (
    Loss,
    batches,
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    compute_loss,
    enter,
    forward,
    split_batch,
)
from torchworker.weights import save_weights

STEP_EVENT_SECONDS = 0.25


def train(request: TrainRequest, path: Path) -> TrainResult:
    """Launch the ranks of one training run and wait for them.

    Raises Described with the root cause when a rank fails.
    """
    folder = Path(request.folder)
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request.train.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend=rendezvous.BACKEND,
        # A restart inside the agent reuses the store and is unreliable with gloo; retries are new launches.
        max_restarts=0,
        monitor_interval=0.02,
        # This process has torch and no user code, so a fork is a clean rank that need not import torch again.
        start_method="fork",
        local_addr=rendezvous.LOOPBACK,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "ranks"), redirects=Std.ALL),
    )
    (folder / "ranks").mkdir(exist_ok=True)
    # Gloo would otherwise look up the host's name, which need not resolve, and listen on that address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        results = elastic_launch(config, run_rank)(str(path), os.getpid())
    except ChildFailedError as error:
        raise Described(_root_cause(folder, error, request.train.processes)) from error
    result: TrainResult = results[0]
    return result


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failure-rank{rank}.json"


def _root_cause(folder: Path, error: ChildFailedError, processes: int) -> Failure:
    """An exception that is not a lost connection, before death by a signal, before a lost connection.

    When a rank dies the others see their connection close, often before the agent sees the death.
    """
    said: dict[int, Failure] = {}
    for rank in range(processes):
        if _failure_file(folder, rank).exists():
            said[rank] = decode(Failure, json.loads(_failure_file(folder, rank).read_text()))
    for failure in said.values():
        if failure.kind == "user":
            return failure
    signalled = {rank: item.exitcode for rank, item in error.failures.items() if item.exitcode < 0}
    for rank, code in signalled.items():
        return Failure(kind="worker", message=f"rank {rank} was killed by {_signal_name(-code)}", rank=rank)
    for failure in said.values():
        if "LostConnection" not in failure.message:
            return failure
    silent = [str(rank) for rank in range(processes) if rank not in said]
    if silent:
        return Failure(
            kind="worker",
            message=f"rank {' and '.join(silent)} ended without a word (killed, or out of memory)",
            rank=int(silent[0]),
        )
    return next(iter(said.values()))


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name


def run_rank(request_file: str, agent: int) -> TrainResult | None:
    """Entry of one rank. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from torch's launcher."""
    die_with_parent(agent)
    request = TrainRequest.read(Path(request_file))
    rank = int(os.environ["RANK"])
    try:
        torch.set_num_threads(request.train.threads)
        enter(request.project)
        return _Run(request).fit()
    except (Exception, SystemExit) as error:
        failure = failure_of(error, request.project.folder, rank)
        if isinstance(error, dist.DistError) or "onnection" in str(error):
            failure = dataclasses.replace(failure, kind="worker", message=f"LostConnection: {failure.message}")
        _write_failure(_failure_file(Path(request.folder), rank), failure)
        raise


def _write_failure(path: Path, failure: Failure) -> None:
    path.write_text(json.dumps(dataclasses.asdict(failure)))


class _Run:
    """State of one rank during training."""

    def __init__(self, request: TrainRequest) -> None:
        self.request = request
        self.project: Project = request.project
        self.settings: TrainSettings = request.train
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")

    def fit(self) -> TrainResult | None:
        """Train all epochs; rank 0 saves the weights and returns the result, the others return None."""
        settings, project = self.settings, self.project
        dist.init_process_group("gloo")
        # The same seed everywhere while building, so that a model's random initialisation agrees.
        torch.manual_seed(settings.seed)
        model = build_model(project).to(self.device)
        train_set = build_dataset(project, "train")
        validation_set = build_dataset(project, "validation")
        loss = build_loss(project)
        self._try_validation(model, validation_set, loss)
        ddp = DistributedDataParallel(model)
        optimizer = build_optimizer(project, settings, model)
        # From here each rank draws its own dropout masks.
        torch.manual_seed(settings.seed + self.rank)

        folder = Path(self.request.folder)
        self.events = EventLog(folder / EVENTS) if self.rank == 0 else None
        self.train_size = len(train_set)  # type: ignore[arg-type]
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            train_set, self.world, self.rank, shuffle=True, seed=settings.seed
        )
        self.loader = DataLoader(
            train_set,
            batch_size=settings.batch_size // self.world,
            sampler=self.sampler,
            num_workers=settings.data_workers,
            persistent_workers=settings.data_workers > 0,
            generator=torch.Generator().manual_seed(settings.seed + self.rank),
        )
        self.steps = len(self.loader) * settings.epochs
        self.step = 0
        self.fingerprint = Fingerprint()
        self._say(
            "started",
            processes=self.world,
            device=str(self.device),
            train_samples=self.train_size,
            validation_samples=len(validation_set),  # type: ignore[arg-type]
            steps=self.steps,
        )
        self.began = self.last_said = time.perf_counter()
        history = []
        for epoch in range(1, settings.epochs + 1):
            epoch_began = time.perf_counter()
            train_loss = self._train_epoch(epoch, ddp, loss, optimizer)
            seconds = time.perf_counter() - epoch_began
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                **self._evaluate(model, validation_set, loss),
                "samples_per_second": self.train_size / seconds,
                "seconds": seconds,
                "time": time.time(),
            }
            history.append(row)
            self._say("epoch", epochs=settings.epochs, eta_seconds=self._eta(), **row)
        digest = self._data_fingerprint()
        result = None
        if self.rank == 0:
            save_weights(model, folder / WEIGHTS)
            result = TrainResult(
                weights=WEIGHTS,
                history=history,
                train_samples=self.train_size,
                validation_samples=len(validation_set),  # type: ignore[arg-type]
                data_fingerprint=digest,
                environment=self._environment(),
            )
        # Nobody leaves before the weights are on disk: an early exit would look like a lost rank.
        dist.barrier()
        dist.destroy_process_group()
        return result

    @torch.no_grad()
    def _try_validation(self, model: nn.Module, dataset: Dataset[Any], loss: Loss) -> None:
        """One validation batch before the first epoch: a mistake there must not cost an epoch to find."""
        model.eval()
        inputs, target = next(batches(dataset, max(1, self.settings.batch_size // self.world), self.project))
        outputs = self._forward(model, inputs)
        compute_loss(loss, outputs, target, self.project)
        for name in self.project.metrics:
            metric_sum(name, first_output(outputs), target)

    def _train_epoch(self, epoch: int, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> float:
        """One pass over this rank's share; the mean loss over all samples of all ranks."""
        model.train()
        self.sampler.set_epoch(epoch)
        # The sampler repeats samples to give every rank equally many; those are not hashed twice.
        unhashed = len(range(self.rank, self.train_size, self.world)) if epoch == 1 else 0
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches():
            inputs, target = split_batch(batch, self.project)
            count = len(target)
            if unhashed:
                self.fingerprint.update(inputs, target, min(count, unhashed))
                unhashed -= min(count, unhashed)
            optimizer.zero_grad()
            value = compute_loss(loss, self._forward(model, inputs), target, self.project)
            self.step += 1
            number = float(value.detach())
            if not torch.isfinite(value):
                raise UserMistake(
                    f"train: the loss became {number} at epoch {epoch}, step {self.step} of {self.steps} "
                    f"(rank {self.rank}); look at learning_rate {self.settings.learning_rate}, the inputs for "
                    "NaN or inf, and the loss for a log or division of zero"
                )
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += torch.tensor([number * count, count], dtype=torch.float64)
            self._say_step(epoch, number)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _batches(self) -> Any:
        try:
            yield from self.loader
        except (UserMistake, GeneratorExit):
            raise
        except Exception as error:
            raise user_error(
                f"{self.project.data.where}: reading a training item failed", error, self.project.folder
            ) from error

    def _forward(self, model: nn.Module, inputs: Any) -> Any:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        return forward(inner, inputs, self.project, call=model)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, dataset: Dataset[Any], loss: Loss) -> dict[str, float]:
        """Loss and metrics over the validation set, each sample counted once whatever the world size."""
        model.eval()
        # Running statistics differ by rank between forwards; rank 0's are the ones that are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        mine = Subset(dataset, range(self.rank, len(dataset), self.world))  # type: ignore[arg-type]
        sums = {name: [0.0, 0] for name in ("loss", *self.project.metrics)}
        for batch in DataLoader(mine, batch_size=max(1, self.settings.batch_size // self.world)):
            inputs, target = split_batch(batch, self.project)
            outputs = self._forward(model, inputs)
            value = float(compute_loss(loss, outputs, target, self.project))
            sums["loss"][0] += value * len(target)
            sums["loss"][1] += len(target)
            for name in self.project.metrics:
                part, count = metric_sum(name, first_output(outputs), target)
                sums[name][0] += part
                sums[name][1] += count
        table = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(table)
        return {f"validation_{name}": float(row[0] / row[1]) for name, row in zip(sums, table, strict=True)}

    def _data_fingerprint(self) -> str:
        parts: list[tuple[int, int]] = [(0, 0)] * self.world
        dist.all_gather_object(parts, (self.fingerprint.total, self.fingerprint.samples))
        whole = Fingerprint()
        for total, samples in parts:
            whole.merge(total, samples)
        return whole.hexdigest()

    def _eta(self) -> float:
        """Seconds to the end at the rate so far."""
        elapsed = time.perf_counter() - self.began
        return elapsed / max(1, self.step) * (self.steps - self.step)

    def _say_step(self, epoch: int, loss: float) -> None:
        now = time.perf_counter()
        if self.events is None or now - self.last_said < STEP_EVENT_SECONDS:
            return
        self.last_said = now
        rate = self.step * self.settings.batch_size / (now - self.began)
        self._say(
            "step", epoch=epoch, epochs=self.settings.epochs, step=self.step, steps=self.steps, loss=loss,
            samples_per_second=rate, eta_seconds=self._eta(),
        )  # fmt: skip

    def _say(self, event: str, **fields: Any) -> None:
        if self.events is not None:
            self.events.write(event, **fields)

    def _environment(self) -> dict[str, str]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "processes": str(self.world),
            "threads_per_process": str(torch.get_num_threads()),
            "device": str(self.device),
            "backend": "gloo",
        }
