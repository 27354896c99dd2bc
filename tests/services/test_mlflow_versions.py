"""MLflow versions against a real MLflow server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy
import onnxruntime
import pytest
import torch
from mlflow import MlflowClient

from tests.support.ports import free_port
from tests.support.stack_servers import MlflowServer
from train_and_ship.infra.errors import ReleaseError, ServiceError, SettingsError
from train_and_ship.registry.tracking import versions as mlflow_versions
from train_and_ship.registry.tracking.connection import AwayError, check_reachable
from train_and_ship.registry.tracking.rest import model_registry
from train_and_ship.registry.tracking.versions import RegisteredVersion, VersionRecord

FORMATS = {"torchscript": "model.torchscript", "onnx": "model.onnx", "pt2": "model.pt2"}
EXTRA = ["verdicts.json", "golden.safetensors"]
EPOCHS = 3


@pytest.fixture(scope="module")
def server(mlflow_server: MlflowServer) -> str:
    return mlflow_server.url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts, exported from a small model whose batch size is free."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    image_B1HW = torch.randn(2, 1, 8, 8)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (image_B1HW,), dynamic_shapes=dynamic), folder / "model.pt2")
    torch.jit.trace(model, image_B1HW).save(folder / "model.torchscript")
    torch.onnx.export(
        model,
        (image_B1HW,),
        folder / "model.onnx",
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=dynamic,
        external_data=False,
        verbose=False,
    )
    (folder / "verdicts.json").write_text('{"passed": true}')
    (folder / "golden.safetensors").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="module")
def registered(server: str, folder: Path) -> RegisteredVersion:
    return mlflow_versions.register(record(folder), server)


def record(folder: Path, **changes: Any) -> VersionRecord:
    files = [*FORMATS.values(), *EXTRA]
    sha256 = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    base = VersionRecord(
        model="digits",
        folder=folder,
        formats=FORMATS,
        extra_files=EXTRA,
        signature={
            "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}],
        },
        params={"epochs": EPOCHS, "optimizer": "adam", "deterministic": True},
        history=[{"epoch": n, "train_loss": 1 / n, "time": 1_700_000_000.0 + n} for n in range(1, EPOCHS + 1)],
        metrics={"onnx.accuracy": 0.9778, "top-5 (%)": 99.5},
        dataset_name="digits:build_dataset",
        dataset_digest="ab" * 32,
        dataset_source="digits:build_dataset",
        dataset_profile={"train_samples": 1437},
        tags={"git_commit": "3f9a1c2", "flow_run_id": "run-1", "release": "r-1", "sha256": json.dumps(sha256)},
        description="digits r-1: all gates passed.\n\n### Parity\n",
        run_name="r-1",
    )
    return dataclasses.replace(base, **changes)


def versions(url: str, model: str) -> list[str]:
    return [version.version for version in MlflowClient(url).search_model_versions(f"name = '{model}'")]


def newest_run(url: str, experiment: str) -> Any:
    client = MlflowClient(url)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return client.search_runs([found.experiment_id])[0]


def test_a_version_holds_every_format_and_file_byte_for_byte(
    server: str, folder: Path, registered: RegisteredVersion, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(server)
    local = Path(mlflow.artifacts.download_artifacts(registered.model_uri, dst_path=str(tmp_path)))
    hashes = json.loads(MlflowClient(server).get_model_version("digits", registered.version).tags["sha256"])
    for name in [*FORMATS.values(), *EXTRA]:
        content = (local / name).read_bytes()
        assert content == (folder / name).read_bytes()
        assert hashes[name] == hashlib.sha256(content).hexdigest()


def test_the_run_has_params_and_metrics_of_every_epoch(server: str, registered: RegisteredVersion) -> None:
    client = MlflowClient(server)
    run = client.get_run(registered.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "3", "optimizer": "adam", "deterministic": "True"}
    history = client.get_metric_history(registered.run_id, "train_loss")
    assert [(metric.step, metric.value, metric.timestamp) for metric in history] == [
        (n, 1 / n, (1_700_000_000 + n) * 1000) for n in range(1, EPOCHS + 1)
    ]
    assert run.data.metrics["onnx.accuracy"] == 0.9778
    assert run.data.metrics["top-5 ___"] == 99.5


def test_the_model_has_the_metrics_of_the_epoch_that_ships_and_the_run_all_of_them(server: str, folder: Path) -> None:
    tags = {"release": "r-best", "flow_run_id": "run-best"}
    version = mlflow_versions.register(record(folder, model="best", shipped_epoch=2, tags=tags), server)
    client = MlflowClient(server)
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert {metric.key: (metric.value, metric.step) for metric in logged.metrics or []} == {
        "train_loss": (1 / 2, 2), "onnx.accuracy": (0.9778, 2), "top-5 ___": (99.5, 2),
    }  # fmt: skip
    history = client.get_metric_history(version.run_id, "train_loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert output.step == 2 and client.get_run(version.run_id).data.metrics["train_loss"] == 1 / 3


def test_final_metrics_are_shown_on_the_model_page(server: str, registered: RegisteredVersion) -> None:
    client = MlflowClient(server)
    model_id = client.get_run(registered.run_id).outputs.model_outputs[0].model_id
    logged = client.get_logged_model(model_id)
    assert {metric.key: metric.value for metric in logged.metrics or []} == {
        "train_loss": 1 / EPOCHS,
        "onnx.accuracy": 0.9778,
        "top-5 ___": 99.5,
    }


def test_the_dataset_is_an_input_of_the_run_with_its_digest(server: str, registered: RegisteredVersion) -> None:
    (logged,) = MlflowClient(server).get_run(registered.run_id).inputs.dataset_inputs
    assert logged.dataset.name == "digits:build_dataset"
    assert logged.dataset.digest == ("ab" * 32)[:36]
    assert ("ab" * 32) in logged.dataset.profile
    assert "1437" in logged.dataset.profile


def test_the_version_and_the_run_can_be_searched_by_tag(server: str, registered: RegisteredVersion) -> None:
    client = MlflowClient(server)
    version = client.get_model_version("digits", registered.version)
    assert version.tags["git_commit"] == "3f9a1c2"
    assert version.tags["flow_run_id"] == "run-1"
    assert version.tags["release"] == "r-1"
    assert version.run_id == registered.run_id
    run = client.get_run(registered.run_id)
    assert run.data.tags["mlflow.source.git.commit"] == "3f9a1c2"
    assert run.data.tags["flow_run_id"] == "run-1"


def test_the_description_starts_with_a_plain_line(server: str, registered: RegisteredVersion) -> None:
    description = MlflowClient(server).get_model_version("digits", registered.version).description
    assert description is not None
    assert description.splitlines()[0] == "digits r-1: all gates passed."
    assert f"[Report of the run]({registered.report_url})" in description
    about = MlflowClient(server).get_registered_model("digits").description
    assert about is not None and "release of digits" in about and "`champion` is what is live" in about


def test_what_the_description_shows_loads_the_model_and_asks_it(server: str, registered: RegisteredVersion) -> None:
    mlflow.set_tracking_uri(server)
    description = MlflowClient(server).get_model_version("digits", registered.version).description or ""
    (snippet,) = re.findall(r"```python\n(.*?)```", description, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace("model.predict", "answer = model.predict"), names)
    assert names["answer"]["logits"].shape == (1, 10)


def test_pages_of_version_and_run_are_linked(server: str, registered: RegisteredVersion) -> None:
    # MLflow shows the pages for prompts to a new visitor otherwise.
    training = "?workflowType=machine_learning"
    assert registered.version_url == f"{server}/#/models/digits/versions/{registered.version}{training}"
    assert registered.run_url.endswith(f"/runs/{registered.run_id}{training}")
    assert registered.report_url.endswith(f"/runs/{registered.run_id}/artifacts/report.html{training}")


def test_the_alias_loads_and_predicts_like_onnxruntime(
    server: str, folder: Path, registered: RegisteredVersion
) -> None:
    model_registry(server).set_alias("digits", "champion", registered.version)
    mlflow.set_tracking_uri(server)
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    assert [tensor.name for tensor in model.metadata.signature.inputs] == ["image"]
    assert [tensor.name for tensor in model.metadata.signature.outputs] == ["logits"]
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    image_B1HW = numpy.random.default_rng(0).standard_normal((5, 1, 8, 8), dtype=numpy.float32)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(["logits"], {"image": image_B1HW})
    for given in ({"image": image_B1HW}, image_B1HW):
        predicted = model.predict(given)
        assert list(predicted) == ["logits"]
        numpy.testing.assert_array_equal(predicted["logits"], expected)


def test_an_alias_moves_to_another_version(server: str, folder: Path) -> None:
    first, second = (
        mlflow_versions.register(record(folder, model="moving", tags={"release": release}), server)
        for release in ("a", "b")
    )
    for version in (first, second):
        model_registry(server).set_alias("moving", "champion", version.version)
        found = MlflowClient(server).get_model_version_by_alias("moving", "champion")
        assert found.version == version.version


def test_a_release_is_registered_once_by_a_flow_run(server: str, folder: Path) -> None:
    given = record(folder, model="retried")
    assert model_registry(server).versions("retried", "r-1") == []
    first = mlflow_versions.register(given, server)
    assert mlflow_versions.register(given, server) == first
    assert model_registry(server).versions("retried", "r-1") == versions(server, "retried") == [first.version]
    other = record(folder, model="retried", tags={"flow_run_id": "run-2", "release": "r-1"})
    assert mlflow_versions.register(other, server).version not in ("", first.version)


def test_without_onnx_a_version_still_holds_all_files_and_says_what_is_missing(
    server: str, folder: Path, tmp_path: Path
) -> None:
    given = record(folder, model="no-onnx", formats={"pt2": "model.pt2"})
    found = mlflow_versions.register(given, server)
    mlflow.set_tracking_uri(server)
    local = Path(mlflow.artifacts.download_artifacts(found.model_uri, dst_path=str(tmp_path)))
    assert {"model.pt2", *EXTRA} <= {path.name for path in local.iterdir()}
    description = MlflowClient(server).get_model_version("no-onnx", found.version).description
    assert description is not None
    assert description.startswith("digits r-1: all gates passed.\n")
    assert "no ONNX file" in description


def test_a_long_description_is_cut_to_what_the_database_keeps(server: str, folder: Path) -> None:
    text = "plain\n" + "| a | b |\n" * 2000
    found = mlflow_versions.register(record(folder, model="long", description=text), server)
    description = MlflowClient(server).get_model_version("long", found.version).description
    assert description is not None
    assert len(description) <= mlflow_versions.DESCRIPTION_LIMIT
    assert description.rstrip().endswith("(shortened: the version's files hold the full report)")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model": "half", "dataset_name": "x" * 501}, id="logging the data is refused"),
        pytest.param({"model": "half:way"}, id="the last step, creating the version, is refused"),
    ],
)
def test_when_a_step_fails_the_run_is_failed_and_there_is_no_version(
    server: str, folder: Path, changes: dict[str, Any]
) -> None:
    given = record(folder, **changes)
    with pytest.raises(ServiceError, match=f"registering {given.model}"):
        mlflow_versions.register(given, server)
    assert newest_run(server, given.model).info.status == "FAILED"
    assert versions(server, given.model) == []


def test_an_interrupted_registration_leaves_a_failed_run(
    server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_versions, "_log_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlflow_versions.register(record(folder, model="interrupted"), server)
    assert newest_run(server, "interrupted").info.status == "FAILED"
    assert versions(server, "interrupted") == []


def test_a_missing_file_is_named_before_anything_is_written(server: str, folder: Path) -> None:
    given = record(folder, model="missing", extra_files=["absent.json"])
    with pytest.raises(ReleaseError, match=r"expected absent\.json"):
        mlflow_versions.register(given, server)
    assert MlflowClient(server).get_experiment_by_name("missing") is None


def test_a_server_that_is_not_there_is_reported_within_three_seconds() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(AwayError, match=rf"MLflow at {url} does not answer.*`ship up`"):
        check_reachable(url)
    assert time.monotonic() - started < 3


def test_a_server_that_accepts_but_never_answers_is_reported_within_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(AwayError, match="does not answer"):
            check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 3.5


def test_another_program_on_the_port_is_not_taken_for_mlflow() -> None:
    with answering(lambda path: 403) as url, pytest.raises(ServiceError, match="got status 403") as raised:
        check_reachable(url)
    # It will not become one.
    assert not isinstance(raised.value, AwayError)


def test_a_server_that_restarts_behind_a_proxy_is_away_and_a_wrong_name_is_wrong() -> None:
    with answering(lambda path: 503) as url, pytest.raises(AwayError, match="what stands before it says 503"):
        check_reachable(url)
    with pytest.raises(ServiceError, match="does not answer") as raised:
        check_reachable("http://nowhere.invalid:5000")
    assert not isinstance(raised.value, AwayError)


def test_a_registration_that_meets_nobody_says_that_the_server_is_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would try for 8 s.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(AwayError, match=rf"registering away: MLflow at {url} does not answer"):
        mlflow_versions.register(record(folder, model="away"), url)


def test_a_reachable_server_is_reported_as_nothing(server: str) -> None:
    check_reachable(server)
    check_reachable("sqlite:///mlflow.db")


def test_denied_access_names_the_credentials_and_hides_those_in_the_address(folder: Path) -> None:
    with answering(lambda path: 200 if path == "/health" else 401) as url:
        address = url.replace("http://", "http://ann:secret@")
        with pytest.raises(SettingsError, match="MLFLOW_TRACKING_USERNAME") as raised:
            mlflow_versions.register(record(folder), address)
    assert "secret" not in str(raised.value)


def test_a_server_that_goes_away_midway_is_reported_within_twelve_seconds(server: str, folder: Path) -> None:
    with Forwarder(server, closes_at=b"log-batch") as url:
        started = time.monotonic()
        with pytest.raises(ServiceError, match=r"registering leaving: MLflow at .* does not answer"):
            mlflow_versions.register(record(folder, model="leaving"), url)
        assert time.monotonic() - started < 12
    assert versions(server, "leaving") == []


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = (
        "import sys, train_and_ship.registry.tracking.versions\n"
        "assert not {'mlflow', 'torch', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- servers that misbehave


class answering:
    """A web server whose status depends on the path alone."""

    def __init__(self, status: Any) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status(self.path.partition("?")[0]))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Forwarder:
    """Passes TCP connections on to `url` until a request contains `closes_at`; from then on nothing listens."""

    def __init__(self, url: str, closes_at: bytes) -> None:
        self.target = int(url.rpartition(":")[2])
        self.closes_at = closes_at
        self.listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._accept, daemon=True).start()
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pump, args=(upstream, client, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(client, upstream, self.closes_at), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, closes_at: bytes | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if closes_at and closes_at in data:
                    # A blocked accept() keeps a closed socket listening; shutdown wakes it.
                    self.listener.shutdown(socket.SHUT_RDWR)
                    self.listener.close()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
