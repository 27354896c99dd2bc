"""Export trained weights, each format beside the reference data that it is held against.

Each format is captured in a process of its own: exporters keep global state (a second dynamic-length ONNX
export in one process can fail), and a trace may change a model it is given.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from torchworker.contract import (
    EVENTS,
    EXTRAS,
    FORMAT_FILES,
    INT8_FILES,
    PROBE,
    REQUEST,
    Artifact,
    ExportRequest,
    ExportResult,
    Failure,
    Reply,
    decode,
)
from torchworker.exporters.aoti import aoti
from torchworker.exporters.executorch import executorch
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.pt2 import pt2
from torchworker.exporters.subject import Made, Subject
from torchworker.exporters.torchscript import torchscript
from torchworker.parity.reference import enlarged, require_trained, write_reference
from torchworker.process.events import EventLog
from torchworker.process.failure import DescribedError, UserError, describe, failure_of
from torchworker.process.fork import CrashNote, ForkedCall, can_fork
from torchworker.project.extras import write_extras
from torchworker.project.independence import require_independent
from torchworker.project.kept_state import changed, refusal, saved, state_of
from torchworker.project.labels import require_labels
from torchworker.project.opened import Opened
from torchworker.project.served import (
    build_served,
    raw_dataset,
    served_batches,
    served_project,
    weight_names,
    weights_of,
)
from torchworker.project.shippable import cannot_hold
from torchworker.project.signature import (
    dims_of,
    input_specs,
    of_one_sample,
    output_specs,
    resized,
    sizes_of,
    without_batch,
)
from torchworker.project.user_code import (
    batches,
    build_dataset,
    build_model,
    enter,
    forward,
    length_of,
    name_inputs,
    name_outputs,
)
from torchworker.project.weights import is_large, load_weights

EXPORTERS: Mapping[str, Callable[[Subject, Path], Made]] = {
    "torchscript": torchscript,
    "onnx": onnx_model,
    "pt2": pt2,
    "aoti": aoti,
    "executorch": executorch,
}
"""Writes one format and says how."""

REFERENCE_THREADS = 1
"""Reference outputs are computed on one thread, so that they do not depend on the machine's cores."""


def export(request: ExportRequest) -> ExportResult:
    """Write reference data, then every format, into the request's folder.

    Raises UserError when the model cannot be captured faithfully, with the line and the ways out, or when its answers
    depend on the other samples of a batch and the job does not allow it.
    """
    torch.set_num_threads(REFERENCE_THREADS)
    torch.manual_seed(request.seed)
    enter(request.project)
    opened = Opened(request.project, [str(Path(request.folder).parent)], python=False)
    model = build_model(request.project)
    touched, _ = opened.close()
    if request.weights:
        _load(model, request)
    model.eval()
    known = weights_of(model)
    dataset = build_dataset(request.project, "validation")
    raw = raw_dataset(dataset, "validation", request.project)
    torch.set_num_threads(REFERENCE_THREADS)
    with torch.no_grad():
        if request.weights:
            require_trained(model, Path(request.weights).with_name(PROBE), request.project)
        exported, project = build_served(model, request.project), served_project(request.project)
    for parameter in exported.parameters():
        parameter.requires_grad_(False)
    # The user's code may have changed it on import.
    torch.set_num_threads(REFERENCE_THREADS)
    inputs, _ = next(served_batches(dataset, raw, request.batch, request.project))
    named = enlarged(name_inputs(exported, inputs, project), request.batch)
    dims = dims_of(named, request.dynamic, project, request.max_batch)
    artifacts: dict[str, Artifact] = {}
    left_out: dict[str, str] = {}
    reference, read = "", None
    with torch.no_grad():
        before = state_of(exported)
        outputs = output_specs(exported, named, dims, project)
        require_labels(project, outputs[0].name, outputs[0].shape)
        # A size of 1 looks like a dimension that broadcasts, and would be captured as such.
        large = {name: 2 for name, size in sizes_of(named, dims).items() if size < 2}
        subject = Subject(
            model=exported,
            inputs=resized(named, dims, large),
            outputs=[spec.name for spec in outputs],
            dims=dims,
            project=project,
            external_data=request.external_data == "always",
        )
        if request.only is not None:
            # The interpreter that this stage started for one format, and from which it wants the file that is left.
            _export_child(request.only, request, subject)
        else:
            independence = require_independent(exported, named, project)
            impossible = _impossible(request, subject)
            able = [kind for kind in request.formats if kind not in impossible]
            with _Exports(able, request, subject) as exports:
                # Exporters and the reference need nothing of each other, and a machine has more than one core.
                reference, read = write_reference(request, exported, named, dataset, independence, raw)
                if names := saved(exported, changed(before, exported)):
                    raise refusal(exported, names, named, project)
                artifacts, left_out = _all(exports, request, subject, impossible)
            # Last: what it does with the model is no matter any more.
            write_extras(request.project, model, Path(request.folder) / EXTRAS)
    inputs_of, outputs_of = input_specs(named, dims), outputs
    if request.project.coupled:
        inputs_of, outputs_of = of_one_sample(inputs_of), of_one_sample(outputs_of)
        dims = without_batch(dims)
    return ExportResult(
        artifacts=artifacts,
        left_out=left_out,
        libraries=_copy_libraries(request),
        inputs=inputs_of,
        outputs=outputs_of,
        dims=dims,
        reference=reference,
        validation=read,
        weight_names=weight_names(exported, known) if request.project.serving is not None else None,
        touched=[file.path for file in touched],
    )


def _load(model: nn.Module, request: ExportRequest) -> None:
    try:
        load_weights(model, Path(request.weights))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{request.project.model.where}: the trained weights do not fit the model as it is now: {describe(error)}. "
            "If its code was changed after training, start a new run"
        ) from error


def _copy_libraries(request: ExportRequest) -> list[str]:
    """Into the folder, beside the artifacts that need them. After capture: importing user code may have built them."""
    for library in map(Path, request.libraries):
        if not library.is_file():
            raise UserError(f"export.libraries: expected a shared library, found none at {library}")
        shutil.copyfile(library, Path(request.folder) / library.name)
    return [Path(library).name for library in request.libraries]


def _impossible(request: ExportRequest, subject: Subject) -> dict[str, Failure]:
    """Formats that cannot hold the model, whatever an exporter makes of it, and why."""
    outputs = name_outputs(forward(subject.model, subject.inputs, subject.project), subject.project)
    reasons = {kind: cannot_hold(kind, subject.model, subject.inputs, outputs) for kind in request.formats}
    return {
        kind: Failure(kind="user", message=f"export: {why}, or leave {kind} out of export.formats")
        for kind, why in reasons.items()
        if why
    }


def _all(
    exports: _Exports, request: ExportRequest, subject: Subject, impossible: Mapping[str, Failure]
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """Artifacts by format, int8 variants among them, and why some were left out."""
    artifacts, failures = exports.made()
    failures |= impossible
    broken = [failure for failure in failures.values() if failure.kind == "worker"]
    if failures and (broken or not request.auto or not artifacts):
        raise DescribedError(_joined(list(failures.values())))
    # From the float artifacts, so after them. One that cannot be made is no reason to stop.
    able = [kind for kind in request.int8 if kind == "pt2e-int8" or "onnx" in artifacts]
    with _Exports(able, request, subject) as exports:
        smaller, failed = exports.made()
    left_out = {kind: failure.message for kind, failure in [*failures.items(), *failed.items()]}
    for kind in request.int8:
        if kind not in able:
            left_out[kind] = "it is made of the onnx artifact, and there is none"
    return artifacts | smaller, left_out


class _Exports:
    """Formats that are being made, each in a process of its own, which ends with this block: side by side, or where the
    model is large one after the other, as an exporter takes two or three times the memory of the weights.

    They are forks of this process, which has the model and has exported nothing: that spares every exporter the import
    of the user's code. It is safe here, as torch runs on one thread: there is no thread pool to lose.
    """

    def __init__(self, kinds: Sequence[str], request: ExportRequest, subject: Subject) -> None:
        self._request = request
        self._queue: ForkedCall[dict[str, int]] | None = None
        self._running: Mapping[str, ForkedCall[int] | subprocess.Popen[bytes]] = {}
        if not can_fork():
            self._running = {kind: _new_interpreter(kind, request) for kind in kinds}
        elif kinds and is_large(subject.model):
            self._queue = ForkedCall(partial(_one_by_one, kinds, request, subject), CrashNote())
        else:
            self._running = {kind: _begun(kind, request, subject) for kind in kinds}

    def __enter__(self) -> _Exports:
        return self

    def __exit__(self, *_: object) -> None:
        for running in (*self._running.values(), *([self._queue] if self._queue is not None else [])):
            running.kill()
            running.wait()

    def made(self) -> tuple[dict[str, Artifact], dict[str, Failure]]:
        """Artifacts by format, and what failed, when all have ended."""
        if self._queue is not None:
            return _made(self._request, self._queue.result())
        return _made(self._request, {kind: running.wait() for kind, running in self._running.items()})


def _begun(kind: str, request: ExportRequest, subject: Subject) -> ForkedCall[int]:
    return ForkedCall(partial(_export_child, kind, request, subject), CrashNote())


def _one_by_one(kinds: Sequence[str], request: ExportRequest, subject: Subject) -> dict[str, int]:
    """Exit status by format. In a fork, which waits where the process that has begun it goes on."""
    return {kind: _begun(kind, request, subject).wait() for kind in kinds}


def _new_interpreter(kind: str, request: ExportRequest) -> subprocess.Popen[bytes]:
    """The user's code has threads, which a fork would lose together with the locks they hold: start afresh."""
    folder = Path(request.folder) / f"only-{kind}"
    folder.mkdir()
    replace(request, only=kind).write(folder / REQUEST)
    argv = [sys.executable, "-P", "-m", "torchworker.stage", "export", str(folder / REQUEST)]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL)


def _made(request: ExportRequest, statuses: Mapping[str, int]) -> tuple[dict[str, Artifact], dict[str, Failure]]:
    """What processes left. statuses: format to exit status."""
    artifacts: dict[str, Artifact] = {}
    failures: dict[str, Failure] = {}
    for kind, status in statuses.items():
        reply = Path(request.folder) / f"export-{kind}.json"
        if not reply.exists():
            ended = f"the export to {kind} ended with status {status} and left no result"
            failures[kind] = Failure(kind="worker", message=ended)
            continue
        said = Reply.read(reply)
        reply.unlink()
        if said.failure is not None:
            failures[kind] = said.failure
        else:
            artifacts[kind] = decode(Artifact, said.result)
    return artifacts, failures


def _joined(failures: list[Failure]) -> Failure:
    """Every format's failure in one message; the user's mistakes count when there are any."""
    mine = [failure for failure in failures if failure.kind == "user"] or failures
    return replace(mine[0], message="\n".join(failure.message for failure in mine))


def _export_child(kind: str, request: ExportRequest, subject: Subject) -> int:
    path = Path(request.folder) / {**FORMAT_FILES, **INT8_FILES}[kind]
    write_event = EventLog(Path(request.folder) / EVENTS).write
    torch.set_num_threads(REFERENCE_THREADS)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            method, notes = _write(kind, request, subject, path)
        artifact = Artifact(file=path.name, method=method, seconds=time.perf_counter() - began, notes=notes)
        reply = Reply(result=asdict(artifact))
        write_event("made", format=kind, method=method, seconds=artifact.seconds)
    except (Exception, SystemExit) as error:
        reply = Reply(failure=failure_of(error, request.project.folder))
        write_event("failed", format=kind)
    reply.write(Path(request.folder) / f"export-{kind}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    return 0 if reply.failure is None else 1


def _write(kind: str, request: ExportRequest, subject: Subject, path: Path) -> Made:
    """Make one artifact and say how."""
    if kind not in INT8_FILES:
        return EXPORTERS[kind](subject, path)
    # Here: an import of seconds that most jobs do not need.
    from torchworker.exporters import quantize

    model = path.with_name(FORMAT_FILES["onnx"])
    if kind == "onnx-int8-dynamic":
        return Made(quantize.onnx_dynamic(model, path))
    calibration = _calibration(request, subject)
    if kind == "onnx-int8-static":
        return Made(quantize.onnx_static(model, path, calibration))
    return Made(quantize.pt2e(subject, path, calibration))


def _calibration(request: ExportRequest, subject: Subject) -> list[dict[str, Tensor]]:
    """Inputs of training samples, drawn by the job's seed; the first ones of a stream."""
    project, limit = served_project(request.project), request.calibration_samples
    dataset = build_dataset(project, "train")
    size = length_of(dataset)
    if not isinstance(dataset, IterableDataset) and size is not None:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(request.seed))
        dataset = Subset(dataset, order[:limit].tolist())
    # Collated as validation samples are: what was captured has their shapes.
    drawn = batches(dataset, request.batch, project, limit)
    return [name_inputs(subject.model, inputs, project) for inputs, _ in drawn]
