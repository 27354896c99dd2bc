"""Passwords beside the sources want to be in an image that a team pushes to a registry."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.support.docker_build import RULES, is_sent
from tests.support.import_graph import FOLDERS
from tests.support.projects import REPOSITORY

IN_THE_IMAGE = [*FOLDERS, "names", "examples", "projects"]


@pytest.mark.parametrize("folder", ["", *IN_THE_IMAGE])
def test_nothing_that_git_ignores_is_sent(folder: str) -> None:
    for line in (REPOSITORY / ".gitignore").read_text().splitlines():
        ignored = line.strip().rstrip("/").replace("*", "some")
        if ignored and not ignored.startswith("#"):
            path = f"{folder}/{ignored}".lstrip("/")
            assert not is_sent(path) and not is_sent(f"{path}/inner"), path


@pytest.mark.parametrize(
    "path",
    [
        *(".env", "infra/team/.env", "infra/team/mlflow-accounts.ini", "infra/team/prod.env", "key.pem", "id_rsa"),
        *(".aws/credentials", ".ssh/id_rsa", ".git/config", "notes.txt", "dump.sql", "kubeconfig", "tests/conftest.py"),
        *("examples/digits/.env", "examples/digits/key.pem", "projects/faces/.netrc", "projects/faces/tls.key"),
        *("projects/faces/.git/config", "ship/.ship/pids/worker.json", "projects/faces/aws/credentials"),
    ],
)
def test_no_password_or_key_is_sent_wherever_it_lies(path: str) -> None:
    assert not is_sent(path)


def test_everything_that_runs_is_sent() -> None:
    wanted = ["pyproject.toml", "setup.py", "constraints.txt", "prefect.yaml", "prefect.toml", "README.md", "LICENSE"]
    for folder in FOLDERS:
        kinds = (".py", ".cpp", ".jinja", ".txt", ".md", ".toml")
        found = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in kinds and path.is_file()]
        wanted += [path.relative_to(REPOSITORY).as_posix() for path in found if "__pycache__" not in path.parts]
    wanted += ["examples/digits/job.yaml", "projects/faces/job.yaml", "names/torchworker"]
    missing = [path for path in wanted if not is_sent(path) and not re.search(r"build/|\.egg-info|/\.", path)]
    assert missing == []


def test_what_is_sent_is_a_list_and_not_the_rest() -> None:
    rules = [line for line in RULES if line and not line.startswith("#")]
    assert rules[0] == "*"


def test_every_image_is_named_by_digest_and_has_no_default() -> None:
    compose = yaml.safe_load((REPOSITORY / "infra" / "team" / "compose.yaml").read_text())
    (built,) = {str(service["build"]["args"]) for service in compose["services"].values() if "build" in service}
    assert "'${PYTHON_IMAGE:?by digest: python:3.11-slim@sha256:" in built
    fetched = [service["image"] for service in compose["services"].values() if "build" not in service]
    assert fetched and all(re.match(r"\$\{\w+:\?by digest: \w+:\d+@sha256:", image) for image in fetched)
    dockerfile = (REPOSITORY / "infra" / "team" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.+)$", dockerfile, re.MULTILINE) == ["${PYTHON_IMAGE}"]
    assert "ARG PYTHON_IMAGE=" not in dockerfile and "*@sha256:*" in dockerfile
