"""The tutorial is run as it stands: its files are written, its commands typed, and what they print is what it shows."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from tests.support.local_stack import stack_environment
from tests.support.new_databases import put_databases
from tests.support.passwords import VARIABLES, put_password
from tests.support.ports import free_ports
from tests.support.processes import PATIENCE
from tests.support.projects import REPOSITORY
from train_and_ship.ship.main import app

PAGE = (REPOSITORY / "docs" / "tutorial.md").read_text()
# Servers of the stack are on other ports here, and so is the one that serves.
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def file(self) -> str | None:
        named = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


def commands() -> list[str]:
    return [line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines() if line]


def test_every_command_of_the_tutorial_is_one_with_these_words_and_options() -> None:
    ours, understood = typer.main.get_command(app).commands, set()
    for line in commands():
        words = shlex.split(line, comments=True)
        if words[0] == "ship":
            # Parses them as the command would, and runs nothing; what does not fit is raised.
            ours[words[1]].make_context(words[1], words[2:])
            understood.add(words[1])
    assert understood >= {
        "init",
        "check",
        "up",
        "run",
        "live",
        "diff",
        "retrain",
        "serve",
        "rollback",
        "history",
        "down",
    }


def test_what_the_tutorial_shows_is_saved_printed_or_typed() -> None:
    assert {block.file for block in BLOCKS if block.language in ("python", "yaml")} == {
        "make_data.py",
        "wear.py",
        "job.yaml",
        "ask.py",
    }
    assert {block.language for block in BLOCKS} == {"bash", "python", "yaml", "text"}


def pattern(line: str) -> str:
    """What a printed line has to match: dots stand for anything, an address for one of any port."""
    line = ADDRESS.sub("http://127.0.0.1:…", line.strip())
    return re.escape(line).replace("…", ".*")


# A stack of its own, five runs and a server.
@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "wear"
    folder.mkdir()
    put_password(home)
    put_databases(home)
    port = free_ports(1)[0]
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SHIP_")},
        **stack_environment(home),
        **VARIABLES,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    printed, serving = "", None
    try:
        for block in BLOCKS:
            if block.file is not None:
                (folder / block.file).write_text(block.text)
            elif block.language == "text":
                for line in block.text.splitlines():
                    assert re.search(pattern(line), printed), f"{line!r} is not in\n{printed}"
            elif block.language == "bash":
                printed = ""
                for line in block.text.splitlines():
                    line = line.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
                    if line.startswith("ship serve"):
                        words = [*shlex.split(line, comments=True), "--port", str(port)]
                        serving = subprocess.Popen(words, cwd=folder, env=variables, executable=_ship())
                        _ready(port, serving)
                        continue
                    done = subprocess.run(
                        ["bash", "-c", line], cwd=folder, env=variables, capture_output=True, text=True, timeout=600
                    )
                    expected = 2 if "# exits with 2" in line else 0
                    assert done.returncode == expected, f"{line}\n{done.stdout}{done.stderr}"
                    printed += done.stdout + done.stderr
    finally:
        if serving is not None:
            serving.send_signal(signal.SIGINT)
            serving.wait(60)
        subprocess.run([_ship(), "down"], cwd=folder, env=variables, timeout=120, check=False)


def _ship() -> str:
    return str(Path(sys.executable).with_name("ship"))


def _ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.poll() is None, "ship serve has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready") as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    pytest.fail("ship serve was not ready in time")
