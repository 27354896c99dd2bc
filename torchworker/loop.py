"""The built-in training loop: supervised, data-parallel, one object a rank."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from torchworker.checkpoint import Checkpoints, random_state, set_random_state
from torchworker.contract import EVENTS, WEIGHTS, Project, TrainRequest, TrainResult, TrainSettings
from torchworker.events import EventLog
from torchworker.failure import UserMistake, is_lost_connection, user_error
from torchworker.fingerprint import Fingerprint, whole_fingerprint
from torchworker.finish import environment, leave, save_trained
from torchworker.metrics import first_output, metric_sum
from torchworker.project import (
    apply_gradients,
    backward,
    batches,
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    compute_loss,
    dtype_name,
    forward,
    require_gradients,
    split_batch,
    try_metric,
)
from torchworker.sharding import ResumableSampler, SeededDataset

STEP_EVENT_SECONDS = 0.25
STEPS_TO_MEASURE = 20
"""Steps after which the checkpoint interval in seconds is turned into steps."""


class Loop:
    """State of one rank during training; the process group exists."""

    def __init__(self, request: TrainRequest) -> None:
        self.project: Project = request.project
        self.settings: TrainSettings = request.train
        self.folder = Path(request.folder)
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        self.notes: list[str] = []
        self.events = EventLog(self.folder / EVENTS) if self.rank == 0 else None
        self.checkpoints = Checkpoints(Path(request.checkpoints), self.settings.checkpoint_keep)
        self._build()

    def _build(self) -> None:
        settings, project = self.settings, self.project
        # The same seed everywhere while building, so that a model's random initialisation agrees.
        torch.manual_seed(settings.seed)
        self.model = build_model(project).to(self.device)
        train_set = build_dataset(project, "train")
        self.validation_set = build_dataset(project, "validation")
        self.train_size = len(train_set)  # type: ignore[arg-type]
        self.validation_size = len(self.validation_set)  # type: ignore[arg-type]
        self.loss = build_loss(project)
        self._try_validation()
        self.ddp = self._data_parallel()
        self.optimizer = build_optimizer(project, settings, self.model)
        # A batch of a rank is what one forward and backward pass takes.
        self.local_batch = settings.batch_size // (self.world * settings.accumulate)
        self.sampler = ResumableSampler(train_set, self.world, self.rank, shuffle=True, seed=settings.seed)
        self.generator = torch.Generator()
        self.loader = DataLoader(
            SeededDataset(train_set, settings.seed),
            batch_size=self.local_batch,
            sampler=self.sampler,
            num_workers=settings.data_workers,
            persistent_workers=settings.data_workers > 0,
            generator=self.generator,
        )
        self.epoch_steps = math.ceil(len(self.loader) / settings.accumulate)
        self.steps = self.epoch_steps * settings.epochs
        self.schedule = build_schedule(project, settings, self.optimizer, self.steps)
        # From here each rank draws its own dropout masks.
        torch.manual_seed(settings.seed + self.rank)

        self.epoch = 1
        self.step = 0
        """Optimizer steps that are done."""
        self.epoch_step = 0
        """Those of them in this epoch."""
        self.sums = torch.zeros(2, dtype=torch.float64)
        """Loss times samples, and samples, of this rank in this epoch."""
        self.history: list[dict[str, float]] = []
        self.fingerprint = Fingerprint()
        self.checkpoint_every = settings.checkpoint_steps or 0
        self.step_seconds = 0.0
        """Of the last optimizer step."""

    def _data_parallel(self) -> DistributedDataParallel:
        try:
            return DistributedDataParallel(self.model)
        except (RuntimeError, ValueError, TypeError) as error:
            if is_lost_connection(error):
                raise
            what = f"{self.project.model.where}: its parameters and buffers cannot be shared between processes"
            raise user_error(what, error, self.project.folder) from error

    def fit(self) -> TrainResult | None:
        """Train to the end; rank 0 saves the weights and returns the result, the others return None."""
        settings = self.settings
        self._resume()
        self._say(
            "started",
            processes=self.world,
            device=str(self.device),
            train_samples=self.train_size,
            validation_samples=self.validation_size,
            step=self.step,
            steps=self.steps,
            notes=self.notes,
        )
        self.began = self.last_said = time.perf_counter()
        self.first_step = self.step
        while self.epoch <= settings.epochs and not self._stops_early():
            began, first = time.perf_counter(), self.epoch_step
            train_loss = self._train_epoch()
            seconds = time.perf_counter() - began
            share = 1 - first / self.epoch_steps
            row = {
                "epoch": self.epoch,
                "train_loss": train_loss,
                **self._evaluate(),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "samples_per_second": self.train_size * share / seconds,
                "seconds": seconds,
                "time": time.time(),
            }
            self.history.append(row)
            self._say("epoch", epochs=settings.epochs, eta_seconds=self._eta(), **row, **self._load())
            self.epoch += 1
            self.epoch_step = 0
            self.sums.zero_()
        self.checkpoints.wait()
        digest = whole_fingerprint(self.fingerprint)
        result = None
        if self.rank == 0:
            self.model.eval()
            save_trained(self.model, self.validation_set, self.project, self.folder)
            result = TrainResult(
                weights=WEIGHTS,
                history=self.history,
                train_samples=self.train_size,
                validation_samples=self.validation_size,
                data_fingerprint=digest,
                environment=environment(self.device),
                notes=[*self.notes, *self.checkpoints.failures],
            )
        del self.ddp
        leave()
        return result

    # --- resuming

    def _state(self) -> dict[str, Any]:
        """What every rank has alike."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "schedule": self.schedule.state_dict(),
        }

    def _own(self) -> dict[str, Any]:
        """What only this rank knows, and where the run is."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_step": self.epoch_step,
            "world": self.world,
            "sums": self.sums.tolist(),
            "fingerprint": [self.fingerprint.total, self.fingerprint.samples],
            "history": self.history,
            "shapes": self._shapes(),
            "random": random_state(),
        }

    def _shapes(self) -> dict[str, str]:
        return {name: f"{dtype_name(t)} {list(t.shape)}" for name, t in self.model.state_dict().items()}

    def _save(self) -> None:
        held = self.checkpoints.save(self.step, self._state(), self._own())
        self._say("checkpoint", step=self.step, held_seconds=held, failures=self.checkpoints.failures)

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        path, damaged = self.checkpoints.latest()
        self.notes += damaged
        if path is None:
            return
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        own = self._read_own(path)
        # DDP arranges its gradient buckets after its first backward pass, and the order in which many ranks
        # sum depends on them. One pass before the state is restored puts them as they were.
        self._arrange_buckets()
        state = self._state()
        self.checkpoints.load(path, state)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        set_model_state_dict(self.model, state["model"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self.epoch_step = own["epoch"], own["step"], own["epoch_step"]
        self.history = own["history"]
        note = f"resumed from step {self.step} of {self.steps}"
        if own["world"] == self.world:
            self.sums = torch.tensor(own["sums"], dtype=torch.float64)
            self.fingerprint.merge(*own["fingerprint"])
            set_random_state(own["random"])
        else:
            self._share_sums(path, own["world"])
            note += f", written by {own['world']} processes and read by {self.world}: bits may differ"
        self.notes.append(note)

    def _read_own(self, path: Path) -> dict[str, Any]:
        """This rank's values; raises UserMistake when the checkpoint is of another model."""
        own = self.checkpoints.own(path, self.rank)
        there, here = own["shapes"], self._shapes()
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserMistake(
                    f"train: {path} is a checkpoint of another model: {name} is {there.get(name, 'missing')} there and "
                    f"{here.get(name, 'missing')} here; start a new run, or bring back the model that began this one"
                )
        return own

    def _share_sums(self, path: Path, world: int) -> None:
        """Sums of ranks that are no more are added up on rank 0."""
        if self.rank != 0:
            return
        for rank in range(world):
            own = self.checkpoints.own(path, rank)
            self.sums += torch.tensor(own["sums"], dtype=torch.float64)
            self.fingerprint.merge(*own["fingerprint"])

    def _arrange_buckets(self) -> None:
        """One forward and backward pass whose gradients are thrown away."""
        self.model.train()
        inputs, target = next(batches(self.sampler.dataset, self.local_batch, self.project))
        compute_loss(self.loss, self._forward(self.ddp, inputs), target, self.project).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()

    # --- one epoch

    def _train_epoch(self) -> float:
        """The rest of this epoch's share of this rank; the mean loss over all samples of all ranks."""
        self.model.train()
        consumed = self.epoch_step * self.settings.batch_size
        self.sampler.set_epoch(self.epoch)
        self.sampler.consumed = min(consumed, self.sampler.total_size)
        self.generator.manual_seed(self.settings.seed * 1_000_003 + self.epoch * self.world + self.rank)
        # The sampler repeats samples to give every rank equally many; those are not hashed twice.
        self._unhashed = len(range(self.rank, self.train_size, self.world)) - consumed // self.world
        stream = self._batches()
        for _ in range(self.epoch_step, self.epoch_steps):
            self._optimizer_step(stream)
            self.step += 1
            self.epoch_step += 1
            if self._is_checkpoint_due():
                self._save()
        total = self.sums.clone()
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _optimizer_step(self, stream: Iterator[tuple[Any, Tensor]]) -> None:
        began = time.perf_counter()
        micro = [batch for _, batch in zip(range(self.settings.accumulate), stream, strict=False)]
        samples = sum(len(target) for _, target in micro)
        self.optimizer.zero_grad()
        for position, (inputs, target) in enumerate(micro):
            self._hash(inputs, target)
            # Gradients are exchanged once a step.
            self.ddp.require_backward_grad_sync = position == len(micro) - 1
            value = compute_loss(self.loss, self._forward(self.ddp, inputs), target, self.project)
            number = float(value.detach())
            if not math.isfinite(number):
                self._refuse(number)
            # Weighted by its samples, so that the last, smaller one counts as much as it holds.
            weighted = value * (len(target) / samples) if len(micro) > 1 else value
            backward(weighted, self.project)
            self.sums += torch.tensor([number * len(target), len(target)], dtype=torch.float64)
        if self.step == self.first_step:
            require_gradients(self.model, self.project)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        apply_gradients(self.optimizer, self.project)
        self.schedule.step()
        self.step_seconds = time.perf_counter() - began
        self._say_step(number)

    def _refuse(self, loss: float) -> None:
        raise UserMistake(
            f"train: the loss became {loss} at epoch {self.epoch}, step {self.step + 1} of {self.steps} "
            f"(rank {self.rank}); look at learning_rate {self.settings.learning_rate}, the inputs for NaN or inf, and "
            "the loss for a log or division of zero"
        )

    def _hash(self, inputs: Any, target: Tensor) -> None:
        if self.epoch == 1 and self._unhashed > 0:
            count = min(len(target), self._unhashed)
            self.fingerprint.update(inputs, target, count)
            self._unhashed -= count

    def _is_checkpoint_due(self) -> bool:
        done = self.step - self.first_step
        if not self.checkpoint_every and done == STEPS_TO_MEASURE:
            # Rank 0's clock decides for all: the interval in steps has to be the same everywhere.
            pace = (time.perf_counter() - self.began) / done
            every = torch.tensor([max(1, round(self.settings.checkpoint_seconds / pace))])
            dist.broadcast(every, 0)
            self.checkpoint_every = int(every)
        return self.checkpoint_every > 0 and self.step % self.checkpoint_every == 0 and self.step < self.steps

    def _stops_early(self) -> bool:
        patience = self.settings.early_stopping
        if patience is None or len(self.history) <= patience:
            return False
        losses = [row["validation_loss"] for row in self.history]
        return min(losses[-patience:]) >= min(losses[:-patience])

    def _batches(self) -> Iterator[tuple[Any, Tensor]]:
        try:
            for batch in self.loader:
                yield split_batch(batch, self.project)
        except (UserMistake, GeneratorExit):
            raise
        except Exception as error:
            where = f" ({error.__notes__[0]})" if getattr(error, "__notes__", None) else ""
            raise user_error(
                f"{self.project.data.where}: reading a training item failed{where}", error, self.project.folder
            ) from error

    def _forward(self, model: nn.Module, inputs: Any) -> Any:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        return forward(inner, inputs, self.project, call=model)

    # --- validation

    @torch.no_grad()
    def _try_validation(self) -> None:
        """One validation batch before the first epoch: a mistake there must not cost an epoch to find."""
        self.model.eval()
        size = max(1, self.settings.batch_size // self.world)
        inputs, target = next(batches(self.validation_set, size, self.project))
        outputs = self._forward(self.model, inputs)
        compute_loss(self.loss, outputs, target, self.project)
        for name in self.project.metrics:
            try_metric(name, outputs, target)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Loss and metrics over the validation set, each sample counted once whatever the world size."""
        self.model.eval()
        # Running statistics differ by rank between forwards; rank 0's are the ones that are saved.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)
        mine = Subset(self.validation_set, range(self.rank, self.validation_size, self.world))
        sums = {name: [0.0, 0] for name in ("loss", *self.project.metrics)}
        for batch in DataLoader(mine, batch_size=max(1, self.settings.batch_size // self.world)):
            inputs, target = split_batch(batch, self.project)
            outputs = self._forward(self.model, inputs)
            value = float(compute_loss(self.loss, outputs, target, self.project))
            sums["loss"][0] += value * len(target)
            sums["loss"][1] += len(target)
            for name in self.project.metrics:
                part, count = metric_sum(name, first_output(outputs), target)
                sums[name][0] += part
                sums[name][1] += count
        table = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(table)
        means = {f"validation_{name}": float(row[0] / row[1]) for name, row in zip(sums, table, strict=True)}
        if not all(math.isfinite(mean) for mean in means.values()):
            raise UserMistake(
                f"train: after step {self.step} of {self.steps} the model gives {means}; expected finite numbers; look "
                f"at learning_rate {self.settings.learning_rate} and the validation data for NaN or inf"
            )
        return means

    # --- what is seen of it

    def _eta(self) -> float:
        """Seconds to the end at the rate so far."""
        elapsed = time.perf_counter() - self.began
        return elapsed / max(1, self.step - self.first_step) * (self.steps - self.step)

    def _say_step(self, loss: float) -> None:
        now = time.perf_counter()
        if self.events is None or now - self.last_said < STEP_EVENT_SECONDS:
            return
        self.last_said = now
        rate = (self.step + 1 - self.first_step) * self.settings.batch_size / (now - self.began)
        self._say(
            "step", epoch=self.epoch, epochs=self.settings.epochs, step=self.step + 1, steps=self.steps, loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"], samples_per_second=rate, eta_seconds=self._eta(),
        )  # fmt: skip

    def _load(self) -> dict[str, Any]:
        """Seconds of the last step by rank, and the largest memory of a rank. Once an epoch: it is a collective."""
        mine = (self.step_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        every: list[tuple[float, int]] = [(0.0, 0)] * self.world
        dist.all_gather_object(every, mine)
        seconds = {str(rank): item[0] for rank, item in enumerate(every)}
        return {"step_seconds": seconds, "memory_bytes": max(item[1] for item in every)}

    def _say(self, event: str, **fields: Any) -> None:
        if self.events is not None:
            self.events.write(event, **fields)
