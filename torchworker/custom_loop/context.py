"""A custom loop: one function of the user's, called in every rank with a small context."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils.data import Dataset, IterableDataset

from torchworker.contract import EVENTS, WEIGHTS, Entrypoint, Project, TrainRequest, TrainResult
from torchworker.custom_loop.checkpoints import CheckpointHandle
from torchworker.custom_loop.finished import keep_returned, returned_before
from torchworker.custom_loop.preflight import fingerprint_share, name_of, resolve_main, try_parts
from torchworker.custom_loop.reporting import Reports
from torchworker.custom_loop.returned import require_sound, unwrapped
from torchworker.data.fingerprint import whole_readings
from torchworker.process.events import EventLog
from torchworker.process.failure import UserError, is_lost_connection, user_error, user_line
from torchworker.project.randomness import seed_everything
from torchworker.project.user_code import build_dataset, build_model, length_of
from torchworker.project.weights import start_from
from torchworker.training.results import environment, leave, save_probe, save_whole, whole_cpu_seconds

JOURNAL = "reports.jsonl"
FOLDER = "loop"
"""Beside the weights: what the loop itself writes."""


class Context:
    """What `main` is given, one a rank. The process group exists; the environment is torchrun's."""

    def __init__(self, request: TrainRequest, entry: Entrypoint, device: torch.device, events: EventLog | None) -> None:
        """
        Args:
            request: of the training stage.
            entry: the loop.
            device: this rank's own.
            events: where reports go; None but on rank 0.
        """
        settings = request.train
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.device = device
        """This rank's own; a GPU is already the current one."""
        self.seed = settings.seed
        """torch, Python's random and NumPy were seeded with it, alike in every rank, just before `main`."""
        self.job: dict[str, Any] = dict(entry.job)
        """The whole job file as plain values, defaults filled in."""
        self.folder = Path(request.folder) / FOLDER
        """For whatever the loop writes; kept with the run, not shipped, and empty at the start of an attempt."""
        self.folder.mkdir(exist_ok=True)
        self._project = request.project
        self._start, self._start_sha256 = request.start, request.start_sha256
        self._started = False
        self._reports = Reports(name_of(entry), self.rank, events, Path(request.checkpoints) / JOURNAL)
        say = (events or EventLog(None)).write
        self.checkpoint = CheckpointHandle(Path(request.checkpoints), settings, name_of(entry), self._reports, say)

    def build_model(self) -> nn.Module:
        """The model of `model.factory` on the CPU: untrained, or with the live release's weights (retrain.start)."""
        model = build_model(self._project)
        if self._start:
            start_from(model, Path(self._start), self._start_sha256)
            self._started = True
        return model

    @property
    def missed_start(self) -> bool:
        """Whether the loop was to start from given weights and never asked for the model that has them."""
        return bool(self._start) and not self._started

    def build_dataset(self, split: str) -> Dataset[Any]:
        """What `data.factory` gives for `train` or `validation`."""
        return build_dataset(self._project, split)

    def report(self, metrics: Mapping[str, Any], *, step: int, steps: int | None = None) -> None:
        """Numbers by name, for the terminal, Prefect, MLflow and the release; what rank 0 reports counts.

        step: what the curves are drawn over; steps: how many there will be, where that is known. Raises UserError
        for NaN and infinity.
        """
        self._reports.add(metrics, step, steps)

    def go_on_from_the_end(self) -> None:
        """The loop has returned in an earlier launch: what it reported is known."""
        self._reports.resume(sys.maxsize)
        self.checkpoint.notes.append("the loop had returned its model before; it was not called again")

    def reported(self, name: str) -> list[dict[str, float]]:
        """The run's history. Raises UserError in rank 0 when nothing was reported."""
        rows = self._reports.finish()
        if self.rank == 0 and not rows:
            raise UserError(
                f"{name} returned without a report from rank 0, so nobody could see how it went; call "
                "context.report({'train_loss': …}, step=…) now and then"
            )
        return rows


def run_entrypoint(request: TrainRequest, entry: Entrypoint, device: torch.device) -> TrainResult | None:
    """Train by the user's function; rank 0 saves the weights and returns the result, the others return None."""
    project, settings = request.project, request.train
    main = resolve_main(entry, project)
    rank = dist.get_rank()
    events = EventLog(Path(request.folder) / EVENTS) if rank == 0 else None
    everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=settings.build_seconds))
    if events is not None:
        facts = try_parts(project, formats=request.formats)
        events.write(
            "started", processes=dist.get_world_size(), device=str(device), train_samples=facts.train_samples,
            validation_samples=facts.validation_samples, step=0, notes=[],
        )  # fmt: skip
    # The other ranks wait for rank 0 here, and not in an exchange of the loop's own.
    dist.barrier(group=everyone)
    context = Context(request, entry, device, events)
    model = returned_before(request, entry)
    if model is not None:
        context.go_on_from_the_end()
        return _finish(model, request, entry, context, together=True)
    seed_everything(settings.seed)
    store = dist.distributed_c10d._get_default_store()
    returned = _call(main, context, entry, project)
    if context.missed_start:
        raise UserError(
            f"{name_of(entry)} trained a model of its own making, and retrain.start: live asks for one that begins "
            "with the live release's weights; train what context.build_model() gives, or use retrain.start: scratch"
        )
    # A script made for torchrun may end the group as its last line; what follows needs one.
    together = dist.is_initialized()
    if not together:
        dist.init_process_group(
            "gloo", store=PrefixStore("after-main", store), rank=rank, world_size=context.world_size,
            timeout=timedelta(seconds=settings.collective_seconds),
        )  # fmt: skip
    model = unwrapped(returned, name_of(entry))
    del returned
    if together:
        context.checkpoint.meet("ends")
    return _finish(model, request, entry, context, together)


def _finish(
    model: nn.Module, request: TrainRequest, entry: Entrypoint, context: Context, together: bool
) -> TrainResult | None:
    """What the built-in loop leaves too. Every rank calls it."""
    project, name = request.project, name_of(entry)
    require_sound(model, name, project)
    history = context.reported(name)
    notes = context.checkpoint.finish(together)
    save_whole(model, Path(request.folder))
    keep_returned(request, entry)
    mine = fingerprint_share(
        build_dataset(project, "train"), project, request.train.seed, context.rank, context.world_size
    )
    read = whole_readings({"train": mine})
    validation_set = build_dataset(project, "validation")
    save_probe(model, validation_set, project, Path(request.folder), context.device)
    cpu_seconds = whole_cpu_seconds()
    result = None
    if context.rank == 0:
        result = TrainResult(
            weights=WEIGHTS,
            history=history,
            train_samples=read["train"].samples,
            validation_samples=_count(validation_set),
            data_fingerprint=read["train"].fingerprint,
            environment=environment(context.device, request.train),
            notes=notes,
            cpu_seconds=cpu_seconds,
            read=read,
        )
    del model
    leave()
    return result


def _count(dataset: Dataset[Any]) -> int:
    length = length_of(dataset)
    if length is not None:
        return length
    assert isinstance(dataset, IterableDataset), dataset
    return sum(1 for _ in iter(dataset))


def _call(main: Callable[..., Any], context: Context, entry: Entrypoint, project: Project) -> Any:
    name = name_of(entry)
    try:
        return main(context, **entry.function.args)
    except UserError as mistake:
        # Raised by the context, and so without the line that called it.
        raise UserError(f"{mistake}{user_line(mistake, project.folder)}") from mistake.__cause__
    except SystemExit as error:
        what = f"{name} ended the process; expected it to return the trained model"
        raise user_error(what, error, project.folder) from error
    except Exception as error:
        if is_lost_connection(error):
            raise
        if "initialize the default process group twice" in str(error):
            raise user_error(
                f"{name}: the process group exists already; guard the call with `if not dist.is_initialized()`",
                error, project.folder,
            ) from error  # fmt: skip
        raise user_error(f"{name} failed", error, project.folder) from error
