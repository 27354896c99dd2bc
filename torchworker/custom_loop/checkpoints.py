"""Checkpoints for a custom loop: `context.checkpoint`, plain calls around `torchworker/training/checkpoint.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchworker.contract import TrainSettings
from torchworker.custom_loop.reporting import Reports
from torchworker.custom_loop.state import SKELETON, empty_tensors, plain, put_together, skeleton_of, tensors_of
from torchworker.process.failure import UserError, describe
from torchworker.project.user_code import describe_tensor
from torchworker.training.checkpoint import Checkpoints, Interval, random_state, set_random_state, use_threads_of

FILES = "files"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds."""

    step: int
    state: Mapping[str, Any]
    """As it was given to `save`, objects replaced by their state_dict; tensors on the CPU unless loaded in place."""
    own: Mapping[str, Any]
    """This rank's JSON values; empty for a rank that the saving run did not have."""
    files: Path | None
    """The folder that was given to `save`: to read, not to write."""


class CheckpointHandle:
    """Saves and loads; every rank makes the same calls in the same order."""

    def __init__(
        self, folder: Path, settings: TrainSettings, name: str, reports: Reports, say: Callable[..., None]
    ) -> None:
        """
        Args:
            folder: of checkpoints, on a file system that all ranks share.
            settings: say when checkpoints are due and how many stay.
            name: of the loop, for messages.
            reports: the run's history, which goes on from the step of the checkpoint.
            say: writes an event.
        """
        self._checkpoints = Checkpoints(folder, settings.checkpoint_keep)
        self._interval = Interval(settings.checkpoint_steps, settings.checkpoint_seconds)
        self._name, self._reports, self._say = name, reports, say
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._seconds = settings.collective_seconds
        """How long ranks wait for each other."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._seconds))
        self._step: int | None = None
        """Of the newest checkpoint that was saved or loaded."""
        self._loaded = False
        self.notes: list[str] = []

    def load(self, into: Mapping[str, Any] | None = None) -> Saved | None:
        """The newest sound checkpoint, or None when there is none. The last thing to do before the loop.

        into: objects with load_state_dict, which is called with what was saved under their name; and dicts whose
        tensors, also sharded ones, are filled in place. The random state of torch, Python and NumPy is put back too.
        """
        path, damaged = self._checkpoints.latest()
        self.notes += damaged
        self._loaded = True
        if path is None:
            return None
        own = self._checkpoints.own(path, self._rank)
        tensors = empty_tensors(path)
        self._use_theirs(tensors, into or {}, path)
        self._checkpoints.load(path, tensors)
        state = put_together(path, tensors)
        for name, value in (into or {}).items():
            if hasattr(value, "load_state_dict"):
                self._fill(name, value, state, path)
        self._step = own["step"]
        note = f"resumed from step {self._step}"
        if own["world"] == self._world:
            set_random_state(own["random"])
            if threads := use_threads_of(own):
                note += f", {threads}"
        else:
            note += f", written by {own['world']} processes and read by {self._world}: bits may differ"
        self.notes.append(note)
        self._reports.resume(own["step"])
        self._say("resumed", step=self._step, notes=self.notes)
        files = path / FILES
        mine = own["own"] if self._rank < own["world"] else {}
        return Saved(step=own["step"], state=state, own=mine, files=files if files.exists() else None)

    def _use_theirs(self, tensors: dict[str, Any], into: Mapping[str, Any], path: Path) -> None:
        """Replace tensors to load into by those of the caller, which may be sharded."""
        for name, here in tensors_of(plain(into)).items():
            there = tensors.get(name)
            if there is not None and (there.shape != here.shape or there.dtype != here.dtype):
                raise UserError(
                    f"{self._name}: {path} is a checkpoint of another model: {name} is {describe_tensor(there)} there "
                    f"and {describe_tensor(here)} here; start a new run, or bring back what began this one"
                )
            if there is not None:
                tensors[name] = here

    def _fill(self, name: str, value: Any, state: Mapping[str, Any], path: Path) -> None:
        try:
            value.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self._name}: {path} is a checkpoint of another model: {name} cannot be loaded: {describe(error)}; "
                "start a new run, or bring back what began this one"
            ) from error

    def is_due(self, step: int) -> bool:
        """Whether `train.checkpoint` of the job asks for one after this step. Every rank asks after every step."""
        return self._interval.is_due(step)

    def save(
        self,
        state: Mapping[str, Any] | None = None,
        *,
        step: int,
        own: Mapping[str, Any] | None = None,
        files: str | PathLike[str] | None = None,
    ) -> None:
        """Write a checkpoint in the background, while the loop goes on; a full disk costs it, not the training.

        The random state of torch, Python and NumPy is saved too.

        Args:
            state: what all ranks have alike, nested at will; objects with a state_dict at the top. Rank 0's copy of a
                tensor that is not sharded counts, and rank 0's of everything else.
            step: grows from call to call, also over restarts.
            own: JSON values of this rank.
            files: a folder that is complete in all ranks when they call this, such as a framework's own checkpoint; it
                is copied.

        Raises:
            UserError: what was given cannot be saved, ranks do different things, or `load` was not called before.
        """
        self._check_order(step)
        try:
            whole = plain(state or {})
            skeleton = skeleton_of(whole)
        except TypeError as error:
            raise UserError(f"{self._name}: checkpoint.save() was given {error}") from None
        values = {
            "world": self._world,
            "threads": torch.get_num_threads(),
            "step": step,
            "own": dict(own or {}),
            "random": random_state(),
        }
        try:
            json.dumps(values["own"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._name}: checkpoint.save(own=…) expected JSON values: {error}") from None
        folder = None if files is None else Path(files)
        if folder is not None and not folder.is_dir():
            raise UserError(f"{self._name}: checkpoint.save(files=…) expected a folder, got {folder}, which is none")

        def write(work: Path) -> None:
            (work / SKELETON).write_bytes(skeleton)
            if folder is not None:
                shutil.copytree(folder, work / FILES)

        held = self._checkpoints.save(step, tensors_of(whole), values, write)
        self._step = step
        self._say("checkpoint", step=step, held_seconds=held, failures=self._checkpoints.failures)

    def _check_order(self, step: Any) -> None:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise UserError(f"{self._name}: checkpoint.save(step=) expected a whole number from 0, got {step!r}")
        if not self._loaded:
            raise UserError(
                f"{self._name}: checkpoint.load() has to come before the first checkpoint.save(), in every run: it "
                "gives None in a new one, and without it a run that died would begin anew"
            )
        self.meet(f"saves a checkpoint of step {step}")
        if self._step is not None and step <= self._step:
            raise UserError(
                f"{self._name}: checkpoint.save(step={step}) after step {self._step}; steps have to grow, also over "
                "restarts: go on from the step that load() gives"
            )

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete, or has failed."""
        self._checkpoints.wait()

    def finish(self, together: bool) -> list[str]:
        """Wait for what is being written; notes of loading and saving. together: the process group is still there."""
        self._checkpoints.wait(together)
        return [*self.notes, *self._checkpoints.failures, *self._reports.failures]

    def meet(self, what: str) -> None:
        """Wait until every rank says the same. Raises UserError when they do different things, or do not come."""
        said: list[str] = [""] * self._world
        try:
            dist.all_gather_object(said, what, group=self._group)
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise UserError(
                f"{self._name}: rank {self._rank} {what} and waited {self._seconds:g} s in vain for all others to do "
                "the same; every rank has to, not only rank 0"
            ) from None
        other = next((rank for rank, text in enumerate(said) if text != said[0]), None)
        if other is not None:
            raise UserError(
                f"{self._name}: rank 0 {said[0]} while rank {other} {said[other]}; every rank has to do the same, "
                "and not only rank 0"
            )
