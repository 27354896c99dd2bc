"""`ship run examples/digits/job.yaml` against the same job written by hand (benchmarks/by_hand).

Needs the local stack (`ship up`). Runs both commands alternately, in swapped order from round to round, after one
round that is not counted, and writes the result into docs/benchmarks.md.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml
from report import PAGE, ROOT, machine, write

from train_and_ship.infra.password import read_password
from train_and_ship.infra.rundir import COMPLETED
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.password import variables_of

JOB = ROOT / "examples/digits/job.yaml"
BY_HAND = ROOT / "benchmarks/by_hand"
SERVICES = {
    "Prefect": os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api") + "/health",
    "MLflow": os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000") + "/health",
    "the S3 server": os.environ.get("AWS_ENDPOINT_URL", "http://127.0.0.1:4566"),
}
SETTINGS = Settings.load()
ENVIRONMENT = {**os.environ, **variables_of(SETTINGS, read_password(SETTINGS.home) or "")}
"""What the script written by hand needs to get into the local stack."""


COMPUTE = ("train", "export", "validate", "rehearse")
"""Of ours, the stages in which the flow waits for its children."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    wall: float
    """Seconds from start to exit."""
    cpu: float
    """User and system seconds of the command and every process it waited for; the servers are not in it."""
    stages: dict[str, float]
    """Seconds by stage, as the command itself reports them."""


def check_services() -> None:
    for name, address in SERVICES.items():
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an answer, which is all we ask
        except OSError as error:
            sys.exit(f"{name} does not answer at {address} ({error}). Start the local stack: ship up")


def check_same_job() -> None:
    """The comparison means nothing when the two sides do different work."""
    sys.path[:0] = [str(BY_HAND), str(JOB.parent)]
    import train as by_hand

    job = yaml.safe_load(JOB.read_text())
    for name, ours, theirs in (("train", job["train"], by_hand.TRAIN), ("model", job["model"]["args"], by_hand.MODEL)):
        if ours != theirs:
            sys.exit(f"{name} differs: {JOB.name} has {ours}, by_hand/train.py has {theirs}")


def stages_of_ours(printed: str) -> dict[str, float]:
    """They are beside the report, whose path is the last line of `ship run`."""
    found = re.findall(r"^  report +(\S.*?)\s*$", printed, re.MULTILINE)
    if not found:
        sys.exit(f"our command did not say where its report is; it printed:\n{printed}")
    return dict(json.loads((ROOT / found[-1]).with_name(COMPLETED).read_text())["stages"])


def stages_of_by_hand(printed: str) -> dict[str, float]:
    return dict(json.loads(printed.strip().splitlines()[-1])["seconds"])


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(side: str, command: list[str]) -> Timing:
    cpu, begin = children_cpu(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    wall = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{side} failed ({done.returncode}): {shlex.join(command)}\n{done.stdout}\n{done.stderr}")
    stages = stages_of_ours(done.stderr + done.stdout) if side == "ours" else stages_of_by_hand(done.stdout)
    return Timing(wall=wall, cpu=children_cpu() - cpu, stages=stages)


def run(rounds: int, commands: dict[str, list[str]]) -> list[dict[str, Timing]]:
    """One dict a round, in the order of running; round 0 fills the caches and is dropped."""
    counted = []
    for number in range(rounds + 1):
        order = list(commands) if number % 2 else list(commands)[::-1]
        timings = {side: timed(side, commands[side]) for side in order}
        ours, by_hand = timings["ours"], timings["by_hand"]
        note = " (warm-up, not counted)" if number == 0 else ""
        print(
            f"round {number}{note}: ours {ours.wall:.1f} s, by hand {by_hand.wall:.1f} s, "
            f"ratio {ours.wall / by_hand.wall:.2f}",
            flush=True,
        )
        if number:
            counted.append(timings)
    return counted


def stage_medians(timings: list[Timing]) -> dict[str, float]:
    names = [name for name in timings[0].stages if all(name in t.stages for t in timings)]
    medians = {name: statistics.median(t.stages[name] for t in timings) for name in names}
    # What no stage claims: starting and ending the interpreter, and whatever the report leaves out.
    medians["outside the stages"] = statistics.median(t.wall - sum(t.stages.values()) for t in timings)
    return medians


def section(rounds: list[dict[str, Timing]], command: list[str]) -> str:
    shown = shlex.join([Path(command[0]).name, *command[1:]])
    lines = [
        "## `ship run` against the same job written by hand",
        "",
        machine("torch", "prefect", "mlflow", "onnxruntime"),
        "Measured with `python benchmarks/ship_vs_by_hand.py`: examples/digits, both sides alternately on a running "
        f"local stack, one uncounted round first. Ours is `{shown}`.",
        "",
        "| round | first | ours, s | by hand, s | ratio | ours, CPU s | by hand, CPU s | CPU ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    wall_ratios, cpu_ratios = [], []
    for number, timings in enumerate(rounds, 1):
        ours, by_hand = timings["ours"], timings["by_hand"]
        wall_ratios.append(ours.wall / by_hand.wall)
        cpu_ratios.append(ours.cpu / by_hand.cpu)
        first = "ours" if next(iter(timings)) == "ours" else "by hand"
        lines.append(
            f"| {number} | {first} | {ours.wall:.1f} | {by_hand.wall:.1f} | {wall_ratios[-1]:.2f} "
            f"| {ours.cpu:.1f} | {by_hand.cpu:.1f} | {cpu_ratios[-1]:.2f} |"
        )
    lines += [
        "",
        f"**Median ratio, ours to by hand: {statistics.median(wall_ratios):.2f} in wall clock, "
        f"{statistics.median(cpu_ratios):.2f} in CPU time.**",
        "",
        "Median seconds by stage, as each side reports them:",
        "",
        "| stage | ours | by hand |",
        "|---|---|---|",
    ]
    ours = stage_medians([timings["ours"] for timings in rounds])
    by_hand = stage_medians([timings["by_hand"] for timings in rounds])
    stages = [*dict.fromkeys([*by_hand, *ours])]
    stages.sort(key="outside the stages".__eq__)
    cells = {s: [f"{side[s]:.2f}" if s in side else "–" for side in (ours, by_hand)] for s in stages}
    lines += [f"| {stage} | {' | '.join(values)} |" for stage, values in cells.items()]
    over = statistics.median(
        timings["ours"].wall / sum(timings["ours"].stages[stage] for stage in COMPUTE) for timings in rounds
    )
    lines += ["", f"Ours is {over:.2f} times the stages in which it waits for its children ({', '.join(COMPUTE)})."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds; each runs both sides once")
    ship = str(Path(sys.executable).parent / "ship")
    default = shlex.join([ship, "run", str(JOB.relative_to(ROOT))])
    parser.add_argument("--ours", default=default, help="another command to measure against by_hand")
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")

    check_services()
    check_same_job()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is busy (load average {load:.1f}): read the CPU columns rather than the wall clock")
    commands = {"ours": shlex.split(options.ours), "by_hand": [sys.executable, str(BY_HAND / "ship.py")]}
    text = section(run(options.rounds, commands), commands["ours"])
    print(f"\n{text}")
    write(options.write, "ship_vs_by_hand", text)


if __name__ == "__main__":
    main()
