"""Read a job file: YAML into a `Job`, with every mistake by line, key, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from torchworker import situations
from train_and_ship.infra.addresses import has_password, without_password
from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.mistakes import Keys, key_name, mistakes, shown


def load_job(path: Path, changes: Sequence[str] = ()) -> tuple[Job, Path]:
    """Read and validate a job file; also the absolute project folder.

    Args:
        path: of the file.
        changes: what is said otherwise than in the file, each `KEY=VALUE` with dots between keys and a value in YAML.

    Raises JobError with one line a mistake: where, what was expected, what was given.
    """
    if not path.is_file():
        places = [*Path().glob("*.yaml"), *Path().glob("jobs/*.yaml"), *Path().glob("examples/*/job.yaml")]
        found = {str(place): None for place in [*path.parent.glob("*.y*ml"), *sorted(places)] if _looks_like_job(place)}
        hint = f"; did you mean {next(iter(found))}?" if len(found) == 1 else f"; there are {', '.join([*found][:5])}"
        raise JobError(f"job file {path}: no such file{hint if found else ''}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"job file {path}: expected UTF-8 text that can be read, got {error}") from None
    job = job_of(text, path, changes)
    return job, project_folder(job, path)


def project_folder(job: Job, path: Path) -> Path:
    """The absolute folder of a job's project. Raises JobError when it, or what `retrain` names in it, is not there.

    path: of the file, which paths in the job are relative to.
    """
    folder = (path.parent / job.project).resolve()
    if not folder.is_dir():
        raise JobError(f"{path}: project: expected a folder, got {folder}, which does not exist")
    _require_files(job, folder, path)
    return folder


def validated(job: Job, path: Path) -> Job:
    """A job that was made, or changed, in Python, asked what a job file is asked. Raises JobError.

    path: for messages.
    """
    document = _plain(job)
    try:
        found = Job.model_validate(document)
    except ValidationError as error:
        said = [f"{path}: {key_name(keys)}: {what}" for keys, what in mistakes(Job, error, written=False)]
        raise JobError("\n".join(said)) from None
    _require_no_password(document, path)
    return found


def _plain(value: Any) -> Any:
    """Keys that were given, and values, as a file has them; `model_copy` gives some without a check."""
    match value:
        case BaseModel():
            return {name: _plain(inner) for name, inner in vars(value).items() if name in value.model_fields_set}
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value


def job_of(text: str, path: Path, changes: Sequence[str] = ()) -> Job:
    """The job that a file with this text describes. Raises JobError.

    Args:
        text: YAML.
        path: of the file, for messages; nothing of it is read.
        changes: as of `load_job`.
    """
    try:
        document, twice = _parsed(text, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise JobError(f"{place}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(document, dict):
        raise JobError(f"{path}: expected keys such as name, model, data, train; got {shown(document)}")
    for change in changes:
        set_key(document, change)
    try:
        job = Job.model_validate(document)
    except ValidationError as error:
        lines = [*twice, *_explained(error, path, text)]
        raise JobError("\n".join(lines)) from None
    if twice:
        raise JobError("\n".join(twice))
    _require_no_password(document, path)
    return job


def set_key(document: dict[Any, Any], change: str) -> None:
    """Set one key of the document. Raises JobError for what names no key, or one below a value."""
    name, given, text = change.partition("=")
    keys = name.strip().split(".")
    if not given or not all(keys):
        raise JobError(f"--set {change}: expected KEY=VALUE, such as train.epochs=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"--set {change}: not valid YAML: {getattr(error, 'problem', error)}") from None
    for place, key in enumerate(keys[:-1]):
        if document.get(key) is None:
            document[key] = {}
        document = document[key]
        if not isinstance(document, dict):
            above = ".".join(keys[: place + 1])
            raise JobError(f"--set {change}: expected keys below {above}, which is {shown(document)} in the job file")
    document[keys[-1]] = value


def _require_no_password(value: object, path: Path, key: str = "") -> None:
    """Raises JobError for an address with a password: the job is in every release, in MLflow and in reports."""
    if isinstance(value, str) and has_password(value):
        raise JobError(
            f"{path}: {key}: expected an address without a password, got {without_password(value)!r} with one; the job "
            "is published with each release. Let the code read it from the environment, or from a file"
        )
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _require_no_password(item, path, f"{key}.{name}" if key else str(name))


def _require_files(job: Job, folder: Path, path: Path) -> None:
    """Raises JobError for what `retrain` names and is not there: a slip of the pen would look like no change."""
    named = [("code", name) for name in job.retrain.code or ()]
    named += [("files", name) for name in job.retrain.files if not any(sign in name for sign in "*?[!")]
    missing = [
        f"{path}: retrain.{key}: expected {folder / name}, found none"
        for key, name in named
        if not (folder / name).exists()
    ]
    if missing:
        raise JobError("\n".join(missing))


def _looks_like_job(path: Path) -> bool:
    text = path.read_text(errors="replace")
    return all(f"{key}:" in text for key in ("name", "model", "data", "train"))


def _parsed(text: str, path: Path) -> tuple[Any, list[str]]:
    """What the YAML says, and a line for each key that it says twice. Raises YAMLError."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        # Before it is made into values: that resolves merges in place.
        twice = _given_twice(root, path)
        return loader.construct_document(root) if root is not None else None, twice
    finally:
        loader.dispose()


def _given_twice(root: yaml.Node | None, path: Path) -> list[str]:
    """A line for each key that its mapping has already, of which YAML would quietly keep the last one's value.

    What a merge (`<<: *base`) brings is there to be given anew and does not count.
    """
    found: list[tuple[int, str]] = []
    # An anchor's node is in the tree once for each alias.
    seen: set[int] = set()
    pending: list[tuple[yaml.Node | None, tuple[str, ...]]] = [(root, ())]
    while pending:
        node, keys = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(item, (*keys, str(number))) for number, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                # Keys that are no scalars are refused later.
                name, line = str(key.value), key.start_mark.line + 1
                pending.append((value, (*keys, name)))
                if name in first and key.tag != "tag:yaml.org,2002:merge":
                    place = ".".join((*keys, name))
                    found.append((line, f"{path}:{line}: {place}: {situations.GIVEN_TWICE} (line {first[name]})"))
                first.setdefault(name, line)
    return [told for _, told in sorted(found)]


def _explained(error: ValidationError, path: Path, text: str) -> list[str]:
    """A message for each key, in the order of their lines."""
    found = [(_line_of(text, keys), key_name(keys), said) for keys, said in mistakes(Job, error, written=True)]
    return [
        f"{path}:{line}: {key}: {said}" if key else f"{path}: {said}"
        for line, key, said in sorted(found, key=itemgetter(0))
    ]


def _line_of(text: str, keys: Keys) -> int:
    """1-based line of the deepest key that is in the file."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None, "the document was validated, so it is not empty"
    line = node.start_mark.line
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


def job_schema() -> dict[str, Any]:
    """JSON schema of the job file, for editors; kept in `docs/job.schema.json`."""
    schema = Job.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "train-and-ship job", **schema}
