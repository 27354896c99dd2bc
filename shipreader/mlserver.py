"""The folder from which MLServer serves the ONNX artifact of a pulled release.

<repository>/<model>/model-settings.json    replaced by one rename; names the release's own folder, never `current`
<repository>/<model>/onnx_model.py          what MLServer runs: a copy of the file beside this one
<repository>/<model>/inference_tensors.py   what that imports: another copy
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shipreader.durable import write_durably
from shipreader.errors import ReaderError
from shipreader.records import FILES, Release

BATCH_SIZE, BATCH_SECONDS = 64, 0.002
"""At most so many rows are put together, up to which a promotion asks whether samples see one another (MLServer takes
each request for a row); and the first of them waits at most so long."""
FORMATS = ("onnx", "onnx-int8-dynamic", "onnx-int8-static")
"""What is served: ONNX that `ship promote` loads before it goes live. What is called otherwise nobody has tried."""
DATATYPES = {
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bool": "BOOL",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip
"""Of the Open Inference Protocol, by dtype. Triton's configuration has the same with `TYPE_` before them."""


def write_model(
    repository: Path, release: Release, *, batch_size: int = BATCH_SIZE, batch_seconds: float = BATCH_SECONDS
) -> Path:
    """Make the model that MLServer loads from a repository folder this release; the path of its settings.

    Args:
        repository: MLServer's folder of models.
        release: verified, on this machine.
        batch_size: requests computed together, as far as `rows_together` lets them; 1 turns batching off.
        batch_seconds: how long a request waits for others at most.

    Raises:
        ReaderError: a release without ONNX or with a dtype that the protocol does not have.
    """
    signature = release.manifest.signature
    require_datatypes(signature)
    kind = served(release)
    artifact = release.artifact(kind)
    folder = repository / release.model
    folder.mkdir(parents=True, exist_ok=True)
    shipped = any(name.startswith(f"{FILES}/") for name in release.manifest.files)
    inputs, outputs = (_tensors(signature[side]) for side in ("inputs", "outputs"))
    settings: dict[str, Any] = {
        "name": release.model,
        "implementation": "onnx_model.OnnxModel",
        "platform": "onnx",
        "inputs": inputs,
        "outputs": outputs,
        # No version: MLServer then has the new one loaded before it lets go of the old one.
        "parameters": {
            "uri": str(artifact),
            "extra": {
                "release": release.id,
                "generation": release.generation,
                "format": kind,
                "signature": dict(signature),
                **({"files": str(release.folder / FILES)} if shipped else {}),
            },
        },
    }
    together = rows_together(signature, batch_size)
    if together > 1:
        settings |= {"max_batch_size": together, "max_batch_time": batch_seconds}
    for name in ("onnx_model.py", "inference_tensors.py"):
        write_durably(folder / name, Path(__file__).with_name(name).read_bytes())
    path = folder / "model-settings.json"
    write_durably(path, json.dumps(settings, indent=1).encode())
    return path


def served(release: Release) -> str:
    """Which of FORMATS the release recommends, for many requests before few; `onnx` when it recommends none."""
    recommended = [release.recommended(purpose) or "" for purpose in ("throughput", "latency")]
    return next((kind for kind in recommended if kind in FORMATS), "onnx")


def can_batch(signature: Mapping[str, Any]) -> bool:
    """Whether requests may be computed together.

    The first dimension of every tensor, and no other, is one dynamic dimension, the batch, and answers do not depend on
    the other samples in it.
    """
    if signature.get("coupled"):
        return False
    shapes = [tensor["shape"] for side in ("inputs", "outputs") for tensor in signature[side]]
    first = {shape[0] if shape else 0 for shape in shapes}
    others = [size for shape in shapes for size in shape[1:]]
    return len(first) == 1 and isinstance(first.pop(), str) and not any(isinstance(size, str) for size in others)


def rows_together(signature: Mapping[str, Any], most: int = BATCH_SIZE) -> int:
    """How many rows of several requests may be computed together, at most `most`; 1 where each is computed by itself.

    Never more than BATCH_SIZE, which is what was proven, nor than the release says of its batch; none where that has no
    room for two requests. The promotion asks by the same number.
    """
    if not can_batch(signature):
        return 1
    batch = signature["inputs"][0]["shape"][0]
    least, largest = next(
        ((dim["min"], dim["max"]) for dim in signature.get("dims", ()) if dim["name"] == batch), (1, None)
    )
    rows = min(most, BATCH_SIZE, BATCH_SIZE if largest is None else largest)
    return rows if rows >= 2 * max(least, 1) else 1


def require_datatypes(signature: Mapping[str, Any]) -> None:
    """Raises ReaderError for a dtype that the protocol does not have, and for a signature that names no tensors."""
    if not {"inputs", "outputs"} <= signature.keys():
        raise ReaderError("expected the release's inputs and outputs in its manifest, got none")
    for tensor in (*signature["inputs"], *signature["outputs"]):
        if tensor["dtype"] not in DATATYPES:
            raise ReaderError(f"{tensor['name']}: the Open Inference Protocol has no {tensor['dtype']}")


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for tensor in tensors:
        shape = [-1 if isinstance(size, str) else size for size in tensor["shape"]]
        found.append({"name": tensor["name"], "datatype": DATATYPES[tensor["dtype"]], "shape": shape})
    return found
