"""ExecuTorch: the exported program lowered for phones and small machines, which have neither Python nor torch.

Lowering may narrow the declared sizes without a word: the file has memory for less than the lowered program notes. The
runtime looks at no more than how many elements an input has. So both are read back and held against what was declared,
and the file carries its signature, in a method of its own, which readers check.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from torchworker.exporters.agreement import disagreement, hides_nan
from torchworker.exporters.operators import notes
from torchworker.exporters.program import capture
from torchworker.exporters.sizes import ranges
from torchworker.exporters.subject import Made, Subject
from torchworker.process.failure import UserError, describe
from torchworker.process.fork import ChildDiedError, ChildTimeoutError, CrashNote, run_in_fork
from torchworker.project.signature import BATCH
from torchworker.runtimes.load import SIGNATURE, load_artifact, planned_shapes

TRIAL_SECONDS = 300.0
"""A first look at the file's answers takes at most this long."""
Range = tuple[int, int | None]
"""Smallest and largest size of a dimension; None for no limit."""


def executorch(subject: Subject, path: Path) -> Made:
    """Write one program and say how it was made: with XNNPACK's kernels where that is the model, else without.

    Raises UserError without the library, for a dimension without a largest size, and for what cannot be lowered, or
    only to another model.
    """
    require_ends(subject)
    lower = _lowering()
    refusals = []
    for backend, xnnpack in (("XNNPACK", True), ("portable kernels", False)):
        # Lowering narrows the program it is given, so each attempt has one of its own.
        captured = capture(subject)
        noted = notes(captured.program, "executorch", subject.folder)
        try:
            with captured.assuming():
                lowered, content = lower(captured.program, subject, xnnpack)
        except Exception as error:
            refusals.append(f"{backend}: it cannot be lowered: {describe(error).splitlines()[0][:300]}")
            continue
        path.write_bytes(content)
        refusal = narrowed(subject, ranges(lowered, subject), "the lowered program takes")
        refusal = refusal or _tried(subject, path)
        if not refusal:
            return Made(f"{captured.method} → ExecuTorch, {backend}", noted)
        refusals.append(f"{backend}: {refusal}")
    path.unlink(missing_ok=True)
    raise UserError(f"export: ExecuTorch: {'; '.join(refusals)}; leave executorch out of export.formats")


def require_ends(subject: Subject) -> None:
    """Raises UserError for a dimension without a largest size: memory is planned for it before anything runs."""
    for dim in subject.dims:
        if dim.max is None:
            key = "export.max_batch" if dim.name == BATCH else f"export.dynamic.{dim.name}.max"
            raise UserError(
                f"{key}: expected the largest size that users will send, for which ExecuTorch plans memory, got none; "
                "declare it, or leave executorch out of export.formats"
            )


def narrowed(subject: Subject, found: Mapping[str, Range], who: str) -> str:
    """Which dimensions have a smaller range than was declared, in words. Empty: none.

    found: name to smallest and largest size; who: whose they are, in words.
    """
    said = []
    for dim in subject.dims:
        low, high = found[dim.name]
        if low > dim.min or (high is not None and dim.max is not None and high < dim.max):
            key = "export.max_batch" if dim.name == BATCH else f"export.dynamic.{dim.name}"
            said.append(f"{key}: {dim.min} to {dim.max} is declared for {dim.name}, and {who} {low} to {high}")
    return "; ".join(said)


Lower = Callable[[ExportedProgram, Subject, bool], tuple[ExportedProgram, bytes]]
"""(program, subject, whether XNNPACK takes what it can) → the lowered program and the file's content."""


def _lowering() -> Lower:
    """Raises UserError without the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What importing torchao says about the CUDA libraries it does not find.
        logging.disable(logging.WARNING)
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
        except ImportError as error:
            raise UserError(
                f"export.formats: executorch needs the library of that name ({describe(error)}): "
                "pip install 'executorch==1.5.1', or leave executorch out"
            ) from error
        finally:
            logging.disable(logging.NOTSET)

    def lower(program: ExportedProgram, subject: Subject, xnnpack: bool) -> tuple[ExportedProgram, bytes]:
        # NNPACK, which this machine's kernels might use and the device's do not, has a limit of its own: batch < 16.
        with warnings.catch_warnings(), torch.backends.nnpack.flags(enabled=False):
            warnings.simplefilter("ignore")
            manager: Any = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()] if xnnpack else None,
                constant_methods={SIGNATURE: subject.signature()},
            )
            final = manager.to_executorch()
            return final.exported_program(), bytes(final.buffer)

    return lower


def _tried(subject: Subject, path: Path) -> str:
    """What is wrong with the sizes that the file takes, or with its answers; asked in a process that may die of it."""

    def look() -> str:
        refusal = narrowed(subject, planned(subject, path), "the file has memory for")
        if refusal:
            return refusal
        call = load_artifact("executorch", path, torch.get_num_threads())
        return disagreement(call, subject) or hides_nan(call, subject)

    try:
        return run_in_fork(look, CrashNote(), TRIAL_SECONDS)
    except ChildDiedError as death:
        return str(death)
    except ChildTimeoutError as hung:
        return f"its runtime gives {hung}"
    except Exception as error:
        return f"its runtime fails: {describe(error).splitlines()[0][:300]}"


def planned(subject: Subject, path: Path) -> dict[str, Range]:
    """The largest size of each dimension that the file has memory for; it notes no smallest."""
    shapes = dict(zip(subject.inputs, planned_shapes(path), strict=True))
    found: dict[str, Range] = {}
    for dim in subject.dims:
        sizes = [shapes[name][axis] for name, axes in dim.axes.items() for axis in axes]
        found[dim.name] = (dim.min, min(sizes))
    return found
