"""Training on one GPU: what works there, how fast it is beside a plain script, and whether a resumed run is the same.

    python benchmarks/gpu.py [--only checks|ways|script] [--rounds 3]

Needs a CUDA device. Writes the results into docs/gpu.md, and exits with 1 when a check failed. Nothing depends on it:
the tests of the same code run on CPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from report import ROOT, machine, write
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT))

from tests.support.projects import NAN, NAN_TRAIN, STATEFUL, STATEFUL_TRAIN, write_project
from tests.support.worker_stages import WorkerStages
from torchworker.contract import TrainResult
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer

PAGE = ROOT / "docs/gpu.md"
BY_HAND = ROOT / "benchmarks/by_hand/gpu_train.py"
EPOCHS, STEPS = 2, 40
NETS = {"tokens": 64, "reference": 512}
"""Batch of each: a transformer of 86 million parameters, and the convolutional net of the other benchmarks."""
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16, fused Adam": {"precision": "bf16", "fused": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, channels last, cuDNN chooses": {"precision": "bf16", "channels_last": True, "cudnn_benchmark": True},
    "bf16, gradients in bf16": {"precision": "bf16", "comm_hook": "bf16"},
    "bf16, FSDP": {"precision": "bf16", "strategy": "fsdp"},
}
FORMATS = ("torchscript", "onnx", "pt2")
EXAMPLES = ("digits", "audio", "sequence", "tabular", "translate", "own_loop", "lightning")
MISTAKES: dict[str, dict[str, Any]] = {
    "more processes than GPUs": {"processes": torch.cuda.device_count() + 1},
    "a bf16 hook over gloo": {"comm_hook": "bf16", "backend": "gloo"},
}


@contextmanager
def opened(job: dict[str, Any] | Path) -> Iterator[WorkerStages]:
    """The stages of a job, in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = job if isinstance(job, Path) else folder / "job.yaml"
        sharded = False
        if isinstance(job, dict):
            # A job asks for two processes at least; on one GPU the same code shards over itself.
            sharded = job["train"].get("strategy") == "fsdp"
            train = {key: value for key, value in job["train"].items() if key != "strategy"}
            path.write_text(yaml.safe_dump({**job, "train": train}))
        fork_server = ForkServer(folder / "host.log")
        try:
            stages = WorkerStages(fork_server, path, folder / "run")
            if sharded:
                stages.job = stages.job.model_copy(
                    update={"train": stages.job.train.model_copy(update={"strategy": "fsdp"})}
                )
            yield stages
        finally:
            fork_server.close()


def reference_job(net: str, **train: Any) -> dict[str, Any]:
    return {
        "name": net,
        "project": str(ROOT / "benchmarks/reference"),
        "model": {"factory": f"{net}:build_model"},
        "data": {"factory": f"{net}:build_dataset", "args": {"samples": STEPS * NETS[net]}},
        "train": {
            "epochs": EPOCHS, "processes": 1, "batch_size": NETS[net], "device": "cuda", "learning_rate": 1e-4, **train,
        },
    }  # fmt: skip


def ours(net: str, **train: Any) -> tuple[TrainResult, list[dict[str, Any]]]:
    """The built-in loop: its result and its epochs' events."""
    with opened(reference_job(net, **train)) as stages:
        result = stages.train()
        lines = (stages.folder / "train/events.jsonl").read_text().splitlines()
    return result, [event for line in lines if (event := json.loads(line))["event"] == "epoch"]


def by_hand(net: str, precision: str, read: bool) -> float:
    """The plain script: seconds of its last epoch."""
    options = {
        "module": net, "samples": STEPS * NETS[net], "epochs": EPOCHS, "batch": NETS[net], "precision": precision,
        "read": read,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(BY_HAND)]
    done = subprocess.run([*command, json.dumps(options)], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])[-1])


# ---- does it work


def trained_exported_proved(job: Path | dict[str, Any]) -> str:
    """Train on the GPU, export and hold the artifacts against the model on the CPU."""
    with opened(job) as stages:
        result = stages.train()
        where = result.environment["device"]
        assert where == "cuda", f"trained on {where}"
        chosen = stages.job.export.formats
        stages.export(*(FORMATS if chosen == "auto" else chosen))
        proved = stages.validate()
    failed = [f"{one.format} {one.gate}" for one in proved.verdicts if one.ran and not one.passed]
    assert not failed, f"failed: {', '.join(failed)}"
    last = result.history[-1]
    quality = [
        f"{name.removeprefix('validation_')} {last[name]:.4g}" for name in last if name.startswith("validation_")
    ]
    gates = sum(one.ran for one in proved.verdicts)
    return f"{', '.join(quality)}; {gates} of {gates} gates passed: {', '.join(sorted(proved.metrics))}"


def example(name: str) -> Callable[[], str]:
    def check() -> str:
        source = ROOT / "examples" / name / "job.yaml"
        job = yaml.safe_load(source.read_text())
        job["train"]["processes"] = 1
        job["project"] = str(source.parent)
        return trained_exported_proved(job)

    return check


def sharded() -> str:
    return trained_exported_proved(reference_job("reference", strategy="fsdp", precision="bf16"))


def mistake(train: dict[str, Any]) -> Callable[[], str]:
    def check() -> str:
        try:
            ours("reference", **train)
        except JobError as error:
            return str(error).splitlines()[0]
        raise AssertionError("it was accepted")

    return check


def weights_of(folder: Path, dies: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Trains a small net with everything that has state; its rank is killed in its call number `dies`."""
    train = {**STATEFUL_TRAIN, "processes": 1, "device": "cuda"}
    model = {"factory": "plain:build_model", "args": {"dies": dies}}
    job = write_project(folder, extra=STATEFUL, train=train, model=model)
    with opened(job) as stages:
        result = stages.train()
        return load_file(stages.folder / "train/weights.safetensors"), list(result.notes)


def killed() -> str:
    with tempfile.TemporaryDirectory() as name:
        whole, _ = weights_of(Path(name) / "whole", 0)
        again, _ = weights_of(Path(name) / "again", 0)
        resumed, notes = weights_of(Path(name) / "killed", 15)

    def furthest(one: dict[str, torch.Tensor]) -> float:
        return max(float((one[key].double() - whole[key].double()).abs().max()) for key in whole)

    assert any("resumed from step" in note for note in notes), notes
    assert furthest(resumed) < 1e-4, f"off by {furthest(resumed)}"
    said = [note for note in notes if "resumed" in note]
    return (
        f"{said[0]}; largest difference of a weight to the run that was not killed {furthest(resumed):.1g}, "
        f"between two runs that were not {furthest(again):.1g}"
    )


def nan() -> str:
    with tempfile.TemporaryDirectory() as name:
        job = write_project(Path(name), extra=NAN, train={**NAN_TRAIN, "processes": 1, "device": "cuda"})
        with opened(job) as stages:
            try:
                stages.train()
            except JobError as error:
                said = str(error).splitlines()[0]
                assert "loss became nan at epoch 1, step 3 of 9" in said, said
                return said
    raise AssertionError("it was not noticed")


CHECKS: dict[str, Callable[[], str]] = {
    **{f"example `{name}`": example(name) for name in EXAMPLES},
    "FSDP2 in bf16": sharded,
    "killed by SIGKILL while training": killed,
    "a loss that becomes NaN": nan,
    **{name: mistake(train) for name, train in MISTAKES.items()},
}


def checks() -> tuple[str, bool]:
    """Several at a time: nothing is timed here."""

    def tried(check: Callable[[], str]) -> tuple[bool, str]:
        try:
            return True, check()
        except Exception as error:
            traceback.print_exc()
            return False, f"{type(error).__name__}: {error}".splitlines()[0]

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(CHECKS, pool.map(tried, CHECKS.values()), strict=True))
    rows = [f"| {name} | {'yes' if held else '**no**'} | {said} |" for name, (held, said) in found.items()]
    text = "\n".join(["| | holds | what was seen |", "|---|---|---|", *rows])
    return text, all(held for held, _ in found.values())


# ---- how fast is it


def ways() -> tuple[str, bool]:
    lines = [
        "| net | way | samples a second | ÷ float32 | memory, GB | loss held out |",
        "|---|---|---|---|---|---|",
    ]
    good = True
    for net in NETS:
        base = 0.0
        for way, train in WAYS.items():
            if "channels" in way and net == "tokens":
                continue
            try:
                _, epochs = ours(net, **train)
            except Exception as error:
                good = False
                lines.append(f"| {net} | {way} | failed: {str(error).splitlines()[0]} | | | |")
                continue
            last = epochs[-1]
            base = base or last["samples_per_second"]
            lines.append(
                f"| {net} | {way} | {last['samples_per_second']:,.0f} | {last['samples_per_second'] / base:.2f} "
                f"| {last['memory_bytes'] / 1e9:.2f} | {last['validation_loss']:.4f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines), good


def script(rounds: int) -> tuple[str, bool]:
    lines = [
        "| net | precision | loop, s an epoch | script that reads the loss on every step | script that reads it once "
        "an epoch | speed ÷ the first | **÷ the second** |",
        "|---|---|---|---|---|---|---|",
    ]
    for net in NETS:
        for precision in ("float32", "bf16"):
            took: list[tuple[float, float, float]] = []
            for _ in range(rounds):
                loop = ours(net, precision=precision)[1][-1]["seconds"]
                took.append((loop, by_hand(net, precision, True), by_hand(net, precision, False)))
            loop, reads, waits = (statistics.median(side) for side in zip(*took, strict=True))
            lines.append(
                f"| {net} | {precision} | {loop:.3f} | {reads:.3f} | {waits:.3f} "
                f"| {statistics.median(b / a for a, b, _ in took):.2f} "
                f"| **{statistics.median(c / a for a, _, c in took):.2f}** |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["checks", "ways", "script"])
    parser.add_argument("--rounds", type=int, default=3, help="of the loop beside the script")
    parser.add_argument("--write", type=Path, default=PAGE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks/gpu.py: expected a CUDA device, torch {torch.__version__} found none")
    where = f"{machine('torch')} {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}."
    good = True
    for name, section in (("checks", checks), ("ways", ways), ("script", lambda: script(options.rounds))):
        if options.only not in (None, name):
            continue
        began = time.monotonic()
        text, held = section()
        good &= held
        print(f"{text}\n{name}: {time.monotonic() - began:.0f} s", flush=True)
        write(options.write, name, f"{where}\n\n{text}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
