"""Model versions in MLflow: one run and one version for a release, whatever its formats.

The only module that imports mlflow, and only inside functions, because the import costs more than a second:
call `warm_up` in a thread while something else is busy.

The version is created last, by one request that carries its tags and description. Its existence means
complete, and nothing has to be taken back when an earlier step fails.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import json
import os
import platform
import re
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

import httpx
import yaml

from infra.errors import ReleaseError, ServiceError, SettingsError
from registry.description import shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.models import Model, ModelSignature

DESCRIPTION_LIMIT = 5000
"""Characters that MLflow's database keeps of a version's description."""
TAG_FLOW_RUN = "flow_run_id"
TAG_RELEASE = "release"
TAG_COMMIT = "git_commit"

_BATCH_OF_METRICS = 1000
_BATCH_OF_PARAMS = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 5000
_DIGEST_LENGTH = 36

_ENVIRONMENT_DEFAULTS = {
    # mlflow's own default is 7 retries over more than two minutes. These give up about 8 s after a server has
    # gone, yet outlast its restart.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0.3",
    # Otherwise every finished run costs one more request and prints two lines.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Usage statistics are sent to the makers of mlflow unless somebody asks for that.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_NEEDS_ONNX = (
    "This version has no ONNX file, and `mlflow.pyfunc.load_model` needs one. Its files can be fetched with "
    "`mlflow.artifacts.download_artifacts`."
)


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """Everything that MLflow is told about one release."""

    model: str
    """Name of the registered model, and of the experiment that holds its runs."""
    folder: Path
    """Folder with the artifacts."""
    formats: Mapping[str, str]
    """Format to file name in the folder: `{"onnx": "model.onnx", ...}`. Without `onnx` pyfunc cannot load it."""
    extra_files: Sequence[str]
    """Other file names in the folder that belong to the version."""
    signature: Mapping[str, Sequence[Mapping[str, Any]]]
    """`inputs` and `outputs`: items with `name`, `dtype` and `shape`; a string in a shape is a dynamic dimension."""
    params: Mapping[str, str | int | float | bool]
    history: Sequence[Mapping[str, float]]
    """One mapping an epoch: `epoch`, `time` (unix seconds) and metrics."""
    metrics: Mapping[str, float]
    """Final metrics, measured on the artifacts."""
    dataset_name: str
    dataset_digest: str
    """Fingerprint of the training data, hexadecimal."""
    dataset_source: str
    """Where the data comes from, in words, as a reference or as a URI."""
    dataset_profile: Mapping[str, Any]
    """Sizes of the data: `{"train_samples": 1437}`."""
    tags: Mapping[str, str]
    """`git_commit`, `flow_run_id`, `release`, `sha256.<file>` and whatever else is worth searching for."""
    description: str
    """Markdown; the first line is plain text."""
    run_name: str
    started: float | None = None
    """When the work began, unix seconds; by default the end of the first epoch."""


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version that exists in MLflow."""

    version: str
    """MLflow's number of it: `"3"`."""
    run_id: str
    model_uri: str
    """`models:/<model>/<version>`."""
    version_url: str
    """Its page, or an empty string when the tracking URI is no web address."""
    run_url: str


def warm_up() -> None:
    """Import mlflow (1 to 2 s)."""
    _import_mlflow()


def check_reachable(tracking_uri: str) -> None:
    """Ask the server for its health, within 3 s and without importing mlflow.

    Raises ServiceError. A tracking URI that is no web address (a database) has nothing to ask.
    """
    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        return
    shown = _without_credentials(tracking_uri)
    try:
        answer = httpx.get(
            f"{tracking_uri.rstrip('/')}/health",
            timeout=httpx.Timeout(2, connect=1),
            verify=_tls_verification(),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise ServiceError(
            f"MLflow at {shown} does not answer ({reason}). Start it with `ship up`, or set MLFLOW_TRACKING_URI."
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise ServiceError(
            f"expected MLflow at {shown}, got status {answer.status_code} from {shown}/health. "
            "Is another program listening there? Set MLFLOW_TRACKING_URI or SHIP_MLFLOW_PORT."
        )


def find_version(model: str, flow_run_id: str, release: str, tracking_uri: str) -> RegisteredVersion | None:
    """The version that this flow run registered for this release, or None. Raises ServiceError."""
    with _translated(f"looking for a version of {model}", tracking_uri):
        return _find(_client(tracking_uri), model, flow_run_id, release, tracking_uri)


def register(record: VersionRecord, tracking_uri: str) -> RegisteredVersion:
    """Log a run and create one version with all files of the record. Writes to MLflow.

    The same flow run and release (tags `flow_run_id` and `release`) are registered once: a second call returns
    the first one's version. When a step fails, the run ends as FAILED and there is no version.

    Raises ReleaseError for a missing file, SettingsError when MLflow denies access, ServiceError for the rest.
    """
    files = _files(record)
    with _translated(f"registering {record.model}", tracking_uri):
        client = _client(tracking_uri)
        flow_run, release = record.tags.get(TAG_FLOW_RUN), record.tags.get(TAG_RELEASE)
        if flow_run and release and (found := _find(client, record.model, flow_run, release, tracking_uri)):
            return found
        experiment_id = _experiment(client, record.model)
        run_id = _create_run(client, experiment_id, record)
        with _failed_unless_finished(client, run_id):
            model_id = _log_model(client, experiment_id, run_id, record, files)
            _log_run(client, run_id, model_id, record)
            client.set_terminated(run_id, "FINISHED")
            version = _create_version(client, run_id, model_id, record)
    return _registered(record.model, version, run_id, experiment_id, tracking_uri)


def set_alias(model: str, alias: str, version: str, tracking_uri: str) -> None:
    """Point `models:/<model>@<alias>` at a version, in one step. Writes to MLflow. Raises ServiceError."""
    with _translated(f"setting alias {alias} of {model} to version {version}", tracking_uri):
        _client(tracking_uri).set_registered_model_alias(model, alias, version)


# ---- the steps of a registration


def _files(record: VersionRecord) -> dict[str, Path]:
    """Name in the version → file. Raises ReleaseError for a file that is not there."""
    names = dict.fromkeys([*record.formats.values(), *record.extra_files])
    # An ONNX file of more than 2 GB keeps its weights beside it.
    if "onnx" in record.formats and (record.folder / f"{record.formats['onnx']}.data").is_file():
        names[f"{record.formats['onnx']}.data"] = None
    missing = [name for name in names if not (record.folder / name).is_file()]
    if missing:
        raise ReleaseError(f"expected {', '.join(missing)} in {record.folder}, found no such file; run export again")
    return {name: (record.folder / name).absolute() for name in names}


def _experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # The tag answers the question that the page would otherwise ask each visitor.
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise SettingsError(
            f"MLflow experiment {name!r} was deleted; restore it with `mlflow experiments restore` or rename the job"
        )
    return str(found.experiment_id)


def _create_run(client: MlflowClient, experiment_id: str, record: VersionRecord) -> str:
    started = record.started or (record.history[0].get("time") if record.history else None) or time.time()
    run = client.create_run(
        experiment_id,
        start_time=_milliseconds(started),
        tags=_tags(record),
        run_name=record.run_name,
    )
    return str(run.info.run_id)


def _log_model(
    client: MlflowClient, experiment_id: str, run_id: str, record: VersionRecord, files: Mapping[str, Path]
) -> str:
    """Upload the files as an MLflow model and return its id.

    `mlflow.onnx.log_model` would parse and write the ONNX file anew and copy every other file. Here the upload
    is byte for byte the file that was validated, so its sha256 holds, and nothing is copied.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    logged = client.create_logged_model(
        experiment_id,
        name="model",
        source_run_id=run_id,
        tags=_tags(record),
        params=_params(record),
        model_type="onnx" if "onnx" in record.formats else "",
    )
    model_id = str(logged.model_id)
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, _last_epoch(record))])
        with tempfile.TemporaryDirectory(prefix="mlflow-model-") as name:
            staging = Path(name)
            generated = _write_model_files(
                staging, _mlmodel(record, logged.artifact_location, model_id, run_id, files), record
            )
            if clash := sorted(generated & files.keys()):
                raise ValueError(f"file names reserved by MLflow: {', '.join(clash)}")
            for file, path in files.items():
                (staging / file).parent.mkdir(parents=True, exist_ok=True)
                (staging / file).symlink_to(path)
            client.log_model_artifacts(model_id, str(staging))
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    except BaseException:
        with contextlib.suppress(Exception):
            check_reachable(client.tracking_uri)
            client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)
        raise
    return model_id


def _mlmodel(record: VersionRecord, location: str, model_id: str, run_id: str, files: Mapping[str, Path]) -> Model:
    """The description of the files that pyfunc reads."""
    from mlflow.models import Model

    onnx_file = record.formats.get("onnx")
    model = Model(
        artifact_path=location,
        run_id=run_id,
        model_uuid=model_id,
        model_id=model_id,
        signature=_signature(record.signature),
        metadata={"formats": dict(record.formats), TAG_RELEASE: record.tags.get(TAG_RELEASE, "")},
        model_size_bytes=sum(path.stat().st_size for path in files.values()),
    )
    if onnx_file:
        model.add_flavor(
            "python_function",
            loader_module="mlflow.onnx",
            data=onnx_file,
            env={"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            python_version=platform.python_version(),
        )
        model.add_flavor(
            "onnx",
            onnx_version=importlib.metadata.version("onnx"),
            data=onnx_file,
            providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
            onnx_session_options=None,
            code=None,
        )
    return model


def _write_model_files(folder: Path, model: Model, record: VersionRecord) -> set[str]:
    """Write `MLmodel` and the environment to load it in; returns the file names."""
    model.save(str(folder / "MLmodel"))
    if "onnx" not in record.formats:
        return {"MLmodel"}
    # Pinned here, because mlflow's own inference loads the model in another process.
    packages = ("mlflow", "onnx", "onnxruntime", "numpy")
    requirements = [f"{package}=={importlib.metadata.version(package)}" for package in packages]
    python = platform.python_version()
    environment = {
        "python": python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": ["-r requirements.txt"],
    }
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))
    (folder / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False))
    return {"MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml"}


def _log_run(client: MlflowClient, run_id: str, model_id: str, record: VersionRecord) -> None:
    """Log params, metrics per epoch, final metrics and the data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    metrics = _metrics(record, model_id)
    params = [Param(key, value) for key, value in _params(record).items()]
    client.log_batch(run_id, metrics=metrics[:_BATCH_OF_METRICS], params=params[:_BATCH_OF_PARAMS])
    for start in range(_BATCH_OF_METRICS, len(metrics), _BATCH_OF_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH_OF_METRICS])
    for start in range(_BATCH_OF_PARAMS, len(params), _BATCH_OF_PARAMS):
        client.log_batch(run_id, params=params[start : start + _BATCH_OF_PARAMS])
    dataset = Dataset(
        name=record.dataset_name,
        digest=record.dataset_digest[:_DIGEST_LENGTH],
        source_type="code",
        source=json.dumps({"tags": {"mlflow.source.name": record.dataset_source}}),
        # The digest above may be cut to what MLflow's database keeps.
        profile=json.dumps({**record.dataset_profile, "digest": record.dataset_digest}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _create_version(client: MlflowClient, run_id: str, model_id: str, record: VersionRecord) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(record.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    description = record.description
    if "onnx" not in record.formats:
        first, _, rest = description.partition("\n")
        description = f"{first}\n\n{_NEEDS_ONNX}\n{rest}"
    version = client.create_model_version(
        record.model,
        source=f"models:/{model_id}",
        run_id=run_id,
        tags=dict(record.tags),
        description=shorten(description, DESCRIPTION_LIMIT),
        # The open source server answers when the version is ready; waiting would only log a line.
        await_creation_for=0,
        model_id=model_id,
    )
    return str(version.version)


# ---- values


def _signature(signature: Mapping[str, Sequence[Mapping[str, Any]]]) -> ModelSignature | None:
    """None when numpy has no such dtype (bfloat16): MLflow cannot check such a tensor."""
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(tensors: Sequence[Mapping[str, Any]]) -> Schema:
        return Schema(
            [
                TensorSpec(
                    numpy.dtype(tensor["dtype"]),
                    tuple(-1 if isinstance(dim, str) else dim for dim in tensor["shape"]),
                    name=tensor["name"],
                )
                for tensor in tensors
            ]
        )

    try:
        return ModelSignature(inputs=schema(signature["inputs"]), outputs=schema(signature["outputs"]))
    except TypeError:
        return None


def _metrics(record: VersionRecord, model_id: str) -> list[Metric]:
    """Every epoch's metrics for the run; the last epoch's and the final ones for the model as well."""
    from mlflow.entities import Metric

    now = time.time()
    metrics = []
    for index, epoch in enumerate(record.history, start=1):
        owner = model_id if index == len(record.history) else None
        step, timestamp = int(epoch.get("epoch", index)), _milliseconds(epoch.get("time", now))
        for name, value in epoch.items():
            if name not in ("epoch", "time"):
                metrics.append(Metric(_key(name), float(value), timestamp, step, model_id=owner))
    for name, value in record.metrics.items():
        metrics.append(Metric(_key(name), float(value), _milliseconds(now), _last_epoch(record), model_id=model_id))
    return metrics


def _last_epoch(record: VersionRecord) -> int:
    return int(record.history[-1].get("epoch", len(record.history))) if record.history else 0


def _tags(record: VersionRecord) -> dict[str, str]:
    """Tags of the run and of its model; the checksums are on the version, where a reader compares them."""
    tags = {key: value for key, value in record.tags.items() if not key.startswith("sha256.")}
    tags |= {
        "mlflow.source.name": "train-and-ship",
        "mlflow.source.type": "JOB",
        "mlflow.user": _user(),
        "mlflow.note.content": record.description,
    }
    if commit := record.tags.get(TAG_COMMIT):
        tags["mlflow.source.git.commit"] = commit
    return {key: shorten(value, _TAG_LENGTH) for key, value in tags.items()}


def _params(record: VersionRecord) -> dict[str, str]:
    return {_key(name): str(value)[:_PARAM_LENGTH] for name, value in record.params.items()}


def _key(name: str) -> str:
    """MLflow refuses other characters in the names of metrics and params."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _user() -> str:
    # A container may run under a number that has no name.
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return "unknown"


# ---- talking to the server


def _import_mlflow() -> None:
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.models
    import mlflow.types  # noqa: F401


def _client(tracking_uri: str) -> MlflowClient:
    """A client of its own for each call, so that mlflow's global state stays the caller's."""
    _import_mlflow()
    import mlflow
    from mlflow import MlflowClient

    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        # Used without a server, the registry asks the global tracking store about the model.
        mlflow.set_tracking_uri(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri)


def _find(
    client: MlflowClient, model: str, flow_run_id: str, release: str, tracking_uri: str
) -> RegisteredVersion | None:
    conditions = {"name": model, f"tags.{TAG_FLOW_RUN}": flow_run_id, f"tags.{TAG_RELEASE}": release}
    if any("'" in value for value in conditions.values()):
        raise ValueError(f"expected no quotation mark in {conditions}")
    found = client.search_model_versions(
        " and ".join(f"{name} = '{value}'" for name, value in conditions.items()),
        max_results=1,
        order_by=["version_number ASC"],
    )
    if not found:
        return None
    run = client.get_run(str(found[0].run_id)).info
    return _registered(model, str(found[0].version), run.run_id, run.experiment_id, tracking_uri)


def _registered(model: str, version: str, run_id: str, experiment_id: str, tracking_uri: str) -> RegisteredVersion:
    site = _without_credentials(tracking_uri) if urlsplit(tracking_uri).scheme in ("http", "https") else ""
    return RegisteredVersion(
        version=version,
        run_id=run_id,
        model_uri=f"models:/{model}/{version}",
        version_url=f"{site}/#/models/{quote(model, safe='')}/versions/{version}" if site else "",
        run_url=f"{site}/#/experiments/{experiment_id}/runs/{run_id}" if site else "",
    )


@contextlib.contextmanager
def _failed_unless_finished(client: MlflowClient, run_id: str) -> Iterator[None]:
    """End the run as FAILED when the block raises, also when it is cancelled."""
    try:
        yield
    except BaseException:
        # Not worth another round of retries when the server is gone: the run then stays unfinished.
        with contextlib.suppress(Exception):
            check_reachable(client.tracking_uri)
            client.set_terminated(run_id, "FAILED")
        raise


@contextlib.contextmanager
def _translated(action: str, tracking_uri: str) -> Iterator[None]:
    """Turn what mlflow raises into our errors. ValueError and the like are our own bugs and pass."""
    _import_mlflow()
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        shown = _without_credentials(tracking_uri)
        try:
            check_reachable(tracking_uri)
        except ServiceError as unreachable:
            raise ServiceError(f"{action}: {unreachable}") from error
        reason = str(error).partition("\n")[0]
        if getattr(error, "error_code", "") in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise SettingsError(
                f"{action}: MLflow at {shown} denied access ({reason}); "
                "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        raise ServiceError(f"{action}: MLflow at {shown} answered: {reason}") from error


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return urlunsplit(parts).rstrip("/") if parts.scheme in ("http", "https") else parts.scheme or uri


def _tls_verification() -> bool | ssl.SSLContext:
    """The same certificates that mlflow trusts."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return False
    bundle = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("REQUESTS_CA_BUNDLE")
    if not bundle:
        return True
    return ssl.create_default_context(cafile=bundle)
