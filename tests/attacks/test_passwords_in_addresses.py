"""A password in an address wants to be read by those who may see reports, tags, pid files, command lines and errors."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
import time
from pathlib import Path

import pytest

from tests.support.projects import write_project
from train_and_ship.infra.addresses import has_password, recognisable, without_password
from train_and_ship.infra.components import components
from train_and_ship.infra.errors import GateError, JobError, ServiceError, SettingsError, StoreFaultError, WorkerError
from train_and_ship.infra.home import make_folder, open_to_others
from train_and_ship.infra.processes import PidFile, Program, start, stop
from train_and_ship.infra.rundir import run_folder
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import Lines, Page, Section, Text, markdown
from train_and_ship.registry.text import Table
from train_and_ship.tasks import outcome

SECRET = "hunter2"
ADDRESS = f"https://ada:{SECRET}@mlflow.example.com/path"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ADDRESS, "https://mlflow.example.com/path"),
        (f"postgresql://ada:p@{SECRET}@db:5432/x", "postgresql://db:5432/x"),
        (f"see {ADDRESS}, or s3://key:{SECRET}@host/b.", "see https://mlflow.example.com/path, or s3://host/b."),
        (f'<a href="https://{SECRET}@host/x">', '<a href="https://host/x">'),
        ("https://host/@ada/page and ada@example.com", "https://host/@ada/page and ada@example.com"),
        ("no address", "no address"),
        # In the query and the fragment, by the name.
        *(
            (
                f"GET https://host/a?page=2&{name}={SECRET}&next=1 failed",
                f"GET https://host/a?page=2&{name}=***&next=1 failed",
            )
            for name in (
                "token",
                "access_token",
                "X-Auth-Token",
                "private-token",
                "sig",
                "Signature",
                "api_key",
                "apikey",
                "key",
                "subscription-key",
                "secret",
                "client_secret",
                "password",
                "pwd",
                "X-Amz-Signature",
                "X-Amz-Credential",
                "X-Amz-Security-Token",
                "x-amz-date",
                "AWSAccessKeyId",
                "X-Goog-Signature",
                "jwt",
                "sessionid",
                "auth",
            )
        ),
        (f"https://host/#access_token={SECRET}", "https://host/#access_token=***"),
        (f"with url: /simple?token={SECRET} (Caused by", "with url: /simple?token=*** (Caused by"),
        (f"(https://host/?token={SECRET})", "(https://host/?token=***)"),
        (f"[a](https://host/?token={SECRET}).", "[a](https://host/?token=***)."),
        (
            f"<a href='https://host/?a=1&amp;token={SECRET}&amp;b=2'>",
            "<a href='https://host/?a=1&amp;token=***&amp;b=2'>",
        ),
        (
            f"https://host/?to=https%3A%2F%2Fb%3Ftoken%3D{SECRET}%26a%3D1",
            "https://host/?to=https%3A%2F%2Fb%3Ftoken%3D***%26a%3D1",
        ),
        (f"https://ada:x@host/?token={SECRET}(1)x", "https://host/?token=***"),
        # Names of other things.
        *(
            (f"https://host/?{name}=5", f"https://host/?{name}=5")
            for name in (
                "tokens",
                "max_tokens",
                "tokenizer",
                "sort_key",
                "max-keys",
                "prefix",
                "design",
                "compass",
                "author",
            )
        ),
        ("token=5 and key = 7 in a sentence", "token=5 and key = 7 in a sentence"),
    ],
)
def test_one_function_takes_them_out_of_any_text(text: str, expected: str) -> None:
    assert without_password(text) == expected


def test_no_error_carries_one() -> None:
    said = f"cannot reach {ADDRESS}"
    gate = GateError(said, f"| {ADDRESS} |")
    for error in (ServiceError(said), WorkerError(said), StoreFaultError(said, status=500, code="x"), gate):
        assert SECRET not in str(error) and "mlflow.example.com" in str(error)
    assert SECRET not in gate.message + gate.table


def test_no_report_carries_one() -> None:
    blocks = [Text(text=f"why: {ADDRESS}"), Lines(text=ADDRESS), Table(header=("a",), rows=[(ADDRESS,)])]
    page = Page(
        title=ADDRESS, verdict="failed", good=False, intro=ADDRESS, facts=Table(rows=[("x", ADDRESS)]),
        sections=[Section(title="x", blocks=blocks)],
    )  # fmt: skip
    for made in (html(page), markdown(page)):
        assert SECRET not in made and "mlflow.example.com" in made


def test_no_pid_file_carries_one_and_another_password_is_noticed(tmp_path: Path) -> None:
    program = Program(
        name="sleeper", argv=[sys.executable, "-c", "import time; time.sleep(60)"], environment={}, folder=tmp_path,
        configuration={"MLFLOW_TRACKING_URI": ADDRESS},
    )  # fmt: skip
    pid_file = tmp_path / "sleeper.json"
    try:
        start(program, tmp_path / "log", pid_file)
        assert SECRET not in pid_file.read_text()
        record = PidFile.read(pid_file)
        assert record is not None and record.configuration["MLFLOW_TRACKING_URI"] == recognisable(ADDRESS)
        assert recognisable(ADDRESS) != recognisable(ADDRESS.replace(SECRET, "other"))
    finally:
        stop([pid_file])


def test_prefects_address_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"https://ada:{SECRET}@prefect.example.com/api")
    with pytest.raises(SettingsError, match="PREFECT_API_AUTH_STRING=user:password") as refused:
        Settings.load()
    assert SECRET not in str(refused.value) and "PREFECT_API_URL=https://prefect.example.com/api" in str(refused.value)


def test_a_job_takes_none_because_it_is_published(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    path.write_text(path.read_text().replace("data:", f'data:\n  args: {{places: ["{ADDRESS}"]}}', 1))
    with pytest.raises(JobError, match=r"data\.args\.places\.0: expected an address without a password") as refused:
        load_job(path)
    assert SECRET not in str(refused.value)
    assert has_password(ADDRESS) and not has_password("ssh://git@host/repository.git and http://host:80/a@b")
    assert has_password(f"https://host/data.csv?X-Amz-Signature={SECRET}")
    assert not has_password("https://host/?token=*** and https://host/?page=2") and not has_password("a?key=7")


def test_hiding_twice_is_hiding_once_and_takes_no_time_on_long_texts() -> None:
    once = without_password(f"https://a:{SECRET}@host/?token={SECRET}")
    assert without_password(once) == once
    began = time.process_time()
    for text in (
        "?" * 200_000,
        "?a_" * 70_000,
        "?token" * 40_000,
        "?" + "secret" * 40_000,
        "&" + "a" * 200_000,
        "=" + "&key" * 50_000,
        "?token=" + ")" * 100_000,
    ):
        without_password(text)
    assert time.process_time() - began < 2


def test_no_command_line_carries_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []
    sent: list[bytes] = []

    class Process:
        async def communicate(self, body: bytes) -> None:
            sent.append(body)

    async def begin(*argv: str, **_: object) -> Process:
        lines.extend(argv)
        return Process()

    monkeypatch.setattr(outcome.asyncio, "create_subprocess_exec", begin)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / ".ship"))
    settings = Settings.load()
    asyncio.run(outcome._end_from_outside("digits", tmp_path, "FAILED", "why", settings))
    for component in components(settings):
        lines.extend(component.argv)
    assert SECRET not in " ".join(lines) and json.loads(sent[0])[4] == ADDRESS


@pytest.mark.parametrize("name", [".ship", "elsewhere"])
def test_the_folder_of_all_state_is_its_owners_from_its_first_file_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = tmp_path / "team" / name
    monkeypatch.setenv("SHIP_HOME", str(home))
    run_folder(home / "runs" / "digits", "one", "")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.parent.stat().st_mode) & 0o055
    assert open_to_others(home) == ""
    home.chmod(0o770)
    assert open_to_others(home).endswith(f"chmod go-w {home}") and "its group" in open_to_others(home)
    # Whoever has opened it is told, and keeps it.
    make_folder(home / "more")
    assert (home / ".gitignore").read_text() == "*\n"
    assert stat.S_IMODE(home.stat().st_mode) == 0o770
