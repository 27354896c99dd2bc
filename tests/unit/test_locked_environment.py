"""The environment of a deployed project: made once for each lock, or a refusal that names the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from train_and_ship.infra import locked_environment, private
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.interpreter import our_interpreter
from train_and_ship.infra.locked_environment import _run, lock_of, python_for
from train_and_ship.ship import worker

VERSION = ".".join(our_interpreter().version.split(".")[:2])


def test_a_lock_has_what_an_index_has_and_nothing_of_ours() -> None:
    lock = lock_of(our_interpreter(), "job.yaml").splitlines()
    names = {line.partition("==")[0] for line in lock}
    assert {"torch", "numpy"} <= names and not {"torchworker", "shipreader", "train-and-ship", "python", "pip"} & names
    assert all(line.count("==") == 1 for line in lock)


def test_a_package_from_a_file_of_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked_environment, "installed_from", lambda _: {"mine": "folder", "theirs": "file"})
    with pytest.raises(JobError, match=r"^job\.yaml: theirs of .* came from a file, which no worker has"):
        lock_of(our_interpreter(), "job.yaml")


@pytest.mark.soak
def test_a_package_that_cannot_be_had_is_named_and_the_next_try_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(JobError) as refused:
            python_for(tmp_path, VERSION, "there-is-no-such-package==1.0\n", said.append)
        assert "cannot have there-is-no-such-package==1.0 on this worker" in str(refused.value)
        assert "logs/environment-" in str(refused.value)
    assert len(said) == 2 and "1 packages are installed" in said[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cu126", "cannot have torch==2.13.0+cu126 on this"),
        (
            "ERROR: Could not find a version that satisfies the requirement mine==1 (from versions: none)",
            "have mine==1 on",
        ),
        ("ERROR: disk full", "cannot be made: the installer ended with 1"),
    ],
)
def test_what_pip_could_not_find_is_in_the_first_line(tmp_path: Path, words: str, told: str) -> None:
    with pytest.raises(JobError) as refused:
        _run([sys.executable, "-c", f"print({words!r}); raise SystemExit(1)"], tmp_path / "log")
    assert told in str(refused.value).splitlines()[0] and words in str(refused.value)


@pytest.mark.parametrize("through", ["worker", "deployment"])
def test_what_a_package_runs_when_it_is_built_gets_what_an_installation_needs_and_no_secret(
    through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = (
        *("SHIP_SIGNING_KEY", "SHIP_SIGNING_KEY_PASSWORD", "SHIP_NOTIFY", "PREFECT_API_AUTH_STRING"),
        *("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "SSH_AUTH_SOCK"),
    )
    needed = ("PATH", "HOME", "TMPDIR", "LANG", "PIP_INDEX_URL", "UV_INDEX_URL", "HTTPS_PROXY", "SSL_CERT_FILE")
    monkeypatch.setattr(private, "_taken", {})
    monkeypatch.setattr(private, "keep_private", lambda: None)
    for name in (*secrets, *needed):
        monkeypatch.setenv(name, str(tmp_path))
    seen = tmp_path / "seen"
    looks = [sys.executable, "-c", f"import os; open({str(seen)!r}, 'w').write(' '.join(os.environ))"]
    if through == "worker":
        worker._run(looks, exports=True)
    else:
        _run(looks, tmp_path / "log")
    names = set(seen.read_text().split())
    assert names >= set(needed) and not names & set(secrets)
    assert private.signing_password() == str(tmp_path)


def test_a_python_that_is_not_there_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"deployed with Python 3\.7, and this worker has none: expected python3\.7"):
        python_for(tmp_path, "3.7", "numpy==2.4.6\n", print)
    assert not list((tmp_path / "environments").glob("*/bin"))


def test_an_environment_that_is_there_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(folder: Path, version: str, lock: str) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "COMPLETE").touch()

    monkeypatch.setattr(locked_environment, "_make", make)
    first = python_for(tmp_path, VERSION, "numpy==2.4.6\n", print)
    assert python_for(tmp_path, VERSION, "numpy==2.4.6\n", print) == first
    assert python_for(tmp_path, VERSION, "numpy==2.4.5\n", print) != first
    assert str(made[0] / "bin/python") == first and len(made) == 2
