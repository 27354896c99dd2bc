"""ONNX, by torch's exporter, from the same program that pt2 is made of."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from torchworker.exporters.elman import translations
from torchworker.exporters.operators import notes
from torchworker.exporters.program import capture
from torchworker.exporters.recurrent import keep_batches_filled
from torchworker.exporters.subject import Made, Subject
from torchworker.process.failure import UserError, describe
from torchworker.process.shown_warnings import keep

OPSET = 20
"""ONNX operator set: what torch 2.13's exporter writes natively."""


def onnx_model(subject: Subject, path: Path) -> Made:
    """Write one file with named inputs, outputs and dynamic dimensions, and say how it was captured.

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
        try:
            onnx_program = _exported(program, subject)
        except Exception as error:
            try:
                # Some operators have a form in ONNX only once torch has taken them apart.
                onnx_program = _exported(program.run_decompositions(), subject)
            except Exception:
                raise UserError(
                    f"export: ONNX cannot express the model: {_cause(error)}; leave onnx out of export.formats"
                ) from error
    unfaithful = [w for w in caught if "duplicated values" in str(w.message)]
    for warning in unfaithful:
        keep(warning)
    if unfaithful or onnx_program is None:
        raise UserError(
            f"export: the ONNX exporter warns that the result may be wrong: {[str(w.message) for w in unfaithful[:1]]}"
        )
    keep_batches_filled(onnx_program.model)
    _name_dimensions(onnx_program.model, subject)
    onnx_program.save(str(path), external_data=False)
    return Made(f"{captured.method} → ONNX opset {OPSET}", noted)


def _exported(program: ExportedProgram, subject: Subject) -> Any:
    return torch.onnx.export(
        program,
        (),
        input_names=list(subject.inputs),
        output_names=list(subject.outputs),
        opset_version=OPSET,
        custom_translation_table=translations(),
        dynamo=True,
        verbose=False,
    )


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps it in advice of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return describe(error).splitlines()[0]


def _name_dimensions(model: Any, subject: Subject) -> None:
    """Call dynamic dimensions by their names throughout; the exporter leaves torch's symbols, such as `s97`.

    model: onnx_ir.Model.
    """
    from onnx_ir import SymbolicDim

    names: dict[Any, str] = {}
    for value in model.graph.inputs:
        for dim in subject.dims:
            for axis in dim.axes.get(value.name, ()):
                if value.shape is not None and isinstance(value.shape[axis], SymbolicDim):
                    names[value.shape[axis]] = dim.name
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, SymbolicDim) and size in names:
                value.shape[axis] = SymbolicDim(names[size])
