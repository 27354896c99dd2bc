"""Views in the bucket, read by the servers that they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from shipreader.mlserver import write_model
from shipreader.reader import Reader
from shipreader.records import Release
from tests.support.inference_traffic import Traffic
from tests.support.onnx_releases import SIGNATURE, kinds_release, onnx_release
from tests.support.ports import free_ports
from tests.support.processes import PATIENCE
from tests.support.releases import CHANNEL, MODEL, move
from tests.support.runnable_releases import move_weights
from tests.support.tool_environments import tool_environment, tool_python
from tests.support.triton import TritonServer
from train_and_ship.infra.errors import ReleaseError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.ports import port_is_free
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.maintenance.retention import Policy, Step, decide
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.registry.serving.layouts import (
    SERVICE_MAY_LAG,
    inference_service,
    triton_config,
    write_kserve,
    write_triton,
)
from train_and_ship.ship.view import _triton

TRITON = f"models/{MODEL}/views/{CHANNEL}/triton/"

# A first run installs Triton and KServe's downloader into environments of their own.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def go_live(object_store: ObjectStore, tmp_path: Path) -> Callable[[float], Release]:
    """Publish and promote the release with a factor; the release as a reader has it."""

    def live(factor: float) -> Release:
        folder = tmp_path / "releases" / str(factor)
        manifest = onnx_release(folder, factor) if not folder.exists() else published[factor]
        published[factor] = manifest
        publish(object_store, folder, manifest)
        move(object_store, manifest)
        return reader.pull()

    published: dict[float, Any] = {}
    client = s3_client(Settings.load())
    reader = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "pulled", channel=CHANNEL, client=client)
    return live


@pytest.fixture
def triton(object_store: ObjectStore, tmp_path: Path) -> Iterator[TritonServer]:
    server = TritonServer(tmp_path, f"s3://{object_store.address}/{object_store.bucket}/{TRITON.rstrip('/')}")
    yield server
    server.stop()


def versions(store: ObjectStore, prefix: str = f"{TRITON}{MODEL}/") -> set[str]:
    names = {key.removeprefix(prefix).partition("/")[0] for key in store.list_keys(prefix)}
    return {name for name in names if name.isdecimal()}


def moved_to(store: ObjectStore, generation: int) -> None:
    """As if the channel had moved so many times."""
    live = read_pointer(Channel(store, MODEL, CHANNEL))
    assert live is not None
    store.put(pointer_key(MODEL, CHANNEL), replace(live, generation=generation).encode())


# One flip under traffic is asked below.
@pytest.mark.soak
def test_triton_follows_the_view_through_flips_and_a_rollback_and_no_request_fails(
    object_store: ObjectStore, go_live: Callable[[float], Release], triton: TritonServer
) -> None:
    write_triton(object_store, go_live(1.0), "python")
    triton.start(MODEL)
    with Traffic(f"{triton.url}/v2/models/{MODEL}/infer") as traffic:
        traffic.until(1.0)
        for factor in (2.0, 3.0, 1.0):
            write_triton(object_store, go_live(factor), "python")
            traffic.until(factor)
    assert traffic.failures == []
    # The version that answered is the channel's generation; the last one is the rollback.
    assert set(traffic.factors) == {("1", 1.0), ("2", 2.0), ("3", 3.0), ("4", 1.0)}
    assert len(traffic.factors) > 100
    assert versions(object_store) == {"3", "4"}


def test_a_version_that_is_half_there_does_not_count(
    object_store: ObjectStore, go_live: Callable[[float], Release], triton: TritonServer
) -> None:
    write_triton(object_store, go_live(1.0), "python")
    triton.start(MODEL)
    # A writer that died before the commit.
    object_store.put_new(f"{TRITON}{MODEL}/2/model.py", b"raise SystemExit")
    with Traffic(f"{triton.url}/v2/models/{MODEL}/infer", clients=2) as traffic:
        traffic.until(1.0)
        # Triton looks every second.
        start = len(traffic.factors)
        release = go_live(3.0)
        write_triton(object_store, replace(release, generation=3), "python")
        traffic.until(3.0)
    assert traffic.failures == [] and len(traffic.factors) > start
    assert {version for version, _ in traffic.factors} == {"1", "3"}


def test_the_commit_has_a_second_of_its_own_because_triton_compares_whole_seconds(
    object_store: ObjectStore, go_live: Callable[[float], Release]
) -> None:
    release, folder = go_live(1.0), f"{TRITON}{MODEL}/"

    def seconds() -> dict[str, datetime]:
        return {key: item.modified.replace(microsecond=0) for key, item in object_store.list_objects(folder).items()}

    before: datetime | None = None
    for generation in (1, 2):
        write_triton(object_store, replace(release, generation=generation))
        found = seconds()
        committed = found.pop(f"{folder}config.pbtxt")
        assert committed > max(found.values()) and committed != before
        before = committed
    # A writer that died behind its commit: the next one of the same release ends it.
    object_store.put_new(f"{folder}9/model.onnx", b"of another writer")
    config = object_store.get(f"{folder}config.pbtxt")
    assert config is not None
    object_store.replace(f"{folder}config.pbtxt", *config)
    write_triton(object_store, replace(release, generation=2))
    found = seconds()
    assert found.pop(f"{folder}config.pbtxt") > max(found.values())


def test_a_view_never_goes_back_however_many_write_it(
    object_store: ObjectStore, go_live: Callable[[float], Release]
) -> None:
    release = go_live(1.0)
    moved_to(object_store, 17)
    newest = write_triton(object_store, replace(release, generation=9))
    assert newest.generation == 9
    assert write_triton(object_store, replace(release, generation=8)).generation == 9
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_triton(object_store, replace(release, generation=n)), range(10, 18)))
    config = object_store.get(f"{TRITON}{MODEL}/config.pbtxt")
    assert config is not None and b"versions: [ 17 ]" in config[0]
    assert {"17"} <= versions(object_store) <= {str(n) for n in range(8, 18)}
    assert f"{TRITON}{MODEL}/17/model.onnx" in object_store.list_keys(TRITON)


def test_a_view_holds_the_bytes_of_the_release_or_is_not_written(
    object_store: ObjectStore, go_live: Callable[[float], Release]
) -> None:
    release = go_live(1.0)
    object_store.put_new(f"{TRITON}{MODEL}/1/model.onnx", b"something else")
    with pytest.raises(ReleaseError, match=r"1/model\.onnx: expected"):
        write_triton(object_store, release)
    assert object_store.get(f"{TRITON}{MODEL}/config.pbtxt") is None
    (release.folder / "model.onnx").write_bytes(b"\x08\x09" * 50)
    with pytest.raises(ReleaseError, match="expected SHA-256"):
        write_triton(object_store, replace(release, generation=2))
    assert object_store.get(f"{TRITON}{MODEL}/config.pbtxt") is None


def with_files(store: ObjectStore, folder: Path) -> Release:
    """Live on the channel: the release with factor 3, its weights and two files that the job ships beside the model."""
    onnx_release(folder, 3.0)
    move_weights(folder / "model.onnx", "model.onnx.data")
    (folder / "files" / "tokenizer").mkdir(parents=True)
    # What Triton would load, and what MLServer looks for, if they looked there.
    (folder / "files" / "config.pbtxt").write_text("backend: 'none'")
    (folder / "files" / "tokenizer" / "model-settings.json").write_text("{}")
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": "model.onnx"}, signature=SIGNATURE, metrics={})
    publish(store, folder, manifest)
    move(store, manifest)
    client = s3_client(Settings.load())
    return Reader(MODEL, bucket=store.bucket, folder=folder.parent / "pulled", channel=CHANNEL, client=client).pull()


def test_weights_and_files_beside_the_model_go_along_into_every_view(object_store: ObjectStore, tmp_path: Path) -> None:
    release = with_files(object_store, tmp_path / "release")
    names = {"files/config.pbtxt", "files/tokenizer/model-settings.json"}
    assert release.file("tokenizer") == release.folder / "files" / "tokenizer"
    write_triton(object_store, release)
    # Again, as a writer that died half-way does.
    write_triton(object_store, release)
    write_kserve(object_store, release)
    for version in (f"{TRITON}{MODEL}/1/", f"models/{MODEL}/views/{CHANNEL}/kserve/1/{MODEL}/1/"):
        keys = {key.removeprefix(version) for key in object_store.list_keys(version)}
        assert keys == {"model.onnx", "model.onnx.data", *names}
        found = object_store.get(f"{version}files/config.pbtxt")
        assert found is not None and found[0] == b"backend: 'none'"
    settings = json.loads(write_model(tmp_path / "mlserver", release).read_text())
    assert settings["parameters"]["extra"]["files"] == str(release.folder / "files")
    assert len(list((tmp_path / "mlserver").rglob("model-settings.json"))) == 1


@pytest.mark.soak
def test_triton_reads_the_weights_beside_the_model_and_does_not_look_at_other_files_there(
    object_store: ObjectStore, triton: TritonServer, tmp_path: Path
) -> None:
    write_triton(object_store, with_files(object_store, tmp_path / "release"), "python")
    triton.start(MODEL)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    answer = httpx.post(f"{triton.url}/v2/models/{MODEL}/infer", json=body).json()
    assert answer["outputs"][0]["data"] == [3, 6, 9, 12]


PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
print(json.dumps(json_format.MessageToDict(text_format.Parse(sys.stdin.read(), ModelConfig()))))
"""


def test_the_configuration_is_what_triton_calls_one(go_live: Callable[[float], Release]) -> None:
    release = go_live(1.0)
    python = tool_python("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1", "numpy==1.26.4")

    def parsed(release: Release) -> dict[str, Any]:
        config = triton_config(release, "onnxruntime", 7)
        answer = subprocess.run([python, "-c", PARSE], input=config, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return dict(yaml.safe_load(answer.stdout))

    config = parsed(release)
    assert config["backend"] == "onnxruntime" and config["maxBatchSize"] == 64
    assert config["input"] == [{"name": "x", "dataType": "TYPE_FP32", "dims": ["4"]}]
    assert config["versionPolicy"] == {"specific": {"versions": ["7"]}}
    assert config["parameters"]["release"] == {"stringValue": release.id}
    named = replace(release.manifest, signature={**release.manifest.signature, "labels": ["a", 'b"\\', "в", "d"]})
    config = parsed(replace(release, manifest=named))
    assert json.loads(config["parameters"]["labels"]["stringValue"]) == ["a", 'b"\\', "в", "d"]
    # Dimensions besides the batch, no batch at all, and a batch of single numbers.
    tensors = [
        {"name": "tokens", "dtype": "int64", "shape": ["batch", "length"]},
        {"name": "mask", "dtype": "bool", "shape": ["batch", 3]},
    ]
    signature = {"inputs": tensors, "outputs": [{"name": "y", "dtype": "float16", "shape": ["batch"]}]}
    config = parsed(replace(release, manifest=replace(release.manifest, signature=signature)))
    assert "maxBatchSize" not in config and "dynamicBatching" not in config
    assert [item["dims"] for item in config["input"]] == [["-1", "-1"], ["-1", "3"]]
    assert config["output"] == [{"name": "y", "dataType": "TYPE_FP16", "dims": ["-1"]}]
    signature = {"inputs": [tensors[1]], "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}]}
    config = parsed(replace(release, manifest=replace(release.manifest, signature=signature)))
    assert config["maxBatchSize"] == 64 and config["output"][0]["reshape"] == {}
    # What the release has room for, and none where two requests have none, or samples see one another.
    for said, rows in (({"max": 8}, 8), ({"max": 500}, 64), ({"max": 1}, 0), ({"min": 8, "max": 8}, 0), (None, 0)):
        more = {"dims": [{"name": "batch", "min": 1, **said}]} if said is not None else {"coupled": True}
        config = parsed(replace(release, manifest=replace(release.manifest, signature={**signature, **more})))
        assert config.get("maxBatchSize", 0) == rows and ("dynamicBatching" in config) == (rows > 0)
        assert config["input"][0]["dims"] == (["3"] if rows else ["-1", "3"])
    with pytest.raises(ReleaseError, match="Triton has no complex64"):
        odd = {**signature, "inputs": [{"name": "z", "dtype": "complex64", "shape": ["batch", 1]}]}
        triton_config(replace(release, manifest=replace(release.manifest, signature=odd)), "python", 1)
    with pytest.raises(SettingsError, match="backend: expected one of onnxruntime, python"):
        triton_config(release, "tensorrt", 1)


def test_kserve_downloads_one_generation_and_no_other(
    object_store: ObjectStore, go_live: Callable[[float], Release], tmp_path: Path
) -> None:
    python = tool_python("kserve-storage==0.21.0")
    release = go_live(1.0)
    first = write_kserve(object_store, replace(release, generation=2))
    write_kserve(object_store, replace(release, generation=20))
    uri = f"s3://{object_store.bucket}/{first.prefix}"
    service = inference_service(release, uri)
    assert service["spec"]["predictor"]["model"]["storageUri"] == uri and uri.endswith("/2/")
    # What KServe runs before the server of a pod.
    script = "import sys; from kserve_storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"
    environment = {**os.environ, "S3_USE_HTTPS": "0", "S3_VERIFY_SSL": "0"}
    models = tmp_path / "mnt-models"
    argv = [str(python), "-c", script, uri, str(models)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(models).as_posix(): path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert set(found) == {f"{MODEL}/config.pbtxt", f"{MODEL}/1/model.onnx"}
    assert found[f"{MODEL}/1/model.onnx"] == release.artifact("onnx").read_bytes()
    assert b"versions: [ 1 ]" in found[f"{MODEL}/config.pbtxt"]
    # The trap: without the slash the other generation comes too.
    trap = tmp_path / "trap"
    subprocess.run([*argv[:3], uri.rstrip("/"), str(trap)], env=environment, capture_output=True, check=True)
    assert len([path for path in trap.rglob("*") if path.is_file()]) == 4
    with pytest.raises(SettingsError, match="expected a slash at the end"):
        inference_service(release, uri.rstrip("/"))
    # A release as it is: the same, for servers that want its own layout.
    whole = tmp_path / "whole"
    plain = f"s3://{object_store.bucket}/models/{MODEL}/releases/{release.id}/"
    subprocess.run([*argv[:3], plain, str(whole)], env=environment, capture_output=True, check=True)
    assert (whole / "model.onnx").read_bytes() == release.artifact("onnx").read_bytes()


def test_a_release_that_a_view_names_is_not_collected(
    object_store: ObjectStore, go_live: Callable[[float], Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = go_live(1.0)
    write_kserve(object_store, first)
    go_live(2.0)
    go_live(3.0)
    later = object_store.now() + timedelta(minutes=1)
    monkeypatch.setattr(object_store, "now", lambda: later)
    policy = Policy(keep_last=2, slowest_reader=timedelta(0))
    decided = {one.release: one for one in decide(object_store, MODEL, policy)}
    assert decided[first.id].step is Step.KEEP and "kserve/1/" in decided[first.id].why


def test_kserve_keeps_the_last_two_generations_and_what_a_service_may_still_name(
    object_store: ObjectStore, go_live: Callable[[float], Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = go_live(1.0)
    for generation in (1, 2, 3):
        write_kserve(object_store, replace(release, generation=generation))
    assert versions(object_store, f"models/{MODEL}/views/{CHANNEL}/kserve/") == {"1", "2", "3"}
    later = object_store.now() + SERVICE_MAY_LAG + timedelta(minutes=1)
    monkeypatch.setattr(object_store, "now", lambda: later)
    write_kserve(object_store, replace(release, generation=3))
    assert versions(object_store, f"models/{MODEL}/views/{CHANNEL}/kserve/") == {"2", "3"}


def test_the_command_writes_each_view(
    object_store: ObjectStore, go_live: Callable[[float], Release], tmp_path: Path
) -> None:
    release = go_live(1.0)

    def ship(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("ship"), "view", *argv]
        environment = {**os.environ, "SHIP_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = ship("triton", MODEL)
    assert done.returncode == 0, done.stderr
    assert f"--model-repository=s3://{object_store.address}/{object_store.bucket}/{TRITON.rstrip('/')} " in done.stdout
    assert versions(object_store) == {"1"} and f"version 1, release {release.id}\n" in done.stdout
    done = ship("kserve", MODEL)
    service = yaml.safe_load(done.stdout)
    assert service["metadata"]["name"] == f"{MODEL}-{CHANNEL}"
    assert service["metadata"]["annotations"]["train-and-ship/release"] == release.id
    done = ship("mlserver", MODEL, "--to", str(tmp_path / "here"))
    assert (tmp_path / "here" / "mlserver" / "models" / MODEL / "model-settings.json").is_file(), done.stderr
    done = ship("torchserve", MODEL)
    assert done.returncode == 2 and "expected one of triton, kserve, mlserver" in done.stderr


def test_the_command_says_that_a_later_version_stays_to_which_the_channel_has_moved_meanwhile(
    object_store: ObjectStore, go_live: Callable[[float], Release], capsys: pytest.CaptureFixture[str]
) -> None:
    release = go_live(1.0)
    moved_to(object_store, 9)
    write_triton(object_store, replace(release, generation=9))
    _triton(object_store, "onnxruntime", release)
    said = f"version 9, left as it was: it is later than version 1, which is release {release.id}\n"
    assert said in capsys.readouterr().out


@pytest.mark.soak
def test_mlserver_serves_the_view_and_refuses_what_it_cannot_answer(object_store: ObjectStore, tmp_path: Path) -> None:
    if sys.version_info >= (3, 13):
        pytest.skip("MLServer 1.7.1 wants Python below 3.13")
    pins = (Path(__file__).parents[1] / "support" / "mlserver-requirements.txt").read_text().splitlines()
    python = tool_environment("mlserver", [pin for pin in pins if pin[0] != "#"])
    release = kinds_release(tmp_path / "kinds")
    publish(object_store, tmp_path / "kinds", release)
    move(object_store, release)
    client = s3_client(Settings.load())
    reader = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "pulled", channel=CHANNEL, client=client)
    write_model(tmp_path / "models", reader.pull())
    port = next(port for port in free_ports(50) if all(map(port_is_free, range(port, port + 3))))
    (tmp_path / "settings.json").write_text(
        json.dumps(
            {
                **{"host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2},
                **{"model_repository_root": str(tmp_path / "models"), "parallel_workers": 0},
            }
        )
    )
    url = f"http://127.0.0.1:{port}/v2/models/{MODEL}"
    with (tmp_path / "log").open("w") as log:
        argv = [python.with_name("mlserver"), "start", str(tmp_path)]
        process = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", timeout=5).is_success:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        good = [
            {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
            {"name": "half", "datatype": "FP16", "shape": [1, 2], "data": [1, 2]},
            {"name": "id", "datatype": "INT64", "shape": [1], "data": [9]},
            {"name": "flag", "datatype": "BOOL", "shape": [1], "data": [True]},
        ]
        answer = httpx.post(f"{url}/infer", json={"inputs": good})
        outputs = {item["name"]: (item["shape"], item["data"]) for item in answer.json()["outputs"]}
        assert outputs == {"log": ([1], [0]), "same": ([1, 2], [1, 2]), "row": ([1, 1], [90]), "not": ([1], [False])}
        for place, data, said in (
            (0, [-1], "NaN or infinity, which MLServer cannot answer"),
            (1, [70000, 0], "expected at most 65504"),
            (2, [1.9], "expected a whole number for INT64, got 1.9"),
            (2, [10], "[-10,9]"),
            (3, ["true"], "expected true or false"),
        ):
            inputs = [{**item, "data": data} if number == place else item for number, item in enumerate(good)]
            answer = httpx.post(f"{url}/infer", json={"inputs": inputs})
            assert answer.status_code == 400 and said in answer.json()["error"], answer.text
    finally:
        process.terminate()
        process.wait(PATIENCE)
