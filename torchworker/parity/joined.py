"""Whether an artifact tells one caller what another has sent: golden samples alone, and as servers put them together.

The golden outputs are whoever publishes' own, so they do not tell: a file that hands each sample the answer to the one
before it gives them faithfully. Nor does this find one that does so only for samples that ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchworker.contract import RehearsedRelease
from torchworker.parity.probes import Inputs, Probe
from torchworker.runtimes.load import Call

Asked = tuple[Inputs, Probe]

DISTINCT = 16
"""Golden samples that are asked alone, all different."""
MOST = 64
"""Samples that servers put together, unless they are told otherwise or the release says less."""
ALONE, TOGETHER = "samples alone", "samples together"
"""What is asked, for verdicts."""
COUPLED = "parity: {coupled: allowed} in the job, with which each request is computed by itself"
REMEDY = (
    "Samples see one another, and servers would compute those of different callers together: let the answer to a "
    f"sample depend on it alone, or say {COUPLED}, and export again"
)


class OneSampleError(Exception):
    """The golden inputs do not tell whether samples see one another."""


def alone_and_together(call: Call, golden: Sequence[Probe], release: RehearsedRelease) -> dict[str, Asked]:
    """What an artifact gives for golden samples one by one and put together, beside what it should give.

    Args:
        call: the artifact.
        golden: the batches of capture, the smallest first, each with a sample in each row.
        release: whose inputs and dims these are; servers join its samples.

    Returns:
        Of ALONE and TOGETHER the answers by output, [samples, …], and the probe with the golden ones; nothing where a
        batch holds one request only.

    Raises:
        OneSampleError: all samples are the same.
    """
    least, most = next(
        ((max(dim.min, 1), dim.max) for dim in release.dims if dim.name == release.inputs[0].shape[0]), (1, None)
    )
    count = max(MOST, 2 * least) if most is None else min(max(MOST, 2 * least), most)
    if count < 2 * least:
        return {}
    largest = golden[-1]
    rows = _distinct(largest.inputs)
    if len(rows) < 2:
        raise OneSampleError(
            f"expected golden inputs of two different samples at least, got {len(rows)} in {largest.name}: they do not "
            f"tell whether samples see one another; export with validation data that has more, or with {COUPLED}"
        )
    names = [spec.name for spec in release.outputs]
    apart = [_answers(call, _rows(largest.inputs, [row] * least), names) for row in rows]
    alone = {name: torch.cat([found[name][:1] for found in apart]) for name in names}
    # In no order that a model could turn round, and the same each time.
    drawn = torch.randint(len(rows), (count,), generator=torch.Generator().manual_seed(0))
    mixed = [rows[place] for place in drawn.tolist()]
    together = _answers(call, _rows(largest.inputs, mixed), names)
    return {ALONE: (alone, _of_rows(largest, rows)), TOGETHER: (together, _of_rows(largest, mixed))}


def _answers(call: Call, inputs: Inputs, names: Sequence[str]) -> Inputs:
    """By output. Raises ValueError where one has no row for each sample."""
    size = len(next(iter(inputs.values())))
    got = call(inputs)
    if len(got) != len(names) or any(not tensor.dim() or len(tensor) != size for tensor in got):
        raise ValueError(f"expected {size} rows of {', '.join(names)}, got {[list(tensor.shape) for tensor in got]}")
    return {name: tensor.clone() for name, tensor in zip(names, got, strict=True)}


def _of_rows(probe: Probe, rows: Sequence[int]) -> Probe:
    return replace(
        probe,
        inputs=_rows(probe.inputs, rows),
        eager=_rows(probe.eager or {}, rows),
        exact=_rows(probe.exact, rows),
        perturbed=_rows(probe.perturbed, rows),
        tied=_rows(probe.tied, rows),
    )


def _rows(tensors: Mapping[str, Tensor], rows: Sequence[int]) -> Inputs:
    return {name: tensor[list(rows)] for name, tensor in tensors.items()}


def _distinct(inputs: Inputs) -> list[int]:
    """Where the first samples are that differ from all before them, at most DISTINCT."""
    seen: dict[bytes, int] = {}
    for row in range(len(next(iter(inputs.values())))):
        bits = [tensor[row].reshape(-1).contiguous().view(torch.uint8) for tensor in inputs.values()]
        seen.setdefault(torch.cat(bits).numpy().tobytes(), row)
        if len(seen) == DISTINCT:
            break
    return list(seen.values())
