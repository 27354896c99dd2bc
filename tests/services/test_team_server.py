"""One Prefect and one MLflow for a team: PostgreSQL behind both, passwords in front, several workers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY
from tests.support.channels import live
from tests.support.fixture_types import Command
from tests.support.ports import free_ports
from tests.support.postgres import Postgres, binaries, postgres
from tests.support.processes import PATIENCE
from tests.support.projects import write_project
from tests.support.team_servers import ACCOUNT, answers, at, process
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import LOOPBACK, Settings

pytestmark = pytest.mark.timeout(600)

SHORT = {"epochs": 1, "processes": 1, "batch_size": 32}
DATABASES = ("prefect", "mlflow", "mlflow_accounts")


@dataclass(frozen=True, kw_only=True)
class Team:
    """The two servers, and how a member of the team reaches them."""

    database: Postgres
    folder: Path
    prefect_port: int
    mlflow_port: int
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefect_url(self) -> str:
        return f"http://{LOOPBACK}:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        return f"http://{LOOPBACK}:{self.mlflow_port}"

    def api(self, path: str, body: Mapping[str, Any]) -> Any:
        reply = httpx.post(self.prefect_url + path, json=dict(body), auth=ACCOUNT)
        reply.raise_for_status()
        return reply.json()

    @contextmanager
    def servers(self) -> Iterator[None]:
        """Both, until the end of the block."""
        account = ":".join(ACCOUNT)
        (self.folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = {self.database.url('postgresql+psycopg2', 'mlflow_accounts')}\n"
            f"admin_username = {ACCOUNT[0]}\nadmin_password = {ACCOUNT[1]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        prefect = {
            "PREFECT_API_DATABASE_CONNECTION_URL": self.database.url("postgresql+asyncpg", "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": account,
            "PREFECT_HOME": str(self.folder / "prefect-server"),
        }
        mlflow = {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of this server",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        store = ("--backend-store-uri", self.database.url("postgresql+psycopg2", "mlflow"))
        files = ("--serve-artifacts", "--artifacts-destination", str(self.folder / "artifacts"))
        with (
            process(self.folder, "prefect", prefect, "prefect", "server", "start", *at(self.prefect_port)),
            process(
                self.folder, "mlflow", mlflow, "mlflow", "server", *at(self.mlflow_port), "--workers", "1",
                "--app-name", "basic-auth", *store, *files,
            ),
        ):  # fmt: skip
            answers(f"{self.prefect_url}/health", self.folder / "prefect.log")
            answers(f"{self.mlflow_url}/health", self.folder / "mlflow.log")
            yield


@pytest.fixture(scope="module")
def team(stack: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Databases and accounts; the servers are started by who needs them."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed, and apt-get cannot install it here")
    folder = tmp_path_factory.mktemp("team")
    database_port, prefect_port, mlflow_port, nobody = free_ports(4)
    with postgres(programs, database_port) as database:
        for name in DATABASES:
            database.run("createdb", name)
        team = Team(database=database, folder=folder, prefect_port=prefect_port, mlflow_port=mlflow_port)
        variables = {
            "PREFECT_API_URL": team.prefect_url,
            "PREFECT_API_AUTH_STRING": ":".join(ACCOUNT),
            "PREFECT_HOME": str(folder / "prefect"),
            "MLFLOW_TRACKING_URI": team.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": ACCOUNT[0],
            "MLFLOW_TRACKING_PASSWORD": ACCOUNT[1],
            "SHIP_HOME": str(folder / "home"),
            "SHIP_BUCKET": stack.bucket,
            "AWS_ENDPOINT_URL": str(stack.s3_endpoint),
            # The bucket is the team's: this machine would start its own elsewhere.
            "SHIP_S3_PORT": str(nobody),
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }
        yield Team(**{**vars(team), "variables": variables})


@pytest.mark.soak
def test_several_workers_ship_through_one_server_whose_state_is_backed_up_and_restored(
    team: Team, command: Command, store: ObjectStore, tmp_path: Path
) -> None:
    def run(*argv: str, **more: str) -> str:
        done = command(*argv, **team.variables, **more)
        assert done.status == 0, done.text
        return done.text

    def versions() -> dict[str, list[str]]:
        """Model to the aliases of its versions, as MLflow has them."""
        url = f"{team.mlflow_url}/api/2.0/mlflow/registered-models/search"
        reply = httpx.get(url, auth=ACCOUNT).raise_for_status().json()
        return {
            model["name"]: sorted(alias["alias"] for alias in model.get("aliases", []))
            for model in reply.get("registered_models", [])
        }

    def completed() -> set[str]:
        runs = team.api("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
        return {found["id"] for found in runs}

    with team.servers():
        run("prefect", "work-pool", "create", "local", "--type", "process")
        run("prefect", "--no-prompt", "deploy", "--all")
        with ExitStack() as workers:
            for name in ("one", "two"):
                # Two machines of the team: each has a home of its own.
                home = {"PREFECT_HOME": str(team.folder / name), "SHIP_HOME": str(team.folder / f"{name}-home")}
                workers.enter_context(
                    process(
                        team.folder, f"worker-{name}", {**team.variables, **home},
                        "prefect", "worker", "start", "--pool", "local", "--name", name, "--limit", "1",
                    )
                )  # fmt: skip
            for model in ("ours", "theirs"):
                job = write_project(tmp_path / model, name=model, train=SHORT, export={"formats": ["onnx"]})
                run("prefect", "deployment", "run", "train-and-ship/train-and-ship", "-p", f"job={job}")
            seen, deadline = "", time.monotonic() + PATIENCE
            while len(completed()) < 2:
                lines = "".join(path.read_text() for path in team.folder.glob("worker-*.log")).splitlines()
                # A run that stands still says that it is at work.
                said = "\n".join(line for line in lines if "is at work" not in line)
                if said != seen:
                    seen, deadline = said, time.monotonic() + PATIENCE
                assert time.monotonic() < deadline, seen[-6000:]
                time.sleep(0.5)
        assert live(store, "ours") and live(store, "theirs")
        before = completed(), versions()
        assert before[1] == {"ours": ["champion"], "theirs": ["champion"]}
        assert httpx.post(f"{team.prefect_url}/flow_runs/filter", json={}).status_code == 401
        assert httpx.get(f"{team.mlflow_url}/api/2.0/mlflow/registered-models/search").status_code == 401
        shown = command("ship", "status", **team.variables)
        assert shown.status == 0 and "ours" in shown.output and "not known" not in shown.errors, shown.text
        hidden = command("ship", "status", **{**team.variables, "PREFECT_API_AUTH_STRING": ""})
        assert "is not known" in hidden.errors and "PREFECT_API_AUTH_STRING" in hidden.errors, hidden.text
        refused = command("ship", "run", str(job), **{**team.variables, "PREFECT_API_AUTH_STRING": "team:wrong"})
        assert refused.status != 0 and "PREFECT_API_AUTH_STRING" in refused.errors, refused.text
        assert "Traceback" not in refused.text

    dumps = {name: team.database.run("pg_dump", "--format", "custom", name) for name in DATABASES}
    for name, dump in dumps.items():
        team.database.run("dropdb", name)
        team.database.run("createdb", name)
        team.database.run("pg_restore", "--dbname", name, input=dump)
    with team.servers():
        assert (completed(), versions()) == before
