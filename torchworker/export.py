"""Export trained weights, each format beside the reference data that it is held against.

Each format is captured in a process of its own: exporters keep global state (a second dynamic-length ONNX
export in one process can fail), and a trace may change a model it is given.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from torchworker.contract import (
    FORMAT_FILES,
    PROBE,
    REQUEST,
    Artifact,
    ExportRequest,
    ExportResult,
    Failure,
    Project,
    Reply,
    decode,
)
from torchworker.failure import Described, UserMistake, describe, failure_of, user_line
from torchworker.lifeline import die_with_parent
from torchworker.project import (
    batches,
    build_dataset,
    build_model,
    enter,
    forward,
    name_inputs,
    name_outputs,
    specs,
)
from torchworker.reference import enlarged, require_trained, write_reference
from torchworker.weights import load_weights, state_hash

OPSET = 20
"""ONNX operator set: what torch 2.13's exporter writes natively."""
ONNX_SINGLE_FILE_BYTES = 1_900_000_000
"""A protobuf file ends at 2 GiB; stay clear of it."""
REFERENCE_THREADS = 1
"""Reference outputs are computed on one thread, so that they do not depend on the machine's cores."""


def export(request: ExportRequest) -> ExportResult:
    """Write reference data, then every format, into the request's folder.

    Raises UserMistake when the model cannot be captured faithfully, with the line and the ways out.
    """
    torch.set_num_threads(REFERENCE_THREADS)
    torch.manual_seed(request.seed)
    enter(request.project)
    model = build_model(request.project)
    try:
        load_weights(model, Path(request.weights))
    except (RuntimeError, ValueError) as error:
        raise UserMistake(
            f"{request.project.model.where}: the trained weights do not fit the model as it is now: {describe(error)}. "
            "If its code was changed after training, start a new run"
        ) from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dataset = build_dataset(request.project, "validation")
    # The user's code may have changed it on import.
    torch.set_num_threads(REFERENCE_THREADS)
    inputs, _ = next(batches(dataset, request.batch, request.project))
    named = enlarged(name_inputs(model, inputs, request.project), request.batch)
    with torch.no_grad():
        require_trained(model, Path(request.weights).with_name(PROBE), request.project)
        before = state_hash(model)
        outputs = name_outputs(forward(model, named, request.project), request.project)
        reference = "" if request.only else write_reference(request, model, named, dataset)
        if state_hash(model) != before:
            raise UserMistake(
                "export: running the model in eval mode changed its own parameters or buffers; an exported model "
                "must not keep state between calls"
            )
        artifacts = _side_by_side(request, model, named, list(outputs))
    return ExportResult(artifacts=artifacts, inputs=specs(named), outputs=specs(outputs), reference=reference)


def _side_by_side(
    request: ExportRequest, model: nn.Module, named: Mapping[str, Tensor], outputs: list[str]
) -> dict[str, Artifact]:
    """Each format in a fork of this process, which has the model and has exported nothing.

    A fork spares every exporter the import of the user's code. It is safe here: torch runs on one thread, so
    there is no thread pool to lose.
    """
    folder = Path(request.folder)
    if request.only is not None:
        _export_child(request.only, request, model, named, outputs)
        statuses = {request.only: 0}
    elif threading.active_count() > 1 or torch.get_num_threads() != REFERENCE_THREADS:
        statuses = _in_new_interpreters(request)
    else:
        statuses = _in_forks(request, model, named, outputs)
    artifacts, failures = {}, []
    for kind, status in statuses.items():
        reply = folder / f"export-{kind}.json"
        if not reply.exists():
            raise RuntimeError(f"the export to {kind} ended with status {status} and left no result")
        said = Reply.read(reply)
        if request.only is None:
            reply.unlink()
        if said.failure is not None:
            failures.append(said.failure)
        else:
            artifacts[kind] = decode(Artifact, said.result)
    if failures:
        raise Described(_joined(failures))
    return artifacts


def _in_forks(
    request: ExportRequest, model: nn.Module, named: Mapping[str, Tensor], outputs: list[str]
) -> dict[str, int]:
    children: dict[int, str] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    for kind in request.formats:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(parent)
            os._exit(_export_child(kind, request, model, named, outputs))
        children[pid] = kind
    return {kind: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, kind in children.items()}


def _in_new_interpreters(request: ExportRequest) -> dict[str, int]:
    """The user's code has threads, which a fork would lose together with the locks they hold: start afresh."""
    running = {}
    for kind in request.formats:
        folder = Path(request.folder) / f"only-{kind}"
        folder.mkdir()
        replace(request, only=kind).write(folder / REQUEST)
        argv = [sys.executable, "-P", "-m", "torchworker.stage", "export", str(folder / REQUEST)]
        running[kind] = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    return {kind: process.wait() for kind, process in running.items()}


def _joined(failures: list[Failure]) -> Failure:
    """Every format's failure in one message; the user's mistakes count when there are any."""
    mine = [failure for failure in failures if failure.kind == "user"] or failures
    return replace(mine[0], message="\n".join(failure.message for failure in mine))


def _export_child(
    kind: str, request: ExportRequest, model: nn.Module, named: Mapping[str, Tensor], outputs: list[str]
) -> int:
    path = Path(request.folder) / FORMAT_FILES[kind]
    write = {"torchscript": _torchscript, "onnx": _onnx, "pt2": _pt2}[kind]
    torch.set_num_threads(REFERENCE_THREADS)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            method = write(model, named, outputs, path, request.project)
        artifact = Artifact(file=path.name, method=method, seconds=time.perf_counter() - began)
        reply = Reply(result=asdict(artifact))
    except (Exception, SystemExit) as error:
        reply = Reply(failure=failure_of(error, request.project.folder))
    reply.write(Path(request.folder) / f"export-{kind}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    return 0 if reply.failure is None else 1


# --- formats --------------------------------------------------------------------------------------------------


def _torchscript(
    model: nn.Module, named: Mapping[str, Tensor], outputs: list[str], path: Path, project: Project
) -> str:
    """Script, which keeps control flow; else trace, accepted only when it raises no TracerWarning."""
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        program: Any = torch.jit.script(model)
        method = "torch.jit.script"
    except Exception as script_error:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                program = torch.jit.trace(model, tuple(named.values()))  # type: ignore[no-untyped-call]
            except Exception as error:
                raise UserMistake(
                    f"export: TorchScript can neither script the model ({_brief(script_error)}) nor trace it "
                    f"({describe(error)}{user_line(error, project.folder)})"
                ) from error
        baked = [str(w.message).split("\n")[0] for w in caught if issubclass(w.category, torch.jit.TracerWarning)]  # type: ignore[attr-defined]
        if baked:
            raise UserMistake(
                "export: TorchScript cannot script the model "
                f"({_brief(script_error)}), and tracing it would bake in a decision made on the example data: "
                f"{baked[0]} Make the branch torch.cond or scriptable, or leave torchscript out of export.formats"
            ) from script_error
        method = "torch.jit.trace"
    program.save(str(path))
    return method


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def capture(model: nn.Module, named: Mapping[str, Tensor], project: Project) -> tuple[ExportedProgram, str]:
    """torch.export with a dynamic first dimension on every input: non-strict, then strict.

    A named Dim makes torch refuse to specialise it; Dim.AUTO would do so silently.
    """
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} if tensor.dim() else None for tensor in named.values())
    errors = []
    for strict in (False, True):
        try:
            program = torch.export.export(model, tuple(named.values()), dynamic_shapes=shapes, strict=strict)
            return program, f"torch.export, {'strict' if strict else 'non-strict'}"
        except Exception as error:
            errors.append(error)
    first = errors[0]
    raise UserMistake(
        f"export: torch.export cannot capture the model with a dynamic batch: {_brief(first)}"
        f"{user_line(first, project.folder)}. Ways out for a decision on data: torch.cond, while_loop, or a fixed "
        "number of steps with a mask; or leave onnx and pt2 out of export.formats"
    ) from first


def _pt2(model: nn.Module, named: Mapping[str, Tensor], outputs: list[str], path: Path, project: Project) -> str:
    program, method = capture(model, named, project)
    torch.export.save(program, str(path))
    return method


def _onnx(model: nn.Module, named: Mapping[str, Tensor], outputs: list[str], path: Path, project: Project) -> str:
    """torch's dynamo-based exporter from the exported program; one file, named inputs and outputs."""
    # The exporter reports progress on standard output and logs every missing optional decomposition.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program, method = capture(model, named, project)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > ONNX_SINGLE_FILE_BYTES:
        raise UserMistake(
            f"export: the model's weights are {size / 1e9:.1f} GB and one ONNX file holds less than 2 GB; "
            "leave onnx out of export.formats"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        onnx_program = torch.onnx.export(
            program,
            tuple(named.values()),
            input_names=list(named),
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    unfaithful = [str(w.message) for w in caught if "duplicated values" in str(w.message)]
    if unfaithful or onnx_program is None:
        raise UserMistake(f"export: the ONNX exporter warns that the result may be wrong: {unfaithful[:1]}")
    _name_batch_dimension(onnx_program.model)
    onnx_program.save(str(path), external_data=False)
    return f"{method} → ONNX opset {OPSET}"


def _name_batch_dimension(model: Any) -> None:
    """Call the dynamic dimension `batch` throughout; the exporter leaves torch's symbol, such as `s97`.

    model: onnx_ir.Model.
    """
    from onnx_ir import SymbolicDim

    symbols = {value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, SymbolicDim) and size in symbols:
                value.shape[axis] = SymbolicDim("batch")
