"""`ship check`: build everything a job refers to, try it once, and say what would be trained and shipped."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from torchworker.contract import (
    FORMAT_FILES,
    INT8_FILES,
    CheckRequest,
    CheckResult,
    DynamicDim,
    InspectResult,
    TensorSpec,
)
from train_and_ship.infra.interpreter import Interpreter, our_interpreter
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.data.checks import (
    Report,
    check_data,
    require_good_data,
    require_held_out,
    shared_samples,
)
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.results import Checked
from train_and_ship.tasks.at_work import at_work, never_silent
from train_and_ship.tasks.extras import not_passed_on, require_extras, require_variables
from train_and_ship.tasks.interpreters import Chosen, choose_interpreter
from train_and_ship.tasks.requests import (
    dynamic_dims,
    inspect_request,
    project_of,
    required_formats,
    train_settings,
)
from train_and_ship.tasks.rooms import Rooms, bound
from train_and_ship.tasks.shipped import require_files
from train_and_ship.tasks.snapshot import verified_snapshot
from train_and_ship.tasks.trial import TrialExport, try_export
from train_and_ship.tasks.worker import ask_worker


def check(job_file: Path, export: bool = True, changes: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the job's facts.

    Args:
        job_file: of the job.
        export: as of `check_job`.
        changes: what the job says otherwise than its file, as `load_job` takes it.
        as_json: print them as JSON, and what is being done to standard error.

    Raises what `check_job` does, and JobError with one message a mistake.
    """
    console = Console(stderr=as_json)
    job, project = load_job(job_file, changes)
    found = asyncio.run(check_job(job, job_file, project, export, console))
    if as_json:
        typer.echo(found.json())
    else:
        console.print(found)


async def check_job(job: Job, job_file: Path, folder: Path, export: bool, console: Console) -> Checked:
    """Build everything a job refers to, and try it once.

    Args:
        job: what is asked about.
        job_file: what it was read from; paths are relative to its folder.
        folder: of the project, absolute.
        export: whether the untrained model is exported and the artifacts are asked, as a run does after training.
        console: what is being done is told there.

    Raises:
        JobError: one message a mistake.
        GateError: the data fails its checks, or an artifact is not the model.
    """
    chosen = choose_interpreter(job, job_file, folder)
    require_extras(job, chosen.interpreter)
    require_variables(job)
    require_files(job, folder)
    snapshot, _ = verified_snapshot(Settings.load(), job, folder)
    with at_work("check"):
        async with never_silent(partial(_say, console)):
            found = await _build(job, folder, snapshot, chosen, export, console)
    return _all_of(job, folder, found, chosen)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """All that was found out."""

    result: CheckResult
    report: Report | None
    trial: TrialExport | None


async def _build(
    job: Job, folder: Path, snapshot: Path | None, chosen: Chosen, export: bool, console: Console
) -> _Found:
    """The job, its data, and the checks of that where the job has some; the live release is not asked.

    Without checks the data is only glanced at: a run reads all of it.

    Args:
        job: what is asked about.
        folder: of the project, absolute.
        snapshot: folder of the job's verified data; None when it has none.
        chosen: what runs its code.
        export: whether the untrained model is exported.
        console: what is being done is told there.
    """
    project, report, trial = project_of(job, folder, snapshot), None, None
    with tempfile.TemporaryDirectory(prefix="ship-check-") as name:
        work = Path(name)
        rooms = Rooms(chosen.interpreter, work / "host.log")
        request = CheckRequest(
            project=project,
            train=train_settings(job),
            ranks_here=0 if job.train.launcher.machines else job.train.processes,
            dynamic=dynamic_dims(job),
            max_batch=job.export.max_batch,
            formats=required_formats(job),
            glance=job.data.checks is None,
        )
        if job.data.checks is not None:
            # First: a NaN in the data is a better reason than the NaN of the loss.
            look = inspect_request(job, project)
            facts = await ask_worker(rooms.project, "inspect", look, InspectResult, work / "inspect")
            report = check_data(job.data.checks, facts, None, "")
            require_good_data(job.name, report)
        result = await ask_worker(rooms.project, "check", request, CheckResult, work)
        require_held_out(job.data.checks, *result.shared)
        if export:
            trial = await try_export(rooms, job, project, work, partial(_say, console))
    return _Found(result=result, report=report, trial=trial)


def _say(console: Console, what: str) -> None:
    console.print(escape(what), style="dim")


def _count(samples: int | None) -> str:
    return "a stream of" if samples is None else f"{samples:,}"


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} [{', '.join(str(size) for size in spec.shape)}]"


def _dimension(dim: DynamicDim) -> str:
    return f"{dim.name}: {dim.min} to {dim.max}" if dim.max is not None else f"{dim.name}: {dim.min} or more"


def _training(job: Job, result: CheckResult) -> list[tuple[str, str]]:
    train = job.train
    ranks = f"{train.processes} processes × {job.threads} threads"
    if train.entrypoint is not None:
        arguments = "".join(f", {name}={value!r}" for name, value in train.args.items())
        return [("training", f"{train.entrypoint}(context{arguments}) in {ranks}, seed {train.seed}; found, not run")]
    loss = train.loss if isinstance(train.loss, str) else train.loss.factory
    optimizer = train.optimizer if isinstance(train.optimizer, str) else train.optimizer.factory
    return [
        ("loss", f"{loss}, {result.loss:.4g} on one batch before training"),
        (
            "training",
            f"{train.epochs} epochs, batch {train.batch_size} over {ranks}, {optimizer}, learning rate "
            f"{train.learning_rate:g}, seed {train.seed}",
        ),
        *([("ships", _ships(job))] if train.ships == "best" or train.ema is not None else []),
    ]


def _ships(job: Job) -> str:
    watched, better = job.watched
    most = "highest" if better == "higher" else "lowest"
    averaged = f", averaged over the steps (ema {job.train.ema:g})" if job.train.ema is not None else ""
    return (f"the epoch with the {most} {watched}" if job.train.ships == "best" else "the last epoch") + averaged


def _int8(job: Job) -> str:
    assert job.export.int8 is not None, "asked before"
    return "\n".join(f"{kind}: {INT8_FILES[kind]}, if it is as good and faster" for kind in job.export.int8.wanted)


def _files(job: Job) -> str:
    written = [f"what {job.export.extras} writes"] if job.export.extras is not None else []
    return ", ".join([*job.export.files, *written])


def _serving(job: Job) -> str:
    raw = job.data.raw if isinstance(job.data.raw, str) or job.data.raw is None else job.data.raw.factory
    return f"{job.export.serving}(model), asked about what {raw or job.data.factory} gives"


def _served(job: Job) -> str:
    if job.export.serve == "none":
        return "nothing is recommended"
    how = f"{job.serve_threads} threads" if job.serve_threads > 1 else "1 thread"
    return f"the fastest, measured with {how}" if job.export.serve == "auto" else f"{job.export.serve}, with {how}"


def _checked(job: Job, data: Report) -> str:
    assert job.data.checks is not None, "asked before"
    drift = "; drift is asked when a run begins, against what is live then" if job.data.checks.drift is not None else ""
    return f"passes {len(data.findings)} checks{drift}"


def _exports(job: Job, trial: TrialExport | None) -> list[str]:
    if trial is None:
        may_be = ", if it can capture the model" if job.export.formats == "auto" else ""
        return [f"{kind}: {FORMAT_FILES[kind]}{may_be}" for kind in job.export.wanted]
    made = [f"{kind}: {item.file}, {item.method}" for kind, item in trial.exported.artifacts.items()]
    return made + [f"not {kind}: {why}" for kind, why in trial.exported.left_out.items()]


def _notes(job: Job, folder: Path, result: CheckResult, chosen: Chosen) -> list[str]:
    return [chosen.hint, shared_samples(*result.shared), *result.notes, not_passed_on(job, folder)]


def _environment(job: Job, found: Interpreter) -> str:
    """What runs the code, and where artifacts are proven: another torch, or its C++ ABI, binds what is compiled."""
    ours = our_interpreter().torch
    clean = "the clean room is ours" + (f", with torch {ours}" if found.torch != ours else "")
    compiled = bound([*job.export.wanted, *(job.export.int8.wanted if job.export.int8 else ())], job.export.libraries)
    where = (
        f"; proven where they are made, because they are compiled against that torch and its C++ ABI and load nowhere "
        f"else: {', '.join(compiled)}"
        if compiled
        else ""
    )
    return f"{found.path}: Python {found.version}, torch {found.torch}; {clean}{where}"


def _all_of(job: Job, folder: Path, found: _Found, chosen: Chosen) -> Checked:
    result, data, trial = found.result, found.report, found.trial
    notes = [note for note in _notes(job, folder, result, chosen) if note]
    facts = (
        ("project", str(folder)),
        *([("python", _environment(job, chosen.interpreter))] if not chosen.interpreter.ours else []),
        ("model", f"{job.model.factory}, {result.parameters:,} parameters, {result.parameter_bytes / 1e6:.2f} MB"),
        (
            "data",
            f"{job.data.factory}: {_count(result.train_samples)} training, "
            f"{_count(result.validation_samples)} validation",
        ),
        *([("data.checks", _checked(job, data))] if data is not None else []),
        *([("serving", _serving(job))] if job.export.serving is not None else []),
        ("inputs", "\n".join(_tensor(spec) for spec in result.inputs)),
        ("outputs", "\n".join(_tensor(spec) for spec in result.outputs)),
        ("target", _tensor(result.target)),
        *([("samples", result.independence)] if result.independence else []),
        ("dynamic", "\n".join(_dimension(dim) for dim in result.dims)),
        *_training(job, result),
        ("exports", "\n".join(_exports(job, found.trial))),
        *([("int8", _int8(job))] if job.export.int8 is not None else []),
        *([("files", _files(job))] if job.export.files or job.export.extras is not None else []),
        *([("labels", ", ".join(job.export.labels))] if job.export.labels else []),
        ("to serve", _served(job)),
        ("release", f"channel {job.release.channel}"),
        *([("env", ", ".join(job.env))] if job.env else []),
        *(("note", note) for note in notes),
    )
    gates: list[tuple[str, ...]] = [("parity of every format", "", "1 (× its own rounding)", "", "")]
    for name, gate in job.gates.items():
        limits = (gate.min, gate.max, gate.vs_live, gate.times_live)
        gates.append((name, *("" if limit is None else f"{limit:g}" for limit in limits)))
    return Checked(
        model=job.name,
        project=folder,
        python=chosen.interpreter.path,
        parameters=result.parameters,
        train_samples=result.train_samples,
        validation_samples=result.validation_samples,
        inputs=tuple(_tensor(spec) for spec in result.inputs),
        outputs=tuple(_tensor(spec) for spec in result.outputs),
        exports={kind: item.file for kind, item in trial.exported.artifacts.items()} if trial else {},
        left_out=dict(trial.exported.left_out) if trial else {},
        notes=tuple(notes),
        facts=facts,
        gates=tuple(gates),
    )
