"""ONNX, by torch's exporter, from the same program that pt2 is made of."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from torchworker.contract import EXTERNAL_DATA
from torchworker.exporters import attention
from torchworker.exporters.agreement import differs_without_tokens
from torchworker.exporters.elman import translations
from torchworker.exporters.filled import keep_batches_filled, keep_samples_there
from torchworker.exporters.onnx_file import save_onnx
from torchworker.exporters.operators import notes
from torchworker.exporters.program import capture
from torchworker.exporters.subject import Made, Subject
from torchworker.process.failure import UserError, describe
from torchworker.process.shown_warnings import keep
from torchworker.project.signature import BATCH
from torchworker.runtimes.load import load_artifact, onnx_session

OPSET = 20
"""ONNX operator set, unless there is attention with a mask: the lowest that torch 2.13's exporter writes natively, and
so for the oldest readers."""
IR_VERSIONS = {OPSET: 9, attention.OPSET: 10}
"""Of the file, by operator set. ONNX Runtime 1.17 was the first to read 9 and opset 20, 1.23 to read opset 23."""


LARGEST_WEIGHTS = 1_500_000_000
"""Bytes of weights that are in the file itself: protobuf reads no message of 2 GiB, and the rest of it needs some."""
SMALLEST_OUTSIDE = 256
"""Bytes of a tensor that may be outside: readers want what shapes are made of where they read the graph."""


def onnx_model(subject: Subject, path: Path) -> Made:
    """Write one file with named inputs, outputs and dynamic dimensions, and say how it was captured.

    Weights of more than LARGEST_WEIGHTS bytes, or any where the subject says so, are in a file of their own beside it
    (EXTERNAL_DATA).

    Raises UserError for models that torch.export or ONNX cannot express, and where the exporter itself has doubts. What
    ONNX cannot hold whatever the model computes is in `project/shippable.py`.
    """
    # The exporter reports progress on standard output and logs every missing optional decomposition.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # One fused operator that ONNX does not have, for what it has operators for.
    torch.backends.mha.set_fastpath_enabled(False)
    captured = capture(subject)
    program = captured.program
    noted = notes(program, "onnx", subject.folder)
    # The exporter takes the program apart again, and would fix the length of what has a loop.
    with warnings.catch_warnings(record=True) as caught, captured.assuming():
        warnings.simplefilter("always")
        onnx_program, opset = _exported(program, subject)
        if onnx_program is not None and opset == attention.OPSET:
            _write(onnx_program, opset, subject, path)
            if differs_without_tokens(load_artifact("onnx", path, torch.get_num_threads()), subject):
                # A mask of floats that are finite, as T5's biases are: the operator takes the lowest for -inf.
                onnx_program, opset = _at(OPSET, program, subject), OPSET
    unfaithful = [w for w in caught if "duplicated values" in str(w.message)]
    for warning in unfaithful:
        keep(warning)
    if unfaithful or onnx_program is None:
        raise UserError(
            f"export: the ONNX exporter warns that the result may be wrong: {[str(w.message) for w in unfaithful[:1]]}"
        )
    if opset == attention.OPSET:
        noted = tuple(line for line in noted if not line.startswith(attention.AT_20))
    else:
        _write(onnx_program, opset, subject, path)
    return Made(f"{captured.method} → ONNX opset {opset}", noted)


def _write(onnx_program: Any, opset: int, subject: Subject, path: Path) -> None:
    """Finish the exporter's program and write it. Raises UserError where ONNX Runtime lacks an operator for it.

    Args:
        onnx_program: torch.onnx.ONNXProgram, changed in place.
        opset: its operator set.
        subject: what was exported.
        path: of the file.
    """
    keep_batches_filled(onnx_program.model)
    _name_dimensions(onnx_program.model, subject)
    keep_samples_there(onnx_program.model, BATCH)
    onnx_program.model.ir_version = IR_VERSIONS[opset]
    _save(onnx_program.model, subject, path)
    _require_kernels(onnx_program.model, path)


def _save(model: Any, subject: Subject, path: Path) -> None:
    """model: onnx_ir.Model."""
    import onnx_ir

    data = path.name + EXTERNAL_DATA
    path.with_name(data).unlink(missing_ok=True)
    held = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    outside = subject.external_data or sum(tensor.nbytes for tensor in held if tensor is not None) > LARGEST_WEIGHTS
    outside = outside and any(tensor is not None and tensor.nbytes >= SMALLEST_OUTSIDE for tensor in held)
    if outside:
        onnx_ir.save(model, path, external_data=data, size_threshold_bytes=SMALLEST_OUTSIDE)
    else:
        save_onnx(model, path)


def _exported(program: ExportedProgram, subject: Subject) -> tuple[Any, int]:
    """The exporter's program and its operator set. Raises UserError where ONNX cannot express the model."""
    if attention.has_masks(program):
        with contextlib.suppress(Exception):
            return _at(attention.OPSET, program, subject), attention.OPSET
    try:
        return _at(OPSET, program, subject), OPSET
    except Exception as error:
        with contextlib.suppress(Exception):
            # Some operators have a form in ONNX only once torch has taken them apart.
            return _at(OPSET, program.run_decompositions(), subject), OPSET
        raise UserError(
            f"export: ONNX cannot express the model: {_cause(error)}; leave onnx out of export.formats"
        ) from error


def _at(opset: int, program: ExportedProgram, subject: Subject) -> Any:
    more = {**attention.attention_translation(), **_group_norm()} if opset == attention.OPSET else {}
    return torch.onnx.export(
        program,
        (),
        input_names=list(subject.inputs),
        output_names=list(subject.outputs),
        opset_version=opset,
        custom_translation_table={**translations(), **more},
        dynamo=True,
        verbose=False,
    )


def _group_norm() -> dict[Any, Any]:
    """For torch's exporter at an operator set that has GroupNormalization: the operators that it writes below 21.

    ONNX Runtime 1.31 takes that one's variance as the difference of two means: of a flat picture it may be negative,
    and its root is NaN.
    """
    from onnxscript.function_libs.torch_lib.ops.nn import aten_group_norm

    return {torch.ops.aten.group_norm.default: aten_group_norm}


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps it in advice of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return describe(error).splitlines()[0]


def _require_kernels(model: Any, path: Path) -> None:
    """Raises UserError, and the file is gone, where ONNX Runtime lacks an operator for bfloat16 or float16.

    Args:
        model: onnx_ir.Model; ONNX Runtime is asked only where such a value is in it.
        path: where it was written.
    """
    from onnx_ir import DataType

    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    half = {value.dtype for value in values} & {DataType.BFLOAT16, DataType.FLOAT16}
    if not half:
        return
    try:
        onnx_session(str(path), 1)
    except Exception as error:
        for written in (path, path.with_name(path.name + EXTERNAL_DATA)):
            written.unlink(missing_ok=True)
        named = re.search(r"implementation for (\w+)\(|operator \((\w+)\)", str(error))
        lacks = next(filter(None, named.groups())) if named else "operator that it needs"
        kinds = " and ".join(sorted(kind.name.lower() for kind in half))
        said = describe(error).splitlines()[0][:200]
        raise UserError(
            f"export: ONNX Runtime's CPU provider has no {lacks} for {kinds} ({said}); make the model float32 in "
            "model.factory (.float()), or leave onnx out of export.formats"
        ) from error


def _name_dimensions(model: Any, subject: Subject) -> None:
    """Call dynamic dimensions by their names throughout, also in sums (`past + 1`) and inside loops and branches; the
    exporter leaves torch's symbols, such as `s97`.

    model: onnx_ir.Model.
    """
    from onnx_ir import SymbolicDim

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim in subject.dims:
            for axis in dim.axes.get(value.name, ()):
                size = value.shape[axis] if value.shape is not None else None
                if isinstance(size, SymbolicDim) and size.value is not None:
                    names[size.value] = dim.name

    def named(size: str) -> str:
        # A dimension may be declared that is a sum of others to torch.
        return names.get(size) or re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), size)

    graphs = [model.graph, *model.graph.subgraphs()]
    values = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    values += [value for graph in graphs for node in graph for value in node.outputs]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, SymbolicDim) and size.value is not None and named(size.value) != size.value:
                value.shape[axis] = SymbolicDim(named(size.value))
