"""What commands cost in this build and in an earlier one: CPU of all their processes, side by side.

    git worktree add ../before COMMIT && make -C ../before .venv/.ready
    python benchmarks/two_builds.py --before ../before

Both builds have a stack of their own, and this one has a second: by turns in which order, with pairs of this build with
itself beside them. Where those spread wider than the margin, the result is "not resolved". CPU is user and system of
the command and of all that it starts, and what the three servers of its stack spend meanwhile. Writes the result into
docs/benchmarks.md.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
from report import PAGE, ROOT, machine, write

sys.path.insert(0, str(ROOT))

from tests.support.ports import free_ports
from train_and_ship.infra.password import USER, read_password

JOB = "examples/digits/job.yaml"
ROLLBACK = ["rollback", "digits", "--why", "measured"]
FURTHEST = 5
"""Releases that are gone back before a bucket is put back."""
OURS = ("PREFECT_", "MLFLOW_", "SHIP_", "AWS_", "PYTHONDONTWRITE")


@dataclass(frozen=True)
class Subject:
    """A command, and how much of the earlier build's CPU it may take."""

    name: str
    now: Sequence[str]
    before: Sequence[str]
    most: float | None
    """None where another number is to be held against it."""
    times: int = 1
    """How often each side is asked for one measurement, by turns: what takes half a second is lost in the noise."""


SUBJECTS = {
    "run": Subject("`ship run`", ["run", JOB], ["run", JOB], 1.05),
    # Each goes one release further back, from time to time the bucket is put back.
    "rollback": Subject("`ship rollback`", ROLLBACK, ROLLBACK, 1.05, times=15),
    "check-no-export": Subject("`ship check --no-export`", ["check", "--no-export", JOB], ["check", JOB], 1.1),
    "check": Subject("`ship check`", ["check", JOB], ["check", JOB], None),
}


class Side:
    """A build, with a stack of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        prefect, mlflow, s3 = free_ports(3)
        self.home = tempfile.mkdtemp(prefix="two-builds-")
        self.releases = 0
        """Of digits, that were shipped here."""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
            "SHIP_HOME": self.home,
            "SHIP_PREFECT_PORT": str(prefect),
            "SHIP_MLFLOW_PORT": str(mlflow),
            "SHIP_S3_PORT": str(s3),
        }
        self._kept: dict[str, tuple[str, bytes]] = {}
        """Key, hash and content of what can change when a pointer moves."""

    def ship(self, *words: str) -> None:
        """Run a command of this build."""
        done = subprocess.run(
            [self.folder / ".venv/bin/ship", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{self.folder}: ship {' '.join(words)}:\n{done.stdout[-3000:]}")
        self.releases += words == ("run", JOB)

    def have(self, releases: int) -> None:
        """Ship digits until there are so many, and remember how the bucket is then."""
        while self.releases < releases:
            self.ship("run", JOB)
        bucket = self._bucket()
        self._kept = {item.key: (item.e_tag, item.get()["Body"].read()) for item in bucket.objects.all() if small(item)}

    def put_back(self) -> None:
        """The bucket as it was remembered, whatever has moved since."""
        if not self._kept:
            return
        bucket = self._bucket()
        there = {item.key: item.e_tag for item in bucket.objects.all() if small(item)}
        for key in there.keys() - self._kept.keys():
            bucket.Object(key).delete()
        for key, (tag, content) in self._kept.items():
            if there.get(key) != tag:
                bucket.put_object(Key=key, Body=content)

    def _bucket(self) -> Any:
        session = boto3.Session(USER, read_password(Path(self.home)) or "none asked", region_name="us-east-1")
        endpoint = f"http://127.0.0.1:{self.environment['SHIP_S3_PORT']}"
        (bucket,) = session.resource("s3", endpoint_url=endpoint).buckets.all()
        return bucket

    def cpu(self, words: Sequence[str]) -> float:
        """Seconds, user and system, of a command, and of the servers meanwhile."""
        servers, before = self._servers(), resource.getrusage(resource.RUSAGE_CHILDREN)
        self.ship(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return own + self._servers() - servers

    def _servers(self) -> float:
        seconds = 0.0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SHIP_HOME") == self.home:
                    seconds += sum(process.cpu_times()[:2])
        return seconds


def small(item: Any) -> bool:
    """No file of a release, which nothing changes."""
    return bool(item.size < 100_000)


@contextlib.contextmanager
def stacks(before: Path) -> Iterator[tuple[Side, Side, Side]]:
    """The earlier build, this one, and this one again."""
    sides = Side(before), Side(ROOT), Side(ROOT)
    try:
        for side in sides:
            side.ship("up")
        yield sides
    finally:
        for side in sides:
            side.ship("down")


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def row(subject: Subject, sides: Sequence[Side], pairs: int) -> str:
    """Ask by turns; a row of the table."""
    words = (subject.before, subject.now, subject.now)
    seconds: list[list[float]] = [[], [], []]
    # The first of each side fills caches.
    for pair in range(pairs + 1):
        taken = [0.0, 0.0, 0.0]
        for time in range(subject.times):
            for side in sides if time % FURTHEST == 0 else ():
                side.put_back()
            for place in (0, 1, 2)[:: 1 if (pair + time) % 2 else -1]:
                taken[place] += sides[place].cpu(words[place]) / subject.times
        if pair:
            for of_side, measured in zip(seconds, taken, strict=True):
                of_side.append(measured)
    before, now, again = seconds
    ratios = [a / b for a, b in zip(now, before, strict=True)]
    same = [a / b for a, b in zip(again, now, strict=True)]
    verdict = ""
    if subject.most is not None:
        margin = abs(subject.most - statistics.median(ratios))
        resolved = max(max(same) - 1, 1 - min(same)) <= margin
        within = statistics.median(ratios) <= subject.most
        verdict = f"at most {subject.most}: " + (("within" if within else "more") if resolved else "not resolved")
    middle = f"{statistics.median(before):.2f} s | {statistics.median(now):.2f} s"
    return f"| {subject.name} | {middle} | {spread(ratios)} | {spread(same)} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, type=Path, help="folder of the earlier build, with its .venv")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--only", default=",".join(SUBJECTS), help=f"some of {','.join(SUBJECTS)}")
    options = parser.parse_args()
    folder = options.before.resolve()
    commit = subprocess.check_output(["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"], text=True).strip()
    rows = []
    with stacks(folder) as sides:
        for name in options.only.split(","):
            if name == "rollback":
                # Nothing is measured here.
                with ThreadPoolExecutor(len(sides)) as pool:
                    list(pool.map(Side.have, sides, [FURTHEST + 1] * len(sides)))
            rows.append(row(SUBJECTS[name], sides, options.pairs))
            print(rows[-1], flush=True)
    text = "\n".join(
        [
            "## This build and an earlier one",
            "",
            f"`python benchmarks/two_builds.py --before FOLDER --pairs {options.pairs} --only {options.only}`. By"
            f" turns, digits. {machine('torch', 'prefect', 'mlflow')}",
            f"CPU (user and system) of all processes, servers too; medians, in brackets lowest and highest. Before: "
            f"{commit}.",
            "",
            "| command | before | now | now ÷ before | now ÷ now | wanted |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    write(PAGE, "two-builds", text)


if __name__ == "__main__":
    main()
