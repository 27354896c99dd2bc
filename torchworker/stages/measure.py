"""How fast, large and quick to load artifacts are: each in a process of its own, calls of all taking turns.

Every artifact is loaded by a fork of this process, which has torch and has run nothing. The forks wait; one at a time
is told to make some calls, at every batch size round after round, so that what else the machine does meanwhile falls
on all of them alike.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from torchworker.contract import DynamicDim, Measured, MeasureRequest, MeasureResult, Speed, Timed, read_with
from torchworker.gates.speed import apply_speed_limits, recommended, speedups, too_slow, undecided
from torchworker.parity.clean_room import forbid_user_code
from torchworker.parity.reference import enlarged
from torchworker.process.failure import describe
from torchworker.process.fork import ChildDiedError, CrashNote, ForkedCall, run_in_fork
from torchworker.project.signature import BATCH, resized, samples_of_a_call, sizes_of
from torchworker.runtimes.load import Call, load_artifact, load_libraries, prepare_runtime, require_hashes

ROUNDS = 5
ROUND_SECONDS = 0.02
"""About how long the calls of one artifact at one batch size take in a round."""
CALLS = (4, 100)
"""Fewest and most calls of a round."""
WARM_UP_CALLS = 3
DECIDING_ROUNDS = 15
"""Further ones, of artifacts between which the first did not decide."""
LONGEST_SECONDS, DECIDING_SECONDS = 10.0, 3.0
"""After this long at one batch size an artifact gets no further round, no deciding one."""

SIZES = 16
"""Of the declared ones that memory is measured over. ONNX Runtime keeps memory for each shape, and the largest one
needs most: of an encoder for 1 to 600 tokens 16 sizes found 189 MB, all 600 found 200 (17 at the data's own)."""
SIZES_SECONDS = 3.0
"""After this long no further size is asked; the largest comes first."""

Inputs = dict[str, Tensor]


def measure(request: MeasureRequest) -> MeasureResult:
    """Numbers of every subject, what is recommended, and verdicts. A subject that fails has none, and says why."""
    forbid_user_code(request.forbidden_modules, request.forbidden_folder)
    inputs = _inputs(request)
    dims = [*request.dims, DynamicDim(name=BATCH, min=1, max=None, axes={spec.name: (0,) for spec in request.inputs})]
    measured: dict[str, Measured] = {}
    with ExitStack() as stack:
        processes: dict[str, _Process] = {}
        for subject in request.subjects:
            print(f"measure: {subject.name}: loading", flush=True)
            read = read_with(subject.file, [str(path) for path in Path(subject.file).parent.iterdir()])
            found = Measured(format=subject.format, bytes=sum(Path(name).stat().st_size for name in read))
            try:
                # One after the other: what loads beside another waits for it.
                loads = [_load_in_fork(subject, inputs, request.threads) for _ in range(request.loads - 1)]
                process = stack.enter_context(_Process(subject, inputs, request.threads, dims))
                loads.append(process.load_ms)
            except Exception as error:
                measured[subject.name] = replace(found, problem=describe(error))
                continue
            processes[subject.name] = process
            measured[subject.name] = replace(found, load_ms=statistics.median(loads))
        speeds = {name: list[Speed]() for name in processes}
        for batch in inputs:
            print(f"measure: batch {batch}", flush=True)
            for name, speed in _take_turns(processes, batch).items():
                if isinstance(speed, Speed):
                    speeds[name].append(speed)
                else:
                    processes.pop(name)
                    measured[name] = replace(measured[name], load_ms=None, problem=speed)
        sizes = declared_sizes(inputs[max(inputs)], request)
        for name, process in processes.items():
            try:
                asked, taken = process.ask("sizes", sizes), process.ask("memory")
            except RuntimeError as error:
                # It may take more memory than there is.
                asked, taken = describe(error), None
            measured[name] = replace(measured[name], memory_bytes=taken, memory_over=asked, speeds=speeds[name])
    faster = speedups(measured)
    slow = too_slow(faster, request.speedup)
    kept = {name: item for name, item in measured.items() if name not in slow}
    serve = recommended(kept, request.serve)
    return MeasureResult(
        measured=measured,
        serve=serve,
        speedups=faster,
        too_slow=slow,
        verdicts=apply_speed_limits(kept, serve, request.gates),
        threads=request.threads,
        machine=machine(),
    )


def machine() -> str:
    """Processor and how many of it this process may use."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else 'processor'}, {len(os.sched_getaffinity(0))} cores"


def _inputs(request: MeasureRequest) -> dict[int, Inputs]:
    """Inputs by batch size, ascending, made of the largest reference batch."""
    with safe_open(request.golden, framework="pt") as golden:
        largest = max(int(key.split(".")[0].removeprefix("batch_")) for key in golden.keys())  # noqa: SIM118
        named = {spec.name: golden.get_tensor(f"batch_{largest}.input.{spec.name}") for spec in request.inputs}
    largest = samples_of_a_call(request.inputs, largest)
    sizes = sorted({size for size in request.batches if size <= largest}) or [1]
    return {size: {name: tensor.clone() for name, tensor in enlarged(named, size).items()} for size in sizes}


def declared_sizes(inputs: Inputs, request: MeasureRequest) -> list[dict[str, int]]:
    """Sizes of the declared dimensions to measure memory over: the largest, the smallest, and steps between them.

    Args:
        inputs: those of the largest batch that is called with, [batch, …].
        request: says which dimensions there are. One without a largest size goes to twice its present one and one.

    Returns:
        Dimension to size; the batch too, where a largest one is declared. Empty when nothing is.
    """
    present = sizes_of(inputs, request.dims)
    ends = {dim.name: (dim.min, dim.max or 2 * present[dim.name] + 1) for dim in request.dims}
    if request.max_batch is not None and samples_of_a_call(request.inputs, request.max_batch) > 1:
        ends[BATCH] = (1, request.max_batch)
    if not ends:
        return []
    # All of them together, from the smallest to the largest: the corner where each is largest needs most.
    steps = [
        {name: low + (high - low) * step // (SIZES - 1) for name, (low, high) in ends.items()} for step in range(SIZES)
    ]
    return [steps[-1], *(sizes for position, sizes in enumerate(steps[:-1]) if sizes not in steps[:position])]


@dataclass(frozen=True)
class _Round:
    """Calls in a row, in seconds."""

    walls: Sequence[float]
    thread: float
    """CPU time of the calling thread, all calls together."""
    cpu: float
    """The same of all threads."""


def _take_turns(processes: Mapping[str, _Process], batch: int) -> dict[str, Speed | str]:
    """Every artifact's speed at one batch size, or why it has none."""
    rounds: dict[str, list[_Round]] = {}
    failed: dict[str, Speed | str] = {}
    calls: dict[str, int] = {}
    names = list(processes)

    def attempt(name: str, *order: Any) -> Any:
        try:
            return processes[name].ask(*order)
        except Exception as error:
            failed[name] = describe(error)
            return None

    def turns(of: Sequence[str], count: int, longest: float) -> None:
        for number in range(count):
            # Nobody always comes after the same neighbour.
            for name in of if number % 2 == 0 else reversed(of):
                spent = sum(sum(done.walls) for done in rounds.get(name, []))
                if name in failed or spent > longest:
                    continue
                done = attempt(name, "round", batch, calls[name])
                if done is not None:
                    rounds.setdefault(name, []).append(done)

    for name in names:
        calls[name] = attempt(name, "warm up", batch) or 0
    turns(names, ROUNDS, LONGEST_SECONDS)
    quickest = {name: min(map(_thread_seconds, rounds[name])) for name in names if name not in failed}
    turns(undecided(quickest), DECIDING_ROUNDS, DECIDING_SECONDS)
    return {name: failed.get(name) or _speed(batch, rounds[name]) for name in names}


def _thread_seconds(done: _Round) -> float:
    """Of one call."""
    return done.thread / len(done.walls)


def _speed(batch: int, rounds: Sequence[_Round]) -> Speed:
    walls = sorted(wall for done in rounds for wall in done.walls)
    return Speed(
        batch=batch,
        calls=len(walls),
        p50_ms=1000 * statistics.median(walls),
        p99_ms=1000 * walls[min(len(walls) - 1, round(0.99 * len(walls)))],
        # Others on the machine make a round slower, even in CPU time, and never quicker (as `timeit` has it).
        thread_ms=1000 * min(map(_thread_seconds, rounds)),
        cpu_ms=1000 * min(done.cpu / len(done.walls) for done in rounds),
    )


class _Process:
    """A fork that holds one artifact and calls it when told to. Raises what the artifact raises."""

    def __init__(self, subject: Timed, inputs: Mapping[int, Inputs], threads: int, dims: Sequence[DynamicDim]) -> None:
        self._name = subject.name
        self._pipe, theirs = Pipe()
        self._child = ForkedCall(partial(self._serve, theirs, subject, inputs, threads, dims), CrashNote())
        theirs.close()
        try:
            self.load_ms: float = self._answer()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _serve(self, pipe: Connection, *asked: Any) -> None:
        # In the fork: while it holds the other end too, that end is never closed.
        self._pipe.close()
        _serve(pipe, *asked)

    def ask(self, *order: Any) -> Any:
        """What it answers."""
        self._pipe.send(order)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the process that held {self._name} ended") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _end(self) -> None:
        # It waits for an order, which does not come any more.
        self._pipe.close()
        self._child.wait()


def _load_in_fork(subject: Timed, inputs: Mapping[int, Inputs], threads: int) -> float:
    """Milliseconds in a process that does nothing else."""
    try:
        return run_in_fork(lambda: _load(subject, inputs, threads)[1], CrashNote())
    except ChildDiedError as death:
        raise RuntimeError(str(death)) from None


def _load(subject: Timed, inputs: Mapping[int, Inputs], threads: int) -> tuple[Call, float]:
    """The artifact, and milliseconds until it gave its first answer."""
    prepare_runtime(subject.format, threads)
    require_hashes(Path(), subject.hashes)
    load_libraries(map(Path, subject.libraries))
    began = time.perf_counter()
    call = load_artifact(subject.format, Path(subject.file), threads)
    call(next(iter(inputs.values())))
    return call, 1000 * (time.perf_counter() - began)


def _serve(
    pipe: Connection, subject: Timed, inputs: Mapping[int, Inputs], threads: int, dims: Sequence[DynamicDim]
) -> None:
    """Load, then answer orders until the other end is closed."""
    try:
        prepare_runtime(subject.format, threads)
        before = _start_watching_memory()
        call, milliseconds = _load(subject, inputs, threads)
        gc.collect()
        gc.disable()
        pipe.send(milliseconds)
    except Exception as error:
        pipe.send(RuntimeError(describe(error)))
        return
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            if order[0] == "warm up":
                pipe.send(_warm_up(call, inputs[order[1]]))
            elif order[0] == "round":
                pipe.send(_round(call, inputs[order[1]], order[2]))
            elif order[0] == "sizes":
                pipe.send(_ask_sizes(call, inputs[max(inputs)], dims, order[1]))
            else:
                peak = _memory("VmHWM")
                pipe.send(None if before is None or peak is None else max(0, peak - before))
        except Exception as error:
            pipe.send(RuntimeError(describe(error)))


def _warm_up(call: Call, inputs: Inputs) -> int:
    """Calls that fill a round."""
    for _ in range(WARM_UP_CALLS):
        call(inputs)
    began = time.perf_counter()
    call(inputs)
    return min(max(round(ROUND_SECONDS / max(time.perf_counter() - began, 1e-6)), CALLS[0]), CALLS[1])


def _ask_sizes(call: Call, inputs: Inputs, dims: Sequence[DynamicDim], sizes: Sequence[Mapping[str, int]]) -> str:
    """Call with inputs of each size; says which."""
    asked: list[Mapping[str, int]] = []
    began, why = time.perf_counter(), ""
    for wanted in sizes:
        try:
            call(resized(inputs, dims, wanted))
        except Exception as error:
            # What is live may have been declared for less.
            why = (
                f"; refused at {', '.join(f'{name} {size}' for name, size in wanted.items())}: {describe(error)[:200]}"
            )
            break
        asked.append(wanted)
        if time.perf_counter() - began > SIZES_SECONDS:
            break
    if not asked:
        return f"the data's own sizes{why}" if why else ""
    ends = {name: sorted({wanted[name] for wanted in asked}) for name in asked[0]}
    shown = ", ".join(
        f"{name} {found[0]} to {found[-1]}" if len(found) > 1 else f"{name} {found[0]}" for name, found in ends.items()
    )
    return f"{len(asked)} of the declared sizes: {shown}{why}"


def _round(call: Call, inputs: Inputs, calls: int) -> _Round:
    walls = []
    thread, cpu = time.thread_time(), time.process_time()
    for _ in range(calls):
        began = time.perf_counter()
        call(inputs)
        walls.append(time.perf_counter() - began)
    return _Round(walls, time.thread_time() - thread, time.process_time() - cpu)


def _start_watching_memory() -> int | None:
    """Bytes that this process has, from which on its peak is kept; None where the kernel does not say."""
    # Where it is refused, the peak counts from the fork on, and importing the runtime may have raised it.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
