"""The examples of docs/observations.md, each in the server that it is for, ended by SIGTERM: every request is a row."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import httpx
import pytest

import shipreader
from tests.support.onnx_releases import SIGNATURE, onnx_release
from tests.support.ports import free_port
from tests.support.processes import PATIENCE, eventually
from tests.support.projects import REPOSITORY
from tests.support.releases import move
from tests.support.tool_environments import tool_python
from tests.support.triton import TritonServer
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.observations.reading import read_new
from train_and_ship.registry.observations.rows import Row
from train_and_ship.registry.release.manifest import Manifest, build_manifest

# A first run installs the servers.
pytestmark = [pytest.mark.timeout(900), pytest.mark.soak]
FASTAPI, KSERVE, TRITON = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs" / "observations.md").read_text(), re.DOTALL
)
COLUMNS = {"inputs": ["age"], "outputs": ["score"]}
CONFIG = """
name: "digits"
backend: "python"
input [{name: "age", data_type: TYPE_FP32, dims: [1]}]
output [{name: "score", data_type: TYPE_FP32, dims: [1]}]
"""


@pytest.fixture
def live(object_store: ObjectStore, tmp_path: Path) -> Manifest:
    """What the readers follow; its job names the columns."""
    folder = tmp_path / "release"
    onnx_release(folder, 2.0)
    (folder / "job.json").write_text('{"observe": {"columns": {"inputs": ["age"], "outputs": ["score"]}}}')
    manifest = build_manifest(folder, model="digits", formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    publish(object_store, folder, manifest)
    move(object_store, manifest)
    return manifest


def rows_after(store: ObjectStore, argv: list[Any], ask: Callable[[], dict[str, Any]], folder: Path) -> list[Row]:
    """What is in the bucket once the server has answered ten requests and was ended."""
    environment = {**os.environ, "BUCKET": store.bucket, "PYTHONPATH": str(Path(shipreader.__path__[0]).parent)}
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(argv, cwd=folder, env=environment, stdout=log, stderr=log) as process:
        try:
            eventually(lambda: process.poll() is not None or answers(ask), "the server", 60)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            ids = [ask()["id"] for _ in range(10)]
        finally:
            process.terminate()
            process.wait(PATIENCE)
    rows = read_new(store, "digits", columns=COLUMNS).rows
    assert set(ids) <= {row.request_id for row in rows}
    return rows


def answers(ask: Callable[[], object]) -> bool:
    try:
        return bool(ask())
    except (httpx.HTTPError, ValueError):
        return False


def require_observed(rows: list[Row], release: str) -> None:
    assert len(rows) >= 10
    for row in rows:
        assert (row.inputs, row.outputs, row.error, row.arm) == ({"age": 21.0}, {"score": 42.0}, "", "live")
        assert row.release == release and row.generation == 1 and row.latency_ms is not None


def test_fastapi(object_store: ObjectStore, live: Manifest, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(FASTAPI)
    port = free_port()
    argv = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)]

    def ask() -> Any:
        return httpx.post(f"http://127.0.0.1:{port}/predict", json={"age": 21, "user": 7}).raise_for_status().json()

    rows = rows_after(object_store, argv, ask, tmp_path)
    require_observed(rows, live.release)
    assert {row.key_slot for row in rows} != {None} and len({row.key_slot for row in rows}) == 1


def test_kserve(object_store: ObjectStore, live: Manifest, tmp_path: Path) -> None:
    python = tool_python("kserve==0.21.0", "boto3>=1.36")
    (tmp_path / "server.py").write_text(KSERVE)
    port = free_port()
    argv = [python, "server.py", f"--http_port={port}", "--enable_grpc=false"]

    def ask() -> Any:
        asked = {"instances": [{"age": 21.0, "secret": 1}]}
        return httpx.post(f"http://127.0.0.1:{port}/v1/models/digits:predict", json=asked).raise_for_status().json()

    require_observed(rows_after(object_store, argv, ask, tmp_path), live.release)


def test_triton(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "repository" / "digits" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(TRITON)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    # What lies beside the model can be imported.
    (version / "shipreader").symlink_to(shipreader.__path__[0])
    for package in ("boto3", "botocore", "s3transfer", "jmespath", "python-dateutil", "urllib3", "six"):
        for top in {Path(file.parts[0]) for file in files(package) or () if file.suffix == ".py"}:
            place = Path(sys.modules["httpx"].__file__ or "").parents[1] / top
            if place.exists() and not (version / top).exists():
                (version / top).symlink_to(place)
    monkeypatch.setenv("BUCKET", object_store.bucket)
    triton = TritonServer(tmp_path, str(version.parents[1]))
    triton.start("digits")
    try:
        for number in range(10):
            tensor = {"name": "age", "datatype": "FP32", "shape": [1], "data": [21]}
            asked = {"id": f"r-{number}", "inputs": [tensor]}
            answer = httpx.post(f"{triton.url}/v2/models/digits/infer", json=asked).raise_for_status().json()
            assert answer["outputs"][0]["data"] == [42]
    finally:
        triton.stop()
    rows = read_new(object_store, "digits", columns=COLUMNS).rows
    assert sorted(row.request_id for row in rows) == [f"r-{number}" for number in range(10)], triton.log.read_text()
    require_observed(rows, "")
