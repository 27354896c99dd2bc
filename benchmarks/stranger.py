"""What the tool asks of somebody with a project of their own: side by side, in one run.

    make bench-stranger

- from an empty folder to the first promoted model, in four commands, beside the first of them: the installation;
- a run of digits whose code has an environment of its own, beside one without, by turns;
- `ship --help` beside an application of two commands in the same library.

The first installs some 2.5 GB into a temporary folder, from pip's cache where that has them. Writes the results into
docs/benchmarks.md.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from report import PAGE, ROOT, machine, write

sys.path.insert(0, str(ROOT))

from tests.support.ports import free_ports

OURS = ("PREFECT_", "MLFLOW_", "SHIP_", "AWS_", "PYTHONDONTWRITE")
PROJECT = '''
import torch
from torch import nn
from torch.utils.data import Dataset


class Points(Dataset):
    """2,000 and 500 points of eight numbers, and whether the first four are more than the others together."""

    def __init__(self, split):
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        self.points = torch.randn(2000 if split == "train" else 500, 8, generator=generator)
        self.sides = (self.points[:, :4].sum(1) > self.points[:, 4:].sum(1)).long()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index], self.sides[index]


class Sides(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, point):
        return self.layers(point)
'''
BARE = """
import typer

application = typer.Typer()


@application.command()
def up(port: int = 1) -> None:
    "Start."


@application.command()
def down(port: int = 1) -> None:
    "Stop."


application()
"""


def stack_of(home: Path) -> dict[str, str]:
    """The environment of a stack with a folder and ports of its own."""
    prefect, mlflow, s3 = free_ports(3)
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
        "SHIP_HOME": str(home),
        "SHIP_PREFECT_PORT": str(prefect),
        "SHIP_MLFLOW_PORT": str(mlflow),
        "SHIP_S3_PORT": str(s3),
    }


def call(command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of the clock, and CPU seconds of all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout.decode()[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def from_an_empty_folder(work: Path) -> str:
    """A row for each command, and the quotient of all to the installation."""
    shutil.copytree(ROOT, work / "clone", ignore=shutil.ignore_patterns(".venv", "build", ".ship", ".git", "dist"))
    python = sys.executable
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(command, cwd=work / "clone", check=True)
    _unpack(work / "clone/dist")
    wheels = sorted((work / "clone/dist").glob("*.whl"))
    project, tool = work / "project", work / "tool"
    project.mkdir()
    (project / "points.py").write_text(PROJECT)
    subprocess.run(["git", "init", "--quiet", project], check=True)
    subprocess.run([python, "-m", "venv", tool], check=True)
    environment = stack_of(work / "home")
    install = [tool / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *wheels]
    commands = {
        "`pip install` of the three wheels": install,
        "`ship up`": [tool / "bin/ship", "up"],
        "`ship init`": [tool / "bin/ship", "init"],
        "`ship run job.yaml`": [tool / "bin/ship", "run", "job.yaml"],
    }
    try:
        took = {name: call(command, project, environment)[0] for name, command in commands.items()}
    finally:
        subprocess.run([tool / "bin/ship", "down"], env=environment, stdout=subprocess.DEVNULL, check=False)
    first = next(iter(took.values()))
    rows = [f"| {name} | {seconds:.1f} |" for name, seconds in took.items()]
    return "\n".join(
        [
            "| command | seconds |", "|---|---|", *rows, "",
            f"**All four ÷ the first: {sum(took.values()) / first:.2f}**; wanted: at most 2, in at most four commands.",
        ]
    )  # fmt: skip


def _unpack(dist: Path) -> None:
    """The two wheels that the tool's own carries, beside it."""
    (tool,) = dist.glob("train_and_ship-*.whl")
    with zipfile.ZipFile(tool) as archive:
        for name in archive.namelist():
            if name.startswith("train_and_ship/ship/wheels/") and name.endswith(".whl"):
                (dist / Path(name).name).write_bytes(archive.read(name))


def two_environments(work: Path, pairs: int) -> str:
    """Runs of digits with an environment of its own and without, by turns."""
    ship, environment = Path(sys.executable).with_name("ship"), stack_of(work / "home-of-two")
    second = work / "second"
    # The same packages, so that nothing else differs, behind another interpreter.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", second], check=True)
    site = next((second / "lib").glob("python3*/site-packages"))
    (site / "those_of_the_tool.pth").write_text(f"import site; site.addsitedir({_packages()!r})\n")
    jobs = {}
    for name, line in {"one": "", "two": f"python: {second}/bin/python\n"}.items():
        folder = work / f"digits-{name}"
        shutil.copytree(ROOT / "examples/digits", folder)
        job = folder / "job.yaml"
        job.write_text(job.read_text().replace("name: digits", f"name: digits-{name}") + line)
        jobs[name] = job
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    try:
        call([ship, "up"], work, environment)
        # Uncounted: the C++ runner is compiled, MLflow makes its tables.
        for job in jobs.values():
            call([ship, "run", job], work, environment)
        for number in range(pairs):
            for name in list(jobs) if number % 2 else list(jobs)[::-1]:
                took[name].append(call([ship, "run", jobs[name]], work, environment))
    finally:
        subprocess.run([ship, "down"], env=environment, stdout=subprocess.DEVNULL, check=False)
    rows, more = [], []
    for place, what in enumerate(("clock", "CPU, without the servers")):
        one, two = ([value[place] for value in took[name]] for name in ("one", "two"))
        apart = [b - a for a, b in zip(one, two, strict=True)]
        more.append(statistics.median(apart))
        rows.append(
            f"| {what} | {statistics.median(one):.2f} | {statistics.median(two):.2f} | **{more[-1]:+.2f}** "
            f"({min(apart):+.2f} to {max(apart):+.2f}) |"
        )
    return "\n".join(
        [
            "| seconds | the tool's own environment | one of the project's | what it costs |", "|---|---|---|---|",
            *rows, "",
            f"Medians of {pairs} pairs. At most 1.5 s was wanted.",
        ]
    )  # fmt: skip


def _packages() -> str:
    return sysconfig.get_path("purelib")


def help_beside_bare(work: Path, pairs: int) -> str:
    """`ship --help`, and that of an application that does nothing."""
    bare = work / "bare.py"
    bare.write_text(BARE)
    commands: dict[str, list[str | Path]] = {
        "ship": [Path(sys.executable).with_name("ship"), "--help"],
        "bare": [sys.executable, bare, "--help"],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(pairs):
        for name, command in commands.items():
            took[name].append(call(command, work, os.environ)[1])
    ours, theirs = (statistics.median(took[name]) for name in ("ship", "bare"))
    return (
        f"`ship --help` takes {ours:.2f} s of CPU, an application of two commands in the same library {theirs:.2f} s: "
        f"**{ours / theirs:.2f}** times as much (median of {pairs}); at most 1.3 was wanted."
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--only", nargs="*", choices=["install", "two", "help"], default=["install", "two", "help"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-stranger-") as name:
        work = Path(name)
        parts = {
            "install": lambda: "### From an empty folder\n\n" + from_an_empty_folder(work),
            "two": lambda: "### An environment of the project's own\n\n" + two_environments(work, asked.pairs),
            "help": lambda: "### The command line\n\n" + help_beside_bare(work, asked.pairs),
        }
        for part in asked.only:
            text = f"{parts[part]()}\n\n{machine('torch', 'prefect', 'mlflow')} `make bench-stranger`."
            write(PAGE, f"stranger-{part}", text)
            print(text)


if __name__ == "__main__":
    main()
