"""Export and validation of a transformer of 99 million parameters against the same by hand: CPU time and peak memory.

    python benchmarks/large.py [--rounds 3] [--formats torchscript onnx pt2] [--write docs/benchmarks.md]

Ours and by hand take turns, each in processes of its own. CPU time is that of all of them, user and system; memory is
the largest sum of their PSS (pages that several processes share count once), looked at three times a second.
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
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from report import PAGE, ROOT, machine, write

from torchworker.contract import ExportResult, TrainRequest, ValidateResult, decode
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import export_request, project_of, train_settings, validate_request
from train_and_ship.tasks.worker import call_worker

FORMATS = ("torchscript", "onnx", "pt2")
NETS = ROOT / "benchmarks/reference"


class PeakMemory:
    """The largest sum of PSS of a process and its descendants while the block runs, and how much at its beginning."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.first = self.peak = self._now()

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        return sum(map(_pss, [self._process.pid, *(child.pid for child in self._process.children(recursive=True))]))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def job_file(folder: Path, formats: list[str]) -> Path:
    document = {
        "name": "net-large",
        "project": str(NETS),
        "model": {"factory": "nets:build_model", "args": {"net": "large"}},
        "data": {"factory": "nets:build_dataset", "args": {"net": "large"}},
        "train": {
            "epochs": 1, "processes": 1, "batch_size": 16, "learning_rate": 0.001, "device": "cpu", "threads": 1,
            "optimizer": {"factory": "torch.optim:SGD"},
        },
        "export": {"formats": formats, "batch": 16, "threads": 1},
    }  # fmt: skip
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Ours:
    """The stages of the job, without Prefect, on a host that runs already."""

    def __init__(self, fork_server: ForkServer, job_file: Path, folder: Path) -> None:
        self._server, self._folder = fork_server, folder
        self._job, project_folder = load_job(job_file)
        self._project = project_of(self._job, project_folder)

    def train(self) -> None:
        request = TrainRequest(
            project=self._project, train=train_settings(self._job), folder=str(self._made("train")),
            checkpoints=str(self._folder / "checkpoints"),
        )  # fmt: skip
        self._call("train", request)

    def export_and_validate(self, number: int) -> dict[str, float]:
        """CPU seconds and bytes of both stages."""
        found: dict[str, float] = {}
        weights = str(self._folder / "train" / "weights.safetensors")
        export = self._made(f"export{number}")
        with PeakMemory(self._server.pid) as memory:
            before = self._cpu()
            request = export_request(self._job, self._project, export, weights=weights)
            exported = decode(ExportResult, self._call("export", request, export))
            found["export cpu"], before = self._cpu() - before, self._cpu()
            found["export peak"] = memory.peak
            validate = self._made(f"validate{number}")
            asked = validate_request(self._job, self._project, export, exported, validate)
            result = decode(ValidateResult, self._call("validate", replace(asked, weights=weights), validate))
            found["validate cpu"] = self._cpu() - before
        if not result.passed:
            raise SystemExit(f"{[item for item in result.verdicts if not item.passed]}")
        return found | {"cpu": found["export cpu"] + found["validate cpu"], "peak": memory.peak - memory.first}

    def _made(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir(parents=True)
        return folder

    def _cpu(self) -> float:
        times = psutil.Process(self._server.pid).cpu_times()
        return float(times.children_user + times.children_system)

    def _call(self, stage: str, request: Any, folder: Path | None = None) -> Any:
        return asyncio.run(call_worker(self._server, stage, request, folder or self._folder / stage))


BY_HAND = """
import json, resource, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[3])
import onnx, onnxruntime, torch
from safetensors.torch import load_file
from nets import build_dataset, build_model
formats = sys.argv[4].split(",")
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
began = time.process_time()
out = Path(sys.argv[1])
out.mkdir(parents=True)
model = build_model("large")
model.load_state_dict(load_file(sys.argv[2]))
model.eval()
tokens, labels = build_dataset("validation", "large").tensors
program = torch.export.export(model, (tokens[:16],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
if "torchscript" in formats:
    torch.jit.script(model).save(out / "model.pt")
if "pt2" in formats:
    torch.export.save(program, out / "model.pt2")
if "onnx" in formats:
    torch.onnx.export(program, f=out / "model.onnx", dynamo=True, external_data=False, verbose=False)
def onnx_model():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
loads = {"torchscript": lambda: torch.jit.load(out / "model.pt"), "onnx": onnx_model,
         "pt2": lambda: torch.export.load(out / "model.pt2").module()}
with torch.no_grad():
    for kind in formats:
        run = loads[kind]()
        for size in (1, 16, 33):
            torch.testing.assert_close(run(tokens[:size]), model(tokens[:size]), rtol=1e-3, atol=1e-4)
        right = sum(int((run(x).argmax(1) == y).sum()) for x, y in zip(tokens.split(16), labels.split(16)))
print(json.dumps({"cpu": time.process_time() - began}))
"""


def by_hand(folder: Path, weights: str, formats: list[str]) -> dict[str, float]:
    """CPU seconds and bytes of a plain script, its imports left out."""
    argv = [sys.executable, "-c", BY_HAND, str(folder), weights, str(NETS), ",".join(formats)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with PeakMemory(process.pid) as memory:
            process.stdin.write("\n")
            process.stdin.close()
            said = process.stdout.read()
    found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return found | {"peak": memory.peak - memory.first}


def table(rows: list[tuple[Mapping[str, float], Mapping[str, float]]], weights: int) -> str:
    lines = [
        "| round | export, CPU s | validate, CPU s | by hand, CPU s | **÷ by hand** | peak ÷ weights | by hand, peak ÷ "
        "weights |",
        "|---" * 7 + "|",
    ]
    for number, (mine, theirs) in enumerate(rows):
        lines.append(
            f"| {number + 1} | {mine['export cpu']:.1f} | {mine['validate cpu']:.1f} | {theirs['cpu']:.1f} | "
            f"{mine['cpu'] / theirs['cpu']:.2f} | {mine['peak'] / weights:.1f} | {theirs['peak'] / weights:.1f} |"
        )
    ratio = statistics.median(mine["cpu"] / theirs["cpu"] for mine, theirs in rows)
    peak = statistics.median(mine["peak"] / weights for mine, _ in rows)
    return "\n".join(
        [*lines, "", f"**Median: {ratio:.2f} × by hand in CPU time, {peak:.1f} × the weights in memory.**"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = ForkServer(folder / "host.log")
        try:
            ours = Ours(server, job_file(folder, options.formats), folder)
            ours.train()
            weights = folder / "train" / "weights.safetensors"
            for number in range(options.rounds):
                theirs = by_hand(folder / f"by-hand{number}", str(weights), options.formats)
                print(f"by hand: {theirs}", flush=True)
                mine = ours.export_and_validate(number)
                print(f"ours: {mine}", flush=True)
                rows.append((mine, theirs))
                for made in (f"export{number}", f"by-hand{number}"):
                    for path in (folder / made).iterdir():
                        if path.is_file():
                            path.unlink()
            size = weights.stat().st_size
        finally:
            server.close()
    text = "\n".join(
        [
            "## A large model",
            "",
            f"{machine('torch', 'onnxruntime')} A transformer encoder of 99 million parameters ({size / 1e6:.0f} MB), "
            f"128 held-out samples of 16 tokens, as {', '.join(options.formats)}; measured with `python "
            "benchmarks/large.py`. By hand is a script that captures each format, compares it at three batch sizes and "
            "takes its accuracy. CPU time, user and system, of all processes; memory is the largest sum of PSS above "
            "what was there before.",
            "",
            table(rows, size),
        ]
    )
    print(f"\n{text}")
    write(options.write, "large", text)


if __name__ == "__main__":
    main()
