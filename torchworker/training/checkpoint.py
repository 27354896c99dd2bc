"""Checkpoints of a distributed run: written beside the training, complete or absent, verified before use.

Tensors go through torch.distributed.checkpoint, so that another world size can read them. What only one rank
knows (its random state, its share of sums) is a JSON file a rank. A checkpoint is written as `step-<n>.work`; rank 0
completes it with `CHECKPOINT.json`, the SHA-256 of every file, and one rename.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from torchworker.contract import CHECKPOINT
from torchworker.durable import make_folders, rename_durably, set_aside, sync

STEPS_TO_MEASURE = 20
"""Steps after which an interval in seconds is turned into steps."""


def find_latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what they were, and a message for each newer one that is not.

    Reads only.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob("step-????????"), reverse=True):
        problem = problem_of(path)
        if not problem:
            return path, damaged
        damaged.append(f"checkpoint {path.name} is damaged ({problem}) and is not used")
    return None, damaged


def problem_of(path: Path) -> str:
    """What is wrong with a folder that `complete` has made; empty when its files are what they were."""
    try:
        said: dict[str, str] = json.loads((path / CHECKPOINT).read_text())
    except (OSError, ValueError):
        return f"{CHECKPOINT} is missing or torn"
    found = _hashes(path)
    if found == said:
        return ""
    wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    return f"{wrong[0]} is missing, added or changed"


def complete(work: Path) -> None:
    """Give `<name>.work` its manifest and its name, from which on it is there."""
    (work / CHECKPOINT).write_text(json.dumps(_hashes(work)))
    target = work.with_suffix("")
    # A damaged one of the same name was not used.
    shutil.rmtree(target, ignore_errors=True)
    rename_durably(work, target)


def _set_damaged_aside(folder: Path, latest: Path | None) -> None:
    """What is newer than the latest sound checkpoint: it would be counted among those that stay."""
    for path in sorted(folder.glob("step-????????")):
        if latest is None or path.name > latest.name:
            set_aside(path, "the checkpoint is damaged and is not used")


def _hashes(path: Path) -> dict[str, str]:
    hashes = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != CHECKPOINT:
            with file.open("rb") as opened:
                hashes[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


class Interval:
    """When checkpoints are due: every so many steps, or about every so many seconds, at the same steps in all ranks."""

    def __init__(self, steps: int | None, seconds: float) -> None:
        self._every, self._seconds = steps or 0, seconds
        self._calls = 0
        self._began = 0.0

    def is_due(self, step: int) -> bool:
        """Every rank asks after every step."""
        if not self._every:
            self._measure()
        return self._every > 0 and step % self._every == 0

    def _measure(self) -> None:
        if not self._calls:
            self._began = time.perf_counter()
        self._calls += 1
        if self._calls > STEPS_TO_MEASURE:
            # Rank 0's clock decides for all.
            pace = (time.perf_counter() - self._began) / STEPS_TO_MEASURE
            every: list[Any] = [max(1, round(self._seconds / pace))]
            dist.broadcast_object_list(every, 0)
            self._every = every[0]


class Checkpoints:
    """Saves and loads the checkpoints of one run. Every rank makes one and calls the same methods in the same order."""

    def __init__(self, folder: Path, keep: int) -> None:
        """folder: on a file system that all ranks share; keep: how many complete checkpoints stay."""
        self._folder, self._keep = folder, keep
        self._rank = dist.get_rank()
        # Saving happens in a thread, so its messages need a group that training does not use.
        self._group = dist.new_group(backend="gloo")
        self._pending: concurrent.futures.Future[Any] | None = None
        self._completed = threading.Event()
        self._abandoned: list[Path] = []
        self.failures: list[str] = []
        """Why checkpoints could not be written; training goes on without them."""

    def latest(self) -> tuple[Path | None, list[str]]:
        """What rank 0 finds, on every rank; leftovers of a death are removed."""
        found: list[Any] = [None, []]
        if self._rank == 0:
            make_folders(self._folder)
            for leftover in self._folder.glob("step-*.work"):
                shutil.rmtree(leftover, ignore_errors=True)
            found = list(find_latest(self._folder))
            _set_damaged_aside(self._folder, found[0])
        dist.broadcast_object_list(found, 0)
        return found[0], found[1]

    def save(
        self,
        step: int,
        state: dict[str, Any],
        own: dict[str, Any],
        write: Callable[[Path], None] | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> float:
        """Start writing a checkpoint and return the seconds that training was held up.

        Args:
            step: optimizer steps that are done.
            state: tensors and plain values that every rank has, such as state dicts. Tensors may change afterwards.
            own: this rank's JSON values, `world` among them.
            write: called on rank 0 to write other files into the checkpoint's folder.
            kept: more of the state.
        """
        # Half a second of import that a short run does not need.
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        began = time.perf_counter()
        self.wait()
        work = self._folder / f"step-{step:08d}.work"
        # All ranks or none: a rank whose disk is full must not leave the others waiting in the save.
        problem = ""
        try:
            work.mkdir(parents=True, exist_ok=True)
            (work / f"rank{self._rank}.json").write_text(json.dumps(own))
            if write is not None and self._rank == 0:
                write(work)
        # shutil.Error is an OSError too.
        except OSError as error:
            problem = str(error)
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._group)
        if any(problems):
            self._give_up(work, next(text for text in problems if text))
            self.wait()
            return time.perf_counter() - began
        # It copies all tensors before it returns, those on a CPU too, so training may go on changing them.
        future = dcp.async_save(  # type: ignore[attr-defined]
            pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, {**state, **(kept or {})}),
            checkpoint_id=str(work),
            process_group=self._group,
            # Running statistics differ by rank between two forwards; rank 0's are the ones that count.
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        )
        self._pending = cast("concurrent.futures.Future[Any]", future)
        if self._rank == 0:
            self._completed.clear()
            self._pending.add_done_callback(lambda done: self._complete(done, work))
        return time.perf_counter() - began

    def _complete(self, done: concurrent.futures.Future[Any], work: Path) -> None:
        """In rank 0's saving thread, after every rank has written: hash, rename, forget the oldest."""
        try:
            done.result()
            # What lies beside the checkpoints, such as a custom loop's reports, is as new as they are.
            for path in self._folder.iterdir():
                if path.is_file():
                    sync(path)
            complete(work)
            for old in sorted(self._folder.glob("step-????????"))[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._give_up(work, str(error).strip().splitlines()[-1])
        finally:
            self._completed.set()

    def _give_up(self, work: Path, reason: str) -> None:
        self.failures.append(f"checkpoint {work.stem} was not written: {reason}")
        self._abandoned.append(work)

    def wait(self, together: bool = True) -> None:
        """Wait until the checkpoint being written is complete or has failed.

        together: until it is so for every rank; not for one whose process group is gone.
        """
        if self._pending is not None:
            concurrent.futures.wait([self._pending])
            self._pending = None
            if self._rank == 0:
                # The callback runs after the future is done.
                self._completed.wait()
            if together:
                dist.barrier(group=self._group)
        # By now no rank writes to what was given up.
        while self._rank == 0 and self._abandoned:
            shutil.rmtree(self._abandoned.pop(), ignore_errors=True)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill `state`, which has the structure that was saved, with what was saved; any world size can."""
        import torch.distributed.checkpoint as dcp

        dcp.load(state, checkpoint_id=str(path), process_group=self._group)  # type: ignore[attr-defined]

    def names(self, path: Path) -> set[str]:
        """Of all values of the state that was saved, such as `optimizer.state.0.weight.step`."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        return set(FileSystemReader(path).read_metadata().state_dict_metadata)

    def own(self, path: Path, rank: int) -> dict[str, Any]:
        """What a rank saved for itself; rank 0's values for a rank that the saving run did not have."""
        first: dict[str, Any] = json.loads((path / "rank0.json").read_text())
        if rank == 0 or rank >= first["world"]:
            return first
        values: dict[str, Any] = json.loads((path / f"rank{rank}.json").read_text())
        return values


def use_threads_of(own: Mapping[str, Any]) -> str:
    """Give torch as many threads as the run began with: sums that they share are rounded in another order by others.

    own: what `Checkpoints.own` gives, with `threads` unless an earlier version wrote it. Returns a note, empty when
    nothing changed.
    """
    then, now = own.get("threads", torch.get_num_threads()), torch.get_num_threads()
    if then == now:
        return ""
    torch.set_num_threads(then)
    return f"with {then} torch {'thread' if then == 1 else 'threads'} a process, as it began, and not {now}"


def random_state() -> dict[str, Any]:
    """The state of every random generator that user code may draw from, as JSON values."""
    state: dict[str, Any] = {"torch": _encoded(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = _encoded(torch.cuda.get_rng_state())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue where `random_state` was taken."""
    torch.set_rng_state(_decoded(state["torch"]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(_decoded(state["cuda"]))
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


def _encoded(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
