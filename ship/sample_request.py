"""A request of the Open Inference Protocol with one golden sample of a release: what `ship serve` says to try."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from shipreader.mlserver import DATATYPES
from shipreader.records import Release
from torchworker.contract import GOLDEN

MOST_NUMBERS = 1_000_000
"""Of a request that is written: of all its inputs together."""
_INPUT = re.compile(r"batch_(\d+)\.input\.(.+)")


def write_sample_request(release: Release, path: Path) -> bool:
    """Write the first sample as JSON; False, and nothing is written, where the release has none that JSON can hold.

    Its golden file belongs to the release and was verified with it.
    """
    golden = release.folder / GOLDEN
    if not golden.is_file():
        return False
    try:
        path.write_text(json.dumps({"inputs": _inputs(golden, release)}, allow_nan=False))
    except ValueError:
        # NaN, a type that the protocol has not, or too many numbers: of somebody else's release perhaps.
        return False
    return True


def _inputs(golden: Path, release: Release) -> list[dict[str, Any]]:
    """Raises ValueError."""
    from safetensors import SafetensorError, safe_open

    found: list[dict[str, Any]] = []
    numbers = 0
    try:
        with safe_open(str(golden), framework="numpy") as tensors:
            batches: dict[int, set[str]] = {}
            for match in filter(None, map(_INPUT.fullmatch, tensors.keys())):
                batches.setdefault(int(match[1]), set()).add(match[2])
            size = min(batches, default=0)
            for tensor in release.manifest.signature["inputs"]:
                if tensor["name"] not in batches.get(size, ()):
                    raise ValueError(f"no golden {tensor['name']}")
                stored = tensors.get_slice(f"batch_{size}.input.{tensor['name']}")
                # Whoever published says how many inputs there are.
                numbers += math.prod(stored.get_shape()[1:])
                if numbers > MOST_NUMBERS or tensor["dtype"] not in DATATYPES:
                    raise ValueError(f"{tensor['name']} is no sample for JSON")
                sample = stored[0:1]
                datatype, shape = DATATYPES[tensor["dtype"]], list(sample.shape)
                found.append({"name": tensor["name"], "datatype": datatype, "shape": shape, "data": sample.tolist()})
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(str(error)) from error
    return found
