"""Copies of what is live, in the layouts that other servers read from the bucket by themselves.

    models/<model>/views/<channel>/triton/<model>/<generation>/model.onnx    immutable
    models/<model>/views/<channel>/triton/<model>/config.pbtxt               names the generation: the commit
    models/<model>/views/<channel>/kserve/<generation>/<model>/…             a whole repository for each, immutable

Beside each model.onnx lies `files/` with what the job ships beside the model, which Triton does not look at, and where
its weights are not in it the file that has them, by the name that model.onnx has for it.

A version is the channel's generation: it only grows, also when the release is an older one. Triton polls, lists and
loads what it finds, so a version that is half there must not count: the configuration names one version explicitly and
is replaced by one conditional PUT after the version is complete. What a poll compares is the newest modification time,
which S3 tells in whole seconds: a poll between the version and the configuration, all in one second, would not see the
configuration until something else is written, so it gets a second of its own. KServe downloads a prefix once, when a
pod starts, so each generation has a prefix of its own.

Everything here writes, and can be repeated.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from shipreader.mlserver import DATATYPES, rows_together
from shipreader.records import FILES, Release, decode_pointer
from torchworker.contract import read_with
from train_and_ship.infra.errors import PreconditionFailedError, ReleaseError, ServiceError, SettingsError
from train_and_ship.infra.objectstore import RECORD_BYTES, ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.transfer import SMALL_UPLOADS_AT_ONCE, in_parallel, put_immutable
from train_and_ship.registry.release.onnx_header import require_one_model

ARTIFACT = "model.onnx"
QUEUE_MICROSECONDS = 2000
"""How long the first request waits for others that Triton puts together with it."""
BACKENDS = ("onnxruntime", "python")
KEPT = 2
"""Versions that stay in a view: the one that is named, and the one before, which is still being served."""
SERVICE_MAY_LAG = timedelta(days=30)
"""How long a running KServe service may name an earlier prefix: a pod that starts again downloads it again."""
_RACES = 20
_TICK_SECONDS = 1.0
"""How finely S3 tells when an object was modified."""
_DATATYPES = {"bfloat16": "BF16", **DATATYPES}
_VERSION = re.compile(r"[1-9][0-9]{0,7}")
_NAMING = re.compile(rb"^version_policy \{ specific \{ versions: \[ (\d{1,8}) \] \} \}$", re.MULTILINE)
"""The line of a configuration that names its version. Tensors have lines of their own, whatever they are called."""


@dataclass(frozen=True, kw_only=True)
class ServingLayout:
    """A view that holds a release."""

    prefix: str
    """Of its keys; ends with a slash, without which a prefix would also match longer names."""
    generation: int
    """What it names; higher than the release's own when another writer was ahead."""


def write_triton(store: ObjectStore, release: Release, backend: str = "onnxruntime") -> ServingLayout:
    """Make a release the version that Triton serves from the channel's model repository.

    `prefix` of the result is the repository. A view that names a later generation already, to which the channel has
    moved meanwhile, is left as it is. Raises ReleaseError for a release without ONNX, with a dtype that Triton does not
    have, with so long names of tensors that nobody would read its configuration, or with weights outside its ONNX file.
    """
    prefix = f"models/{release.model}/views/{release.channel}/triton/"
    folder = f"{prefix}{release.model}/"
    config = triton_config(release, backend, release.generation)
    _put_version(store, f"{folder}{release.generation}/", release, backend)
    generation = _commit(store, folder, config, release)
    _prune(store, folder, generation)
    return ServingLayout(prefix=prefix, generation=generation)


def write_kserve(store: ObjectStore, release: Release, backend: str = "onnxruntime") -> ServingLayout:
    """Make a prefix that KServe downloads for one generation: a Triton model repository with version 1.

    Complete when this returns; hand out its address only then. Raises as `write_triton`.
    """
    views = f"models/{release.model}/views/{release.channel}/kserve/"
    folder = f"{views}{release.generation}/{release.model}/"
    config = triton_config(release, backend, 1)
    _put_version(store, f"{folder}1/", release, backend)
    put_immutable(store, f"{folder}config.pbtxt", config.encode(), "another configuration")
    _prune(store, views, release.generation, SERVICE_MAY_LAG)
    return ServingLayout(prefix=f"{views}{release.generation}/", generation=release.generation)


def inference_service(release: Release, uri: str) -> dict[str, Any]:
    """KServe's resource that serves a view. uri: s3://bucket/prefix/ with the slash at its end."""
    if not uri.endswith("/"):
        raise SettingsError(f"storageUri: expected a slash at the end, got {uri!r}: …/2 would also fetch …/20")
    name = re.sub(r"[._]+", "-", f"{release.model}-{release.channel}").strip("-")
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "annotations": {"train-and-ship/release": release.id, "train-and-ship/generation": str(release.generation)},
        },
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "onnx"},
                    "runtime": "kserve-tritonserver",
                    "protocolVersion": "v2",
                    "storageUri": uri,
                }
            }
        },
    }


def triton_config(release: Release, backend: str, version: int) -> str:
    """config.pbtxt that serves exactly one version.

    Raises SettingsError for a backend that there is not, ReleaseError for a release that Triton cannot serve, or whose
    configuration would be longer than RECORD_BYTES, which `ship view` and `ship gc` do not read.
    """
    if backend not in BACKENDS:
        raise SettingsError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    signature = release.manifest.signature
    if not {"inputs", "outputs"} <= signature.keys():
        raise ReleaseError(f"{release.model} {release.id}: expected its inputs and outputs in the manifest, got none")
    together = rows_together(signature)
    batches = together > 1
    lines = [
        f"# {release.model} release {release.id}",
        f"name: {json.dumps(release.model)}",
        f"backend: {json.dumps(backend)}",
        f"max_batch_size: {together if batches else 0}",
        *_tensors("input", signature["inputs"], batches),
        *_tensors("output", signature["outputs"], batches),
        f"version_policy {{ specific {{ versions: [ {version} ] }} }}",
    ]
    if batches:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}")
    said = {"release": release.id, "generation": str(release.generation)}
    if "labels" in signature:
        said["labels"] = json.dumps(signature["labels"], ensure_ascii=False)
    for key, value in said.items():
        shown = json.dumps(value, ensure_ascii=False)
        lines.append(f"parameters {{ key: {json.dumps(key)} value {{ string_value: {shown} }} }}")
    text = "\n".join(lines) + "\n"
    if len(text.encode()) > RECORD_BYTES:
        raise ReleaseError(
            f"{release.model} {release.id}: expected a configuration of at most {RECORD_BYTES:,} bytes, got "
            f"{len(text.encode()):,}: too many tensors or labels, or too long names of them"
        )
    return text


def _tensors(kind: str, tensors: Sequence[Mapping[str, Any]], batches: bool) -> list[str]:
    lines = []
    for tensor in tensors:
        if tensor["dtype"] not in _DATATYPES:
            raise ReleaseError(f"{tensor['name']}: Triton has no {tensor['dtype']}")
        shape = tensor["shape"][1:] if batches else tensor["shape"]
        dims = ", ".join(str(-1 if isinstance(size, str) else size) for size in shape)
        # A batch of single numbers: Triton wants a dimension to take away.
        shaped = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape: { shape: [ ] }"
        data_type = f"TYPE_{_DATATYPES[tensor['dtype']]}"
        lines.append(f"{kind} {{ name: {json.dumps(tensor['name'])} data_type: {data_type} {shaped} }}")
    return lines


def _put_version(store: ObjectStore, folder: str, release: Release, backend: str) -> None:
    if "onnx" not in release.manifest.formats:
        raise ReleaseError(
            f"{release.model} {release.id}: expected an ONNX artifact, got none; add onnx to export.formats"
        )
    name = release.manifest.formats["onnx"]
    # Here it gets another name, and other neighbours, than where it was tried. What it reads it knows by its own name.
    read = read_with(name, release.manifest.files)
    require_one_model(*(release.folder / file for file in read))
    if backend == "python":
        code = Path(__file__).with_name("triton_model.py").read_bytes()
        put_immutable(store, f"{folder}model.py", code, "the code of another version of train-and-ship")
    # A server loads what it knows by name, and ignores a folder beside it.
    shipped = [file for file in release.manifest.files if file.startswith(f"{FILES}/")]
    in_parallel(lambda file: _put(store, release, file, folder + file), shipped, SMALL_UPLOADS_AT_ONCE)
    for beside in read[1:]:
        _put(store, release, beside, folder + PurePosixPath(beside).name)
    _put(store, release, name, folder + ARTIFACT)


def _put(store: ObjectStore, release: Release, name: str, key: str) -> None:
    """One file of the release, under a key of the view."""
    entry = release.manifest.files[name]
    try:
        store.upload_file_new(release.folder / name, key, entry.sha256)
    except PreconditionFailedError:
        if store.hash(key, entry.bytes) != (entry.sha256, entry.bytes):
            raise ReleaseError(f"{key}: expected {entry.sha256}, got another file; delete it") from None


def _commit(store: ObjectStore, folder: str, config: str, release: Release) -> int:
    """Replace the configuration unless it names a later version; the generation that it names then.

    A later one is none of a generation that the channel has not had; that one, and what is no configuration of ours,
    is replaced too. Returns once the configuration is modified in a second in which nothing else was, as far as a
    listing tells.
    """
    key = f"{folder}config.pbtxt"
    for _ in range(_RACES):
        seconds = {key: listed.modified.replace(microsecond=0) for key, listed in store.list_objects(folder).items()}
        found = _read(store, key)
        body, named = config.encode(), release.generation
        if found is not None:
            naming = _NAMING.search(found[0])
            later = int(naming[1]) if naming is not None else 0
            if later > named and later <= _generation(store, release):
                body, named = found[0], later
            if found[0] == body and seconds.pop(key, None) not in seconds.values():
                return named
        # What was listed is of an earlier second than what is written now.
        time.sleep(_TICK_SECONDS)
        try:
            if found is None:
                store.put_new(key, body)
            else:
                store.replace(key, body, found[1])
        except PreconditionFailedError:
            # Another writer was faster, or it is ours and the reply was lost: reading tells.
            continue
    raise ServiceError(f"{key}: others replaced it {_RACES} times while this was tried")


def _read(store: ObjectStore, key: str) -> tuple[bytes, str] | None:
    """A configuration and its ETag, None where there is none. One that cannot be read has no content."""
    try:
        return store.get(key)
    except ReleaseError:
        try:
            found = store.head(key)
            return (b"", found.etag) if found is not None else None
        except ReleaseError:
            # Not even its ETag is known. The version that it names stays where it is.
            store.delete(key)
            return None


def _generation(store: ObjectStore, release: Release) -> int:
    """The channel's own, now."""
    found = store.get(pointer_key(release.model, release.channel))
    return decode_pointer(found[0], release.model, release.channel).generation if found is not None else 0


def _prune(store: ObjectStore, folder: str, generation: int, lag: timedelta = timedelta(0)) -> None:
    """Delete all versions but the last ones up to this generation; later ones are somebody else's, who is not done.

    lag: how long a version stays after the next one was written, besides.
    """
    versions: dict[int, list[str]] = {}
    written: dict[int, datetime] = {}
    for key, item in store.list_objects(folder).items():
        name = key.removeprefix(folder).partition("/")[0]
        if _VERSION.fullmatch(name) and int(name) <= generation:
            versions.setdefault(int(name), []).append(key)
            written[int(name)] = max(item.modified, written.get(int(name), item.modified))
    numbers = sorted(versions)
    now = store.now() if lag and len(numbers) > KEPT else None
    for position, version in enumerate(numbers[:-KEPT]):
        if now is not None and now - written[numbers[position + 1]] < lag:
            continue
        for key in versions[version]:
            store.delete(key)
