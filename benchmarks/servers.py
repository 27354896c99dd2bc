"""Servers that benchmarks/serving.py holds against each other: the one of `ship serve`, MLServer, and KServe's own.

Each serves a release's ONNX file with one ONNX Runtime session on all cores, and can be told to serve another while it
runs. KServe's is started from this file, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any


class MLServer:
    """1.7.1, with the model that `ship view mlserver` writes."""

    def __init__(self, python: Path, folder: Path, port: int) -> None:
        self.python, self.folder, self.port = python, folder, port
        self.url = f"http://127.0.0.1:{port}/v2/models/mlp/infer"
        self._process: subprocess.Popen[bytes] | None = None

    def load(self, release: Any) -> None:
        """The first one starts it."""
        from shipreader.mlserver import write_model

        write_model(self.folder / "models", release)
        if self._process is not None:
            post(f"http://127.0.0.1:{self.port}/v2/repository/models/mlp/load", b"")
            return
        settings = {
            "host": "127.0.0.1", "http_port": self.port, "grpc_port": self.port + 1, "metrics_port": self.port + 2,
            "model_repository_root": str(self.folder / "models"), "parallel_workers": 0, "debug": False,
        }  # fmt: skip
        (self.folder / "settings.json").write_text(json.dumps(settings))
        self._process = subprocess.Popen(
            [str(self.python.with_name("mlserver")), "start", str(self.folder)],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait(f"http://127.0.0.1:{self.port}/v2/models/mlp/ready", self._process)

    def close(self) -> None:
        """End it."""
        end(self._process)


class KServe:
    """0.21, as a custom predictor: this file's `serve_kserve`. A file says what it serves."""

    def __init__(self, python: Path, folder: Path, port: int) -> None:
        self.python, self.folder, self.port = python, folder, port
        self.url = f"http://127.0.0.1:{port}/v2/models/mlp/infer"
        self._process: subprocess.Popen[bytes] | None = None

    def load(self, release: Any) -> None:
        """The first one starts it."""
        self.folder.mkdir(exist_ok=True)
        wanted, loaded = self.folder / "wanted", self.folder / "loaded"
        draft = self.folder / "draft"
        text = f"{release.generation} {release.artifact('onnx')}"
        draft.write_text(text)
        draft.replace(wanted)
        if self._process is None:
            argv = [str(self.python), str(Path(__file__).resolve()), str(self.folder), str(self.port)]
            self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait(f"http://127.0.0.1:{self.port}/v2/models/mlp/ready", self._process)
        while not loaded.exists() or loaded.read_text() != text:
            time.sleep(0.02)

    def close(self) -> None:
        """End it."""
        end(self._process)


def serve_kserve(folder: Path, port: int) -> None:
    """In KServe's environment."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import kserve.protocol.rest.server as rest
    import numpy as np
    import onnxruntime
    from kserve import InferOutput, InferResponse, Model, ModelServer

    config, thread = rest.uvicorn.Config, ThreadPoolExecutor(1)
    # It listens on all addresses of the machine, and has no option for fewer.
    rest.uvicorn.Config = lambda *given, **named: config(*given, **{**named, "host": "127.0.0.1"})

    class Onnx(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("mlp")
            self.text = ""
            self.follow()
            threading.Thread(target=self.watch, daemon=True).start()

        def follow(self) -> None:
            text = (folder / "wanted").read_text()
            if text == self.text:
                return
            generation, _, path = text.partition(" ")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = len(os.sched_getaffinity(0))
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.served, self.text, self.ready = (generation, opened), text, True
            (folder / "loaded").write_text(text)

        def watch(self) -> None:
            while True:
                time.sleep(0.02)
                self.follow()

        async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            generation, opened = self.served
            x = payload.inputs[0].as_numpy().astype(np.float32)
            (y,) = await asyncio.get_running_loop().run_in_executor(thread, opened.run, ["y"], {"x": x})
            output = InferOutput("y", list(y.shape), "FP32")
            output.set_data_from_numpy(y, binary_data=False)
            return InferResponse(payload.id or "", "mlp", [output], model_version=generation)

    ModelServer(http_port=port, enable_grpc=False, workers=1).start([Onnx()])


def post(url: str, body: bytes) -> None:
    """Raises for a refusal."""
    with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=60) as reply:
        reply.read()


def wait(url: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until it answers."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{url}: no answer ({process.poll()})")


def end(process: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM, and SIGKILL after 20 s."""
    if process is None:
        return
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve_kserve(Path(sys.argv[1]), int(sys.argv[2]))
