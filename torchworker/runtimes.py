"""Load an artifact and call it on named tensors, without the code that made it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Inputs by name → outputs in the order of the signature."""


def load(kind: str, path: Path, threads: int) -> Call:
    """kind: `torchscript`, `onnx` or `pt2`; threads: intra-op threads of the runtime."""
    if kind == "onnx":
        return _onnx(path, threads)
    torch.set_num_threads(threads)
    return _torchscript(path) if kind == "torchscript" else _pt2(path)


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if outputs is None:
        return []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [tensor for item in outputs for tensor in _flat(item)]


def _torchscript(path: Path) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return _flat(call_script(program, inputs))

    return call


def call_script(program: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Call a TorchScript program: by position, or by name where a parameter before the last is left out."""
    names = [argument.name for argument in program.forward.schema.arguments][1:]
    if len(names) == len(inputs) or names[: len(inputs)] == list(inputs):
        return program(*inputs.values())
    return program(**inputs)


def _pt2(path: Path) -> Call:
    exported = torch.export.load(str(path))
    program = exported.module()
    positional = exported.call_spec.in_spec.child(0).num_children

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        given = list(inputs.items())
        with torch.no_grad():
            return _flat(program(*(tensor for _, tensor in given[:positional]), **dict(given[positional:])))

    return call


def onnx_session(model: str | bytes, threads: int, *, as_written: bool = False) -> Any:
    """An onnxruntime.InferenceSession on the CPU. model: path or content; as_written: without its optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnx(path: Path, threads: int) -> Call:
    session = onnx_session(str(path), threads)
    wanted: Sequence[str] = [item.name for item in session.get_inputs()]

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        fed = {name: inputs[name].contiguous().numpy() for name in wanted}
        return [torch.from_numpy(array) for array in session.run(None, fed)]

    return call
