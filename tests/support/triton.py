"""A real Triton server from PyPI: nvidia-pytriton's wheel carries one, with the Python backend only."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.ports import free_port
from tests.support.tool_environments import tool_python

START_SECONDS = 60


@dataclass
class TritonServer:
    """Loads a model repository straight from S3, and polls it."""

    folder: Path
    repository: str
    """s3://http://host:port/bucket/prefix"""
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, model: str) -> None:
        """Skips the test where the package is not to be had. model: what has to be ready."""
        python = tool_python("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1", "numpy==1.26.4")
        (package,) = python.parent.parent.glob("lib/python3*/site-packages/pytriton")
        version = package.parent.parent.name.removeprefix("python")
        home = self.folder / "triton"
        shutil.copytree(package / "tritonserver", home, ignore=shutil.ignore_patterns("python_backend_stubs"))
        # The stub runs our model in the interpreter that it was built for.
        stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, home / "backends" / "python")
        self.port = free_port()
        libraries = subprocess.check_output(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"], text=True
        ).strip()
        argv = [str(home / "bin" / "tritonserver"), f"--model-repository={self.repository}"]
        argv += [f"--backend-directory={home / 'backends'}", "--model-control-mode=poll", "--repository-poll-secs=1"]
        argv += ["--http-address=127.0.0.1", f"--http-port={self.port}", "--allow-grpc=false", "--allow-metrics=false"]
        argv += [f"--backend-config=python,shm-default-byte-size={2**20}", "--exit-on-error=false"]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{package.parent / 'nvidia_pytriton.libs'}:{libraries}",
            # The backend ignores PYTHONPATH and takes the packages of the first python.
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                argv, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers(model):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.2)

    @property
    def log(self) -> Path:
        return self.folder / "triton.log"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _answers(self, model: str) -> bool:
        try:
            return httpx.get(f"{self.url}/v2/models/{model}/ready", timeout=2).is_success
        except httpx.HTTPError:
            return False
