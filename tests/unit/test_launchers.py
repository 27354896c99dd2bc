"""What would be launched, as values. Nothing is launched here, except a stand-in for kubectl."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from pydantic import TypeAdapter, ValidationError

from torchworker.contract import Failure, Launches, Project, Reference, TrainRequest, TrainSettings
from train_and_ship.infra.errors import JobError, SettingsError, WorkerError
from train_and_ship.infra.launchers import hosts, kubernetes, slurm
from train_and_ship.infra.launchers.hosts import HostsLauncher, host_argv
from train_and_ship.infra.launchers.kubernetes import KubernetesLauncher, Volume, manifest
from train_and_ship.infra.launchers.slurm import SlurmLauncher, script
from train_and_ship.infra.launchers.spec import Launcher, Spec, Status
from train_and_ship.infra.launchers.torchrun import agent_argv
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.launcher import LOCAL, LauncherOption, check_train
from train_and_ship.tasks.launched import _judge, launcher_for, spec_for
from train_and_ship.tasks.requests import train_settings

OUT = Path("/shared/run/ship-1")


def spec(**changes: Any) -> Spec:
    known: dict[str, Any] = {
        "name": "ship-1", "argv": ("-m", "torchworker.rank", f"{OUT}/request.json"), "out_dir": OUT,
        "nodes": 2, "min_nodes": 2, "nproc": 4, "python": "/venv/bin/python",
    }  # fmt: skip
    return Spec(**{**known, **changes})


def options(value: Any) -> Any:
    return TypeAdapter(LauncherOption).validate_python(value)


def settings(**train: Any) -> TrainSettings:
    document = {"name": "a", "model": {"factory": "a:b"}, "data": {"factory": "a:b"}}
    known = {"epochs": 1, "batch_size": 96}
    return train_settings(Job.model_validate({**document, "train": {**known, **train}}))


def refused(value: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        options(value)
    return str(caught.value)


# The spec and torchrun


def test_torchrun_is_told_everything_that_its_defaults_get_wrong_across_machines() -> None:
    argv = agent_argv(spec(max_restarts=3, min_nodes=1), endpoint="ctl:29400", local_addr="10.0.0.1", is_host="0")

    assert argv[:4] == ("/venv/bin/python", "-P", "-m", "torch.distributed.run")
    assert {"--nnodes=1:2", "--nproc-per-node=4", "--rdzv-endpoint=ctl:29400", "--rdzv-id=ship-1"} < set(argv)
    assert {"--local-addr=10.0.0.1", "--max-restarts=3"} < set(argv)
    assert "--rdzv-conf=is_host=0,keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=2" in argv
    assert argv[-3:] == ("-m", "torchworker.rank", f"{OUT}/request.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Ship_1"}, "name: expected lower-case"),
        ({"name": "s" * 53}, "at most 52"),
        ({"min_nodes": 3}, "min_nodes: expected 1 to 2"),
        ({"min_nodes": 1}, "max_restarts: expected at least 1"),
        ({"out_dir": Path("run")}, "expected an absolute path, got run"),
        ({"env": {"A B": "1"}}, "names of variables, got 'A B'"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**changes)


# Several hosts


def test_a_host_gets_one_shell_line_with_its_address_environment_and_lease() -> None:
    argv = host_argv(spec(env={"NOTE": "it's"}), "me@a", hosts.SSH, "10.0.0.9", 0)

    assert argv[0] == "ssh" and argv[-2] == "me@a"
    words = shlex.split(argv[-1])
    assert words[0] == "env" and "NOTE=it's" in words and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words
    start = words.index("/venv/bin/python")
    assert words[start : start + 5] == ["/venv/bin/python", "-P", "-m", "torchworker.lease", "60"]
    assert "--local-addr=a" in words
    assert f"--rdzv-endpoint=10.0.0.9:{hosts.ANY_PORT}" in words


def test_the_connection_is_a_template_that_is_filled_in() -> None:
    argv = host_argv(spec(), "a", ("enter", "ns-{host}", "sh", "-c", "cd /; {command}"), "10.0.0.9", 29400)

    assert argv[:4] == ("enter", "ns-a", "sh", "-c")
    assert argv[4].startswith("cd /; env PYTHONSAFEPATH=1") and "--rdzv-endpoint=10.0.0.9:29400" in argv[4]


def test_a_job_folder_in_which_nothing_was_started_is_unknown(tmp_path: Path) -> None:
    launcher = HostsLauncher(hosts=("a", "b"), address="10.0.0.9")
    assert launcher.status(str(tmp_path)).state == "unknown"
    launcher.cancel(str(tmp_path))


def test_more_nodes_than_hosts_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="expected 2 hosts, got 1"):
        HostsLauncher(hosts=("a",), address="10.0.0.9").launch(spec(out_dir=tmp_path))


# Slurm


def test_a_batch_script_of_fixed_size_ends_all_nodes_with_the_first_and_is_never_requeued() -> None:
    text = script(spec(cpus=8, mem_mb=4000, gpus=2, time_limit=90), ["--partition=gpu"])

    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=ship-1\n#SBATCH --nodes=2\n")
    for option in (
        "--no-requeue", "--cpus-per-task=8", "--mem=4000M", "--gpus-per-node=2", "--time=2", "--partition=gpu",
        f"--output={OUT}/slurm.log",
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in text
    assert "--kill-on-bad-exit=1" in text
    assert "no-kill" not in text


def test_a_batch_script_that_may_shrink_keeps_the_other_nodes() -> None:
    text = script(spec(min_nodes=1, max_restarts=1))
    assert "#SBATCH --no-kill\n" in text
    assert "--no-kill --kill-on-bad-exit=0" in text


def test_the_first_node_of_a_slurm_job_holds_the_store() -> None:
    text = script(spec())
    assert "is_host=$((SLURM_NODEID == 0))," in text
    assert '--rdzv-endpoint="$head":"$port"' in text


def test_a_job_inherits_no_credentials_and_waits_for_no_login_shell(tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\ncat > {tmp_path}/script\necho '7;lab'\n")
    program.chmod(0o755)
    (tmp_path / "squeue").symlink_to("/bin/true")
    known = {"HOME": "/root", "USER": "me", "LANG": "C", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "ml"}
    others = {"AWS_SECRET_ACCESS_KEY": "secret", "SBATCH_EXPORT": "NONE", "TWO_LINES": "a\nHOME=no"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launcher = SlurmLauncher(arguments=("--partition=gpu",), environment={**known, **others, **path})

    assert launcher.launch(spec()) == "7"
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert {name: value for name, value in seen.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")} == {
        **known,
        **path,
    }
    assert (tmp_path / "script").read_text() == script(spec(), ("--partition=gpu",))
    # Anything else than all of them has Slurm run a login shell of the user on the node.
    assert "#SBATCH --export=ALL\n" in script(spec())


def test_a_jobs_own_variables_are_quoted() -> None:
    assert "export NOTE='a b; $(reboot)'\n" in script(spec(env={"NOTE": "a b; $(reboot)"}))


def test_a_batch_script_is_valid_shell() -> None:
    for value in (script(spec()), script(spec(min_nodes=1, max_restarts=1, env={"A": "'\""}))):
        subprocess.run(["bash", "-n"], input=value, text=True, check=True)


@pytest.mark.parametrize(
    ("said", "state", "blames"),
    [
        ("PENDING Reason=Resources", "queued", ""),
        ("RUNNING Reason=None", "running", ""),
        ("COMPLETING Reason=None", "running", ""),
        ("COMPLETED Reason=None", "ended", ""),
        ("FAILED Reason=NonZeroExitCode", "ended", ""),
        ("NODE_FAIL Reason=NodeDown", "ended", "Slurm lost a node"),
        ("TIMEOUT Reason=TimeLimit", "ended", "the job reached its time limit"),
        ("OUT_OF_MEMORY Reason=OutOfMemory", "ended", "the job ran out of the memory it asked for"),
    ],
)
def test_what_slurm_says_becomes_a_status(said: str, state: str, blames: str) -> None:
    status = slurm.status_of(f"JobId=7 JobName=ship-1 UserId=root(0) JobState={said} ExitCode=1:0 Requeue=0")
    assert (status.state, status.blames) == (state, blames)
    assert "Slurm job 7" in status.reason


def test_a_machine_without_slurm_is_told_which_command_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SettingsError, match="squeue: expected this command on PATH"):
        SlurmLauncher().launch(spec())


# Kubernetes

FULL = spec(image="registry/ship:1", cpus=4, mem_mb=8000, gpus=1, time_limit=3600, max_restarts=2, env={"A": "$(B)"})
VOLUME = Volume(claim="runs", mount="/shared")


@pytest.mark.parametrize("version", ["1.30", "1.34", "1.37"])
@pytest.mark.parametrize("value", [spec(image="i"), FULL], ids=["small", "full"])
def test_manifests_are_valid_against_the_official_schemas(value: Spec, version: str) -> None:
    for item in manifest(value, volume=VOLUME, secret="aws")["items"]:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_would_notice_a_misspelt_field() -> None:
    _, job = manifest(FULL)["items"]
    job["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.34", strict=True)


def test_a_kubernetes_job_is_indexed_and_its_pods_find_each_other_by_name() -> None:
    service, job = manifest(FULL, volume=VOLUME)["items"]

    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert (job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (2, 3600)
    pod = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    line = container["command"][2]
    assert "--rdzv-endpoint=ship-1-0.ship-1:29400" in line
    assert '--local-addr="$POD_IP"' in line and "is_host=$((JOB_COMPLETION_INDEX == 0))," in line
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "8000Mi", "nvidia.com/gpu": "1"}
    assert {"name": "runs", "mountPath": "/shared"} in container["volumeMounts"]


def test_a_dollar_in_a_variable_means_itself_in_a_manifest() -> None:
    _, job = manifest(FULL)["items"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "A", "value": "$$(B)"} in container["env"]


def kubernetes_job(**status: Any) -> Mapping[str, Any]:
    return {"metadata": {"name": "ship-1"}, "status": status}


@pytest.mark.parametrize(
    ("job", "state", "blames"),
    [
        (kubernetes_job(), "queued", ""),
        (kubernetes_job(active=2, ready=0), "queued", ""),
        (kubernetes_job(active=2, ready=2), "running", ""),
        (kubernetes_job(conditions=[{"type": "Complete", "status": "True"}]), "ended", ""),
        (kubernetes_job(conditions=[{"type": "FailureTarget", "status": "True"}], active=1), "running", ""),
        (
            kubernetes_job(conditions=[{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]),
            "ended",
            "the job reached its time limit",
        ),
    ],
)
def test_what_kubernetes_says_becomes_a_status(job: Mapping[str, Any], state: str, blames: str) -> None:
    status = kubernetes.status_of(job)
    assert (status.state, status.blames) == (state, blames)


KUBECTL = """\
#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
  *apply*) cat > {folder}/applied; echo created ;;
  *gone*) ;;
  *away*) echo "Unable to connect to the server: dial tcp: i/o timeout" >&2; exit 1 ;;
  *refuse*) echo 'Error from server (Forbidden): no quota' >&2; exit 1 ;;
  *get*) echo '{{"metadata": {{"name": "ship-1"}}, "status": {{"active": 2, "ready": 2}}}}' ;;
  *logs*) echo '[pod/ship-1-0/torchrun] epoch 1' ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that answers as kubectl does and notes what it was asked; this is not a cluster."""
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL.format(folder=tmp_path))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_kubectl_is_asked_in_one_namespace_and_context(kubectl: Path) -> None:
    launcher: Launcher = KubernetesLauncher(namespace="ml", context="prod")
    job = launcher.launch(spec(image="i"))

    assert job == "ship-1"
    assert [item["kind"] for item in json.loads((kubectl / "applied").read_text())["items"]] == ["Service", "Job"]
    assert launcher.status(job).state == "running"
    assert "epoch 1" in launcher.logs(job)
    launcher.cancel(job)
    calls = (kubectl / "calls").read_text().splitlines()
    assert all(call.startswith("--context=prod --namespace=ml ") for call in calls)
    assert "delete job/ship-1 service/ship-1 --ignore-not-found" in calls[-1]


def test_an_api_server_that_is_away_is_not_the_end_of_the_job(kubectl: Path) -> None:
    launcher = KubernetesLauncher()
    assert launcher.status("away").state == "unreachable"
    assert not launcher.status("away").over
    assert launcher.status("gone").state == "unknown"
    with pytest.raises(JobError, match="no quota"):
        launcher.cancel("refuse")


# The job file


def test_local_is_the_name_of_a_launcher_with_nothing_to_say() -> None:
    assert options("local") == LOCAL and LOCAL.machines is None and LOCAL.nodes == 1


def test_each_launcher_is_one_key_with_its_options() -> None:
    several = options({"torchrun": {"hosts": ["a", "b"], "address": "c", "min_nodes": 1}})
    cluster = options({"slurm": {"nodes": 3, "arguments": ["--partition=gpu"], "gpus": 8}})
    pods = options({"kubernetes": {"nodes": 2, "image": "i", "claim": "runs", "mount": "/shared"}})

    assert (several.nodes, cluster.nodes, pods.nodes) == (2, 3, 2)
    assert isinstance(launcher_for(several.machines), HostsLauncher)
    assert isinstance(launcher_for(cluster.machines), SlurmLauncher)
    assert isinstance(launcher_for(pods.machines), KubernetesLauncher)
    made = spec_for(several, settings(processes=4, restarts=2), "ship-1", OUT)
    assert (made.nodes, made.min_nodes, made.nproc, made.max_restarts) == (2, 1, 2, 2)
    assert spec_for(cluster, settings(processes=24), "ship-1", OUT).gpus == 8
    assert spec_for(pods, settings(processes=2), "ship-1", OUT).python == "python"
    # On machines of one's own the ranks run under the interpreter of the job, unless the launcher names theirs.
    assert spec_for(several, settings(processes=4), "ship-1", OUT, python="/project/python").python == "/project/python"
    assert spec_for(pods, settings(processes=2), "ship-1", OUT, python="/project/python").python == "python"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("slurmm", "Input should be a valid dictionary or instance of Launcher"),
        ({"slurm": {}, "local": {}}, "exactly one of torchrun, slurm, kubernetes"),
        ({}, "exactly one of torchrun, slurm, kubernetes"),
        ("torchrun", "hosts"),
        ({"torchrun": {"hosts": ["a", "a"], "address": "c"}}, "each host once"),
        ({"torchrun": {"hosts": ["a"], "address": "c", "connect": ["ssh", "{host}"]}}, "{host} and {command} in it"),
        ({"slurm": {"nodes": 2, "min_nodes": 3}}, "min_nodes <= 2"),
        ({"slurm": {"arguments": ["--nodes=4"]}}, "options of sbatch other than --nodes"),
        ({"slurm": {"arguments": ["--partition=a\n#SBATCH --uid=0"]}}, "options of sbatch such as"),
        ({"slurm": {"env": {"A-B": "1"}}}, "'A-B' is none"),
        ({"kubernetes": {"image": "i", "claim": "c", "mount": "shared"}}, "mount"),
        ({"kubernetes": {"image": "i", "claim": "c", "mount": "/s", "replicas": 2}}, "replicas"),
    ],
)
def test_options_that_cannot_work_are_refused(value: Any, message: str) -> None:
    assert message in refused(value)


def test_a_job_of_fixed_size_is_launched_again_by_us_and_not_by_torchrun() -> None:
    fixed = options({"slurm": {"nodes": 2}})
    assert spec_for(fixed, settings(processes=2, restarts=5), "ship-1", OUT).max_restarts == 0


def test_ranks_must_divide_over_the_machines_and_shrinking_needs_restarts() -> None:
    check_train(options({"slurm": {"nodes": 2, "min_nodes": 1}}), processes=8, restarts=1)
    with pytest.raises(ValueError, match="processes 3 is not a multiple of 2 machines"):
        check_train(options({"slurm": {"nodes": 2}}), processes=3, restarts=0)
    with pytest.raises(ValueError, match="restarts of at least 1"):
        check_train(options({"slurm": {"nodes": 2, "min_nodes": 1}}), processes=2, restarts=0)


# Whose fault it was


def failed(folder: Path, *failures: Failure) -> None:
    for failure in failures:
        failure.write(folder / f"failure-rank{failure.rank}.json")


LOST = Failure(kind="worker", message="LostConnection: closed by peer", rank=0)


def launched(folder: Path, **train: Any) -> TrainRequest:
    """What was asked, with a folder of checkpoints in `folder`."""
    nothing = Reference(target="plain:nothing", where="")
    project = Project(name="plain", folder="", model=nothing, data=nothing, loss="cross_entropy", metrics=())
    return TrainRequest(project=project, train=settings(**train), folder="", checkpoints=str(folder / "checkpoints"))


@pytest.mark.parametrize(
    ("failures", "blames", "expected"),
    [
        ([LOST, Failure(kind="user", message="KeyError: gene", rank=1)], "host b was lost", "KeyError: gene (rank 1)"),
        ([LOST], "host b was lost", "train: host b was lost"),
        ([LOST, Failure(kind="worker", message="disk full", rank=2)], "", "disk full (rank 2)"),
        ([LOST], "", "rank 1 ended without a word"),
        ([], "", "no rank said why"),
    ],
)
def test_the_error_names_the_first_cause_and_not_the_connections_it_broke(
    tmp_path: Path, failures: list[Failure], blames: str, expected: str
) -> None:
    failed(tmp_path, *failures)
    error = _judge(tmp_path, spec(nproc=1), Status("ended", "all over", blames), "", launched(tmp_path))
    assert expected in str(error)


def test_attempts_and_what_torchrun_starts_again_are_of_one_budget(tmp_path: Path) -> None:
    asked, over = launched(tmp_path, restarts=3), Status("ended")
    checkpoints = Path(asked.checkpoints)
    failed(tmp_path, LOST)
    assert _judge(tmp_path, spec(nproc=1), over, "", asked).retryable
    # Rank 0 counts what torchrun starts again.
    Launches.so_far(checkpoints).died(checkpoints, "").keep(checkpoints)
    elastic = options({"slurm": {"nodes": 2, "min_nodes": 1}})
    left = spec_for(elastic, asked.train, "ship-1", OUT, Launches.so_far(checkpoints).deaths)
    assert left.max_restarts == 1
    assert _judge(tmp_path, spec(nproc=1), over, "", asked).retryable
    last = _judge(tmp_path, spec(nproc=1), over, "", asked)
    assert isinstance(last, WorkerError) and not last.retryable
    assert "4 launches without a new checkpoint is what train.restarts: 3 allows" in str(last)


def test_the_same_exception_at_the_same_place_in_two_attempts_is_a_mistake(tmp_path: Path) -> None:
    asked, over = launched(tmp_path), Status("ended")
    failed(tmp_path, Failure(kind="worker", message="ValueError: no", rank=1, place="ValueError at a.py:3 < b.py:4"))
    assert _judge(tmp_path, spec(nproc=1), over, "", asked).retryable
    again = _judge(tmp_path, spec(nproc=1), over, "", asked)
    assert isinstance(again, JobError)
    assert "ValueError: no (twice, ValueError at a.py:3, so another try would not help) (rank 1)" in str(again)
