"""The code of a job looks around for keys and passwords: in its environment, and in that of the process above it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import CODE, write_project
from tests.support.signing_keys import key_pair
from torchworker.contract import InspectResult, Message, Project, RehearsedRelease
from train_and_ship.infra import private
from train_and_ship.infra.components import components
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer, child_environment
from train_and_ship.infra.job_environment import (
    SIGNING_PASSWORD,
    asked_for,
    for_installing,
    for_launcher,
    given,
    inherited,
    mentioned,
    require_set,
    withheld,
)
from train_and_ship.infra.launchers.hosts import HostsLauncher, plan
from train_and_ship.infra.launchers.slurm import script, submission
from train_and_ship.infra.launchers.spec import Spec
from train_and_ship.infra.processes import TOKEN_VARIABLE
from train_and_ship.infra.provenance import git_commit
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.signing import load_private_key
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import config_digest
from train_and_ship.tasks.extras import not_passed_on
from train_and_ship.tasks.requests import inspect_request, project_of, rehearse_request
from train_and_ship.tasks.worker import ask_worker, call_worker

OURS = (
    "SHIP_SIGNING_KEY", "SHIP_SIGNING_KEY_PASSWORD", "SHIP_NOTIFY", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY",
    "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_CLIENT_CUSTOM_HEADERS",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_FLASK_SERVER_SECRET_KEY",
)  # fmt: skip
"""By which this application is given what it may do."""
OTHERS = ("WANDB_API_KEY", "HF_TOKEN", "GITHUB_TOKEN", "SLURM_JWT", "DATABASE_URL", "SSH_AUTH_SOCK")
"""Anybody's, which a job may name."""
STORE = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
USUAL = {
    "PATH": "/bin", "HOME": "/home/ada", "LC_ALL": "C", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0",
    "NCCL_DEBUG": "INFO", "TORCH_LOGS": "+dynamo", "PYTHONPATH": "/src", "HTTPS_PROXY": "http://proxy:3128",
    "REQUESTS_CA_BUNDLE": "/ca.pem", "HF_HOME": "/hub", "XDG_CACHE_HOME": "/cache", "SLURM_JOB_ID": "7",
    TOKEN_VARIABLE: "t",
}  # fmt: skip
SECRET = "open sesame"
EVERYTHING = {**USUAL, **STORE, **dict.fromkeys((*OURS, *OTHERS), SECRET)}


def test_workers_get_what_is_on_the_list_and_nothing_else() -> None:
    assert inherited(EVERYTHING) == USUAL
    assert given(EVERYTHING, []) == STORE
    assert given(EVERYTHING, ["WANDB_API_KEY", *OURS]) == {**STORE, "WANDB_API_KEY": SECRET}
    # ssh asks an agent; no rank does.
    assert for_launcher(EVERYTHING) == {**USUAL, **STORE, "SSH_AUTH_SOCK": SECRET}
    index = {"PIP_INDEX_URL": "https://ada:word@index.example/simple", "UV_INDEX_HOUSE_PASSWORD": SECRET}
    assert for_installing({**EVERYTHING, **index, "UV_PUBLISH_TOKEN": SECRET}) == {**USUAL, **index}


@pytest.mark.parametrize("name", OURS)
def test_a_job_cannot_name_what_this_application_may_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"env\.0: expected a variable that is not ours: {name} says what this"):
        load_job(write_project(tmp_path, env=[name]))


def test_a_name_that_is_none_and_a_variable_that_is_not_set_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"env\.0: expected the name of an environment variable, .* got \"A=B\""):
        load_job(write_project(tmp_path / "a", env=["A=B"]))
    job, _ = load_job(write_project(tmp_path / "b", env=["WANDB_API_KEY", "OF_NOBODY"]))
    with pytest.raises(JobError, match="env: expected OF_NOBODY to be set in the environment of this process"):
        require_set(EVERYTHING, job.env, job.name)


def test_names_of_variables_are_recorded_and_make_no_other_release(tmp_path: Path) -> None:
    without, _ = load_job(write_project(tmp_path / "a"))
    named, _ = load_job(write_project(tmp_path / "b", env=["WANDB_API_KEY"]))
    assert "env" not in without.model_dump(mode="json")
    assert named.model_dump(mode="json")["env"] == ["WANDB_API_KEY"]
    assert named.training_digest() == without.training_digest() and config_digest(named) == config_digest(without)


LOOKS_AROUND = """
    import json, os
    from pathlib import Path

    def seen():
        yield "os.environ", dict(os.environ)
        for pid in ("self", os.getppid()):
            lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\\0")
            yield str(pid), dict(line.decode().split("=", 1) for line in lines if b"=" in line)

    Path(__file__).with_name("seen.json").write_text(json.dumps(dict(seen())))
"""


def look_around(server: ForkServer, folder: Path) -> list[dict[str, str]]:
    """What the code of a job sees: its own environment, what /proc has of it, and of the process above it."""
    job, project = load_job(write_project(folder, code=CODE, extra=LOOKS_AROUND, env=["WANDB_API_KEY"]))
    request = inspect_request(job, project_of(job, project))
    asyncio.run(ask_worker(server, "inspect", request, InspectResult, folder / "work"))
    said = "".join(path.read_text() for path in (folder / "work").iterdir() if path.is_file())
    assert SECRET not in said
    seen: dict[str, dict[str, str]] = json.loads((project / "seen.json").read_text())
    return list(seen.values())


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in EVERYTHING.items():
        if name not in USUAL:
            monkeypatch.setenv(name, value)


def require_only_what_is_given(own: dict[str, str]) -> None:
    assert own.items() >= {**STORE, "WANDB_API_KEY": SECRET}.items()
    assert [name for name in own if name in OURS or name in OTHERS] == ["WANDB_API_KEY"]


def test_the_code_of_a_job_finds_what_it_named_in_its_environment_and_no_other_secret(
    fork_server: ForkServer, secrets: None, tmp_path: Path
) -> None:
    own, *_ = look_around(fork_server, tmp_path)
    require_only_what_is_given(own)


# A fork server of its own imports torch; the same without one is asked above and below.
@pytest.mark.soak
def test_nor_does_it_in_that_of_the_process_which_forked_it(secrets: None, tmp_path: Path) -> None:
    server = ForkServer(tmp_path / "host.log")
    try:
        own, *others = look_around(server, tmp_path)
        require_only_what_is_given(own)
        for environment in others:
            assert not set(environment) & {*OURS, *OTHERS, *STORE}
        # The process that started it can still sign, and starts nothing that could.
        assert SIGNING_PASSWORD not in os.environ and private.signing_password() == SECRET
    finally:
        server.close()
        private._taken.clear()


class Recorded:
    """Stands for a fork server: notes what a stage would be given."""

    def __init__(self) -> None:
        self.variables: Any = "not asked"

    async def run(self, *_: Any, variables: Any, **__: Any) -> int:
        self.variables = variables
        return 1


def test_the_clean_room_gets_no_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STORE, "WANDB_API_KEY": SECRET}.items():
        monkeypatch.setenv(name, value)
    job, folder = load_job(write_project(tmp_path, env=["WANDB_API_KEY"]))
    release: Any = {"folder": str(tmp_path), "formats": {}, "inputs": [], "outputs": [], "files": {}}
    requests: list[Message] = [
        inspect_request(job, project_of(job, folder)),
        rehearse_request(job, RehearsedRelease(**release), None, None, str(folder)),
    ]
    found = []
    for request in requests:
        recorded: Any = Recorded()
        with pytest.raises(Exception, match="left no result"):
            asyncio.run(call_worker(recorded, "any", request, tmp_path))
        found.append(recorded.variables)
    assert found[0].items() >= {**STORE, "WANDB_API_KEY": SECRET}.items() and found[1] is None
    assert not {*STORE, "WANDB_API_KEY"} & child_environment().keys()


HOLDER = """
import ctypes, os, sys
from train_and_ship.infra import private
if os.getuid() == 0:
    os.setuid(65534)
# As a process is that was started by this user.
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
if sys.argv[1] == "private":
    private.take_password()
print(private.signing_password() == "open sesame", flush=True)
sys.stdin.read()
"""
READER = """
import os, sys
if os.getuid() == 0:
    os.setuid(65534)
for file in ("environ", "mem", "maps"):
    try:
        with open(f"/proc/{sys.argv[1]}/{file}", "rb") as opened:
            found = b"open sesame" in opened.read() if file == "environ" else True
        print(file, "read" if found else "nothing")
    except OSError as error:
        print(file, type(error).__name__)
"""


@pytest.mark.parametrize(("how", "environ"), [("as usual", "read"), ("private", "PermissionError")])
def test_no_process_of_the_same_user_reads_the_environment_of_one_that_holds_the_password(
    how: str, environ: str
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, how],
        env={**os.environ, SIGNING_PASSWORD: SECRET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        seen = subprocess.check_output([sys.executable, "-S", "-c", READER, str(holder.pid)], text=True)
        said = dict(line.split() for line in seen.splitlines())
        assert said["environ"] == environ
        if how == "private":
            assert said == dict.fromkeys(("environ", "mem", "maps"), "PermissionError")
    finally:
        holder.communicate("")


def test_a_password_that_was_taken_still_signs_and_no_program_started_later_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_pair(tmp_path, password=SECRET)
    monkeypatch.setenv(SIGNING_PASSWORD, SECRET)
    try:
        private.take_password()
        assert SECRET not in subprocess.check_output(["env"], text=True)
        load_private_key(key)
    finally:
        private._taken.clear()


def test_of_the_local_stack_only_what_starts_runs_has_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHIP_SIGNING_KEY", "SHIP_SIGNING_KEY_PASSWORD", "SHIP_NOTIFY"):
        monkeypatch.setenv(name, "json://ada@127.0.0.1:1")
    monkeypatch.setenv("SHIP_HOME", str(tmp_path))
    for address in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "SHIP_BUCKET"):
        monkeypatch.delenv(address, raising=False)
    parts = {part.name: part for part in components(Settings.load())}
    assert {name for name, part in parts.items() if SIGNING_PASSWORD in part.environment} == {"worker"}
    assert {name for name, part in parts.items() if "SHIP_NOTIFY" in part.environment} == {"worker"}
    # And that one shows it to nobody.
    assert "train_and_ship.infra.doors.worker" in parts["worker"].argv


SPEC = Spec(
    name="ship-1", argv=("-m", "torchworker.rank", "request.json"), out_dir=Path("/shared/run"), nodes=1, min_nodes=1,
    nproc=1, python="python", given={"WANDB_API_KEY": SECRET},
)  # fmt: skip


def test_what_a_job_names_goes_to_other_machines_through_standard_input_alone() -> None:
    launcher = HostsLauncher(hosts=("a",), address="10.0.0.9")
    planned = plan(SPEC, launcher)
    assert SECRET not in json.dumps(planned) and planned["given"] == ["WANDB_API_KEY"]
    assert SECRET not in script(SPEC)
    assert f"export WANDB_API_KEY='{SECRET}'\n" in submission(SPEC)
    lease = subprocess.Popen(
        [sys.executable, "-P", "-m", "torchworker.lease", "5", "sh", "-c", "echo $WANDB_API_KEY"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert lease.stdin is not None and lease.stdout is not None
    print(json.dumps({"WANDB_API_KEY": SECRET}), end="\n..", file=lease.stdin, flush=True)
    assert (lease.stdout.read(), lease.wait()) == (f"{SECRET}\n", 0)
    lease.stdin.close()
    lease.stdout.close()


def test_a_machine_that_was_not_told_what_to_give_starts_nothing() -> None:
    cut = subprocess.run(
        [sys.executable, "-P", "-m", "torchworker.lease", "5", "echo", "started"],
        input='{"WANDB_API_KEY": ', capture_output=True, text=True,
    )  # fmt: skip
    assert cut.stdout == "" and cut.returncode == 1 and "the controller is gone" in cut.stderr


def test_a_command_in_the_configuration_of_a_projects_repository_sees_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nenv > {tmp_path}/.git/seen\n")
    hook.chmod(0o755)
    git("init", "--quiet")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--allow-empty", "-m", "one")
    git("config", "core.fsmonitor", str(hook))
    for name, value in EVERYTHING.items():
        if name not in USUAL:
            monkeypatch.setenv(name, value)
    assert git_commit(tmp_path).endswith("-dirty")
    seen = (tmp_path / ".git" / "seen").read_text()
    assert "PATH=" in seen and SECRET not in seen and "AWS_" not in seen


def test_people_are_told_which_variables_their_code_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = withheld(EVERYTHING, [])
    assert names == sorted(OTHERS)
    assert asked_for(names, ["import wandb\nwandb.init()"]) == ["WANDB_API_KEY"]
    assert asked_for(names, ["from datasets import load_dataset"]) == ["HF_TOKEN"]
    assert asked_for(names, ['os.environ["DATABASE_URL"]', "import os"]) == ["DATABASE_URL"]
    assert mentioned(names, "KeyError: 'DATABASE_URL'") == ["DATABASE_URL"]
    assert mentioned(["HOST"], "no HOST") == [] and mentioned(["HOST"], "KeyError: 'HOST'") == ["HOST"]
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    job, folder = load_job(write_project(tmp_path / "a", extra="\n    # import later\n    import wandb\n"))
    assert not_passed_on(job, folder) == (
        "WANDB_API_KEY: set here and not passed on to the code of the job; `env: [WANDB_API_KEY]` in the job file does "
        "that"
    )
    job, folder = load_job(write_project(tmp_path / "b", extra="import wandb", env=["WANDB_API_KEY"]))
    assert not_passed_on(job, folder) == ""


def test_a_job_that_fails_for_lack_of_a_variable_says_how_to_name_it(
    fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_OF_IMAGES", "images")
    job, folder = load_job(write_project(tmp_path, extra="import os\nplace = os.environ['BUCKET_OF_IMAGES']\n"))
    request = inspect_request(job, project_of(job, folder))
    with pytest.raises(JobError, match=r"`env: \[BUCKET_OF_IMAGES\]` in the job file"):
        asyncio.run(ask_worker(fork_server, "inspect", request, InspectResult, tmp_path / "work"))


def test_the_order_to_a_worker_holds_names_and_no_values(tmp_path: Path) -> None:
    job, folder = load_job(write_project(tmp_path, env=["WANDB_API_KEY"]))
    project = project_of(job, folder)
    assert isinstance(project, Project) and list(project.env) == ["WANDB_API_KEY"]


FAMILY = """
import ctypes, os, psutil, subprocess, time
from pathlib import Path
from train_and_ship.infra.processes import PidFile
if os.getuid() == 0:
    os.setuid(65534)
prctl = ctypes.CDLL(None).prctl
prctl(4, 1, 0, 0, 0)
began, (read, write) = psutil.Process().create_time(), os.pipe()
if (flow := os.fork()) == 0:
    # A run whose worker is gone: its own environment is not to be read, that of what it starts is.
    os.close(read)
    prctl(4, 0, 0, 0, 0)
    with subprocess.Popen(["/bin/sleep", "60"], env={"SHIP_PROCESS_TOKEN": "t"}) as child:
        os.write(write, str(child.pid).encode())
        os.close(write)
os.close(write)
child = int(os.read(read, 20))
os.kill(flow, 0)
while Path(f"/proc/{child}/comm").read_text() != "sleep\\n":
    time.sleep(0.01)
record = PidFile(name="worker", pid=2**22 + 1, create_time=began, port=None, token="t", configuration={})
found = [process.pid for process in record.family()]
for pid in (child, flow):
    os.kill(pid, 9)
print(found == [flow, child], found, flow, child)
"""


def test_a_private_run_whose_worker_is_gone_is_found_all_the_same() -> None:
    said = subprocess.check_output([sys.executable, "-c", FAMILY], text=True)
    assert said.startswith("True"), said
