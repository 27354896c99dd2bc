"""Call an artifact through the C++ runner: a process without Python that speaks frames of tensors (cpp/runner.cpp)."""

from __future__ import annotations

import contextlib
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from torchworker.runtimes.load import Call

TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
"""The order is the protocol's: cpp/runner.cpp has the same."""


class RunnerEndedError(Exception):
    """The runner is gone: killed, crashed or never loaded. The message has the last words of its log."""


@contextlib.contextmanager
def running(runner: Path, kind: str, artifact: Path, threads: int, log: Path) -> Iterator[Call]:
    """Start the runner with one artifact; it ends with the block.

    Args:
        runner: the program that the stage `cpp` built.
        kind: one of RUN_IN_CPP.
        artifact: the file that it runs.
        threads: intra-op threads.
        log: where its standard error goes.

    Yields:
        The call. It raises RuntimeError with the runner's message when the model fails, and the runner goes on.

    Raises:
        RunnerEndedError: it does not load the artifact, or is gone.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(runner), kind, str(artifact), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            given.write(encode(inputs))
            given.flush()
            return _read(answers)
        except (BrokenPipeError, EOFError) as error:
            raise _ended(process, log) from error

    try:
        try:
            _read(answers)
        except EOFError as error:
            raise _ended(process, log) from error
        except RuntimeError as error:
            raise RunnerEndedError(f"does not load: {error}") from error
        yield call
    finally:
        with contextlib.suppress(OSError):
            given.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        answers.close()


def _ended(process: subprocess.Popen[bytes], log: Path) -> RunnerEndedError:
    status = process.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return RunnerEndedError(f"the C++ runner {how}: {' '.join(log.read_text(errors='replace').splitlines()[-3:])}")


def encode(inputs: Mapping[str, Tensor]) -> bytes:
    """A request: count, then name, dtype, sizes and elements of each input."""
    parts = [struct.pack("<I", len(inputs))]
    for name, tensor in inputs.items():
        parts.append(struct.pack("<B", len(name.encode())) + name.encode())
        parts.append(struct.pack(f"<BB{tensor.dim()}q", TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape))
        # A single element is contiguous whatever its stride, and only a copy can be looked at as bytes.
        values = tensor.clone(memory_format=torch.contiguous_format)
        parts.append(values.flatten().view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def _read(answers: IO[bytes]) -> list[Tensor]:
    """Raises RuntimeError with the runner's message, EOFError when it is gone."""
    (fine,) = struct.unpack("<B", _exactly(answers, 1))
    (count,) = struct.unpack("<I", _exactly(answers, 4))
    if not fine:
        raise RuntimeError(_exactly(answers, count).decode(errors="replace").strip())
    tensors = []
    for _ in range(count):
        kind, dimensions = struct.unpack("<BB", _exactly(answers, 2))
        if kind >= len(TYPES):
            raise RuntimeError("an output has a dtype that the runner does not pass on")
        sizes = struct.unpack(f"<{dimensions}q", _exactly(answers, 8 * dimensions))
        tensor = torch.empty(sizes, dtype=TYPES[kind])
        raw = _exactly(answers, tensor.numel() * tensor.element_size())
        flat = torch.frombuffer(bytearray(raw), dtype=TYPES[kind]) if raw else tensor.flatten()
        tensors.append(flat.view(sizes))
    return tensors


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the runner's answer ends early")
    return data
