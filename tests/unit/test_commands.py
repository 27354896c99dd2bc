"""What every command of `ship` has: a group, and examples that can be typed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click
import pytest
import typer.main
from typer.testing import CliRunner

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.examples import EXAMPLES
from train_and_ship.ship.main import app
from train_and_ship.ship.newest_run import run_of

GROUP = typer.main.get_command(app)
RUN = "0932e559-aef2-4a0b-8800-1413436e53d"


def commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in GROUP.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"{name} {word}": below for word, below in inner.items()} if inner else {name: command}
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_examples_of_a_command_fit_it(name: str) -> None:
    for line in EXAMPLES[name]:
        words = shlex.split(line.removeprefix('eval "$(').removesuffix(')"').partition(" > ")[0])
        assert words[0] == "ship" and " ".join(words[1:]).startswith(name)
        # Parses them as the command would, and runs nothing; what does not fit is raised.
        commands()[name].make_context(name, words[1 + len(name.split()) :])
    assert EXAMPLES[name][0] in CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "120"}).output


def test_every_command_is_in_a_group_and_has_examples() -> None:
    assert set(EXAMPLES) == set(commands())
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "─ Commands ─" not in shown
    for group in ("The local stack", "Training", "Releases", "Serving", "Keeping order"):
        assert f"─ {group} ─" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pull digits /srv/digits", "expected MODEL alone, got '/srv/digits' as well; what it is says an option"),
        ("pull digits /srv/digits", "--channel, --to"),
        ("history digits staging", "option before it: --channel, --last"),
        ("check a.yaml b.yaml", "expected JOB alone, got 'b.yaml' as well; what it is says an option before it: --set"),
        ("channel show", "Missing argument"),
        ("down now", "expected no argument, got 'now'"),
    ],
)
def test_a_word_too_many_says_which_options_take_one(words: str, expected: str) -> None:
    shown = CliRunner().invoke(app, words.split(), env={"COLUMNS": "160"})
    assert shown.exit_code == 2 and expected in " ".join(shown.output.replace("│", " ").split())


def test_the_version_names_what_is_used() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0 and shown.output.startswith("train-and-ship ") and ", torch 2." in shown.output


def test_the_newest_run_of_a_model_is_meant_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    settings = Settings.load()
    for last in "12":
        (settings.runs / "digits" / f"{RUN}{last}").mkdir(parents=True)
        os.utime(settings.runs / "digits" / f"{RUN}{last}", (int(last), int(last)))
    (settings.runs / "digits" / ".locks").mkdir()
    assert run_of(settings, "digits").name == f"{RUN}2"
    assert run_of(settings, "digits", f"{RUN}1").name == f"{RUN}1"
    with pytest.raises(RequestError, match=rf"digits: expected run {RUN}9 in .*, found none"):
        run_of(settings, "digits", f"{RUN}9")
    with pytest.raises(RequestError, match=r"other: expected a run in .*, found none"):
        run_of(settings, "other")


def test_the_report_of_the_newest_run_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    run = Settings.load().runs / "digits" / f"{RUN}1"
    run.mkdir(parents=True)
    (run / "report.html").write_text("<p>")
    shown = CliRunner().invoke(app, ["open", "report", "digits", "--print"])
    assert shown.output.strip() == (run / "report.html").resolve().as_uri()
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)) or True)
    assert CliRunner().invoke(app, ["open", "mlflow"]).exit_code == 0
    assert opened == [Settings.load().mlflow_url]
