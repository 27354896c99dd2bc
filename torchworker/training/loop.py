"""The built-in training loop: supervised, data-parallel, one object a rank."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchworker.contract import EVENTS, WEIGHTS, Project, TrainRequest, TrainResult, TrainSettings
from torchworker.data.fingerprint import whole_readings
from torchworker.data.loading import TrainingData, ValidationData, one_stream
from torchworker.process.events import EventLog
from torchworker.process.failure import UserError
from torchworker.project import user_code
from torchworker.project.metrics import first_output
from torchworker.project.parameters import freeze, set_training
from torchworker.project.randomness import seed_everything
from torchworker.project.weights import start_from
from torchworker.training.averaging import Averaging
from torchworker.training.best import BestWeights, stops_early
from torchworker.training.checkpoint import Checkpoints, Interval, random_state, set_random_state, use_threads_of
from torchworker.training.device import device_notes, memory_bytes, place
from torchworker.training.evaluation import Evaluation
from torchworker.training.losses import Losses
from torchworker.training.optimizer import (
    apply_gradients,
    build_optimizer,
    build_schedule,
    float16_cause,
    follows_loss,
    set_optimizer_mode,
)
from torchworker.training.preflight import Preflight
from torchworker.training.results import environment, leave, save_trained, whole_cpu_seconds
from torchworker.training.strategy import autocast, make_scaler, naming_unused, shard, share_model
from torchworker.training.weighting import StepWeights

STEP_EVENT_SECONDS = 0.25


class Loop:
    """State of one rank during training; the process group exists."""

    def __init__(self, request: TrainRequest, device: torch.device) -> None:
        self.project: Project = request.project
        self.settings: TrainSettings = request.train
        self.start, self.start_sha256 = request.start, request.start_sha256
        self._formats, self._dynamic = request.formats, request.dynamic
        self.folder = Path(request.folder)
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.device = device
        self.notes = device_notes(self.settings, device)
        self._say = EventLog(self.folder / EVENTS if self.rank == 0 else None).write
        self.checkpoints = Checkpoints(Path(request.checkpoints), self.settings.checkpoint_keep)
        self._build()

    def _build(self) -> None:
        settings, project = self.settings, self.project
        # Some ranks take longer than others to make their parts: that is no lost connection.
        everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=settings.build_seconds))
        # The same seed everywhere while building, so that a model's random initialisation agrees.
        seed_everything(settings.seed)
        self.model = user_code.build_model(project)
        if self.start:
            start_from(self.model, Path(self.start), self.start_sha256)
            self.notes.append(f"started from the weights of release {Path(self.start).parent.name}")
        self.notes += freeze(self.model, settings.freeze, project)
        self.model.to(self.device)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pin_memory = self.device.type == "cuda"
        train_set = user_code.build_dataset(project, "train")
        self.validation_set = user_code.build_dataset(project, "validation")
        self.data = TrainingData(train_set, project, settings, self.world, self.rank, pin_memory)
        self.train_set = train_set
        self.loss = user_code.build_loss(project)
        if isinstance(self.loss, nn.Module):
            self.loss.to(self.device)
        self.weights = StepWeights(self.loss, settings, self.device)
        self.first_step = -1
        """Of this launch."""
        dist.barrier(group=everyone)
        for dataset in (train_set, self.validation_set):
            self.notes += one_stream(dataset, project, settings.seed)
        preflight = Preflight(self.model, self.loss, project, settings, self.device)
        example = preflight.try_validation(self.validation_set, self._formats, self._dynamic)
        self.ignored = preflight.ignored
        self.weights.leave_out(preflight.padding)
        self.finds_unused, notes = preflight.try_training(self.data, example)
        self.notes += notes
        # Before sharding, after which a model cannot be copied.
        self.average = Averaging(self.model, settings.ema, project) if settings.ema is not None else None
        self.strategy = share_model(self.model, project, settings, self.device, find_unused=self.finds_unused)
        self.shipped = self.model
        """What is validated and ships."""
        if self.average is not None:
            self.shipped = self.average.model
            if settings.strategy == "fsdp":
                shard(self.shipped, project, self.device)
        self.best = BestWeights(self.shipped, settings)
        self.scaler = make_scaler(settings, self.device)
        self.evaluation = Evaluation(
            ValidationData(self.validation_set, project, settings, self.world, self.rank, pin_memory),
            example,
            self.loss,
            project,
            self.device,
            weigh=self.weights.of,
            ignored=self.ignored,
            channels_last=settings.channels_last,
            collective=self.strategy.collective_forward,
            dynamic=self._dynamic,
        )
        # After sharding: the optimizer's state is as large as the parameters that it is given.
        self.optimizer = build_optimizer(project, settings, self.model)
        self.epoch_steps = self.data.epoch_steps
        self.steps = self.epoch_steps * settings.epochs
        self.schedule = build_schedule(project, settings, self.optimizer, self.steps)
        # From here each rank draws its own dropout masks.
        seed_everything(settings.seed + self.rank)

        self.epoch = 1
        self.step = 0
        """Optimizer steps that are done."""
        self.epoch_step = 0
        """Those of them in this epoch."""
        self.losses = Losses(self._refuse)
        """Of this rank in this epoch."""
        self.history: list[dict[str, float]] = []
        self.interval = Interval(settings.checkpoint_steps, settings.checkpoint_seconds)
        self.step_seconds = 0.0
        """Of the last optimizer step."""

    def fit(self) -> TrainResult | None:
        """Train to the end; rank 0 saves the weights and returns the result, the others return None."""
        settings = self.settings
        self._resume()
        self._say(
            "started",
            processes=self.world,
            device=str(self.device),
            train_samples=self.data.samples,
            validation_samples=user_code.length_of(self.validation_set),
            step=self.step,
            steps=self.steps,
            notes=self.notes,
        )
        self.began = self.last_said = time.perf_counter()
        self.first_step = self.step
        while self.epoch <= settings.epochs and not stops_early(self.history, settings):
            began, first = time.perf_counter(), self.epoch_step
            train_loss = self._train_epoch()
            seconds = time.perf_counter() - began
            share = 1 - first / self.epoch_steps
            row = {
                "epoch": self.epoch,
                "train_loss": train_loss,
                **self._evaluate(),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "samples_per_second": self.data.used * share / seconds,
                "seconds": seconds,
                "time": time.time(),
            }
            self.history.append(row)
            self.best.see(self.history)
            self._say("epoch", epochs=settings.epochs, step=self.step, eta_seconds=self._eta(), **row, **self._load())
            if follows_loss(self.schedule):
                self.schedule.step(row["validation_loss"])
            self.epoch += 1
            self.epoch_step = 0
            self.losses.sums.zero_()
            if self.step < self.steps and stops_early(self.history, settings):
                # Only now is it known to have been the last step.
                self._save()
        self.checkpoints.wait()
        if not self.evaluation.samples:
            # Gone on with after the last epoch: the samples are known when they were read.
            self._evaluate()
        self.data.read_all()
        read = whole_readings({"train": self.data.fingerprint, "validation": self.evaluation.data.fingerprint})
        set_optimizer_mode(self.optimizer, self.project, training=False)
        self.best.put_back()
        save_trained(self.shipped, self.validation_set, self.project, self.folder, self.device)
        cpu_seconds = whole_cpu_seconds()
        result = None
        if self.rank == 0:
            result = TrainResult(
                weights=WEIGHTS,
                history=self.history,
                train_samples=self.data.samples,
                validation_samples=self.evaluation.samples,
                data_fingerprint=read["train"].fingerprint,
                environment=environment(self.device, self.settings),
                notes=[*self.notes, *self.checkpoints.failures],
                cpu_seconds=cpu_seconds,
                # The first steps of each part are not the first ones of the whole.
                read=read if self.world == 1 or not self.project.sharded else {"validation": read["validation"]},
                ignored=self.ignored,
                shipped_epoch=self.best.epoch or len(self.history),
                chosen_by=settings.watched if self.best.epoch else "",
            )
        self.strategy.release()
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
            "scaler": self.scaler.state_dict(),
            **({"average": self.average.state()} if self.average is not None else {}),
        }

    def _own(self) -> dict[str, Any]:
        """What only this rank knows, and where the run is."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_step": self.epoch_step,
            "world": self.world,
            "threads": torch.get_num_threads(),
            "sums": self.losses.sums.tolist(),
            "fingerprint": [self.data.fingerprint.total, self.data.fingerprint.samples],
            "history": self.history,
            "best": self.best.epoch,
            "ema": self.settings.ema,
            "shapes": self._shapes(),
            "trained": self._trained(),
            "random": random_state(),
        }

    def _shapes(self) -> dict[str, str]:
        return {name: f"{user_code.dtype_name(t)} {list(t.shape)}" for name, t in self.model.state_dict().items()}

    def _trained(self) -> list[str]:
        named = self.model.named_parameters()
        return [name.removeprefix("module.") for name, parameter in named if parameter.requires_grad]

    def _save(self) -> None:
        # No checkpoint of weights that a loss has made NaN.
        self.losses.settle()
        held = self.checkpoints.save(self.step, self._state(), self._own(), kept=self.best.state)
        self._say("checkpoint", step=self.step, held_seconds=held, failures=self.checkpoints.failures)

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        path, damaged = self.checkpoints.latest()
        self.notes += damaged
        if path is None:
            return
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        own = self._read_own(path)
        # DDP arranges its gradient buckets after its first backward pass, and the order in which many ranks
        # sum depends on them. One pass before the state is restored puts them as they were.
        if own["step"] < self.steps:
            self._arrange_buckets()
        # To give its state a form, torch takes a step with an optimizer that has taken none.
        set_optimizer_mode(self.optimizer, self.project, training=True)
        state = self._state()
        # Parameters without a gradient so far (modules that are used now and then) have no optimizer state to load.
        there, of_parameters = self.checkpoints.names(path), state["optimizer"]["state"]
        fresh = [
            name
            for name, values in of_parameters.items()
            if values and not any(f"optimizer.state.{name}.{value}" in there for value in values)
        ]
        for name in fresh:
            del of_parameters[name]
        self.best.expect(own.get("best", 0))
        self.checkpoints.load(path, {**state, **self.best.state})
        options = StateDictOptions(strict=not fresh)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        for name, parameter in self.model.named_parameters():
            if name.removeprefix("module.") in fresh:
                self.optimizer.state.pop(parameter, None)
        set_model_state_dict(self.model, state["model"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.epoch_step = own["epoch"], own["step"], own["epoch_step"]
        self.history = own["history"]
        note = f"resumed from step {self.step} of {self.steps}"
        if own["world"] == self.world:
            self.losses.sums = torch.tensor(own["sums"], dtype=torch.float64)
            self.data.fingerprint.merge(*own["fingerprint"])
            set_random_state(own["random"])
            if threads := use_threads_of(own):
                note += f", {threads}"
        else:
            self._share_sums(path, own["world"])
            note += f", written by {own['world']} processes and read by {self.world}: bits may differ"
        self.notes.append(note)
        if self.history and self.settings.weights == "best" and "best" not in own:
            self.notes.append("the checkpoint is of an earlier version and keeps no best weights: a later epoch ships")

    def _read_own(self, path: Path) -> dict[str, Any]:
        """This rank's values; raises UserError when the checkpoint is of another model, or of other layers of it."""
        own = self.checkpoints.own(path, self.rank)
        there, here = own["shapes"], self._shapes()
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"train: {path} is a checkpoint of another model: {name} is {there.get(name, 'missing')} there and "
                    f"{here.get(name, 'missing')} here; start a new run, or bring back the model that began this one"
                )
        if own.get("ema") != self.settings.ema:
            raise UserError(
                f"train.ema: {path} was written with {own.get('ema')}, and the job says {self.settings.ema}; start a "
                "new run, or give what the run that was begun had"
            )
        # Checkpoints of before do not say it.
        then, now = set(own.get("trained", self._trained())), set(self._trained())
        if then != now:
            changes = {"trained now and not then": now - then, "trained then and not now": then - now}
            told = "; ".join(f"{', '.join(sorted(names))}: {how}" for how, names in changes.items() if names)
            raise UserError(
                f"train: {path} was written while other layers were trained, so its optimizer state is not of these "
                f"({told}); start a new run, or freeze as the run that was begun did"
            )
        return own

    def _share_sums(self, path: Path, world: int) -> None:
        """Sums of ranks that are no more are added up on rank 0."""
        if self.rank != 0:
            return
        for rank in range(world):
            own = self.checkpoints.own(path, rank)
            self.losses.sums += torch.tensor(own["sums"], dtype=torch.float64)
            self.data.fingerprint.merge(*own["fingerprint"])

    def _arrange_buckets(self) -> None:
        """One forward and backward pass whose gradients are thrown away."""
        set_training(self.model, self.settings.freeze)
        batches = user_code.batches(self.train_set, self.data.local_batch, self.project, split="train")
        inputs, target = self._place(next(batches))
        user_code.backward(self._loss(inputs, target), self.project)
        self.optimizer.zero_grad()

    # --- one epoch

    def _train_epoch(self) -> float:
        """The rest of this epoch's share of this rank; the mean loss over all samples of all ranks."""
        set_training(self.model, self.settings.freeze)
        set_optimizer_mode(self.optimizer, self.project, training=True)
        stream = self.data.epoch(self.epoch, self.epoch_step)
        for _ in range(self.epoch_step, self.epoch_steps):
            self._optimizer_step(stream)
            self.step += 1
            self.epoch_step += 1
            # What comes after the last step may fail, and must not cost the steps.
            if self.interval.is_due(self.step) or self.step == self.steps:
                self._save()
        self.data.read_left_out(self.epoch, stream)
        if self.step == self.steps:
            self.checkpoints.wait()
        self.losses.settle()
        total = self.losses.sums.clone()
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _optimizer_step(self, stream: Iterator[tuple[Any, Tensor]]) -> None:
        began = time.perf_counter()
        micro = [batch for _, batch in zip(range(self.settings.accumulate), stream, strict=False)]
        weights = [self.weights.of(target) for _, target in micro]
        shares = self.weights.shares(weights)
        self.optimizer.zero_grad()
        for position, (batch, weight) in enumerate(zip(micro, weights, strict=True)):
            inputs, target = self._place(batch)
            # Gradients are exchanged once a step.
            self.strategy.exchange_gradients(position == len(micro) - 1)
            value = self._loss(inputs, target, labels=batch[1], counts=weight > 0)
            self.losses.add(value, weight, self.step)
            share = shares()[position]
            user_code.backward(self.scaler.scale(value if share is None else value * share), self.project)
        if self.step == self.first_step and not self.finds_unused:
            user_code.require_gradients(self.model, self.project)
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        apply_gradients(self.optimizer, self.project, self.scaler)
        if not follows_loss(self.schedule):
            self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.losses.settle(before=self.step)
        self.step_seconds = time.perf_counter() - began
        self._say_step()

    def _refuse(self, loss: float, step: int) -> None:
        raise UserError(
            f"train: the loss became {loss} at epoch {self.epoch}, step {step + 1} of {self.steps} "
            f"(rank {self.rank}); look at learning_rate {self.settings.learning_rate}, the inputs for NaN or inf, and "
            f"the loss for a log or division of zero{float16_cause(self.model, self.optimizer)}"
        )

    def _loss(self, inputs: Any, target: Tensor, labels: Tensor | None = None, counts: bool = True) -> Tensor:
        """labels: the target where it came from, on the CPU; counts: False when no label of it does."""
        with autocast(self.settings, self.device), naming_unused(self.model, self.project):
            outputs = user_code.forward(self.model, inputs, self.project, call=self.strategy.call)
            if not counts:
                # A mean over nothing would be NaN.
                return first_output(outputs).sum() * 0
            value = user_code.compute_loss(self.loss, outputs, target, self.project, labels=labels)
        if self.step == self.first_step and (notes := self.weights.notes(outputs, target, self.project)):
            self.notes += notes
            self._say("note", notes=notes)
        return value

    def _place(self, batch: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
        placed: tuple[Any, Tensor] = place(batch, self.device, self.settings.channels_last)
        return placed

    def _evaluate(self) -> dict[str, float]:
        # Weights of schedule-free optimizers are others while training.
        set_optimizer_mode(self.optimizer, self.project, training=False)
        means = self.evaluation(self.shipped)
        if not all(math.isfinite(mean) for mean in means.values()):
            raise UserError(
                f"train: after step {self.step} of {self.steps} the model gives {means}; expected finite numbers; look "
                f"at learning_rate {self.settings.learning_rate} and the validation data for NaN or inf"
                f"{float16_cause(self.model, self.optimizer)}"
            )
        return means

    # --- what is seen of it

    def _eta(self) -> float:
        """Seconds to the end at the rate so far."""
        elapsed = time.perf_counter() - self.began
        return elapsed / max(1, self.step - self.first_step) * (self.steps - self.step)

    def _say_step(self) -> None:
        now, loss = time.perf_counter(), self.losses.last
        if loss is None or now - self.last_said < STEP_EVENT_SECONDS:
            return
        self.last_said = now
        rate = (self.step + 1 - self.first_step) * self.settings.batch_size / (now - self.began)
        self._say(
            "step", epoch=self.epoch, epochs=self.settings.epochs, step=self.step + 1, steps=self.steps, loss=loss,
            learning_rate=self.optimizer.param_groups[0]["lr"], samples_per_second=rate, eta_seconds=self._eta(),
        )  # fmt: skip

    def _load(self) -> dict[str, Any]:
        """Seconds of the last step by rank, and the largest memory of a rank. Once an epoch: it is a collective."""
        mine = (self.step_seconds, memory_bytes(self.device))
        every: list[tuple[float, int]] = [(0.0, 0)] * self.world
        dist.all_gather_object(every, mine)
        seconds = {str(rank): item[0] for rank, item in enumerate(every)}
        return {"step_seconds": seconds, "memory_bytes": max(item[1] for item in every)}
