"""`ship serve`: a real MLServer that follows a channel, asked without a pause while the channel moves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.inference_traffic import Traffic, request_body
from tests.support.onnx_releases import SIGNATURE, onnx_release
from tests.support.ports import free_ports
from tests.support.processes import PATIENCE
from tests.support.releases import move, published
from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.processes import port_is_free
from train_and_ship.infra.toolenv import environment
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.ship.serve import require_python, requirements

# A first run installs MLServer into an environment of its own.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def mlserver() -> None:
    """The environment that `ship serve` makes on first use. Skipped where pip cannot get it."""
    try:
        require_python()
        environment("mlserver", requirements())
    except (ServiceError, SettingsError) as error:
        pytest.skip(str(error))


def test_a_python_that_mlserver_does_not_install_on_is_named_with_the_way_out() -> None:
    require_python((3, 12))
    with pytest.raises(
        SettingsError, match=r"below 3\.13, which MLServer 1\.7\.1 needs, and this is 3\.13; .*Python 3\.12"
    ):
        require_python((3, 13))


Serve = Callable[..., str]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """The commands that `serve` started."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
            assert process.wait(timeout=PATIENCE) == 0


@pytest.fixture
def serve(mlserver: None, object_store: ObjectStore, started: list[subprocess.Popen[str]], tmp_path: Path) -> Serve:
    """Start `ship serve digits`; the model's address, once it answers."""

    def start(*options: str) -> str:
        port = next(port for port in free_ports(50) if all(map(port_is_free, range(port, port + 3))))
        argv = [Path(sys.executable).with_name("ship"), "serve", "digits", "--port", str(port)]
        argv += ["--interval", "0.1", "--to", str(tmp_path / "served"), *options]
        process = subprocess.Popen(
            argv, env={**os.environ, "SHIP_HOME": str(tmp_path / "home")}, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert "generation" in lines[0] and f":{port}/" in lines[1], "".join(lines)
        return f"http://127.0.0.1:{port}/v2/models/digits"

    return start


def publish_factors(store: ObjectStore, folder: Path, *factors: float) -> list[Manifest]:
    releases = []
    for factor in factors:
        manifest = onnx_release(folder / str(factor), factor)
        publish(store, folder / str(factor), manifest)
        releases.append(manifest)
    return releases


def test_no_request_fails_while_the_channel_moves_on_is_rolled_back_and_meets_a_bad_release(
    object_store: ObjectStore, serve: Serve, tmp_path: Path
) -> None:
    one, two, three = publish_factors(object_store, tmp_path, 1.0, 2.0, 3.0)
    bad_folder = tmp_path / "bad"
    bad_folder.mkdir()
    (bad_folder / "model.onnx").write_bytes(b"no model at all")
    bad = build_manifest(bad_folder, model="digits", formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    publish(object_store, bad_folder, bad)
    move(object_store, one)
    url = serve()
    with Traffic(f"{url}/infer") as traffic:
        traffic.until(1.0)
        for factor, manifest in ((2.0, two), (3.0, three), (1.0, one)):
            move(object_store, manifest)
            traffic.until(factor)
        # Generation 5 cannot be loaded: 4 stays. 6 is a rollback.
        move(object_store, bad)
        log = tmp_path / "served" / "mlserver" / "mlserver.log"
        deadline = time.monotonic() + PATIENCE
        while "Protobuf parsing failed" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        traffic.until(1.0)
        move(object_store, two)
        traffic.until(2.0)
    assert traffic.failures == []
    assert set(traffic.factors) == {("1", 1.0), ("2", 2.0), ("3", 3.0), ("4", 1.0), ("6", 2.0)}
    assert len(traffic.factors) > 100
    # A client never sees an older release again after a newer one, but for requests that overtake one another.
    versions = [int(version) for version, _ in traffic.factors]
    late = sum(version < max(versions[:place], default=0) for place, version in enumerate(versions))
    assert late <= 4 * 4


def test_requests_that_do_not_fit_are_refused_alone(object_store: ObjectStore, serve: Serve, tmp_path: Path) -> None:
    (one,) = publish_factors(object_store, tmp_path, 1.0)
    move(object_store, one)
    url = serve()
    good = request_body(1.0)
    with Traffic(f"{url}/infer") as traffic:
        traffic.until(1.0)
        for change, said in (
            ({"shape": [1, 5], "data": [0] * 5}, "expected FP32 [-1, 4], got FP32 [1, 5]"),
            ({"shape": [2, 4]}, "shape [2, 4]"),
            ({"datatype": "INT64"}, "expected FP32"),
            ({"name": "z"}, "expected the inputs x; got z"),
            ({"data": ["a", "b", "c", "d"]}, "expected FP32"),
            ({"shape": [-1, 4]}, "expected FP32"),
        ):
            body = {"inputs": [{**good["inputs"][0], **change}]}
            answer = httpx.post(f"{url}/infer", json=body)
            assert answer.status_code == 400 and said in answer.text, answer.text
        nested = {"inputs": [{**good["inputs"][0], "shape": [2, 4], "data": [[1, 2, 3, 4], [5, 6, 7, 8]]}]}
        answer = httpx.post(f"{url}/infer", json={**nested, "outputs": [{"name": "y"}]})
        assert answer.json()["outputs"][0]["data"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert traffic.failures == []
    metadata = httpx.get(url).json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


def test_the_server_ends_with_the_command_even_when_that_is_killed(
    object_store: ObjectStore, serve: Serve, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    (one,) = publish_factors(object_store, tmp_path, 1.0)
    move(object_store, one)
    url = serve()
    started[0].kill()
    assert started[0].wait() == -signal.SIGKILL
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            httpx.get(f"{url}/ready", timeout=1)
        except httpx.HTTPError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_unused_channel_and_a_taken_port_are_named(object_store: ObjectStore, tmp_path: Path) -> None:
    ship = Path(sys.executable).with_name("ship")
    variables = {**os.environ, "SHIP_HOME": str(tmp_path)}
    done = subprocess.run([ship, "serve", "digits"], env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "expected a model" in done.stderr
    published(object_store, tmp_path / "release")
    done = subprocess.run([ship, "serve", "digits"], env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "nothing is live on prod" in done.stderr
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = subprocess.run([ship, "serve", "digits", "--port", port], env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and f"{port} is taken" in done.stderr
