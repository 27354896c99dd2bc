"""The built-in training loop: supervised, data-parallel, one object a rank."""

from __future__ import annotations

import os
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from torchworker.contract import EVENTS, WEIGHTS, Project, TrainRequest, TrainResult, TrainSettings
from torchworker.events import EventLog
from torchworker.failure import UserMistake, user_error
from torchworker.fingerprint import Fingerprint
from torchworker.metrics import first_output, metric_sum
from torchworker.project import (
    Loss,
    batches,
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    compute_loss,
    forward,
    split_batch,
)
from torchworker.weights import save_weights

STEP_EVENT_SECONDS = 0.25


class Loop:
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
        dist.init_process_group("gloo", timeout=timedelta(seconds=self.request.timeout_s))
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
