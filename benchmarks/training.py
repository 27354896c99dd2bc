"""The built-in loop against a plain torchrun script on the reference net, and what the job's switches bring.

    python benchmarks/training.py [--rounds 3] [--write docs/benchmarks.md]

Both sides run alternately, in processes of their own, with the same threads, batches and switches. A pair of runs gives
one ratio; the median of the ratios is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from report import PAGE, ROOT, machine, write

from torchworker.contract import TrainRequest
from torchworker.training.device import half_precision_is_native
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of, train_settings
from train_and_ship.tasks.worker import call_worker

BY_HAND = Path(__file__).parent / "by_hand"
BATCH = 128
EPOCHS = 2
WAYS = ("eager", "TorchScript", "torch.compile", "fused Adam", "bf16", "bf16, fused Adam")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides train with."""

    name: str
    processes: int
    fused: bool = False
    precision: str = "float32"
    net: str = "reference"
    steps: int = 6
    """Of an epoch."""

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.processes)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the model itself noted, the same way on both sides. A step is from one training pass to the next."""

    step: float
    """Median wall seconds of a step in the last epoch."""
    cpu: float
    """Median CPU seconds of such a step, over all ranks."""
    first_epoch_cpu: float
    """The same in the first epoch, whose first step is left out."""
    first_step: float
    """Seconds from the call to the end of the first step."""
    held: list[float]
    """Seconds that each checkpoint held training up."""


def timing_of(marks: Path, count: int, called: float, held: list[float]) -> Timing:
    """marks: as the model was told; count: steps of an epoch; called: unix seconds when the side was started."""
    ranks = [json.loads(path.read_text()) for path in sorted(marks.parent.glob(f"{marks.name}-*"))]

    def steps(epoch: int, column: int) -> list[list[float]]:
        """Of each rank. The last step of an epoch has no pass after it."""
        chosen = slice(epoch * count + (epoch == 0), (epoch + 1) * count)
        return [[after[column] - before[column] for before, after in pairwise(rank[chosen])] for rank in ranks]

    last = len(ranks[0]) // count - 1
    return Timing(
        step=statistics.median(steps(last, 0)[0]),
        cpu=statistics.median(sum(step) for step in zip(*steps(last, 1), strict=True)),
        first_epoch_cpu=statistics.median(sum(step) for step in zip(*steps(0, 1), strict=True)),
        first_step=ranks[0][1][0] - called,
        held=held,
    )


PRECISION = "bf16" if half_precision_is_native(torch.bfloat16) else "float32"
"""Without the instructions for bf16 a step takes 20 s: the loop is not compared there, the switches tell how slow."""

SETTINGS = (
    Setting(name="1 process", processes=1),
    Setting(name="2 processes", processes=2),
    Setting(name=f"1 process, {PRECISION}, fused", processes=1, fused=True, precision=PRECISION),
    Setting(name="one linear layer, 1 process", processes=1, net="layer", steps=100),
)


@contextmanager
def started(folder: Path) -> Iterator[ForkServer]:
    fork_server = ForkServer(folder / "host.log")
    try:
        yield fork_server
    finally:
        fork_server.close()


def ours(setting: Setting, epochs: int, fork_server: ForkServer, **more: Any) -> Timing:
    """The built-in loop. The host runs already, as it does when a flow trains."""
    job = {
        "name": "reference",
        "project": str(ROOT / "benchmarks/reference"),
        "model": {"factory": "reference:build_model"},
        "data": {"factory": "reference:build_dataset", "args": {"samples": setting.steps * BATCH}},
        "train": {
            "epochs": epochs, "processes": setting.processes, "threads": setting.threads, "batch_size": BATCH,
            "fused": setting.fused, "precision": setting.precision, "device": "cpu", **more,
        },
    }  # fmt: skip
    held: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        marks = folder / "marks"
        job["model"]["args"] = {"marks": str(marks), "net": setting.net}
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        loaded, project = load_job(folder / "job.yaml")
        request = TrainRequest(
            project=project_of(loaded, project), train=train_settings(loaded), folder=name, checkpoints=f"{name}/c"
        )
        called = time.time()

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "checkpoint":
                held.append(event["held_seconds"])

        asyncio.run(call_worker(fork_server, "train", request, folder, on_event))
        return timing_of(marks, setting.steps, called, held)


def by_hand(setting: Setting, epochs: int) -> Timing:
    """The plain script, started by torchrun."""
    with tempfile.TemporaryDirectory() as name:
        marks = Path(name) / "marks"
        options = {
            "samples": setting.steps * BATCH, "epochs": epochs, "batch": BATCH, "threads": setting.threads,
            "fused": setting.fused, "precision": setting.precision, "marks": str(marks),
            "net": setting.net,
        }  # fmt: skip
        called = time.time()
        subprocess.run(
            [
                Path(sys.executable).with_name("torchrun"), "--standalone", f"--nproc-per-node={setting.processes}",
                BY_HAND / "reference_train.py", json.dumps(options),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        return timing_of(marks, setting.steps, called, [])


def twenty_steps(way: str) -> dict[str, float]:
    command = [sys.executable, BY_HAND / "twenty_steps.py", way, str(os.cpu_count() or 1)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def compare(rounds: int, fork_server: ForkServer) -> tuple[str, str]:
    """The loop against the script, and what else these runs say: scaling and the time to the first step."""
    pairs: dict[str, list[tuple[Timing, Timing]]] = {setting.name: [] for setting in SETTINGS}
    for number in range(rounds):
        for setting in SETTINGS:
            # Whoever goes first finds the caches of the other side.
            if number % 2:
                script = by_hand(setting, EPOCHS)
                loop = ours(setting, EPOCHS, fork_server)
            else:
                loop = ours(setting, EPOCHS, fork_server)
                script = by_hand(setting, EPOCHS)
            pairs[setting.name].append((loop, script))
            print(f"round {number + 1}, {setting.name}:\n  {loop}\n  {script}", flush=True)
    lines = [
        "| | pairs | loop, ms a step | script, ms a step | speed in wall clock | **in CPU time** | lowest to highest "
        "| in epoch 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, both in pairs.items():
        wall = [script.step / loop.step for loop, script in both]
        cpu = [script.cpu / loop.cpu for loop, script in both]
        first = [script.first_epoch_cpu / loop.first_epoch_cpu for loop, script in both]
        lines.append(
            f"| {name} | {len(both)} | {1000 * statistics.median(loop.step for loop, _ in both):.3g} "
            f"| {1000 * statistics.median(script.step for _, script in both):.3g} | {statistics.median(wall):.3f} "
            f"| **{statistics.median(cpu):.3f}** | {min(cpu):.3f} to {max(cpu):.3f} | {statistics.median(first):.3f} |"
        )
    one, two = (pairs[setting.name] for setting in SETTINGS[:2])
    scaling = [
        [before[side].step / after[side].step for before, after in zip(one, two, strict=True)] for side in (0, 1)
    ]
    starts = [[pair[side].first_step for pair in two] for side in (0, 1)]
    further = [
        f"From 1 process with {SETTINGS[0].threads} threads to 2 with {SETTINGS[1].threads}, on the same cores and "
        f"with the same batch over all: {statistics.median(scaling[0]):.2f} times as fast with the loop, "
        f"{statistics.median(scaling[1]):.2f} with the script.",
        "",
        f"From launch to the end of the first step, 2 processes: {statistics.median(starts[0]):.1f} s with the loop "
        f"(the process that has torch runs already, as in a flow), {statistics.median(starts[1]):.1f} s with torchrun.",
    ]
    return "\n".join(lines), "\n".join(further)


def switches(rounds: int) -> str:
    """Twenty steps each way, alternately."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            results[way].append(twenty_steps(way))
            print(f"{way}: {results[way][-1]}", flush=True)
    lines = [
        "| | speed in wall clock, eager = 1 | **in CPU time** | ms a step | first step, s | loss after 20 steps |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        both = list(zip(results["eager"], results[way], strict=True))
        wall, cpu = (statistics.median(eager[key] / item[key] for eager, item in both) for key in ("step", "cpu"))
        lines.append(
            f"| {way} | {wall:.2f} | **{cpu:.2f}** | {1000 * statistics.median(item['step'] for _, item in both):.0f} "
            f"| {statistics.median(item['first'] for _, item in both):.1f} | {both[-1][1]['loss']:.4f} |"
        )
    return "\n".join(lines)


def stall(fork_server: ForkServer) -> str:
    """How long checkpoints hold training up."""
    timing = ours(SETTINGS[1], EPOCHS, fork_server, checkpoint={"steps": 3})
    return (
        f"A checkpoint of the model and Adam's state (0.6 GB), 2 processes, one every 3 steps: "
        f"{1000 * statistics.median(timing.held):.0f} ms held up (median of {len(timing.held)}), "
        f"{statistics.median(timing.held) / timing.step:.1f} steps of {1000 * timing.step:.0f} ms. That is the copy, "
        "and waiting for the one before where it is still being written."
    )


def training(rounds: int) -> str:
    """The section on the loop and the script."""
    with tempfile.TemporaryDirectory() as name, started(Path(name)) as fork_server:
        table, further = compare(rounds, fork_server)
        held = stall(fork_server)
    return "\n".join(
        [
            "## Training against a plain torchrun script",
            "",
            f"{machine('torch')} Measured with `python benchmarks/training.py --rounds {rounds}`.",
            "",
            "The reference net (3→16→32→64 convolutions with batch norm and ReLU, Linear(50176, 1024), "
            f"Linear(1024, 10), images 3×28×28) with Adam, batch {BATCH} over all processes, "
            f"{SETTINGS[0].steps} steps an epoch. The script is what one writes first "
            "([reference_train.py](../benchmarks/by_hand/reference_train.py)): DistributedDataParallel, a DataLoader, "
            "autocast. Both run alternately, and the model notes when its training passes begin, so a step is what "
            "lies between two of them, the reading of data too. Speed is "
            f"the script's median step of epoch {EPOCHS} ÷ the loop's, the median over pairs; wanted: 0.98 or more. "
            "On a machine that others use too, CPU time (of all ranks, with all their threads) is the one to look at. "
            "In epoch 1 the loop also hashes every sample for the data fingerprint. The last line is of a net of one "
            "linear layer: there the loop's own work, which is the same for any net, shows.",
            "",
            table,
            "",
            further,
            "",
            held,
        ]
    )


def ways(rounds: int) -> str:
    """The section on the switches."""
    return "\n".join(
        [
            "## What the switches bring",
            "",
            f"{machine('torch')} Measured with `python benchmarks/training.py --rounds {rounds}`: twenty Adam steps of "
            f"the reference net in one process with {os.cpu_count()} threads, each way in a process of its own, "
            "alternately; the speed is that of the median step without the first. In the job file: `compile`, `fused`, "
            "`precision: bf16`.",
            "",
            switches(rounds),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs of each setting, runs of each way")
    parser.add_argument("--only", choices=["training", "switches"], help="one section")
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    for name, section in (("training", training), ("switches", ways)):
        if options.only in (None, name):
            text = section(options.rounds)
            print(f"\n{text}")
            write(options.write, name, text)


if __name__ == "__main__":
    main()
