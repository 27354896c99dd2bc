"""`ship serve`: a real server that follows a channel, asked without a pause while the channel moves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shipreader.bucket import Bucket
from shipreader.reader import Reader
from shipreader.report import read_reports
from shipreader.split import slot_of
from tests.support.inference_traffic import Traffic, request_body
from tests.support.onnx_releases import SIGNATURE, kinds_release, onnx_release
from tests.support.ports import free_ports
from tests.support.processes import PATIENCE, eventually
from tests.support.releases import move, published
from tests.support.rollout_objects import roll_out
from tests.support.tool_environments import tool_python
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.ports import port_is_free
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.toolenv import environment
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.observations.reading import read_new
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.ship.server import requirements

# A first run installs the server into an environment of its own.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def server() -> None:
    """The environment that `ship serve` makes on first use. Skipped where pip cannot get it."""
    try:
        environment("serving", requirements())
    except ServiceError as error:
        pytest.skip(str(error))


Serve = Callable[..., str]
KINDS_REQUEST = [
    {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
    {"name": "half", "datatype": "FP16", "shape": [1, 2], "data": [1, 2]},
    {"name": "id", "datatype": "INT64", "shape": [1], "data": [9]},
    {"name": "flag", "datatype": "BOOL", "shape": [1], "data": [True]},
]


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
def serve(server: None, object_store: ObjectStore, started: list[subprocess.Popen[str]], tmp_path: Path) -> Serve:
    """Start `ship serve digits`; the model's address, once it answers."""

    def begin(port: int, *options: str) -> list[str]:
        """The first lines that it says."""
        argv = [Path(sys.executable).with_name("ship"), "serve", "digits", "--port", str(port)]
        argv += ["--interval", "0.1", "--to", str(tmp_path / "served"), *options]
        process = subprocess.Popen(
            argv, env={**os.environ, "SHIP_HOME": str(tmp_path / "home")}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        if lines[0]:
            started.append(process)
        else:
            process.wait(timeout=PATIENCE)
        return lines

    def start(*options: str) -> str:
        free = (port for port in free_ports(50) if all(map(port_is_free, range(port, port + 3))))
        port = next(free)
        lines = begin(port, *options)
        if not lines[0] and "Failed to bind" in (tmp_path / "served" / "server" / "server.log").read_text():
            # The ports of another test, which were free a moment ago.
            port = next(free)
            lines = begin(port, *options)
        assert "generation" in lines[0] and f":{port}/" in lines[1], "".join(lines)
        # What idle threads do was measured.
        assert re.search(r"1 thread$|threads, which (sleep|spin) when idle: asleep a call takes", lines[4].rstrip())
        return f"http://127.0.0.1:{port}/v2/models/digits"

    return start


def publish_factors(store: ObjectStore, folder: Path, *factors: float) -> list[Manifest]:
    releases = []
    for factor in factors:
        manifest = onnx_release(folder / str(factor), factor)
        publish(store, folder / str(factor), manifest)
        releases.append(manifest)
    return releases


def after(first: Callable[[], object], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which does something else before."""

    def made(*words: Any) -> Any:
        first()
        return call(*words)

    return made


def test_no_request_fails_while_the_channel_moves_on_is_rolled_back_and_meets_a_bad_release(
    object_store: ObjectStore, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        log = tmp_path / "served" / "server" / "server.log"
        deadline = time.monotonic() + PATIENCE
        while "Protobuf parsing failed" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        traffic.until(1.0)
        move(object_store, two)
        traffic.until(2.0)
        # Another process brings 7 to the folder, which is its own from before the move on.
        monkeypatch.setattr(Bucket, "changed", after(lambda: move(object_store, three), Bucket.changed))
        client = s3_client(Settings.load())
        Reader("digits", bucket=object_store.bucket, folder=tmp_path / "served", client=client).pull()
        traffic.until(3.0)
    assert traffic.failures == []
    expected = {("1", 1.0), ("2", 2.0), ("3", 3.0), ("4", 1.0), ("6", 2.0), ("7", 3.0)}
    assert set(traffic.factors) == expected
    assert len(traffic.factors) > 100
    # A client never sees an older release again after a newer one, but for requests that overtake one another.
    versions = [int(version) for version, _ in traffic.factors]
    late = sum(version < max(versions[:place], default=0) for place, version in enumerate(versions))
    assert late <= 4 * 5


def test_requests_that_do_not_fit_are_refused_alone(object_store: ObjectStore, serve: Serve, tmp_path: Path) -> None:
    (one,) = publish_factors(object_store, tmp_path, 1.0)
    move(object_store, one)
    url = serve()
    good = request_body(1.0)
    with Traffic(f"{url}/infer") as traffic:
        traffic.until(1.0)
        for change, said in (
            ({"shape": [1, 5], "data": [0] * 5}, "expected FP32 [batch, 4], got FP32 [1, 5]"),
            ({"shape": [2, 4]}, "expected 8 values of shape [2, 4], got 4"),
            ({"datatype": "INT64"}, "expected FP32"),
            ({"name": "z"}, "expected the inputs x; got z"),
            ({"data": ["a", "b", "c", "d"]}, 'expected a number, got "a" at place 0'),
            ({"shape": [-1, 4]}, "whole numbers from 0"),
        ):
            body = {"inputs": [{**good["inputs"][0], **change}]}
            answer = httpx.post(f"{url}/infer", json=body)
            assert answer.status_code == 400 and said in answer.json()["error"], answer.text
        nested = {"inputs": [{**good["inputs"][0], "shape": [2, 4], "data": [[1, 2, 3, 4], [5, 6, 7, 8]]}]}
        answer = httpx.post(f"{url}/infer", json={**nested, "outputs": [{"name": "y"}]})
        assert answer.json()["outputs"][0]["data"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert traffic.failures == []
    metadata = httpx.get(url).json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


# What has the labels: metadata over HTTP, and an answer over either for whoever asks. As JSON.
LABELS = """
import json, sys
import numpy as np
import tritonclient.grpc
from tritonclient.grpc import service_pb2

client = tritonclient.grpc.InferenceServerClient(sys.argv[1])
assert client.get_model_metadata("digits").outputs[0].name == "y"
inputs = [tritonclient.grpc.InferInput("x", (1, 4), "FP32")]
inputs[0].set_data_from_numpy(np.ones((1, 4), np.float32))
wanted = tritonclient.grpc.InferRequestedOutput("y")
plain = client.infer("digits", inputs, outputs=[wanted]).get_response()
wanted._get_tensor().parameters["labels"].bool_param = True
asked = client.infer("digits", inputs, outputs=[wanted]).get_response()
print(json.dumps([dict(plain.outputs[0].parameters), asked.outputs[0].parameters["labels"].string_param]))
"""


def test_labels_are_in_the_metadata_and_in_answers_to_who_asks_for_them(
    object_store: ObjectStore, serve: Serve, tmp_path: Path
) -> None:
    python = tool_python("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1", "numpy==1.26.4")
    folder, labels = tmp_path / "labelled", ["cat", "dog", "löwe", 'a "b"']
    onnx_release(folder, 1.0)
    signature = {**SIGNATURE, "labels": labels}
    release = build_manifest(folder, model="digits", formats={"onnx": "model.onnx"}, signature=signature, metrics={})
    publish(object_store, folder, release)
    move(object_store, release)
    url = serve()
    (output,) = httpx.get(url).json()["outputs"]
    assert json.loads(output["parameters"]["labels"]) == labels and output["shape"] == [-1, 4]
    done = subprocess.run(
        [python, "-c", LABELS, f"127.0.0.1:{httpx.URL(url).port + 1}"],  # type: ignore[operator]
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, asked = json.loads(done.stdout)
    assert plain == {} and json.loads(asked) == labels


# The stock client with its defaults: HTTP with binary tensors, then gRPC. What each call comes to, as JSON.
ASK = """
import json, sys
import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

port = int(sys.argv[1])
clients = {
    "http": (tritonclient.http, tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}"), {}),
    "json": (tritonclient.http, tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}"), {"binary_data": False}),
    "grpc": (tritonclient.grpc, tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port + 1}"), {}),
}

def call(name, version="", **values):
    library, client, options = clients[name]
    arrays = {"x": np.ones(2, np.float32), "half": np.zeros((2, 2), np.float16), "id": np.array([0, 9]),
              "flag": np.array([True, False]), **values}
    inputs = []
    for key, array in arrays.items():
        inputs.append(library.InferInput(key, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array, *options.values())
    names = ("log", "same", "row", "not")
    outputs = [library.InferRequestedOutput(key, **options) for key in names] if options else None
    try:
        found = client.infer("digits", inputs, model_version=version, outputs=outputs)
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return {key: [str(found.as_numpy(key).dtype), found.as_numpy(key).shape, found.as_numpy(key).tolist()]
            for key in names}

odd = np.array([np.nan, 0], np.float32)
answers = {}
for name, (library, client, _) in clients.items():
    document = client.get_model_metadata("digits", **({"as_json": True} if name == "grpc" else {}))
    answers[name] = {
        "ready": client.is_server_ready() and client.is_model_ready("digits") and client.is_model_ready("digits", "1"),
        "versions": document["versions"], "shape": document["inputs"][1]["shape"],
        "good": call(name) if name != "json" else None,
        "odd": call(name, x=odd) if name != "json" else None,
        "bad": call(name, id=np.array([0, 10])),
        "version": call(name, version="2"),
    }
print(json.dumps(answers))
"""


def test_stock_clients_get_every_bit_or_a_refusal_that_says_what_is_wrong(
    object_store: ObjectStore, serve: Serve, tmp_path: Path
) -> None:
    python = tool_python("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1", "numpy==1.26.4")
    release = kinds_release(tmp_path / "kinds")
    publish(object_store, tmp_path / "kinds", release)
    move(object_store, release)
    url = serve()
    port = httpx.URL(url).port
    done = subprocess.run([python, "-c", ASK, str(port)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, answers in found.items():
        assert answers["ready"] and answers["versions"] == ["1"], answers
        assert list(map(int, answers["shape"])) == [-1, 2]
        # In the words of either protocol.
        assert re.match(r"(400|StatusCode.INVALID_ARGUMENT) .*idx=10.*\[-10,9\]", answers["bad"]), answers["bad"]
        assert re.match(r"(404|StatusCode.NOT_FOUND) expected version 1 of digits", answers["version"])
        if name == "json":
            continue
        assert answers["good"] == {
            "log": ["float32", [2], [0, 0]],
            "same": ["float16", [2, 2], [[0, 0], [0, 0]]],
            "row": ["int64", [2, 1], [[0], [90]]],
            "not": ["bool", [2], [False, True]],
        }
        assert str(answers["odd"]["log"]) == "['float32', [2], [nan, -inf]]"
    # Plain JSON, as curl sends it.
    body = {"inputs": KINDS_REQUEST}
    answer = httpx.post(f"{url}/infer", json=body)
    outputs = {item["name"]: (item["shape"], item["data"]) for item in answer.json()["outputs"]}
    assert outputs == {"log": ([1], [0]), "same": ([1, 2], [1, 2]), "row": ([1, 1], [90]), "not": ([1], [False])}
    for place, data, said in (
        (0, [-1], "output log: the model's answer is nan at [0], for which JSON has no word"),
        (1, [70000, 0], "expected at most 65504"),
        (2, [1.9], "expected a whole number for INT64, got 1.9"),
        (2, [10], "idx=10 must be within the inclusive range [-10,9]"),
        (3, ["true"], "expected true or false"),
    ):
        inputs = [{**item, "data": data} if number == place else item for number, item in enumerate(KINDS_REQUEST)]
        answer = httpx.post(f"{url}/infer", json={"inputs": inputs})
        assert answer.status_code == 400 and said in answer.text, answer.text
    for method, path, status in (
        ("GET", "/v2/models/digits/versions/1", 200),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/health/ready", 200),
        ("POST", "/v2/repository/index", 200),
        ("POST", "/v2/repository/models/digits/unload", 403),
        ("GET", "/v3", 404),
    ):
        assert httpx.request(method, f"http://127.0.0.1:{port}{path}").status_code == status
    metrics = httpx.get(f"http://127.0.0.1:{port + 2}/metrics").text
    (failed,) = re.findall(r'model_infer_request_failure_total{model="digits",version="1"} (\S+)', metrics)
    # Five here, and one of each of three clients; another version is none of this one's.
    assert float(failed) == 5 + 3
    assert 'model_infer_request_success_total{model="digits",version="1"}' in metrics


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


# Both of Triton's stock clients, with the key as a parameter of the request: (version, factor) of each.
KEYED = """
import json, sys
import numpy as np
import tritonclient.grpc
import tritonclient.http

port, found = int(sys.argv[1]), []
for library, at in ((tritonclient.http, port), (tritonclient.grpc, port + 1)):
    client = library.InferenceServerClient(f"127.0.0.1:{at}")
    for key in ("user-3863", "user-7248", 42, None):
        inputs = [library.InferInput("x", (1, 4), "FP32")]
        inputs[0].set_data_from_numpy(np.ones((1, 4), np.float32))
        answer = client.infer("digits", inputs, parameters={"user_id": key} if key is not None else None)
        reply = answer.get_response()
        version = reply["model_version"] if library is tritonclient.http else reply.model_version
        found.append([version, float(answer.as_numpy("y")[0, 0])])
print(json.dumps(found))
"""


@pytest.mark.soak
def test_no_request_fails_while_a_candidate_raises_and_the_same_person_gets_the_same_release(
    object_store: ObjectStore, serve: Serve, tmp_path: Path
) -> None:
    python = tool_python("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1", "numpy==1.26.4")
    (old,) = publish_factors(object_store, tmp_path, 2.0)
    # It raises for three of four.
    new = onnx_release(tmp_path / "new", 3.0, breaks_at=2)
    publish(object_store, tmp_path / "new", new)
    pointer = move(object_store, old)
    url = serve()
    port = httpx.URL(url).port
    roll_out(object_store, pointer, new)
    candidate, client = f"1-{new.release}", httpx.Client(trust_env=False, timeout=30)

    def until_tried(share: float) -> None:
        deadline = time.monotonic() + PATIENCE
        wanted = f'model_rollout_share{{model="digits",version="{candidate}"}} {share}'
        while wanted not in client.get(f"http://127.0.0.1:{port + 2}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    until_tried(0.05)
    done = subprocess.run([python, "-c", KEYED, str(port)], capture_output=True, text=True)  # type: ignore[list-item]
    assert done.returncode == 0, done.stderr
    each = [[candidate, 3.0], ["1", 2.0], ["1", 2.0], ["1", 2.0]]
    assert json.loads(done.stdout) == each * 2

    def ask(number: int) -> tuple[str, float, str]:
        key, value = f"user-{number % 50}", 1.0 + number % 4
        answer = client.post(f"{url}/infer", json=request_body(value, user_id=key))
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return key, document["outputs"][0]["data"][0] / value, document["model_version"]

    roll_out(object_store, pointer, new, number=2, share=2500)
    until_tried(0.25)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(200)))
    for number, (key, factor, version) in enumerate(found):
        slot = slot_of("digits", key)
        assert slot is not None
        expected = (3.0, candidate) if slot < 2500 and number % 4 == 0 else (2.0, "1")
        assert (factor, version) == expected
    inside = sum((slot_of("digits", key) or 0) < 2500 for key, _, _ in found)
    fell_back = inside - sum(factor == 3.0 for _, factor, _ in found)
    text = httpx.get(f"http://127.0.0.1:{port + 2}/metrics").text
    assert f'model_rollout_fallback_total{{model="digits",version="{candidate}"}} {float(fell_back)}' in text
    assert 0 < fell_back <= 50 and 'arm="live"' in text and 'arm="candidate"' in text
    # Other processes on the machine are told what is tried.
    (said,) = read_reports(tmp_path / "served")
    assert (said["release"], said["candidate"], said["share"]) == (old.release, new.release, 0.25)
    # Whoever moves the channel ends it.
    (third,) = publish_factors(object_store, tmp_path, 5.0)
    move(object_store, third)
    deadline = time.monotonic() + PATIENCE
    while ask(0)[1] != 5.0:
        assert time.monotonic() < deadline
    assert httpx.get(url).json()["versions"] == ["2"]
    assert httpx.post(f"{url}/versions/{candidate}/infer", json=request_body(1.0)).status_code == 404


@pytest.mark.soak
def test_a_server_that_was_killed_under_traffic_comes_back_and_says_meanwhile_that_it_is_not_ready(
    object_store: ObjectStore, serve: Serve, tmp_path: Path
) -> None:
    (one,) = publish_factors(object_store, tmp_path, 1.0)
    move(object_store, one)
    url = serve("--max-stale", "600")
    (server,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(httpx.URL(url).port) in (process.info["cmdline"] or ()) and "-P" in process.info["cmdline"]
    ]

    def status() -> dict[str, Any]:
        (found,) = read_reports(tmp_path / "served")
        return found

    assert status()["release"] == one.release and status()["problem"] == ""
    server.kill()
    seen = []
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline
        seen.append(status())
        with contextlib.suppress(httpx.HTTPError):
            if seen[-1]["release"] and len(seen) > 5 and httpx.get(f"{url}/ready", timeout=1).status_code == 200:
                break
        time.sleep(0.05)
    gone = [report for report in seen if report["release"] is None]
    assert gone and all("it was ended by SIGKILL" in report["problem"] for report in gone)
    answer = httpx.post(f"{url}/infer", json=request_body(2.0)).json()
    assert answer["model_version"] == "1" and answer["outputs"][0]["data"] == [2.0] * 4


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


def test_a_first_release_that_cannot_be_loaded_ends_the_command_with_the_reason(
    server: None, object_store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no model at all")
    bad = build_manifest(folder, model="digits", formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    publish(object_store, folder, bad)
    move(object_store, bad)
    port = next(port for port in free_ports(50) if all(map(port_is_free, range(port, port + 3))))
    argv = [Path(sys.executable).with_name("ship"), "serve", "digits", "--port", str(port)]
    variables = {**os.environ, "SHIP_HOME": str(tmp_path / "home")}
    done = subprocess.run(argv, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "Protobuf parsing failed" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_requests_are_observed_as_the_job_of_what_is_live_says_and_nothing_is_lost_at_the_end(
    object_store: ObjectStore, serve: Serve, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "observed"
    onnx_release(folder, 2.0)
    (folder / "job.json").write_text(json.dumps({"observe": {"columns": {"inputs": ["x"], "outputs": ["y"]}}}))
    signed = build_manifest(folder, model="digits", formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    (plain,) = publish_factors(object_store, tmp_path, 1.0)
    publish(object_store, folder, signed)
    move(object_store, signed)
    url = serve()
    body = {"id": "r-1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": list(range(8))}]}
    assert httpx.post(f"{url}/infer", json=body).status_code == 200
    # What does not reach a model is no request to it.
    assert httpx.post(f"{url}/infer", json={"inputs": []}).status_code == 400
    move(object_store, plain)
    asked = {**body, "id": "r-2"}
    eventually(lambda: httpx.post(f"{url}/infer", json=asked).json()["model_version"] == "2", "the second release")
    before = read_new(object_store, "digits").rows
    started[0].terminate()
    assert started[0].wait(timeout=PATIENCE) == 0
    rows = before + read_new(object_store, "digits", columns={"inputs": ["x"], "outputs": ["y"]}).rows
    assert rows[0].request_id == "r-1" and all(row.generation == 1 for row in rows)
    (row,) = [row for row in rows if row.request_id == "r-1"]
    assert (row.inputs, row.outputs) == ({"x": [0, 1, 2, 3]}, {"y": [0, 2, 4, 6]})
    assert (row.release, row.arm, row.error) == (signed.release, "live", "") and 0 < (row.latency_ms or 0) < 60_000
    # All of it is away.
    assert not list((tmp_path / "served" / "server" / "observations").iterdir())
