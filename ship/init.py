"""`ship init`: the job file of a repository, made of what its sources have, or a running example."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from train_and_ship.infra.errors import JobError, RequestError
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import job_of, set_key
from train_and_ship.ship import init_files
from train_and_ship.ship.candidates import Candidate, Found, find_candidates
from train_and_ship.tasks.interpreters import IN_PROJECT, choose_interpreter

EXAMPLES = Path(__file__).parent.parent / "examples"
"""A folder each: what the wheel has of them is in pyproject.toml."""
KINDS = ("digits", "tabular", "text")
JOB, SCHEMA, IGNORE = "job.yaml", "job.schema.json", ".gitignore"
WORKFLOW = Path(".github/workflows/ship.yaml")
_SHOWN = 8
"""Candidates that a message names."""

Ask = Callable[[str, Sequence[str], str], str]
"""Ask a person: the question, what can be chosen (nothing for a free answer), and what an empty answer means."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line says; empty where it leaves something open."""

    model: str = ""
    """`module:attribute`."""
    data: str = ""
    """`module:attribute`."""
    name: str = ""
    """Of the model."""
    changes: Sequence[str] = ()
    """Further keys, each `KEY=VALUE`."""


def init(folder: Path, wanted: Wanted, ask: Ask | None) -> None:
    """Write job file, schema, an entry in .gitignore and a CI workflow, and say what comes next.

    Args:
        folder: of the project, inside a repository.
        wanted: what is decided already.
        ask: a person; None without a terminal.

    Raises RequestError, with nothing written, for a folder that cannot be used, files that are there already, and what
    could not be decided; JobError for a job that would not be valid.
    """
    repository = _repository(folder)
    if repository is None:
        raise RequestError(
            f"{folder}: expected a folder of a git repository, found no .git there or above; `git init` makes one, and "
            f"`ship init --example {KINDS[0]}` writes a running example anywhere"
        )
    places = _places(folder, repository, [])
    with _readable(folder):
        found = find_candidates(folder)
    for line in found.unreadable[:_SHOWN]:
        typer.echo(f"not read: {on_one_line(line)}", err=True)
    model = _model(found, wanted.model, ask)
    data = _data(found, wanted.data, ask, model)
    document = _document(folder, found, model, data, wanted, ask)
    text = init_files.job_text(document, SCHEMA)
    job = job_of(text, folder / JOB)
    _write(folder, repository, {places[JOB]: text.encode()}, job.python)
    typer.echo(f"  model    {_shown(model)}\n  data     {_shown(data)}")
    for line in _python_lines(job, folder):
        typer.echo(f"  python   {line}")
    _say_next(folder)


def init_example(folder: Path, kind: str) -> None:
    """Write a running example: its code, its data and the same files as `init`.

    Args:
        folder: where; it may be outside of a repository.
        kind: one of KINDS.

    Raises RequestError, with nothing written, for another kind, a folder that cannot be used, and files that are there.
    """
    if kind not in KINDS:
        raise RequestError(f"--example: expected one of {', '.join(KINDS)}, got {kind!r}")
    repository = _repository(folder) or folder
    files = {path.name: path.read_bytes() for path in sorted((EXAMPLES / kind).iterdir()) if path.is_file()}
    places = _places(folder, repository, [*files])
    # The clone's own example may be on the same stack under the name that is written there.
    named = re.sub(rb"^name: .*$", f"name: {_suggested_name(folder)}".encode(), files[JOB], count=1, flags=re.MULTILINE)
    files[JOB] = f"{init_files.schema_line(SCHEMA)}\n".encode() + named
    _write(folder, repository, {places[name]: content for name, content in files.items()}, None)
    _say_next(folder)


def ask_here() -> Ask | None:
    """The person at this terminal; None where there is none."""
    return _ask if sys.stdin.isatty() and sys.stdout.isatty() else None


def _ask(question: str, choices: Sequence[str], default: str) -> str:
    from rich.prompt import Prompt

    if not choices:
        return str(typer.prompt(question, default=default or None))
    for number, choice in enumerate(choices, 1):
        typer.echo(f"  {number}  {choice}")
    numbers = [str(number) for number, _ in enumerate(choices, 1)]
    return choices[int(Prompt.ask(question, choices=numbers, default="1")) - 1]


# ---- the folder


def _repository(folder: Path) -> Path | None:
    """The root of the repository that a folder is in. Raises RequestError for what is no folder."""
    with _readable(folder):
        if not folder.exists():
            raise RequestError(f"{folder}: expected a folder, found nothing; `mkdir {folder}` makes it")
        if not folder.is_dir():
            raise RequestError(f"{folder}: expected a folder, got a file")
        absolute = folder.resolve()
        return next((place for place in (absolute, *absolute.parents) if (place / ".git").exists()), None)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{folder}: expected a folder that can be read, got {error.strerror or error}") from None


def _places(folder: Path, repository: Path, more: Sequence[str]) -> dict[str, Path]:
    """Name of each file that is written to its path. Raises RequestError that names all that exist."""
    names = {name: folder / name for name in (*more, JOB, SCHEMA)} | {str(WORKFLOW): repository / WORKFLOW}
    if taken := [str(path) for path in names.values() if os.path.lexists(path)]:
        raise RequestError(
            f"expected to write new files, and there {'is' if len(taken) == 1 else 'are'} {', '.join(taken)} already; "
            "nothing was written. Move away what you do not need any more"
        )
    return names


def _write(folder: Path, repository: Path, files: Mapping[Path, bytes], python: str | None) -> None:
    """Write these, the schema, the workflow and the entry of .gitignore: all of them, or none. Raises RequestError."""
    wanted = {
        **files,
        folder / SCHEMA: init_files.schema_text().encode(),
        repository / WORKFLOW: init_files.workflow_text(folder.resolve(), repository, python).encode(),
    }
    made: list[Path] = []
    try:
        for path, content in wanted.items():
            for place in reversed([place for place in path.parents if not place.exists()]):
                place.mkdir()
                made.append(place)
            with path.open("xb") as file:
                made.append(path)
                file.write(content)
        ignored = _ignore(folder / IGNORE)
    except OSError as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise RequestError(
            f"{error.filename or folder}: expected a place that can be written, got {error.strerror}; nothing was left"
        ) from None
    for path in wanted:
        typer.echo(f"wrote {os.path.relpath(path)}")
    if ignored:
        typer.echo(f"wrote {os.path.relpath(folder / IGNORE)}: {init_files.IGNORED}")


def _ignore(path: Path) -> bool:
    """Add the entry, unless it is there. Raises OSError."""
    before = path.read_bytes() if path.exists() else b""
    entry = init_files.IGNORED
    if {line.strip() for line in before.splitlines()} & {word.encode() for word in (entry, entry[:-1], f"/{entry}")}:
        return False
    with path.open("ab") as file:
        file.write((b"\n" if before and not before.endswith(b"\n") else b"") + f"{entry}\n".encode())
    return True


# ---- the environment of the code


def _activated(folder: Path) -> Path | None:
    """The Python of the environment that is activated; None where that is ours, or the project has its own `.venv`."""
    if (folder / IN_PROJECT).exists():
        return None
    active = [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    others = (place for place in active if place.resolve() != Path(sys.prefix).resolve())
    return next((place / "bin" / "python" for place in others if (place / "bin" / "python").exists()), None)


def _python_lines(job: Job, folder: Path) -> Iterator[str]:
    """What runs the code, and what it still needs; nothing where that is the environment of this process."""
    try:
        chosen = choose_interpreter(job, folder / JOB, (folder / job.project).resolve())
    except JobError as error:
        yield str(error)
        return
    if chosen.hint or not chosen.interpreter.ours:
        yield chosen.hint or f"{chosen.interpreter.path}, torch {chosen.interpreter.torch}"
    if job.python is None and (active := _activated(folder)):
        yield f"not the environment that is activated here; --set python={active} would write it into the job"


# ---- what is asked


def _model(found: Found, wanted: str, ask: Ask | None) -> Candidate:
    if wanted:
        return _named(found, wanted, "--model")
    if not found.models:
        raise RequestError(_no_model(found))
    return _chosen(found.models, "--model", "torch.nn.Module, or function that makes one,", ask)


def _data(found: Found, wanted: str, ask: Ask | None, model: Candidate) -> Candidate:
    if wanted:
        data = _named(found, wanted, "--data")
        if data.root != model.root:
            raise RequestError(_two_roots(model, data))
        return data
    beside = [item for item in found.datasets if item.root == model.root]
    if not beside and found.datasets:
        raise RequestError(_two_roots(model, found.datasets[0]))
    if not beside:
        raise RequestError(_no_data(found))
    return _chosen(beside, "--data", "dataset", ask)


def _named(found: Found, reference: str, option: str) -> Candidate:
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise RequestError(f"{option}: expected module:attribute, such as digits:build_model, got {reference!r}")
    if reference in found.known:
        return found.known[reference]
    if module in found.names and name.partition(".")[0] not in found.names[module]:
        there = [known for known in found.known if known.startswith(f"{module}:")]
        raise RequestError(
            f"{option} {reference}: expected a name of {module}, found none such; there {_some(there, 'nothing')}"
        )
    roots = {item.root for known, item in found.known.items() if known.startswith(f"{module}:")}
    # Of an installed package, or assigned: what it needs is not known.
    return Candidate(reference=reference, root=next(iter(roots), "."), place="", needs=())


def _chosen(candidates: Sequence[Candidate], option: str, what: str, ask: Ask | None) -> Candidate:
    if len(candidates) == 1:
        return candidates[0]
    if ask is None:
        raise RequestError(
            f"expected one {what} to be the job's, found {len(candidates)}; say which:\n"
            + "\n".join(f"  {option} {_shown(item)}" for item in candidates[:_SHOWN])
            + (f"\n  … and {len(candidates) - _SHOWN} more" if len(candidates) > _SHOWN else "")
        )
    shown = {_shown(item): item for item in candidates}
    return shown[ask(f"Which {what} is the job's?", [*shown], next(iter(shown)))]


def _document(
    folder: Path, found: Found, model: Candidate, data: Candidate, wanted: Wanted, ask: Ask | None
) -> dict[str, Any]:
    """What the job file says."""
    suggested = wanted.name or _suggested_name(folder)
    name = ask("Name of the model", [], suggested) if ask and not wanted.name else suggested
    document: dict[str, Any] = {
        "name": name,
        **({"project": model.root} if model.root != "." else {}),
        **_python(folder, wanted, ask),
        "model": {"factory": model.reference},
        "data": {"factory": data.reference},
        **init_files.training(found.loss),
    }
    for change in wanted.changes:
        set_key(document, change)
    missing = []
    for key, item in (("model", model), ("data", data)):
        part = document[key] if isinstance(document[key], dict) else {}
        given = part.get("args") or {}
        for parameter in item.needs:
            if parameter in given:
                continue
            if ask is None:
                missing.append(f"  --set {key}.args.{parameter}=…   for {_shown(item)}")
            else:
                set_key(document, f"{key}.args.{parameter}={ask(f'{item.reference}: {parameter}', [], '')}")
    if missing:
        said = "expected a value for each parameter that has no default, got none for:"
        raise RequestError("\n".join([said, *missing]))
    return document


def _python(folder: Path, wanted: Wanted, ask: Ask | None) -> dict[str, str]:
    """The key `python`, where a person wants the environment that is activated."""
    active = _activated(folder)
    if active is None or ask is None or any(change.startswith("python=") for change in wanted.changes):
        return {}
    question = f"Run the code in the environment that is activated here, {active.parent.parent}?"
    if ask(question, ["yes", "no"], "yes") != "yes":
        return {}
    inside = active.absolute().is_relative_to(folder.resolve())
    return {"python": str(active.absolute().relative_to(folder.resolve()) if inside else active)}


def _suggested_name(folder: Path) -> str:
    """Of pyproject.toml's project, else of the folder, as names of models are."""
    name = ""
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project")
        name = project.get("name", "") if isinstance(project, dict) else ""
    words = re.sub(r"[^a-z0-9._-]+", "-", str(name or folder.resolve().name).lower())
    return words.strip("._-")[:63] or "model"


# ---- words


def _shown(item: Candidate) -> str:
    return f"{item.reference}  {item.place}" if item.place else item.reference


def _some(texts: Sequence[str], none: str) -> str:
    if not texts:
        return f"is {none}"
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"{'is' if len(texts) == 1 else 'are'} {', '.join(texts[:_SHOWN])}{more}"


def _no_model(found: Found) -> str:
    if found.notebooks and not found.names:
        return (
            f"expected a torch.nn.Module in a Python file, found notebooks alone ({', '.join(found.notebooks[:3])}): a "
            "job imports its code by name. Put the model and a function build_dataset(split) into a .py file"
        )
    return (
        f"expected a torch.nn.Module, or a function that makes one, in the Python files of the folder, found none in "
        f"{len(found.names)}; name it with --model module:attribute, or give the folder that your code is imported from"
    )


def _no_data(found: Found) -> str:
    said = 'expected a dataset that can be called with split="train" and with split="validation", found none'
    if found.without_split:
        first = found.without_split[0]
        said += f"; {_shown(first)} takes no split"
        called = first.reference.rpartition(":")[2]
        said += ". Write a function that makes both, and name it with --data:\n  def build_dataset(split): "
        return f"{said}return {called}(…)"
    return f"{said}; write build_dataset(split), or name a function with --data module:attribute"


def _two_roots(model: Candidate, data: Candidate) -> str:
    return (
        f"expected model and data below one folder of the import path, got {_shown(model)} in {model.root} and "
        f"{_shown(data)} in {data.root}; name another with --model or --data"
    )


def _say_next(folder: Path) -> None:
    job = os.path.relpath(folder / JOB)
    typer.echo(
        "next:\n"
        f"  ship check {job}     tries everything once, and trains nothing\n"
        f"  ship up && ship run {job}\n"
        f"  ship deploy {job}    every night, if anything changed"
    )
