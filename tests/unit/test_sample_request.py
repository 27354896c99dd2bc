"""The request that `ship serve` says to try: a golden sample, in words that a server of the protocol takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shipreader.inference_tensors import Signature, parse
from shipreader.records import Manifest, Release
from train_and_ship.ship.sample_request import write_sample_request

INPUTS = [
    {"name": "x", "dtype": "float32", "shape": ["batch", 2]},
    {"name": "id", "dtype": "int64", "shape": ["batch"]},
]


def written(folder: Path, golden: dict[str, Any], inputs: list[dict[str, Any]] = INPUTS) -> Path | None:
    if golden:
        save_file(golden, folder / "golden.safetensors")
    manifest = Manifest("digits", "r1", {}, {}, {"inputs": inputs, "outputs": []}, {}, b"")
    path = folder / "request.json"
    assert write_sample_request(Release("prod", 1, folder, manifest, ""), path) == path.exists()
    return path if path.exists() else None


def batch(size: int, **changes: Any) -> dict[str, Any]:
    values = {
        "x": np.arange(2.0 * size, dtype=np.float32).reshape(size, 2) + size,
        "id": np.arange(size) + 7,
        **changes,
    }
    return {f"batch_{size}.input.{name}": value for name, value in values.items()}


def test_it_is_the_first_sample_of_the_smallest_batch(tmp_path: Path) -> None:
    path = written(tmp_path, {**batch(33), **batch(4), "batch_4.eager.x": np.zeros(4)})
    assert path is not None
    asked = parse(path.read_bytes(), None, Signature.of({"inputs": INPUTS, "outputs": []})).inputs
    assert asked["x"].tolist() == [[4.0, 5.0]] and asked["id"].tolist() == [7]


@pytest.mark.parametrize(
    "golden",
    [
        {},
        {"input.x": np.zeros(3)},
        batch(2, x=np.full((2, 2), np.nan, np.float32)),
        batch(1, x=np.zeros((1, 1_000_001), np.float32)),
        # One too many of both inputs together.
        batch(1, x=np.zeros((1, 600_000), np.float32), id=np.zeros((1, 400_001), np.int64)),
        {"batch_1.input.x": np.zeros((1, 2), np.float32)},
    ],
)
def test_without_such_a_sample_nothing_is_written(tmp_path: Path, golden: dict[str, Any]) -> None:
    assert written(tmp_path, golden) is None


def test_a_type_that_the_protocol_has_not_or_a_torn_file_is_none(tmp_path: Path) -> None:
    inputs = [{"name": "x", "dtype": "bfloat16", "shape": ["batch", 2]}]
    assert written(tmp_path, batch(1), inputs) is None
    (tmp_path / "golden.safetensors").write_bytes(b"torn")
    assert written(tmp_path, {}) is None
