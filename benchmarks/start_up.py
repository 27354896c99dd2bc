"""What it takes to load what is started most: CPU of whole processes, this environment against another, side by side.

    python benchmarks/start_up.py --before ../before/.venv/bin/python

Before: the interpreter of an environment in which an earlier version is installed. By turns, with pairs of this side
with itself beside them: where those spread wider than the margin, the result is "not resolved". Writes the result into
docs/benchmarks.md.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from report import PAGE, machine, write

MARGIN = 0.05
SUBJECTS = {
    "`ship --help`": (
        "from {ship}ship.main import main; import sys; sys.argv = ['ship', '--help']; main()",
        "the command line, without heavy libraries",
    ),
    "`ship rollback`": (
        "import {ship}ship.rollback; from {ship}infra.objectstore import ObjectStore; "
        "from {ship}infra.settings import Settings; ObjectStore.from_settings(Settings.load())",
        "its imports and a client of the store; no request",
    ),
    "a rank": ("import torchworker.rank, torchworker.{stages}train", "its imports, torch among them"),
}
"""Name to the Python that is run, with what differs between the two versions in braces, and what that is."""
NAMES = ({"ship": "train_and_ship.", "stages": "stages."}, {"ship": "", "stages": ""})
"""Of today, and of the versions before the packages were called `train_and_ship.…`."""


def cpu(python: str, script: str) -> float:
    """User and system seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-P", "-c", script], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def script_for(python: str, text: str) -> str:
    """The subject's Python with the names that this environment has."""
    for names in NAMES:
        script = text.format(**names)
        done = subprocess.run([python, "-P", "-c", script], capture_output=True, text=True)
        if done.returncode == 0:
            return script
    raise SystemExit(f"{python} runs none of the two forms of:\n{text}\n{done.stderr}")


def spread(values: list[float]) -> str:
    """Median, and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, type=Path, help="python of the other environment")
    parser.add_argument("--pairs", type=int, default=21)
    options = parser.parse_args()
    ours, theirs = sys.executable, str(options.before.absolute())
    rows = []
    for name, (text, what) in SUBJECTS.items():
        mine, other = script_for(ours, text), script_for(theirs, text)
        now, before, itself = [], [], []
        for pair in range(options.pairs):
            # By turns in which order, so that whatever grows or falls in time favours nobody.
            first, second = ((ours, mine, now), (theirs, other, before))[:: 1 if pair % 2 else -1]
            for python, script, found in (first, second):
                found.append(cpu(python, script))
            itself.append(cpu(ours, mine))
        ratios = [a / b for a, b in zip(now, before, strict=True)]
        same = [a / b for a, b in zip(itself, now, strict=True)]
        low, _, high = statistics.quantiles(same, n=4)
        resolved = max(high - 1, 1 - low) <= MARGIN
        verdict = ("within" if statistics.median(ratios) <= 1 + MARGIN else "more") if resolved else "not resolved"
        rows.append(
            f"| {name} | {what} | {statistics.median(now):.2f} s | {spread(ratios)} | {spread(same)} | {verdict} |"
        )
        print(rows[-1], flush=True)
    text = "\n".join(
        [
            "## Start-up",
            "",
            f"`python benchmarks/start_up.py --pairs {options.pairs}`, by turns. {machine('torch', 'prefect')}",
            "CPU (user and system) of whole processes; medians, in brackets the middle half. Before: 4215e1c, when "
            f"the packages had no rooms and no name of their own. *Within*: at most {MARGIN:.0%} more than before.",
            "",
            "| what starts | that is | now | now ÷ before | now ÷ now | |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    write(PAGE, "start-up", text)


if __name__ == "__main__":
    main()
