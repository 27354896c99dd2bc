"""How large a model may be: peak memory and peak disk of a run's stages, in multiples of the weights.

    python benchmarks/size.py [--millions 100 400 1200] [--formats onnx pt2 torchscript] [--write docs/benchmarks.md]

One process trains (SGD, two steps; of the largest model the head alone), then one format at a time is exported, proven,
made a release, published to a Ceph RGW and downloaded from it again. Memory is the largest sum of
the PSS of all processes of ours (pages that several share count once), looked at three times a second, and of it what
no file backs (anonymous): pages of files can be dropped when memory is short. The store is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from report import PAGE, ROOT, machine, write

sys.path.insert(0, str(ROOT))

from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY, RgwServer
from tests.support.ports import free_port
from torchworker.contract import GOLDEN, WEIGHTS, ExportResult, TrainRequest, ValidateResult, decode, read_with
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.tasks.requests import export_request, project_of, train_settings, validate_request
from train_and_ship.tasks.worker import call_worker

FORMATS = ("onnx", "pt2", "torchscript")
LARGE = 1000
"""Millions of parameters from which on the body is frozen: its gradients would be as large again."""


@dataclass
class Peak:
    """The most that was used since it was last set back."""

    memory: int = 0
    anonymous: int = 0
    disk: int = 0
    began: float = field(default_factory=time.monotonic)


class Watch:
    """Looks at the processes of a tree and at a folder until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._over, self._process = folder, threading.Event(), psutil.Process()
        self.peak, self._left_out = Peak(), frozenset[int]()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def leave_out_children(self) -> None:
        """Those that there are now are the store's."""
        self._left_out = frozenset(child.pid for child in self._process.children(recursive=True))

    def next(self) -> Peak:
        """The peak until now; another one begins."""
        found, self.peak = self.peak, Peak()
        return found

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            peak = self.peak
            pids = [self._process.pid, *(child.pid for child in self._process.children(recursive=True))]
            used = [_memory(pid) for pid in pids if pid not in self._left_out]
            peak.memory = max(peak.memory, sum(whole for whole, _ in used))
            peak.anonymous = max(peak.anonymous, sum(anonymous for _, anonymous in used))
            peak.disk = max(peak.disk, _disk(self._folder))


def _memory(pid: int) -> tuple[int, int]:
    """PSS of a process, and what of it is anonymous."""
    found = {"Pss:": 0, "Pss_Anon:": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if (name := line.split()[0]) in found:
                found[name] = 1024 * int(line.split()[1])
    return found["Pss:"], found["Pss_Anon:"]


def _disk(folder: Path) -> int:
    """Bytes that files take, each once however many names it has."""
    seen: dict[int, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            seen[status.st_ino] = 512 * status.st_blocks
    return sum(seen.values())


@contextlib.contextmanager
def local_store(folder: Path, watch: Watch) -> Iterator[ObjectStore]:
    """A Ceph RGW, which keeps what it has on the disk; the server of the local stack keeps uploads in memory."""
    server = RgwServer(folder, free_port())
    try:
        server.start()
        watch.leave_out_children()
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_REGION": "us-east-1", "SHIP_BUCKET": "size"}
        os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        store = ObjectStore.from_settings(Settings.load())
        store.create_bucket_if_missing()
        store.probe()
        yield store
    finally:
        server.kill()


def job_file(folder: Path, millions: int, kind: str) -> Path:
    document = {
        "name": "sized",
        "project": str(ROOT / "benchmarks/reference"),
        "model": {"factory": "sized:build_model", "args": {"millions": millions}},
        "data": {"factory": "sized:build_dataset"},
        "train": {
            "epochs": 1, "processes": 1, "batch_size": 8, "learning_rate": 0.001, "device": "cpu", "threads": 2,
            "optimizer": "sgd", **({"freeze": ["enter.*", "blocks.*"]} if millions >= LARGE else {}),
        },
        "export": {"formats": [kind], "batch": 4, "max_batch": 8, "serve": "none"},
        "parity": {"cpp": "off"},
    }  # fmt: skip
    path = folder / f"{millions}-{kind}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Run:
    """The stages of one model and format, and the peaks of each."""

    def __init__(self, folder: Path, millions: int, kind: str, fork_server: ForkServer, watch: Watch) -> None:
        self._server, self._watch, self.folder = fork_server, watch, folder
        folder.mkdir()
        self.job, project_folder = load_job(job_file(folder, millions, kind))
        self.project = project_of(self.job, project_folder)
        self.peaks: dict[str, Peak] = {}
        self.seconds: dict[str, float] = {}

    def whole(self, store: ObjectStore) -> int:
        """All of it; bytes of the weights."""
        self._watch.next()
        train, export = self._made("train"), self._made("export")
        weights = train / WEIGHTS
        trained = TrainRequest(
            project=self.project, train=train_settings(self.job), folder=str(train),
            checkpoints=str(self.folder / "checkpoints"),
        )  # fmt: skip
        self._ask("train", trained, train)
        request = export_request(self.job, self.project, export, weights=str(weights))
        exported = decode(ExportResult, self._ask("export", request, export))
        validate = self._made("validate")
        asked = validate_request(self.job, self.project, export, exported, validate)
        asked = dataclasses.replace(asked, weights=str(weights))
        validated: ValidateResult = decode(ValidateResult, self._ask("validate", asked, validate))
        if not validated.passed:
            sys.exit(f"{[item for item in validated.verdicts if not item.passed]}")
        began = time.perf_counter()
        release = self._made("release")
        there = {path.name for path in export.iterdir()}
        files = [name for artifact in exported.artifacts.values() for name in read_with(artifact.file, there)]
        for path in (weights, *(export / name for name in (*files, GOLDEN))):
            os.link(path, release / path.name)
        formats = {kind: artifact.file for kind, artifact in exported.artifacts.items()}
        manifest = build_manifest(release, model="sized", formats=formats, signature={}, metrics={})
        publish(store, release, manifest)
        self._note("publish", began)
        began = time.perf_counter()
        copy = self.folder / "copy"
        fetch_release(store, "sized", manifest.release, copy, manifest_sha256=manifest.sha256())
        self._note("download", began)
        return weights.stat().st_size

    def _made(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def _ask(self, stage: str, request: Any, folder: Path) -> Any:
        began = time.perf_counter()
        found = asyncio.run(call_worker(self._server, stage, request, folder))
        self._note(stage, began)
        return found

    def _note(self, stage: str, began: float) -> None:
        self.seconds[stage] = time.perf_counter() - began
        self.peaks[stage] = self._watch.next()


def row(millions: int, kind: str, run: Run, weights: int) -> str:
    """Of the table, and of the terminal."""
    cells = []
    for stage in ("train", "export", "validate", "publish"):
        peak = run.peaks[stage]
        cells.append(f"{peak.memory / weights:.1f} ({peak.anonymous / weights:.1f})")
    disk = [f"{max(run.peaks[stage].disk for stage in stages) / weights:.1f}" for stages in (
        ("train",), ("export", "validate"), ("publish",), ("download",))]  # fmt: skip
    most = max(peak.memory for peak in run.peaks.values()) / 1e9
    seconds = sum(run.seconds.values())
    head = f"| {millions} million | {weights / 1e9:.2f} | {kind} "
    return f"{head}| {' | '.join(cells)} | {most:.1f} | {' | '.join(disk)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="*", default=[100, 400, 600, 1200])
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    head = (
        "| parameters | weights, GB | format | train | export | validate | publish | peak, GB "
        "| disk: trained | exported | published | downloaded | seconds |"
    )
    rows = [head, "|---" * 13 + "|"]
    print("\n".join(rows), flush=True)
    with tempfile.TemporaryDirectory(dir=os.environ.get("SIZE_FOLDER")) as name:
        folder = Path(name)
        watch = Watch(folder)
        try:
            for millions in options.millions:
                for kind in options.formats:
                    (folder / "store").mkdir()
                    with local_store(folder / "store", watch) as store:
                        fork_server = ForkServer(folder / "host.log")
                        try:
                            run = Run(folder / "run", millions, kind, fork_server, watch)
                            rows.append(row(millions, kind, run, run.whole(store)))
                        finally:
                            fork_server.close()
                    print(rows[-1], flush=True)
                    for one in ("run", "store"):
                        shutil.rmtree(folder / one)
        finally:
            watch.close()
    text = "\n".join(
        [
            "## How large a model may be",
            "",
            f"{machine('torch', 'onnxruntime')} Measured with `make bench-size`: transformers with random float32 "
            "weights, one process, SGD, two steps of 8 samples, of 1,200 million parameters the head alone; 16 "
            "held-out samples of 4 tokens, one format at a time. Memory is that of all processes of ours together, in "
            "multiples of the weights, in brackets what no file backs (the rest is pages of files, which the system "
            "can drop); disk is what all files take, in the same multiples, the bucket, a Ceph RGW on the same disk, "
            "among them from `published` on.",
            "",
            *rows,
        ]
    )
    write(options.write, "size", text)


if __name__ == "__main__":
    main()
