"""Others on the machine, and web pages in a browser on it, want into the local stack: its servers, worker and files.

The guards first, in this process; then the real servers of a stack.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as websocket

from tests.support.asgi import asked, welcoming
from tests.support.fixture_types import Ship
from tests.support.passwords import PASSWORD
from tests.support.prefect_api import Api
from tests.support.processes import processes_of
from tests.support.projects import REPOSITORY
from tests.support.repositories import repository
from train_and_ship.infra import password as password_file
from train_and_ship.infra.components import PASSWORD as IN_PID_FILES
from train_and_ship.infra.components import components
from train_and_ship.infra.doors.guard import OwnPages
from train_and_ship.infra.doors.mlflow_server import Asking
from train_and_ship.infra.doors.s3_server import Signed
from train_and_ship.infra.doors.sigv4 import signed_get
from train_and_ship.infra.errors import JobError, SettingsError
from train_and_ship.infra.home import find_home
from train_and_ship.infra.job_folders import FILE as FOLDERS
from train_and_ship.infra.job_folders import MORE, WORKER, add_job_folder, require_job_folder
from train_and_ship.infra.password import FILE, USER, make_password, password_is_open, read_password, require_own_server
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.processes import PidFile
from train_and_ship.infra.settings import MLFLOW_ACCOUNT, PREFECT_ACCOUNT, Settings
from train_and_ship.infra.stack_checks import already_running
from train_and_ship.registry.tracking import connection
from train_and_ship.registry.tracking.rest import RestRegistry
from train_and_ship.ship.prefect_plugin import setup_environment
from train_and_ship.tasks.job_file import find_run, job_of, read_job_file


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# Web pages.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:4200"}, 200),
        ({"host": "127.0.0.1:4200", "origin": "http://127.0.0.1:4200"}, 200),
        # The page calls this machine by one name and its server by the other.
        ({"host": "127.0.0.1:4200", "origin": "http://localhost:4200"}, 200),
        ({"host": "attacker.example:4200"}, 403),
        ({"host": "127.0.0.1.attacker.example"}, 403),
        ({"host": "127.0.0.1:4200@attacker.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1:4200", "origin": "https://attacker.example"}, 403),
        ({"host": "127.0.0.1:4200", "origin": "http://127.0.0.1:8888"}, 403),
        ({"host": "127.0.0.1:4200", "origin": "null"}, 403),
        ({"host": "127.0.0.1:4200", "origin": "https://127.0.0.1:4200"}, 403),
    ],
)
def test_only_pages_of_the_server_itself_ask_it(headers: Mapping[str, str], status: int) -> None:
    assert asked(OwnPages(welcoming), headers=headers).status == status


def test_two_hosts_in_one_request_are_none() -> None:
    headers = [(b"host", b"127.0.0.1:4200"), (b"host", b"attacker.example")]
    seen = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(scope)

    async def ask() -> list[int]:
        sent: list[dict[str, int]] = []

        async def send(message: dict[str, int]) -> None:
            sent.append(message)

        await OwnPages(app)({"type": "http", "method": "GET", "path": "/", "headers": headers}, app, send)
        return [message["status"] for message in sent if "status" in message]

    assert asyncio.run(ask()) == [403] and seen == []


# Passwords.


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"authorization": basic(USER, "x")},
        {"authorization": basic(USER, PASSWORD + "0")},
        {"authorization": basic(USER, "")},
        {"authorization": basic("", PASSWORD)},
        {"authorization": f"Bearer {PASSWORD}"},
        {"authorization": "Basic"},
        {"authorization": "Basic " + "\x80"},
    ],
)
def test_mlflow_answers_nobody_who_does_not_know_the_password(given: Mapping[str, str]) -> None:
    app = Asking(welcoming, USER, PASSWORD)
    refused = asked(app, target="/api/2.0/mlflow/registered-models/search", headers=given)
    assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Basic ")
    assert b"secrets" not in refused.body
    assert asked(app, "POST", "/health", given).status == 401
    assert asked(app, "GET", "/health", given).status == 200
    assert asked(app, headers={"authorization": basic(USER, PASSWORD)}).body == b"secrets"


def test_no_page_is_invited_to_the_s3_server_and_its_management_is_closed() -> None:
    app = Signed(welcoming, USER, PASSWORD)

    def signed(target: str) -> Mapping[str, str]:
        return signed_get(f"http://127.0.0.1:1234{target}", USER, PASSWORD, datetime.now(UTC))

    answer = asked(app, target="/models", headers=signed("/models"))
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers and "etag" in answer.headers
    assert asked(app, target="/_ministack/health").status == 200
    assert asked(app, target="/_ministack/ready", headers=signed("/_ministack/ready")).status == 403
    assert asked(app, "POST", "/_ministack/health").status == 403
    refused = asked(app, target="/models/%3Cb%3E")
    assert refused.status == 403 and b"<Code>AccessDenied</Code>" in refused.body
    assert asked(app, "HEAD", "/models").body == b""
    assert asked(app, "OPTIONS", "/models", {"origin": "http://127.0.0.1:1234"}).status == 403


def test_the_password_is_random_whole_its_owners_alone_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = os.umask(0)
    try:
        one, other = (make_password(tmp_path / name) for name in ("one", "other"))
    finally:
        os.umask(old)
    assert one != other and len(one) == 48
    assert make_password(tmp_path / "one") == one == read_password(tmp_path / "one")
    assert stat.S_IMODE((tmp_path / "one" / FILE).stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FILE]
    assert password_is_open(tmp_path / "one") == ""
    (tmp_path / "one" / FILE).chmod(0o644)
    assert "chmod 600" in password_is_open(tmp_path / "one")
    # What a power cut left is no password.
    (tmp_path / "one" / FILE).write_text("")
    assert read_password(tmp_path / "one") is None
    assert len(make_password(tmp_path / "one")) == 48


def test_no_server_starts_without_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_and_ship.infra.doors import mlflow_server, prefect_server, s3_server

    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    monkeypatch.delenv(prefect_server.ACCOUNT, raising=False)
    for start in (s3_server.main, prefect_server.main):
        with pytest.raises(SystemExit, match="expected"):
            start()
    with pytest.raises(RuntimeError, match="expected the password"):
        mlflow_server.create_app()


def test_another_server_is_never_sent_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    password = make_password(tmp_path)
    own = dict(zip(MLFLOW_ACCOUNT, ("ada", "hers"), strict=True))
    for name, value in {
        **own,
        "SHIP_HOME": str(tmp_path),
        "SHIP_MLFLOW_PORT": "5011",
        PREFECT_ACCOUNT: "ada:p",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    # Of the stack of other tests.
    monkeypatch.setattr(connection, "_before", {})
    local, other = "http://127.0.0.1:5011", "https://mlflow.example.com"

    def sent(address: str) -> str:
        connection.log_in(address)
        return os.environ[MLFLOW_ACCOUNT[1]]

    assert (sent(local), sent(other), sent(f"{local}/"), sent(f"{local}1")) == (password, "hers", password, "hers")
    assert RestRegistry(local)._pool.headers["authorization"] == basic(USER, password)
    assert RestRegistry(other)._pool.headers["authorization"] == basic("ada", "hers")
    assert Settings.load().prefect_account == f"{USER}:{password}"
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.com/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert Settings.load().prefect_account == "ada:p"
    assert password not in Settings.load().child_environment().values()


def test_a_program_of_another_user_at_a_port_of_the_stack_is_not_sent_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_password(tmp_path)
    others = os.getuid() + 1
    for name, value in {"SHIP_HOME": str(tmp_path), "SHIP_MLFLOW_PORT": "5011", "SHIP_PREFECT_PORT": "4211"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    table = tmp_path / "tcp"
    monkeypatch.setattr(password_file, "TABLES", [table])

    def listening(port: int, user: int) -> None:
        row = f"   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000  {user}        0 1 1"
        table.write_text(f"  sl  local_address rem_address   st ...\n{row}\n")

    listening(5012, others)
    require_own_server(tmp_path, "http://127.0.0.1:5011")
    for port in (5011, 4211):
        listening(port, others)
        with pytest.raises(SettingsError, match=f"another user .uid {others}.*{port}"):
            if port == 4211:
                prefect_api(Settings.load(), "GET", "/admin/version")
            else:
                RestRegistry("http://127.0.0.1:5011").aliases("digits")
    with socket.socket() as real:
        real.bind(("127.0.0.1", 0))
        real.listen()
        found = password_file._listeners(Path("/proc/net/tcp").read_text(), real.getsockname()[1])
        assert found == {os.getuid()}


@pytest.mark.parametrize(
    ("address", "expected"), [("http://127.0.0.1:4200/api", True), ("https://x.example/api", False)]
)
def test_the_prefect_command_sends_it_to_the_local_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, expected: bool
) -> None:
    from prefect.plugins import HookContext

    make_password(tmp_path)
    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    monkeypatch.delenv("SHIP_PREFECT_PORT")
    monkeypatch.setenv("PREFECT_API_URL", address)
    result = setup_environment(ctx=HookContext(prefect_version="3", api_url=address, logger_factory=None))
    assert (result is not None and PREFECT_ACCOUNT in result.env) is expected


def test_a_stack_of_before_goes_on_and_is_restarted_only_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"SHIP_HOME": tmp_path})
    make_password(tmp_path)
    ours, this = components(settings), psutil.Process()
    names = [component.name for component in ours]

    def started(*which: str, password: str | None = None) -> None:
        for component in ours:
            path = tmp_path / "pids" / f"{component.name}.json"
            path.unlink(missing_ok=True)
            if component.name in which:
                known = {name: value for name, value in component.configuration.items() if name != IN_PID_FILES}
                if password is not None:
                    known[IN_PID_FILES] = password
                PidFile(
                    name=component.name, pid=this.pid, create_time=this.create_time(), port=None, token="x",
                    configuration=known,
                ).write(path)  # fmt: skip

    said: list[str] = []
    started(*names)
    assert set(already_running(settings, ours, said.append)) == set(names)
    assert len(said) == 1 and "ask for no password" in said[0] and "ship down" in said[0]
    started("worker")
    with pytest.raises(SettingsError, match=r"worker: .* no password: run `ship down` first"):
        already_running(settings, ours, said.append)
    # The file was deleted for a new password, and the servers have the old one.
    started(*names, password="00000000")
    with pytest.raises(SettingsError, match=r"another password than .*password: run `ship down` first"):
        already_running(settings, ours, said.append)


# Jobs of others.


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the owner's project, in the worker of a home."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(WORKER, "local")
    monkeypatch.delenv(MORE, raising=False)
    add_job_folder(tmp_path / "home", project)
    yield project


def test_a_worker_runs_only_jobs_of_folders_that_its_owner_named(
    worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = worker / "deep" / "job.yaml", tmp_path / "elsewhere" / "job.yaml"
    for path in (inside, outside):
        path.parent.mkdir()
        path.write_text("secret: of somebody else")
    require_job_folder(inside)
    link = worker / "link.yaml"
    link.symlink_to(outside)
    for path in (outside, link, worker / ".." / "elsewhere" / "job.yaml", Path("/dev/zero"), tmp_path / "none.yaml"):
        with pytest.raises(JobError) as refused:
            require_job_folder(path)
        for word in (str(worker), "ship deploy", MORE, str(path.resolve())):
            assert word in str(refused.value)
    monkeypatch.setenv(MORE, os.pathsep.join([str(tmp_path / "more"), str(outside.parent)]))
    require_job_folder(outside)
    require_job_folder(link)
    # A worker of one's own, of another Prefect server.
    monkeypatch.delenv(WORKER)
    with pytest.raises(JobError):
        require_job_folder(inside)


def test_nothing_of_a_job_outside_is_read(worker: Path, tmp_path: Path) -> None:
    outside = tmp_path / "notes.txt"
    outside.write_text("secret: of somebody else")
    outside.chmod(0)
    for read in (lambda: read_job_file(str(outside), "one"), lambda: job_of(str(outside), "two", None)):
        with pytest.raises(JobError, match="folder whose jobs this worker runs") as refused:
            read()
        assert "secret" not in str(refused.value)
    assert find_run(str(outside), "three", "three", tmp_path) is None


def test_ones_own_shell_is_asked_for_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    monkeypatch.delenv(MORE, raising=False)
    require_job_folder(tmp_path / "job.yaml")


def test_the_list_of_folders_is_kept_and_a_broken_one_lets_nothing_through(worker: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    add_job_folder(home, worker)
    add_job_folder(home, tmp_path / "second")
    assert json.loads((home / FOLDERS).read_text()) == [str(worker), str(tmp_path / "second")]
    (home / FOLDERS).write_text("[")
    with pytest.raises(SettingsError, match="expected a list of folders"):
        require_job_folder(worker / "job.yaml")


# The real servers.


@dataclass(frozen=True)
class Door:
    """One server of the stack, and a question that shows something of what is behind it."""

    url: str
    target: str
    headers: Mapping[str, str]
    """With which it is answered."""


def door(stack: Settings, name: str, password: str = PASSWORD) -> Door:
    known = {"authorization": basic(USER, password)}
    if name == "prefect":
        return Door(stack.prefect_ui_url, "/api/admin/version", known)
    if name == "mlflow":
        return Door(stack.mlflow_url, "/api/2.0/mlflow/registered-models/search", known)
    url = str(stack.s3_endpoint)
    return Door(url, "/models?list-type=2", signed_get(f"{url}/models?list-type=2", USER, password, datetime.now(UTC)))


def got(asked_door: Door, headers: Mapping[str, str], method: str = "GET") -> httpx.Response:
    return httpx.request(method, asked_door.url + asked_door.target, headers=dict(headers), trust_env=False)


@pytest.mark.parametrize("name", ["prefect", "mlflow", "s3"])
def test_the_servers_of_the_stack_ask_everybody(stack: Settings, name: str) -> None:
    asked_door = door(stack, name)
    assert got(asked_door, asked_door.headers).status_code == 200
    assert got(asked_door, {}).status_code in (401, 403)
    assert got(asked_door, door(stack, name, "0" * 48).headers).status_code in (401, 403)
    own = {**asked_door.headers, "origin": asked_door.url}
    assert got(asked_door, own).status_code == 200
    for foreign in (
        {"origin": "https://attacker.example"},
        {"origin": "http://127.0.0.1:1"},
        {"host": "attacker.example"},
    ):
        answer = got(asked_door, {**asked_door.headers, **foreign})
        assert answer.status_code == 403, foreign
        assert "access-control-allow-origin" not in answer.headers
    asking = {"origin": "https://attacker.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in got(asked_door, asking, "OPTIONS").headers


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out"])
def test_prefects_websockets_ask_too(stack: Settings, path: str) -> None:
    address = f"{stack.prefect_api_url.replace('http', 'ws')}/{path}"
    with pytest.raises(InvalidStatus) as refused:
        websocket(address, origin="https://attacker.example", proxy=None)
    assert refused.value.response.status_code == 403
    with (
        pytest.raises((ConnectionClosed, InvalidStatus)),
        websocket(address, subprotocols=["prefect"], proxy=None) as opened,
    ):
        opened.send(json.dumps({"type": "auth", "token": f"{USER}:wrong"}))
        assert json.loads(opened.recv(10))["type"] != "auth_success"
        opened.recv(10)


def test_a_signed_address_is_good_for_what_it_names_and_for_its_time(stack: Settings) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=stack.s3_endpoint, region_name="us-east-1", aws_access_key_id=USER,
        aws_secret_access_key=PASSWORD, config=Config(signature_version="s3v4"),
    )  # fmt: skip
    client.put_object(Bucket=stack.bucket, Key="attacks/a b+ü", Body=b"mine")
    address = client.generate_presigned_url(
        "get_object", Params={"Bucket": stack.bucket, "Key": "attacks/a b+ü"}, ExpiresIn=60
    )
    with httpx.Client(trust_env=False) as browser:
        assert browser.get(address).content == b"mine"
        assert browser.get(address.replace("/attacks/", "/attacks2/")).status_code == 403
        assert browser.get(address.replace("X-Amz-Expires=60", "X-Amz-Expires=604800")).status_code == 403
        assert browser.put(address, content=b"theirs").status_code == 403
    client.delete_object(Bucket=stack.bucket, Key="attacks/a b+ü")


def test_the_password_is_in_no_command_line_log_pid_file_page_or_record(stack: Settings, ship: Ship) -> None:
    shown = ship("status").text + ship("up").text
    assert PASSWORD not in shown and "`ship password`" in shown
    assert ship("password").output == PASSWORD + "\n"
    lines = [" ".join(process.cmdline()) for process in processes_of(stack)]
    assert len(lines) >= 4 and not any(PASSWORD in line for line in lines)
    for path in stack.home.rglob("*"):
        # Databases too: what runs say of themselves, and what Prefect keeps of deployments.
        if path.is_file() and path != stack.home / FILE:
            assert PASSWORD.encode() not in path.read_bytes(), path


@pytest.mark.soak
def test_a_run_of_a_job_outside_fails_in_the_worker_with_the_folders(stack: Settings) -> None:
    api = Api(stack)
    run = api.wait(api.start("train-and-ship", job="/etc/hostname"), "Failed")
    said = run["state"]["message"]
    assert "folder whose jobs this worker runs" in said and str(REPOSITORY) in said
    assert Path("/etc/hostname").read_text().strip() not in said.replace(sys.prefix, "")


def test_a_state_that_came_with_a_repository_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for place in (theirs, ours):
        (place / ".ship").mkdir(parents=True)
        (place / ".ship/job-folders.json").write_text('["/"]')
    repository(theirs)
    (ours / ".ship/.gitignore").write_text("*\n")
    (ours / "job.yaml").write_text("name: x\n")
    repository(ours)
    monkeypatch.chdir(ours)
    assert find_home() == ours / ".ship"
    monkeypatch.chdir(theirs)
    with pytest.raises(SettingsError, match=r"one that git tracks \(\.ship/job-folders\.json\), .* or set SHIP_HOME"):
        find_home()
