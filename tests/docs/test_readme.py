"""What the README and the pages that go on from it say is run: commands, an example project, Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import typer

from tests.support.fixture_types import Command
from tests.support.passwords import PASSWORD
from tests.support.processes import PATIENCE, Ended
from tests.support.projects import REPOSITORY
from train_and_ship.infra.password import USER
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.main import app

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
RUN = "\n".join(
    [README, *((DOCS / f"{name}.md").read_text() for name in ("every-day", "your-model", "where-things-are"))]
)
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RUN, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Each once; the README has some of the page for every day."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [list(words) for words in dict.fromkeys(tuple(words) for words in lines) if words]


def write_example(folder: Path) -> None:
    """The project of docs/your-model.md."""
    for block in (*blocks("python"), *blocks("yaml")):
        named = re.match(r"# (mine/\S+)\n", block)
        if named:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)


def test_every_make_command_is_a_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    named = {words[1] for words in commands() if words[0] == "make"} | set(re.findall(r"`make (\w+)`", README))
    assert {"ship", "test", "check", "bench", "down"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_the_example_project_imports_nothing_of_ours(tmp_path: Path) -> None:
    write_example(tmp_path)
    code = (tmp_path / "mine" / "iris.py").read_text()
    assert not re.search(r"\b(flows|tasks|registry|infra|torchworker|ship)\b", code)


# It trains and ships several times.
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_command_works_as_written(command: Command, tmp_path: Path) -> None:
    write_example(tmp_path)
    ran = 0
    for words in commands():
        if words[0] == "make":
            continue
        # The example is written outside the repository.
        words = [str(tmp_path / word) if word.startswith("mine/") else word for word in words]
        if words[:3] == ["prefect", "deployment", "run"]:
            words.append("--watch")
        ended = command(*words)
        assert ended.status == 0, f"{shlex.join(words)}\n{ended.text}"
        ran += 1
    assert ran == 11


def test_every_command_of_ours_is_one_with_these_words_and_options(tmp_path: Path) -> None:
    write_example(tmp_path)
    ours, understood = typer.main.get_command(app).commands, 0
    for words in commands():
        if words[0] == "ship":
            arguments = [str(tmp_path / word) if word.startswith("mine/") else word for word in words[2:]]
            # Parses them as the command would, and runs nothing; what does not fit is raised.
            ours[words[1]].make_context(words[1], arguments)
            understood += 1
    assert understood == 10


def test_the_python_that_loads_a_model_works(digits: Ended, stack: Settings) -> None:
    (block,) = [block for block in blocks("python") if "pyfunc" in block]
    names: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:5000", stack.mlflow_url), names)
    assert set(names["model"].predict({"image": numpy.zeros((2, 1, 8, 8), numpy.float32)})) == {"output"}


def test_the_python_of_a_serving_machine_works(digits: Ended, stack: Settings, tmp_path: Path) -> None:
    (block,) = [block for block in blocks("python") if "shipreader" in block]
    variables = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_REGION": "us-east-1"}
    environment = {**os.environ, **variables, "AWS_ENDPOINT_URL": stack.s3_endpoint or ""}
    script = [sys.executable, "-c", block.replace("/srv/digits", str(tmp_path / "digits"))]
    done = subprocess.run(script, check=True, timeout=PATIENCE, env=environment, capture_output=True, text=True)
    assert Path(done.stdout.splitlines()[-1]).name == "model.onnx"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_setting_is_in_the_table() -> None:
    for field in Settings.model_fields.values():
        assert f"`{field.validation_alias}`" in (DOCS / "services.md").read_text()


def test_the_readme_fits_two_screens_and_lists_what_is_not_protected() -> None:
    assert len(README.splitlines()) <= 90
    assert "does not protect from root" in " ".join(README.split())
