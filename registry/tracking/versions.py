"""Model versions in MLflow: one version for a release, whatever its formats, made by the run that trained it.

The version is created last, by one request that carries its tags and description. Its existence means
complete, and nothing has to be taken back when an earlier step fails.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import yaml

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.text import shorten
from train_and_ship.registry.tracking.connection import (
    EXISTS,
    check_reachable,
    connect,
    passing_over,
    translated,
    without_credentials,
)
from train_and_ship.registry.tracking.curves import Point, history_points, position
from train_and_ship.registry.tracking.rest import TAG_RELEASE
from train_and_ship.registry.tracking.runs import (
    BATCH_OF_METRICS,
    REPORT,
    TAG_FLOW_RUN,
    VIEW,
    OpenRun,
    RunRecord,
    end_with,
    metrics_of,
    missing_points,
    open_with,
    page_of_report,
    params_of,
    run_tags,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model, ModelSignature

DESCRIPTION_LIMIT = 5000
"""Characters that MLflow's database keeps of a version's description."""

_DIGEST_LENGTH = 36

_ABOUT = (
    "Each version is a release of {model}: all formats, what was proven of them, and the report of the run. The alias "
    "`champion` is what is live on the channel prod, `previous` what was before, `challenger` a candidate that did not "
    "replace it; other channels have an alias of their own name."
)
_NEEDS_ONNX = (
    "This version has no ONNX file, and `mlflow.pyfunc.load_model` needs one. Its files can be fetched with "
    "`mlflow.artifacts.download_artifacts`."
)


@dataclass(frozen=True, kw_only=True)
class VersionRecord(RunRecord):
    """Everything that MLflow is told about one release, and about the run that it comes from.

    Its tags are `git_commit`, `flow_run_id`, `release`, `sha256` and whatever else is worth searching for.
    """

    folder: Path
    """Folder with the artifacts."""
    formats: Mapping[str, str]
    """Format to file name in the folder: `{"onnx": "model.onnx", ...}`. Without `onnx` pyfunc cannot load it."""
    extra_files: Sequence[str]
    """Other file names in the folder that belong to the version."""
    signature: Mapping[str, Any]
    """`inputs` and `outputs`: items with `name`, `dtype` and `shape`; a string in a shape is a dynamic dimension;
    `labels` where the columns of the first output have names."""
    history: Sequence[Mapping[str, float]]
    """One mapping an epoch or report: `epoch` or `step`, `time` (unix seconds) and metrics."""
    shipped_epoch: int = 0
    """Which of them the model is of; 0 for the last."""
    points: Sequence[Point] = ()
    """What else was measured while it trained; each curve in order."""
    metrics: Mapping[str, float]
    """Final metrics, measured on the artifacts."""
    dataset_name: str
    dataset_digest: str
    """Fingerprint of the training data, hexadecimal."""
    dataset_source: str
    """Where the data comes from, in words, as a reference or as a URI."""
    dataset_profile: Mapping[str, Any]
    """Sizes of the data: `{"train_samples": 1437}`."""

    @property
    def began(self) -> float:
        """`started`, or the end of the first epoch where nobody said."""
        first = self.history[0].get("time") if self.history else None
        return first if self.started is None and first else super().began


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

    @property
    def report_url(self) -> str:
        """The report's page; empty as `run_url` is."""
        return page_of_report(self.run_url)


def register(record: VersionRecord, tracking_uri: str) -> RegisteredVersion:
    """Complete the flow run's run and create one version with all files of the record. Writes to MLflow.

    The run is continued when there is one with the tag `flow_run_id`: what it lacks of the history and points is
    added, nothing twice. The same flow run and release (tags `flow_run_id` and `release`) are registered once: a
    second call returns the first one's version. When a step fails, the run ends as FAILED and there is no version.

    Raises ReleaseError for a missing file, SettingsError when MLflow denies access, ServiceError for the rest.
    """
    files = _files(record)
    with translated(f"registering {record.model}", tracking_uri):
        client = connect(tracking_uri)
        flow_run, release = record.tags.get(TAG_FLOW_RUN), record.tags.get(TAG_RELEASE)
        if flow_run and release and (found := _find(client, record.model, flow_run, release, tracking_uri)):
            return found
        run = open_with(client, record)
        with _failed_unless_finished(client, run.run_id):
            model_id = _log_model(client, run.experiment_id, run.run_id, record, files)
            _log_run(client, run, model_id, record)
            client.set_terminated(run.run_id, "FINISHED")
            report = page_of_report(_run_url(run.run_id, run.experiment_id, tracking_uri))
            version = _create_version(client, run.run_id, model_id, record, report)
    return _registered(record.model, version, run.run_id, run.experiment_id, tracking_uri)


def attach_report(version: RegisteredVersion, model: str, report: str, tracking_uri: str) -> None:
    """The file REPORT of a version's run, over an earlier one. Writes to MLflow.

    Args:
        version: which one.
        model: the registered model.
        report: an HTML document.
        tracking_uri: MLflow's.

    Raises:
        SettingsError: MLflow denies access.
        ServiceError: MLflow does not answer.
    """
    with translated(f"adding the report of {model} version {version.version}", tracking_uri):
        connect(tracking_uri).log_text(version.run_id, report, REPORT)


def tag_decision(version: RegisteredVersion, model: str, decision: str, why: str, tracking_uri: str) -> None:
    """Tags `decision` and `decision_why` of a version. Writes to MLflow.

    Args:
        version: which one.
        model: the registered model.
        decision: `promoted`, `kept`, ….
        why: the reason in words.
        tracking_uri: MLflow's.

    Raises:
        SettingsError: MLflow denies access.
        ServiceError: MLflow does not answer.
    """
    with translated(f"recording the decision on {model} version {version.version}", tracking_uri):
        client = connect(tracking_uri)
        client.set_model_version_tag(model, version.version, "decision", decision)
        client.set_model_version_tag(model, version.version, "decision_why", why)


# ---- the steps of a registration


def _files(record: VersionRecord) -> dict[str, Path]:
    """Name in the version → file. Raises ReleaseError for a file that is not there."""
    names = dict.fromkeys([*record.formats.values(), *record.extra_files])
    missing = [name for name in names if not (record.folder / name).is_file()]
    if missing:
        raise ReleaseError(f"expected {', '.join(missing)} in {record.folder}, found no such file; run export again")
    return {name: (record.folder / name).absolute() for name in names}


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
        tags=run_tags(record.tags, record.description),
        params=params_of(record.params),
        model_type="onnx" if "onnx" in record.formats else "",
    )
    model_id = str(logged.model_id)
    try:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, _shipped(record))])
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
        metadata={
            "formats": dict(record.formats),
            TAG_RELEASE: record.tags.get(TAG_RELEASE, ""),
            **({"labels": list(record.signature["labels"])} if "labels" in record.signature else {}),
        },
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


def _log_run(client: MlflowClient, run: OpenRun, model_id: str, record: VersionRecord) -> None:
    """Log what the run lacks of the training, the model's epoch and final metrics for the model too, and the data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

    trained, shipped, now = history_points(record.history), _shipped(record), time.time()
    metrics = metrics_of(missing_points([*(p for p in trained if p.step != shipped), *record.points], run.latest))
    # Known to the run perhaps, which then keeps one of the two, but not to the model.
    metrics += metrics_of([point for point in trained if point.step == shipped], model_id)
    metrics += metrics_of([Point(name, value, shipped, now) for name, value in record.metrics.items()], model_id)
    tags = [RunTag(name, value) for name, value in run_tags(record.tags, record.description).items()]
    client.log_batch(run.run_id, metrics=metrics[:BATCH_OF_METRICS], tags=tags)
    for start in range(BATCH_OF_METRICS, len(metrics), BATCH_OF_METRICS):
        client.log_batch(run.run_id, metrics=metrics[start : start + BATCH_OF_METRICS])
    dataset = Dataset(
        name=record.dataset_name,
        digest=record.dataset_digest[:_DIGEST_LENGTH],
        source_type="code",
        source=json.dumps({"tags": {"mlflow.source.name": record.dataset_source}}),
        # The digest above may be cut to what MLflow's database keeps.
        profile=json.dumps({**record.dataset_profile, "digest": record.dataset_digest}),
    )
    client.log_inputs(run.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _create_version(client: MlflowClient, run_id: str, model_id: str, record: VersionRecord, report: str) -> str:
    with passing_over(EXISTS):
        client.create_registered_model(record.model, description=_ABOUT.format(model=record.model))
    # Lists of versions show the first line.
    first, _, rest = record.description.partition("\n")
    more = [f"[Report of the run]({report})"] if report else []
    more.append(_snippet(record.signature, model_id) if "onnx" in record.formats else _NEEDS_ONNX)
    description = "\n\n".join([first, *more, rest.lstrip("\n")])
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


def _signature(signature: Mapping[str, Any]) -> ModelSignature | None:
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


def _snippet(signature: Mapping[str, Any], model_id: str) -> str:
    """Markdown: how to load the model, and to ask it with one sample of zeros."""
    inputs = ", ".join(
        # Whoever writes the code of a job names its inputs, and somebody else runs these lines.
        f"{tensor['name']!r}: numpy.zeros({tuple(1 if isinstance(dim, str) else dim for dim in tensor['shape'])}, "
        f'"{tensor["dtype"]}")'
        for tensor in signature["inputs"]
    )
    return f"""\
```python
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/{model_id}")
model.predict({{{inputs}}})
```"""


def _shipped(record: VersionRecord) -> int:
    """Where the model stands on the curves of the history."""
    if record.shipped_epoch:
        return record.shipped_epoch
    return position(record.history[-1], len(record.history)) if record.history else 0


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
    site = _site(tracking_uri)
    return RegisteredVersion(
        version=version,
        run_id=run_id,
        model_uri=f"models:/{model}/{version}",
        version_url=f"{site}/#/models/{quote(model, safe='')}/versions/{version}{VIEW}" if site else "",
        run_url=_run_url(run_id, experiment_id, tracking_uri),
    )


def _run_url(run_id: str, experiment_id: str, tracking_uri: str) -> str:
    site = _site(tracking_uri)
    return f"{site}/#/experiments/{experiment_id}/runs/{run_id}{VIEW}" if site else ""


def _site(tracking_uri: str) -> str:
    """The address of MLflow's pages; empty for a file or a database."""
    return without_credentials(tracking_uri) if urlsplit(tracking_uri).scheme in ("http", "https") else ""


@contextlib.contextmanager
def _failed_unless_finished(client: MlflowClient, run_id: str) -> Iterator[None]:
    """End the run as FAILED when the block raises, also when it is cancelled."""
    try:
        yield
    except BaseException as error:
        # Not worth another round of retries when the server is gone: the run then stays unfinished.
        with contextlib.suppress(Exception):
            check_reachable(client.tracking_uri)
            end_with(client, run_id, "RUNNING", "FAILED", f"register: {error or type(error).__name__}")
        raise
