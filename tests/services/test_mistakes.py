"""A user's mistake ends every command with status 2 and one message.

Commands and parameters come from the app itself: a new one has to be in the tables.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from tests.support.fixture_types import Connect, Ship
from tests.support.releases import MODEL, move, published
from train_and_ship.infra import errors
from train_and_ship.infra.errors import ShipError, UserError
from train_and_ship.ship.main import app


def _commands() -> dict[str, click.Command]:
    """Those of groups by both words: `channel set`."""
    found: dict[str, click.Command] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": below for word, below in inner.items()} if inner else {name: command}
    return found


COMMANDS = _commands()

SOUND: dict[str, list[str]] = {
    "init": ["{folder}", "--example", "digits"],
    "env": [],
    "worker install": [],
    "up": [],
    "down": [],
    "status": [],
    "open": ["mlflow", "--print"],
    "logs": [MODEL],
    "deploy": ["--in-place", "{job}"],
    "approve": ["7d1c6f1e-6f4b-4c3e-9d1f-3f0d3a1f6c11"],
    "channel set": [MODEL, "prod", "--approval", "required"],
    "channel show": [MODEL, "prod"],
    "check": ["{job}"],
    "run": ["{job}"],
    "retrain": ["{job}"],
    "snapshot": ["{folder}"],
    "pull": [MODEL],
    "serve": [MODEL],
    "view": ["triton", MODEL],
    "password": [],
    "sign": [MODEL, "{release}"],
    "iam": ["reader"],
    "history": [MODEL],
    "live": [MODEL],
    "diff": [MODEL, "prod", "prod"],
    "rollback": [MODEL, "--why", "errors"],
    "promote": [MODEL, "--from", "staging", "--why", "errors"],
    "rollout": [MODEL, "staging", "--why", "errors"],
    "doctor": [MODEL],
    "gc": [MODEL],
    "schema": [],
}
"""Words with which each command could do its work, or would begin to."""

NAMES = ["Digits", "../digits", "a" * 64, "digits\n"]
CHANNELS = ["Prod", "../prod", "latest", "champion", "v7", "staging-previous"]
RELEASES = ["0123", "f" * 20, "prod~9", "nowhere", "v0", "../prod", ""]
JOBS = ["{folder}/none.yaml", "{folder}", "{broken}", "{misspelt}", "{binary}", "{folder}/none\0.yaml"]
NUMBERS = ["many", "-1", ""]
WRONG: dict[str, Sequence[str]] = {
    "model": [*NAMES, "nobody"],
    "channel": CHANNELS,
    "job": JOBS,
    "jobs": JOBS,
    "release": RELEASES,
    "source": RELEASES,
    "why": ["", "  "],
    "run": ["tomorrow", "", "../x"],
    "role": ["root", ""],
    "approval": ["maybe", "Required", ""],
    "allow": ["everything", ""],
    "layout": ["tensorrt", ""],
    "backend": ["tensorrt", ""],
    "at": ["yesterday", "2026-13-01", "9999-01-01", "2026-11-17 14:00 Mars/Base"],
    "port": [*NUMBERS, "0", "70000", "{taken}"],
    "interval": [*NUMBERS, "0", "nan"],
    "max_requests": [*NUMBERS, "0"],
    "allow_host": ["http://models.example.com", "models.example.com:443", ""],
    "max_stale": [*NUMBERS, "0", "nan"],
    "batch_size": [*NUMBERS, "0", "65"],
    "last": [*NUMBERS, "0"],
    "keep": [*NUMBERS, "0", "1"],
    "slowest_reader": ["soon", "-1d", "7", ""],
    "grace": ["soon", "5m", "7", ""],
    "cron": ["often", "61 * * * *", ""],
    "timezone": ["Mars/Base", ""],
    "resume": ["../x", "nothing"],
    "folder": ["{folder}/none", "{job}"],
    "page": ["grafana", "report", ""],
    "steps": ["5,1,100", "1,5", "1,200", "half", ""],
    "every": ["soon", "0s", "-1m", ""],
    "key": ["", "a\nb"],
    "stop_if": ["errors", "errors=much", "=1", "p99_ms=1.3"],
    "max_hours": [*NUMBERS, "0", "nan"],
    "fallback_ms": ["many", "-1", ""],
    "changes": ["train.epochs", "=1", "train.epochs=many", "trian.epochs=1", "name.first=x", "train.epochs={{"],
}
"""What a person may type instead, by the name of the parameter."""
OF_COMMAND: dict[tuple[str, str], Sequence[str]] = {
    ("init", "folder"): ["{folder}/none", "{job}"],
    ("init", "model"): ["net", "net:Net"],
    ("init", "data"): ["net"],
    ("init", "name"): ["Digits"],
    ("init", "changes"): ["=1"],
    ("init", "example"): ["tensorrt"],
    ("deploy", "pool"): ["nowhere"],
    ("deploy", "image"): ["train:1"],
    ("deploy", "variables"): ["cpus"],
    ("up", "only"): ["worker", "s3,tensorboard", ","],
    ("worker install", "python"): ["{folder}/none", "{folder}", "{job}"],
    ("doctor", "model"): [*NAMES, "nobody"],
    ("iam", "model"): ["Digits", "../digits"],
    ("iam", "channel"): ["Prod", "../prod"],
    ("open", "model"): ["digits"],
    ("logs", "model"): [*NAMES, "nobody"],
    ("logs", "run"): ["tomorrow", "../x", "0932e559-aef2-4a0b-8800-1413436e53d9"],
    ("rollback", "to"): [name for name in RELEASES if name],
    ("promote", "to"): CHANNELS,
    ("rollout", "to"): CHANNELS,
    ("rollout", "candidate"): RELEASES,
    ("snapshot", "to"): ["s3:/typo", "s3://bucket", "bucket/prefix"],
    # Any folder will do, unless it cannot be one.
    **{(command, "to"): ["{job}"] for command in ("pull", "serve", "view")},
    ("diff", "releases"): [],
    ("channel set", "names"): [],
    ("channel show", "names"): [],
    # The default says what is meant.
    ("deploy", "cron"): ["often", "61 * * * *"],
    ("deploy", "timezone"): ["Mars/Base"],
}
"""Where a parameter of a command means something else than those of its name."""
FREE = {
    *(("approve", "by"), ("approve", "comment"), ("channel set", "why")),
    *(("iam", "kms_key"), ("retrain", "why")),
}
"""Text in which nothing can be wrong."""
MORE: dict[str, list[list[str]]] = {
    "diff": [["prod"], [], ["nobody", "prod", "prod"], ["Digits", "prod", "prod"], [MODEL, "prod", "nowhere"]],
    "rollback": [[MODEL], ["--why", "errors"], [MODEL, "--why", "errors", "--channel", "unused"]],
    "promote": [[MODEL, "--why", "errors"], [MODEL, "--why", "errors", "--from", "prod"]],
    "rollout": [
        *([], ["nobody"], [MODEL, "--next", "--stop", "--why", "errors"], [MODEL, "--next", "--why", "errors"]),
        *([MODEL, "--stop", "--why", "errors"], [MODEL, "staging"], [MODEL, "staging", "--why", "errors", "--next"]),
    ],
    "sign": [[MODEL]],
    "channel set": [
        *([MODEL, name, "--approval", "required"] for name in CHANNELS),
        *([[MODEL, "prod"], ["nobody", "prod", "--approval", "none"], [MODEL, "prod", "x", "--approval", "none"]]),
    ],
    "channel show": [[], [MODEL, "Prod"], ["Digits", "prod"], [MODEL, "prod", "x"]],
    "deploy": [[], ["{job}", "{job}"]],
}
"""Whole lines that are wrong."""

NO_SETTINGS = {"init", "schema", "snapshot", "worker install"}
SETTINGS = {
    "SHIP_S3_PORT": ["many", "0", "70000"],
    "SHIP_RUNS_AT_ONCE": ["0"],
    "SHIP_DISK": ["much"],
    "SHIP_CPU_HOUR_PRICE": ["nan"],
    "SHIP_SILENT_SECONDS": ["1"],
    "SHIP_REHEARSAL_SECONDS": ["0", "long"],
    "SHIP_REHEARSAL_MEMORY": ["0", "120%"],
}
STORE = {
    "AWS_ENDPOINT_URL": ["nonsense", "http://[::1"],
    "SHIP_BUCKET": ["Not A Bucket", "there-is-no-such-bucket"],
    "AWS_PROFILE": ["nobody"],
    "SHIP_HOME": ["{job}"],
    "SHIP_PUBLIC_KEY": ["{folder}/none.pem", "{job}"],
}
"""Asked of one command that reads the bucket and one that follows a channel."""


def parameters() -> Iterator[tuple[str, str, Sequence[str]]]:
    """Command, parameter and wrong values for it."""
    for command, found in COMMANDS.items():
        for parameter in found.params:
            if getattr(parameter, "is_flag", False) or parameter.name is None or (command, parameter.name) in FREE:
                continue
            if values := OF_COMMAND.get((command, parameter.name), WRONG.get(parameter.name, ())):
                yield command, parameter.name, values


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """The bucket with a release that is live, once there is one."""
    return {}


@pytest.fixture
def places(
    tmp_path: Path, connect: Connect, shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """A model with a release that is live, and files to be named. A mistake leaves the bucket as it is."""
    if not shipped:
        store = connect(f"test-{uuid.uuid4().hex[:12]}")
        store.create_bucket_if_missing()
        release = move(store, published(store, tmp_path / "release")).release
        shipped.update(bucket=store.bucket, release=release, objects=store.list_objects(""))
    store = connect(shipped["bucket"])
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    signing = tmp_path / "key.pem"
    monkeypatch.setenv("SHIP_SIGNING_KEY", str(signing))
    folder = tmp_path / "folder"
    folder.mkdir()
    files = {
        "job": "name: digits\nmodel: {factory: m:build}\ndata: {factory: m:data}\ntrain: {epochs: 1}\n",
        "broken": "name: [digits\n",
        "misspelt": "nmae: digits\n",
    }
    found = {"folder": str(folder), "release": shipped["release"], "binary": str(folder / "binary.yaml")}
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, text in files.items():
        found[name] = str(folder / f"{name}.yaml")
        Path(found[name]).write_text(text)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found["taken"] = str(listener.getsockname()[1])
        yield found
    assert store.list_objects("") == shipped["objects"]


def filled(words: Sequence[str], places: dict[str, str]) -> list[str]:
    return [word.format_map(places) for word in words]


def line_with(command: str, name: str, value: str) -> list[str]:
    """The words of a sound command with one of them replaced."""
    words = list(SOUND[command])
    found = next(parameter for parameter in COMMANDS[command].params if parameter.name == name)
    if not isinstance(found, click.Argument):
        # The last one counts.
        return [*words, f"{found.opts[0]}={value}"]
    arguments = [parameter.name for parameter in COMMANDS[command].params if isinstance(parameter, click.Argument)]
    place = arguments.index(name)
    words[place : place + 1] = [value]
    return words


def require_told(ship: Ship, lines: Iterable[Sequence[str]]) -> None:
    """Each line ends with 2 and says why."""
    wrong = []
    for words in lines:
        try:
            ended = ship(*words)
        except Exception as error:
            wrong.append(f"{words}: {error!r}")
            continue
        if ended.status != 2 or not ended.errors.strip() or "Traceback" in ended.text:
            wrong.append(f"{words}: {ended}")
    assert not wrong, "\n".join(wrong)


def test_every_command_and_parameter_is_in_the_tables() -> None:
    assert set(SOUND) == set(COMMANDS)
    for command, found in COMMANDS.items():
        for parameter in found.params:
            assert parameter.name is not None
            known = {(command, parameter.name)} & (FREE | set(OF_COMMAND)) or parameter.name in WRONG
            assert getattr(parameter, "is_flag", False) or known, f"{command}: what can be wrong in {parameter.name}?"


@pytest.mark.parametrize(
    ("command", "name", "values"), [pytest.param(*one, id="-".join(one[:2])) for one in parameters()]
)
def test_a_wrong_value_ends_with_2(
    ship: Ship, places: dict[str, str], command: str, name: str, values: Sequence[str]
) -> None:
    require_told(ship, [[*command.split(), *filled(line_with(command, name, value), places)] for value in values])


@pytest.mark.parametrize("command", MORE)
def test_a_wrong_line_ends_with_2(ship: Ship, places: dict[str, str], command: str) -> None:
    require_told(ship, [[*command.split(), *filled(words, places)] for words in MORE[command]])


def test_an_option_that_there_is_not_ends_with_2(ship: Ship, places: dict[str, str]) -> None:
    require_told(ship, [[*command.split(), *filled(SOUND[command], places), "--nonsense"] for command in COMMANDS])


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - NO_SETTINGS))
def test_a_setting_that_makes_no_sense_ends_every_command_with_2(
    ship: Ship, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for variable, values in SETTINGS.items():
        for value in values:
            monkeypatch.setenv(variable, value)
            ended = ship(*command.split(), *filled(SOUND[command], places))
            assert ended.status == 2 and variable in ended.errors and value in ended.errors, ended.text
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("command", ["history", "rollback", "pull", "gc"])
def test_a_setting_of_the_store_that_makes_no_sense_ends_with_2(
    ship: Ship, places: dict[str, str], command: str
) -> None:
    for variable, values in STORE.items():
        if variable == "SHIP_PUBLIC_KEY" and command in ("history", "gc"):
            continue  # They ask for no signature.
        for value in values:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(variable, value.format_map(places))
                require_told(ship, [[*command.split(), *filled(SOUND[command], places)]])


def test_the_errors_of_users_are_told_apart_from_the_others_by_their_base() -> None:
    def below(kind: type[ShipError]) -> set[type[ShipError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    named = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, ShipError)}
    assert {kind.__name__ for kind in below(ShipError)} >= named
    # Elsewhere there are special cases of these.
    users = {kind.__name__ for kind in below(UserError)} & named
    assert users == {"UserError", "JobError", "SettingsError", "RequestError", "GateError"}


@pytest.mark.parametrize("kind", sorted((k for k in vars(errors).values() if isinstance(k, type)), key=str), ids=str)
def test_each_error_has_its_exit_status(ship: Ship, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    error.args = ("expected this, got that",)

    def fail(*words: object) -> None:
        raise error

    monkeypatch.setattr("train_and_ship.ship.history.history", fail)
    ended = ship("history", MODEL)
    assert ended.status == (2 if isinstance(error, UserError) else 1)
    assert "expected this, got that" in ended.errors and "Traceback" not in ended.text
