"""Which Python runs the code of a job, and what is said of one that cannot. Environments here are real and empty, but
for what says that a package is installed."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY, write_project
from tests.support.second_environment import make_environment
from torchworker import contract
from torchworker.protocol import PROTOCOL, TORCH
from train_and_ship.infra import installing
from train_and_ship.infra import interpreter as interpreters
from train_and_ship.infra.errors import GateError, JobError, RequestError
from train_and_ship.infra.interpreter import look_at, our_interpreter
from train_and_ship.registry.environments import Environments
from train_and_ship.registry.job.base import digest
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship import worker
from train_and_ship.ship.check import _environment
from train_and_ship.tasks.existing import _Chosen, _loads_here
from train_and_ship.tasks.extras import require_extras
from train_and_ship.tasks.interpreters import Chosen, choose_interpreter
from train_and_ship.tasks.rooms import Rooms

Make = Callable[..., Path]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An environment with nothing in it."""
    return make_bare(tmp_path / "bare")


def make_bare(folder: Path) -> Path:
    """What makes a folder a virtual environment; `venv` also writes scripts, and takes ten times as long."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(Path(sys.executable).resolve())
    home = Path(sys.executable).resolve().parent
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    site_of(folder).mkdir(parents=True)
    return folder


def site_of(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


@pytest.fixture
def environment(tmp_path: Path) -> Make:
    """Makes the folder of an environment that says it has these; with `protocol` as its torchworker says it."""

    def make(
        name: str = "environment", torch: str = "2.13.0", worker: str = "0.1.0", protocol: object = PROTOCOL
    ) -> Path:
        folder = make_bare(tmp_path / name)
        site = site_of(folder)
        installed(site, torch=torch, torchworker=worker)
        if worker:
            (site / "torchworker").mkdir()
            (site / "torchworker/__init__.py").touch()
            if protocol is not None:
                (site / "torchworker/protocol.py").write_text(f"PROTOCOL = {protocol}\n")
        return folder

    return make


def installed(site: Path, **versions: str) -> None:
    for name, version in versions.items():
        if version:
            about = site / f"{name}-{version}.dist-info"
            about.mkdir(parents=True)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def choose(folder: Path, python: object = None) -> Chosen:
    """For a job in a folder that says `python:`."""
    path = write_project(folder, python=None if python is None else str(python))
    job, project = load_job(path)
    return choose_interpreter(job, path, project)


def refusal(folder: Path, python: object) -> str:
    with pytest.raises(JobError) as refused:
        choose(folder, python)
    return str(refused.value)


def test_a_job_names_its_interpreter_relative_to_its_file(environment: Make, tmp_path: Path) -> None:
    chosen = choose(tmp_path / "project", f"../{environment().name}/bin/python").interpreter
    assert chosen.path == str(tmp_path / "environment/bin/python") and not chosen.ours
    assert chosen.prefix == str(tmp_path / "environment")
    assert chosen.facts() == {
        "python": our_interpreter().version, "platform": our_interpreter().machine, "torch": "2.13.0",
        "torchworker": "0.1.0",
    }  # fmt: skip


def test_a_folder_is_refused_with_the_path_to_write(environment: Make, tmp_path: Path) -> None:
    environment("project/.venv")
    assert "got the folder" in refusal(tmp_path / "project", ".venv")
    assert refusal(tmp_path / "project", ".venv").endswith("write python: .venv/bin/python")
    assert refusal(tmp_path / "project", ".").endswith("write python: .venv/bin/python")


def test_what_is_not_there_or_is_no_python_is_refused(tmp_path: Path) -> None:
    assert f"expected an interpreter at {tmp_path}/none, found none" in refusal(tmp_path, "none")
    (tmp_path / "text").write_text("print()")
    assert "cannot be started: " in refusal(tmp_path, "text")
    assert "which ended with 0 and is none" in refusal(tmp_path, "/bin/true")
    for answer in ("[]", '{"version": "new", "machine": ""}', '{"version": "3.12.1", "machine": "", "protocol": [1]}'):
        (tmp_path / "liar").write_text(f"#!/bin/sh\necho 'train-and-ship:{answer}'\n")
        (tmp_path / "liar").chmod(0o755)
        look_at.cache_clear()
        assert "which ended with 0 and is none" in refusal(tmp_path, "liar")


def test_one_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "SECONDS", 0.1)
    (tmp_path / "slow").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    assert "says nothing within 0 s" in refusal(tmp_path, "slow")


def test_whatever_is_asked_what_it_is_gets_none_of_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"SHIP_SIGNING_KEY_PASSWORD": "one", "AWS_SECRET_ACCESS_KEY": "two", "PREFECT_API_AUTH_STRING": "three"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "curious").write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    (tmp_path / "curious").chmod(0o755)
    refusal(tmp_path, "curious")
    seen = (tmp_path / "seen").read_text()
    assert "HOME=" in seen and not any(name in seen for name in secrets)
    # A program of this user could read it in /proc.
    assert "SHIP_SIGNING_KEY_PASSWORD" not in os.environ


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    # As 3.9 answers the same question.
    (tmp_path / "old").write_text(
        """#!/bin/sh\necho 'train-and-ship:{"version": "3.9.2", "machine": "linux x86_64"}'\n"""
    )
    (tmp_path / "old").chmod(0o755)
    assert "Python 3.9.2 is too old: expected 3.11 or newer" in refusal(tmp_path, "old")
    with pytest.raises(RequestError, match="too old"):
        worker.install(tmp_path / "old", exports=True)


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"torch": ""}, "it has no torch: install the build for your machine"),
        ({"torch": "2.4.1+cpu"}, r"its torch is 2\.4\.1\+cpu: expected 2\.13 or newer, and older than 2\.15"),
        ({"torch": "2.15.0"}, "its torch is 2.15.0: expected"),
        ({"worker": ""}, "it has no torchworker"),
        ({"worker": "0.0.9", "protocol": None}, r"an older torchworker .*\(0\.0\.9, protocol none; expected "),
        ({"protocol": PROTOCOL - 1}, "an older torchworker than this"),
        (
            {"worker": "9.0", "protocol": PROTOCOL + 1},
            r"a newer torchworker .*\(9\.0, .* newer train-and-ship",
        ),
    ],
)
def test_an_environment_that_cannot_run_the_code_is_refused_with_what_to_do(
    environment: Make, tmp_path: Path, has: dict[str, str], said: str
) -> None:
    python = environment(**has) / "bin/python"
    told = refusal(tmp_path, python)
    assert re.search(said, told), told
    assert f"`ship worker install --python {python}`" in told or "its torch is" in told


def test_two_versions_of_torchworker_on_its_path_are_refused(environment: Make, tmp_path: Path) -> None:
    folder = environment()
    installed(tmp_path / "other", torchworker="0.0.9")
    site = site_of(folder)
    (site / "other.pth").write_text(str(tmp_path / "other"))
    told = refusal(tmp_path, folder / "bin/python")
    assert f"0.1.0 in {site}" in told and f"0.0.9 in {tmp_path / 'other'}" in told and "uninstall all but one" in told


def test_without_a_name_it_is_the_projects_own_environment_and_never_what_a_shell_has_activated(
    environment: Make, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(environment("activated")))
    monkeypatch.setenv("PATH", f"{tmp_path}/activated/bin", prepend=":")
    assert choose(tmp_path / "project").interpreter.ours and not choose(tmp_path / "project").hint
    environment("project/.venv")
    assert choose(tmp_path / "project").interpreter.prefix == str(tmp_path / "project/.venv")
    # One that was not meant for this; what is there is said.
    (tmp_path / "second").mkdir()
    (tmp_path / "second/.venv").symlink_to(bare)
    chosen = choose(tmp_path / "second")
    assert chosen.interpreter.ours and "has no torchworker; `ship worker install --python" in chosen.hint


def test_a_projects_own_environment_of_another_protocol_is_refused_and_not_passed_over(
    environment: Make, tmp_path: Path
) -> None:
    environment("project/.venv", protocol=PROTOCOL + 1)
    assert "the project's own environment" in refusal(tmp_path / "project", None)


def test_our_own_interpreter_is_not_started_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters.subprocess, "run", lambda *_, **__: pytest.fail("it was started"))
    assert choose(tmp_path, sys.executable).interpreter is our_interpreter()


def test_onnx_needs_its_packages_where_the_code_runs(environment: Make, tmp_path: Path) -> None:
    found = look_at(str(environment() / "bin/python"))
    job, _ = load_job(write_project(tmp_path / "a", export={"formats": ["onnx"]}))
    with pytest.raises(JobError, match="onnx needs onnx, onnxscript, onnxruntime, not installed in the env"):
        require_extras(job, found)
    job, _ = load_job(write_project(tmp_path / "b", export={"formats": ["pt2"]}))
    require_extras(job, found)


def test_what_only_loads_where_it_was_made_is_proven_there_and_nowhere_else(environment: Make, tmp_path: Path) -> None:
    formats = ["torchscript", "onnx", "aoti", "executorch", "pt2e-int8", "onnx-int8-static"]
    two = Rooms(look_at(str(environment() / "bin/python")), tmp_path / "log")
    assert two.where_made(formats) == ("aoti", "executorch", "pt2e-int8")
    # Operators of the project's own are built against its torch.
    assert two.where_made(formats, ["libown.so"]) == ("torchscript", "aoti", "executorch", "pt2e-int8")
    assert Rooms(our_interpreter(), tmp_path / "log").where_made(formats, ["libown.so"]) == ()
    said = two.environments(["onnx", "aoti"]).in_words()
    assert said.startswith("made with Python 3") and said.endswith("aoti where made, because they load nowhere else")
    assert Rooms(our_interpreter(), tmp_path / "log").environments(["aoti"]).in_words() == ""


def test_a_check_says_that_torch_is_another_one_and_what_is_proven_with_it(environment: Make, tmp_path: Path) -> None:
    other = look_at(str(environment(torch="2.14.0+cu130") / "bin/python"))
    both, _ = load_job(write_project(tmp_path / "a", export={"formats": ["onnx", "aoti"]}))
    said = _environment(both, other)
    assert f"torch 2.14.0+cu130; the clean room is ours, with torch {our_interpreter().torch}" in said
    assert said.endswith("compiled against that torch and its C++ ABI and load nowhere else: aoti")
    onnx, _ = load_job(write_project(tmp_path / "b", export={"formats": ["onnx"]}))
    assert _environment(onnx, dataclasses.replace(other, torch=our_interpreter().torch)).endswith("clean room is ours")


def test_of_several_wheels_of_torchworker_the_one_of_this_version_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing, "WHEELS", tmp_path)
    version = metadata.version("torchworker")
    # In the order of text 9 comes behind 10.
    for number in ("0.0.9", version, "99.0.0", "9.0.0"):
        (tmp_path / f"torchworker-{number}-py3-none-any.whl").touch()
    with installing.torchworker_wheel() as wheel:
        assert wheel.name == f"torchworker-{version}-py3-none-any.whl"


@pytest.mark.parametrize(
    ("torch", "loaded", "left"),
    [
        ("2.99.0", ["aoti", "onnx", "pt2"], ["onnx", "pt2"]),
        (our_interpreter().torch, ["aoti", "onnx"], ["aoti", "onnx"]),
        ("2.99.0", ["onnx"], ["onnx"]),
    ],
)
def test_a_promotion_loads_what_loads_here_and_its_record_says_what_did_not(
    torch: str, loaded: list[str], left: list[str]
) -> None:
    facts = our_interpreter().facts()
    made = Environments(made={**facts, "torch": torch}, proven=facts, where_made=["aoti"])
    chosen = _loads_here(_Chosen(loaded=loaded, libraries=False, said={}), made, (), "digits: release 1")
    assert chosen.loaded == left
    assert ("torch 2.99.0" in chosen.said.get("not loaded here", "")) == (left != loaded)


def test_a_release_that_loads_nowhere_here_is_not_promoted_untried() -> None:
    # What another one says of itself may be anything.
    made = Environments(made={"torch": "x" * 10_000}, proven={}, where_made=["aoti"])
    with pytest.raises(GateError, match=r"aoti: only loads where it was made, with Python unknown, torch x") as refused:
        _loads_here(_Chosen(loaded=["aoti"], libraries=False, said={}), made, (), "digits: release 1")
    assert len(str(refused.value)) < 500


def test_ship_worker_install_refuses_what_it_cannot_fill(tmp_path: Path, bare: Path) -> None:
    with pytest.raises(RequestError, match="found none at"):
        worker.install(tmp_path, exports=True)
    with pytest.raises(RequestError, match="is the environment of train-and-ship itself"):
        worker.install(Path(sys.executable), exports=True)


def test_without_pip_and_uv_the_way_to_one_of_them_is_said(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RequestError, match=r"expected pip there, or uv on PATH, found neither; .*ensurepip"):
        worker.install(bare / "bin/python", exports=True)


@pytest.mark.soak
def test_ship_worker_install_takes_the_carried_wheel_and_changes_nothing_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    write_wheel(tmp_path, "safetensors", "0.8.1")
    python = make_environment(tmp_path / "environment", "pip", "torch", "numpy", without=["safetensors"])
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    installed(site, safetensors="0.3.0")
    with pytest.raises(RequestError, match="Packages that are there already keep their versions"):
        worker.install(python, exports=False)
    shutil.rmtree(site / "safetensors-0.3.0.dist-info")
    for _ in range(2):
        worker.install(python, exports=False)
    found = look_at.__wrapped__(str(python))
    assert found.protocol == PROTOCOL and len(found.workers) == 1


def write_wheel(folder: Path, name: str, version: str) -> None:
    """An empty package that pip can install."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(file, text)


# ---- what the two sides say to each other


MESSAGES = "10af6b36fffa24c7"
"""Digest of the messages of PROTOCOL. When they change, write the new one here; and raise PROTOCOL, unless no release
has gone out with it: an older torchworker in somebody's environment is then refused before a run, and not in it."""


def test_the_protocols_number_is_raised_when_a_message_changes() -> None:
    kinds = [kind for kind in vars(contract).values() if dataclasses.is_dataclass(kind)]
    messages = {kind.__name__: [(item.name, item.type) for item in dataclasses.fields(kind)] for kind in kinds}
    assert digest(messages) == MESSAGES, "see MESSAGES above"


def test_the_limits_of_torch_are_those_that_are_installed_by() -> None:
    low, high = (".".join(map(str, part)) for part in TORCH)
    asked = tomllib.loads((REPOSITORY / "torchworker/pyproject.toml").read_text())["project"]
    assert f"torch>={low},<{high}" in asked["dependencies"]
    # What messages tell people to install is what the extras ask for; ours is on no index.
    every = [line for lines in asked["optional-dependencies"].values() for line in lines]
    for folder in ("torchworker", "tasks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for told in re.findall(r"install '([^']+)'", path.read_text()):
                assert told in every, f"{path} says to install {told}"
