"""One process that imports torch once and forks a fresh child for every stage.

Importing torch costs seconds of CPU and a flow needs about seven processes that have it; scikit-learn or pandas cost
one more, in inspection, in every rank and in the export. Each stage is still a process of its own: the server never
imports user code, never starts threads of its own and never touches a GPU, so what is forked is a clean interpreter
with torch in it, and what process/first_imports.py finds safe to share.

Protocol, one JSON object a line. On standard input:
    {"id": 1, "stage": "train", "request": "/…/request.json", "log": "/…/train.log", "env": {…}}    start a child
    {"kill": 1}                                                                          end it and its children
On standard output:
    {"ready": true}                  torch is imported
    {"id": 1, "pid": 4711}           the child was started
    {"id": 1, "status": 0, "cpu": 2.5}    the child ended; negative is a signal; CPU seconds of it and its children
End of input means that the parent is gone: everything is killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import sys
from pathlib import Path
from typing import Any

from torchworker.process.first_imports import first_imports, forget_hidden, hidden
from torchworker.process.lifeline import adopt_orphans, descendants, die_with_parent
from torchworker.process.shown_warnings import keep_warnings

EXPORTER = ("onnx", "onnxscript", "onnx_ir", "ml_dtypes", "google")
"""Packages that come along with the exporter to ONNX."""


def _preload() -> None:
    # What stays for good need not be looked through, neither now nor by the collector of any child, which would copy
    # the pages it marks.
    gc.disable()
    import torch

    # DistributedDataParallel and torch.export both import it, in every process that uses them: 1.4 s of CPU.
    import torch._dynamo

    # Of which every rank writes a checkpoint at its end.
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.launcher.api
    import torch.export
    import torch.utils.data  # noqa: F401

    from torchworker.stage import STAGES

    checkpoint = "torch.distributed.checkpoint._fsspec_filesystem"
    for name in (checkpoint, *(f"torchworker.stages.{stage}" for stage in STAGES)):
        # The one is a private name. Of a stage whose packages this environment lacks, its own process says so.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()


def _preload_exporters(request: str) -> None:
    """What artifacts are written and read with."""
    from torchworker.runtimes.load import import_archive_reader, import_onnx_exporter

    import_archive_reader()
    # The stage that reads it says what is wrong with it.
    with contextlib.suppress(Exception):
        asked = json.loads(Path(request).read_bytes())
        # They cannot be imported twice, so a project's own ones could not be had any more.
        if "onnx" in asked.get("formats", ()) and not hidden(asked, EXPORTER):
            import_onnx_exporter()
    gc.freeze()


def _preload_reader(request: str) -> None:
    """What artifacts are read with, where none is written."""
    from torchworker.runtimes.load import import_archive_reader

    with contextlib.suppress(Exception):
        if any(kind.startswith("pt2") for kind in json.loads(Path(request).read_bytes())["formats"]):
            import_archive_reader()
    gc.freeze()


def _preload_packages(request: str) -> None:
    """What the project's modules begin with, where it is safe to share: each stage and each rank would import it."""
    # The stage that reads or imports it says what is wrong with it.
    with contextlib.suppress(Exception):
        for module in first_imports(json.loads(Path(request).read_bytes())):
            importlib.import_module(module)
    gc.freeze()


def _child(job: dict[str, Any], parent: int) -> None:
    """Never returns."""
    status = 70
    try:
        die_with_parent(parent)
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 256)
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115, PTH123
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Of this stage only: others may load what somebody else has made.
        os.environ.update(job.get("env", {}))
        gc.enable()
        keep_warnings(Path(job["log"]).parent)
        from torchworker.stage import run_stage

        with contextlib.suppress(OSError, ValueError):
            forget_hidden(json.loads(Path(job["request"]).read_bytes()))
        status = run_stage(job["stage"], job["request"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        # Not sys.exit: exit handlers registered before the fork belong to the server.
        os._exit(status)


def _kill_everything() -> None:
    # Twice: a process may have forked between the listing and the signal.
    for _ in range(2):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class _ForkServer:
    def __init__(self, replies: int) -> None:
        self._replies = replies
        self._running: dict[int, int] = {}
        self._orphans = 0.0
        """CPU seconds of processes that outlived the stage which started them, and are not reported yet."""

    def say(self, message: dict[str, Any]) -> None:
        os.write(self._replies, (json.dumps(message) + "\n").encode())

    def start(self, job: dict[str, Any]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _child(job, parent)
        self._running[pid] = job["id"]
        self.say({"id": job["id"], "pid": pid})

    def kill(self, job_id: int) -> None:
        for pid, running in self._running.items():
            if running == job_id:
                # The child leads its own session, so its group is it and its ranks.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        while True:
            try:
                # Usage includes the children that it waited for, and theirs.
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            cpu = usage.ru_utime + usage.ru_stime
            if pid not in self._running:
                self._orphans += cpu
            else:
                # What a stage leaves behind in its group ends with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                cpu, self._orphans = cpu + self._orphans, 0.0
                self.say({"id": self._running.pop(pid), "status": os.waitstatus_to_exitcode(status), "cpu": cpu})


def main() -> None:
    """Serve until standard input ends."""
    # The protocol keeps the original standard output; a stray print goes to the log.
    replies = os.dup(1)
    os.dup2(2, 1)
    adopt_orphans()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    _preload()
    server = _ForkServer(replies)
    server.say({"ready": True})

    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    pending = b""
    try:
        while True:
            for key, _ in selector.select():
                if key.fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    server.reap()
                    continue
                chunk = os.read(0, 65536)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    job = json.loads(line)
                    if "request" in job:
                        _preload_packages(job["request"])
                    if job.get("stage") == "export":
                        # Without a training before it: each of its forks, and the clean room's, would import it.
                        _preload_exporters(job["request"])
                    if job.get("stage") == "validate":
                        # A clean room of its own: else this stage, the next two and each of their forks would.
                        _preload_reader(job["request"])
                    server.kill(job["kill"]) if "kill" in job else server.start(job)
                    if job.get("stage") == "train":
                        # Ranks do not wait for it, and the six processes that come after them have it.
                        _preload_exporters(job["request"])
    finally:
        _kill_everything()


if __name__ == "__main__":
    main()
    # Taking the interpreter apart would cost another second, in which whoever closed our input waits.
    os._exit(0)
