"""The artifact that a release recommends against eager, torch.compile and ONNX Runtime by hand; export and validate of
digits against the same by hand.

    python benchmarks/inference.py [--nets cnn transformer reference] [--races 3] [--write docs/benchmarks.md]

Artifacts are made, proven, measured and recommended as a flow does it. Then one process holds all sides, which take
turns; several processes one after the other, because where a runtime finds its memory is a matter of luck that lasts as
long as its process. CPU time of the calling thread, one thread.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from report import PAGE, ROOT, machine, write

from torchworker.contract import (
    GOLDEN,
    ExportRequest,
    ExportResult,
    MeasureResult,
    Timed,
    TrainRequest,
    ValidateRequest,
    ValidateResult,
    decode,
)
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import (
    fixed_gates,
    int8_limits,
    measure_request,
    project_of,
    train_settings,
    user_modules,
)
from train_and_ship.tasks.worker import call_worker

BATCHES = (1, 64)
ROUNDS, ROUND_SECONDS = 30, 0.03
FORMATS = ("torchscript", "onnx", "pt2", "aoti")
NAMES = {"reference": "reference net", "cnn": "small CNN", "transformer": "small transformer"}
PEERS = ("torch.compile", "ONNX Runtime by hand")


class Stages:
    """The stages of one job, without Prefect, on a host that runs already."""

    def __init__(self, fork_server: ForkServer, job_file: Path, folder: Path) -> None:
        self.fork_server, self.folder = fork_server, folder
        self.job, project_folder = load_job(job_file)
        self.project = project_of(self.job, project_folder)
        for name in ("train", "export", "validate", "measure"):
            (folder / name).mkdir(parents=True)

    def _call(self, stage: str, request: Any) -> Any:
        return asyncio.run(call_worker(self.fork_server, stage, request, self.folder / stage))

    def train(self) -> None:
        folder = self.folder / "train"
        settings = train_settings(self.job)
        checkpoints = str(self.folder / "checkpoints")
        self._call(
            "train", TrainRequest(project=self.project, train=settings, folder=str(folder), checkpoints=checkpoints)
        )

    def export(self) -> ExportResult:
        int8 = self.job.export.int8
        request = ExportRequest(
            project=self.project,
            folder=str(self.folder / "export"),
            weights=str(self.folder / "train" / "weights.safetensors"),
            formats=self.job.export.wanted,
            batch=self.job.export.batch,
            seed=0,
            validation_limit=self.job.export.validation_samples,
            int8=int8.wanted if int8 is not None else (),
        )
        self.exported: ExportResult = decode(ExportResult, self._call("export", request))
        return self.exported

    def validate(self) -> ValidateResult:
        result = self.exported
        request = ValidateRequest(
            folder=str(self.folder / "export"),
            formats={kind: artifact.file for kind, artifact in result.artifacts.items()},
            inputs=result.inputs,
            outputs=result.outputs,
            metrics=self.job.metrics,
            gates=fixed_gates(self.job, custom=False),
            forbidden_modules=user_modules(self.job, self.project_folder),
            forbidden_folder=self.project.folder,
            threads=1,
            max_batch=self.job.export.max_batch,
            int8=int8_limits(self.job),
        )
        validated: ValidateResult = decode(ValidateResult, self._call("validate", request))
        if not validated.passed:
            raise SystemExit(f"{[item for item in validated.verdicts if not item.passed]}")
        return validated

    def measure(self, validated: ValidateResult) -> MeasureResult:
        export = self.folder / "export"
        request = measure_request(
            self.job,
            [
                Timed(name=kind, format=kind, file=str(export / artifact.file))
                for kind, artifact in self.exported.artifacts.items()
                if kind not in validated.int8 or not validated.int8[kind].reason
            ],
            golden=export / GOLDEN,
            inputs=self.exported.inputs,
            serve="auto",
            project=self.project,
        )
        measured: MeasureResult = decode(MeasureResult, self._call("measure", request))
        return measured


def job_file(folder: Path, net: str, quantize: str) -> Path:
    document = {
        "name": f"net-{net}",
        "project": str(ROOT / "benchmarks/reference"),
        "model": {"factory": "nets:build_model", "args": {"net": net}},
        "data": {"factory": "nets:build_dataset", "args": {"net": net}},
        "train": {"epochs": 1, "processes": 1, "batch_size": 64, "learning_rate": 0.001, "device": "cpu", "threads": 1},
        "export": {"formats": list(FORMATS), "quantize": quantize, "threads": 1},
    }
    path = folder / f"{net}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


# ---- one process that holds all sides


def race(net: str, folder: Path, artifacts: dict[str, str]) -> None:
    """Print JSON: side to batch to CPU milliseconds of a call. artifacts: side to `format:file`."""
    import onnxruntime
    import torch
    from safetensors.torch import load_file

    from torchworker.runtimes.load import load_artifact

    sys.path.insert(0, str(ROOT / "benchmarks/reference"))
    from nets import build_dataset, build_model

    torch.set_num_threads(1)
    model = build_model(net)
    model.load_state_dict(load_file(folder / "train" / "weights.safetensors"))
    model.eval()
    samples = build_dataset("validation", net).tensors[0]
    name = "tokens" if net == "transformer" else "image"
    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"eager": model, "torch.compile": torch.compile(model)}

    by_hand = folder / "by-hand.onnx"
    program = torch.export.export(model, (samples[:4],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.onnx.export(program, f=by_hand, dynamo=True, external_data=False, verbose=False, input_names=[name])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(by_hand, options, providers=["CPUExecutionProvider"])
    sides["ONNX Runtime by hand"] = lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    for side, artifact in artifacts.items():
        kind, _, file = artifact.partition(":")
        call = load_artifact(kind, Path(file), 1)
        sides[side] = lambda x, call=call: call({name: x})[0]

    spent: dict[str, dict[int, list[float]]] = {side: {batch: [] for batch in BATCHES} for side in sides}
    with torch.no_grad():
        for batch in BATCHES:
            x = samples[:batch].contiguous()
            calls = {}
            for side, call in sides.items():
                for _ in range(5):
                    call(x)
                began = time.thread_time()
                call(x)
                calls[side] = min(max(round(ROUND_SECONDS / (time.thread_time() - began)), 2), 500)
            for number in range(ROUNDS):
                for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
                    began = time.thread_time()
                    for _ in range(calls[side]):
                        sides[side](x)
                    spent[side][batch].append((time.thread_time() - began) / calls[side])
    # Others on the machine make a round slower, never quicker.
    print(json.dumps({side: {b: 1000 * min(t) for b, t in by.items()} for side, by in spent.items()}))


Times = dict[str, dict[str, float]]
"""Milliseconds of a call, by side and batch."""


def inference(
    net: str, races: int, fork_server: ForkServer, folder: Path
) -> tuple[list[Times], dict[str, str], list[str]]:
    """What each race found, what is recommended among float formats, and a line for each int8 variant."""
    stages = Stages(fork_server, job_file(folder, net, "auto"), folder / net)
    stages.train()
    exported = stages.export()
    validated = stages.validate()
    measured = stages.measure(validated)
    print(f"{net}: {measured.serve}, {dict(exported.left_out)}", flush=True)
    told = []
    for kind, found in validated.int8.items():
        faster = measured.speedups.get(kind, {})
        shown = ", ".join(f"{times:.2f}× at batch {batch}" for batch, times in faster.items())
        why = found.reason or measured.too_slow.get(kind, "")
        told.append(f"{NAMES[net]}, `{kind}`: {found.sqnr_db:.0f} dB, {shown or 'not timed'}; {why or 'kept'}")
    export = folder / net / "export"
    artifacts = {kind: f"{kind}:{export / item.file}" for kind, item in exported.artifacts.items()}
    kept = {kind: place for kind, place in artifacts.items() if kind in FORMATS}
    chosen = {
        "latency": min(kept, key=lambda kind: measured.measured[kind].speeds[0].thread_ms),
        "throughput": min(kept, key=lambda kind: measured.measured[kind].speeds[-1].thread_ms),
    }
    best8 = {purpose: kind for purpose, kind in measured.serve.items() if kind not in FORMATS}
    raced = {**{kind: kept[kind] for kind in dict.fromkeys(chosen.values())}}
    raced |= {kind: artifacts[kind] for kind in dict.fromkeys(best8.values())}
    argv = [sys.executable, __file__, "--race", net, str(folder / net), json.dumps(raced)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found: list[Times] = []
    for _ in range(races):
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found, {**chosen, **{f"int8 {p}": k for p, k in best8.items()}}, told


def against_best(spent: Mapping[str, float], mine: str) -> float:
    """Speed of a side, as a part of that of the quickest of eager and the peers."""
    return min(spent[side] for side in ("eager", *PEERS)) / spent[mine]


def table(results: dict[str, tuple[list[Times], dict[str, str], list[str]]]) -> str:
    """Speed against eager, of the quickest round of all races; the last column but one has to be 0.97."""
    lines = [
        "| net | batch | eager, ms | torch.compile | ONNX Runtime by hand | recommended (float) | **÷ best peer** "
        "| with int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for net, (races, chosen, _) in results.items():
        for batch, purpose in ((1, "latency"), (64, "throughput")):
            alone = [{side: by[str(batch)] for side, by in times.items()} for times in races]
            spent = {side: min(times[side] for times in alone) for side in alone[0]}
            speed = {side: spent["eager"] / value for side, value in spent.items()}
            mine = chosen[purpose]
            ratios = [against_best(times, mine) for times in alone]
            int8 = chosen.get(f"int8 {purpose}")
            shown8 = f"{speed[int8]:.2f} ({int8})" if int8 else "none faster"
            lines.append(
                f"| {NAMES[net]} | {batch} | {spent['eager']:.3g} | {speed['torch.compile']:.2f} | "
                f"{speed['ONNX Runtime by hand']:.2f} | {speed[mine]:.2f} ({mine}) | "
                f"**{against_best(spent, mine):.2f}** ({min(ratios):.2f}–{max(ratios):.2f}) | "
                f"{shown8} |"
            )
    return "\n".join(lines)


# ---- export and validate of digits


def by_hand(folder: Path) -> dict[str, float]:
    """Seconds and CPU seconds of export and validate in benchmarks/by_hand/ship.py, its imports left out."""
    code = (
        "import json, sys, time, warnings; from pathlib import Path; warnings.simplefilter('ignore')\n"
        # Before the working folder, which has a package of that name.
        "sys.path.insert(0, sys.argv[3])\n"
        "import ship, torch; from safetensors.torch import load_file; torch.set_num_threads(1)\n"
        "out = Path(sys.argv[1]); model = ship.build_model(**ship.MODEL)\n"
        "model.load_state_dict(load_file(sys.argv[2])); model.eval()\n"
        "images, labels = ship.build_dataset('validation').tensors; ship.MINIMUM_ACCURACY = 0.0\n"
        "wall, cpu = time.perf_counter(), time.process_time()\n"
        "ship.export(model, images, out); middle = time.perf_counter(); ship.validate(model, images, labels, out)\n"
        "print(json.dumps({'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}))"
    )
    folder.mkdir(parents=True, exist_ok=True)
    weights = str(folder.parent / "digits/train/weights.safetensors")
    argv = [sys.executable, "-c", code, str(folder), weights, str(ROOT / "benchmarks/by_hand")]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cpu_of(fork_server: ForkServer) -> float:
    """CPU seconds of all stages that have ended."""
    times = psutil.Process(fork_server.pid).cpu_times()
    return float(times.children_user + times.children_system)


def digits(rounds: int, fork_server: ForkServer, folder: Path) -> str:
    """Ours and by hand, alternately."""
    first = Stages(fork_server, ROOT / "examples/digits/job.yaml", folder / "digits")
    first.train()
    rows, walls, cpus = [], [], []
    for number in range(rounds):
        stages = Stages(fork_server, ROOT / "examples/digits/job.yaml", folder / f"digits-{number}")
        trained = stages.folder / "train"
        trained.rmdir()
        trained.symlink_to(folder / "digits/train")
        wall, cpu = time.perf_counter(), cpu_of(fork_server)
        stages.export()
        validated = stages.validate()
        stages.measure(validated)
        mine = {"wall": time.perf_counter() - wall, "cpu": cpu_of(fork_server) - cpu}
        theirs = by_hand(folder / f"by-hand-{number}")
        walls.append(mine["wall"] / theirs["wall"])
        cpus.append(mine["cpu"] / theirs["cpu"])
        rows.append(
            f"| {number + 1} | {mine['wall']:.1f} | {theirs['wall']:.1f} | {walls[-1]:.2f} | {mine['cpu']:.1f} | "
            f"{theirs['cpu']:.1f} | {cpus[-1]:.2f} |"
        )
    head = ["| round | ours, s | by hand, s | ratio | ours, CPU s | by hand, CPU s | CPU ratio |", "|---" * 7 + "|"]
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    ends = f"**Median ratio, ours to by hand: {wall:.2f} in wall clock, {cpu:.2f} in CPU time.**"
    return "\n".join([*head, *rows, "", ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--races", type=int, default=3, help="processes that hold all sides")
    parser.add_argument("--digits", type=int, default=3, help="rounds of export and validate; 0 leaves them out")
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    parser.add_argument("--race", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.race:
        net, folder, artifacts = options.race
        race(net, Path(folder), json.loads(artifacts))
        return
    sections = ["## Inference", ""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork_server = ForkServer(folder / "host.log")
        try:
            results = {net: inference(net, options.races, fork_server, folder) for net in options.nets}
            print(table(results), flush=True)
            told = digits(options.digits, fork_server, folder) if options.digits else ""
        finally:
            fork_server.close()
    sections += [
        f"{machine('torch', 'onnxruntime')} Measured with `make bench-inference`: speed against eager with no_grad, "
        "above 1 is faster; CPU time of the calling thread, one thread, all sides in one process by turns, "
        f"{ROUNDS} rounds of {1000 * ROUND_SECONDS:.0f} ms, the quickest round of {options.races} processes; in "
        "brackets what single processes found. "
        f"Recommended is what `export.serve: auto` chooses among {', '.join(FORMATS)}; wanted: 0.97 of the best of "
        "eager and both peers. int8 only where it passed every limit of `export.quantize: auto`.",
        "",
        table(results),
        "",
        "int8 variants, as the report of a run shows them:",
        "",
        *(f"- {line}" for _, _, lines in results.values() for line in lines),
    ]
    if told:
        sections += [
            "",
            "### Export and validate of digits against the same by hand",
            "",
            "The functions `export` and `validate` of [by_hand/ship.py](../benchmarks/by_hand/ship.py), imports left "
            "out on both sides. Ours also makes float64 references and about 20 probes, asks each format all of them "
            "in processes of their own, and measures speed, load time and memory.",
            "",
            told,
        ]
    text = "\n".join(sections)
    print(f"\n{text}")
    write(options.write, "inference", text)


if __name__ == "__main__":
    main()
