"""Recurrent layers by ONNX Runtime, in the file that our exporter writes, against eager; and what their guards cost.

    python benchmarks/recurrent.py [--races 5] [--write docs/benchmarks.md]

One process holds all sides, which take turns: eager, the file, and the same file without the guards that keep batches
without rows away from the operator. Several processes one after the other, each with one thread or with as many as both
take by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from report import PAGE, ROOT, machine, write

from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.subject import Subject
from torchworker.runtimes.load import load_artifact

KINDS = ("LSTM", "GRU")
BATCHES = (1, 16)
STEPS = 32
WIDTH = 64
"""Features of a step, and hidden size."""
ROUNDS, ROUND_SECONDS = 40, 0.02
FILES = {"ours": "guarded.onnx", "without guards": "bare.onnx"}
THREADS = {1: "one", 0: "default"}
"""As runtimes are told, and in words."""

Times = dict[str, float]
"""Milliseconds of a call, by side."""


class Layer(torch.nn.Module):
    """sequence [B, T, WIDTH] → what the layer says at each step [B, T, WIDTH]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells = getattr(torch.nn, kind)(WIDTH, WIDTH, batch_first=True)
        self.eval().requires_grad_(False)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        return self.cells(sequence)[0]


def export(kind: str, folder: Path) -> None:
    """Write the layer into `folder` as of FILES, each by our exporter. kind: of KINDS."""
    nothing = Reference(target="a:b", where="model.factory")
    subject = Subject(
        model=Layer(kind),
        inputs={"sequence": torch.randn(4, STEPS, WIDTH)},
        outputs=["said"],
        dims=[
            DynamicDim(name="batch", min=1, max=64, axes={"sequence": (0,)}),
            DynamicDim(name="length", min=1, max=512, axes={"sequence": (1,)}),
        ],
        project=Project(
            name="layer", folder="/nowhere", model=nothing, data=nothing, collate=None, loss="mse_loss", metrics=[]
        ),
    )
    onnx_model(subject, folder / FILES["ours"])
    with mock.patch("torchworker.exporters.onnx_export.keep_batches_filled", lambda model: 0):
        onnx_model(subject, folder / FILES["without guards"])


def race(kind: str, batch: int, threads: int, folder: Path) -> None:
    """Print JSON: Times. kind: of KINDS; threads: of THREADS; folder: as `export` left it."""
    if threads:
        torch.set_num_threads(threads)
    model, sequence = Layer(kind), torch.randn(batch, STEPS, WIDTH)
    sides: dict[str, Callable[[], Any]] = {"eager": lambda: [model(sequence)]}
    for side, file in FILES.items():
        answer = load_artifact("onnx", folder / file, threads)
        sides[side] = lambda answer=answer: answer({"sequence": sequence})

    # With one thread nothing is done by any other, and what else the machine does is not counted.
    clock = time.thread_time if threads == 1 else time.perf_counter
    spent: dict[str, list[float]] = {side: [] for side in sides}
    calls = {}
    with torch.no_grad():
        for side, call in sides.items():
            torch.testing.assert_close(call()[0], model(sequence), rtol=1e-4, atol=1e-5)
            for _ in range(5):
                call()
            began = clock()
            call()
            calls[side] = min(max(round(ROUND_SECONDS / (clock() - began)), 2), 500)
        for number in range(ROUNDS):
            for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
                began = clock()
                for _ in range(calls[side]):
                    sides[side]()
                spent[side].append((clock() - began) / calls[side])
    # Others on the machine make a round slower, never quicker.
    print(json.dumps({side: 1000 * min(times) for side, times in spent.items()}))


def ratios(races: list[Times], above: str, below: str) -> str:
    """The median of a ratio of two sides, and the lowest and the highest."""
    found = sorted(times[above] / times[below] for times in races)
    return f"**{statistics.median(found):.2f}** ({found[0]:.2f}–{found[-1]:.2f})"


def table(results: dict[tuple[str, int, int], list[Times]]) -> str:
    lines = [
        "| layer | batch | threads | eager, ms | ours, ms | ours: speed, eager = 1 | without guards: speed, eager = 1 "
        "| time with guards ÷ without |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, batch, threads), races in results.items():
        eager, ours = (statistics.median(times[side] for times in races) for side in ("eager", "ours"))
        lines.append(
            f"| {kind} | {batch} | {THREADS[threads]} | {eager:.3g} | {ours:.3g} | {ratios(races, 'eager', 'ours')} | "
            f"{ratios(races, 'eager', 'without guards')} | {ratios(races, 'ours', 'without guards')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=5, help="processes for each line")
    parser.add_argument("--race", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, default=PAGE, help="markdown file to write the section into")
    given = parser.parse_args()
    if given.race:
        kind, batch, threads, folder = given.race
        race(kind, int(batch), int(threads), Path(folder))
        return
    asked = [(kind, batch, threads) for kind in KINDS for batch in BATCHES for threads in THREADS]
    results: dict[tuple[str, int, int], list[Times]] = {key: [] for key in asked}
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            (Path(name) / kind).mkdir()
            export(kind, Path(name) / kind)
        for _ in range(given.races):
            for kind, batch, threads in asked:
                argv = [sys.executable, __file__, "--race", kind, str(batch), str(threads), f"{name}/{kind}"]
                done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                times = json.loads(done.stdout.strip().splitlines()[-1])
                results[kind, batch, threads].append(times)
                print(kind, batch, THREADS[threads], times, flush=True)
    text = [
        "## Recurrent layers in ONNX Runtime",
        f"{machine('torch', 'onnxruntime')} Measured with `make bench-recurrent`: one layer, hidden size "
        f"{WIDTH}, {WIDTH} features, {STEPS} steps, in the file that `export.formats: [onnx]` makes, batch and length "
        "dynamic, against eager with no_grad. All sides in one process by turns, the quickest of "
        f"{ROUNDS} rounds of {1000 * ROUND_SECONDS:.0f} ms; medians over {given.races} processes, in brackets the "
        "lowest and the highest. With one thread CPU time of the thread that calls, otherwise the clock on the wall.",
        table(results),
    ]
    write(given.write, "recurrent", "\n\n".join(text))
    print(f"written to {given.write}")


if __name__ == "__main__":
    main()
