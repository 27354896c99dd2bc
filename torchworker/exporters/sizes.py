"""Sizes of dynamic dimensions: which are declared, which a program takes, and what to declare so that they agree."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch.export import ExportedProgram

from torchworker.contract import DynamicDim
from torchworker.exporters.subject import Subject
from torchworker.project.signature import BATCH

LARGEST_TRIED = 64
"""Sizes of a dimension are tried one by one up to its smallest plus this, and at its largest."""


def what_is_taken(
    dims: Sequence[DynamicDim],
    at_capture: Mapping[str, int],
    limits: Mapping[str, int],
    refusal: Callable[[Mapping[str, int]], str],
) -> str:
    """What to declare so that the program takes every size, as keys of the job file; empty where ranges cannot say it.

    Args:
        dims: as they are declared.
        at_capture: sizes that the program takes, by dimension.
        limits: as `declared_sizes` takes them.
        refusal: why the program refuses these sizes; empty when it does not.
    """
    keys: dict[str, int] = {}
    taken = []
    for dim in dims:

        def takes(size: int, name: str = dim.name) -> bool:
            return not refusal({**at_capture, name: size})

        low, high = (_furthest(at_capture[dim.name], end, takes) for end in (dim.min, _largest(dim, limits)))
        taken.append(replace(dim, min=low, max=high if high < _largest(dim, limits) else dim.max))
        if low > dim.min:
            if dim.name == BATCH:
                # There is no key for the smallest batch.
                return ""
            keys[f"export.dynamic.{dim.name}.min"] = low
        if high < _largest(dim, limits):
            keys["export.max_batch" if dim.name == BATCH else f"export.dynamic.{dim.name}.max"] = high
    if any(refusal(sizes) for sizes in declared_sizes(taken, at_capture, limits)):
        # A multiple of eight, say, or one dimension against another.
        return ""
    return ", ".join(f"{key}: {size}" for key, size in keys.items())


def _furthest(good: int, end: int, takes: Callable[[int], bool]) -> int:
    """The last size from one that is taken towards the end, as if there were one limit between them."""
    if takes(end):
        return end
    while abs(end - good) > 1:
        middle = (good + end) // 2
        good, end = (middle, end) if takes(middle) else (good, middle)
    return good


def shape_at(subject: Subject, name: str, sizes: Mapping[str, int]) -> list[int]:
    """Of an input, when its dynamic dimensions have these sizes."""
    shape = list(subject.inputs[name].shape)
    for dim in subject.dims:
        for axis in dim.axes.get(name, ()):
            shape[axis] = sizes[dim.name]
    return shape


def ranges(program: ExportedProgram, subject: Subject) -> dict[str, tuple[int, int | None]]:
    """The smallest and the largest size that the program notes for each dimension; None where it has no limit."""
    found: dict[str, tuple[int, int | None]] = {}
    taken = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [taken[str(name)] for name in program.graph_signature.user_inputs]
    shapes = {name: tensor.shape for name, tensor in zip(subject.inputs, tensors, strict=True)}
    for dim in subject.dims:
        lower, upper = 0, sys.maxsize
        for name, axes in dim.axes.items():
            for axis in axes:
                size = shapes[name][axis]
                noted = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
                if noted is None:
                    # A number: the dimension was fixed.
                    lower, upper = max(lower, int(size)), min(upper, int(size))
                    continue
                lower = max(lower, int(noted.lower))
                upper = min(upper, int(noted.upper)) if noted.upper.is_Integer else upper
        found[dim.name] = (lower, upper if upper < sys.maxsize else None)
    return found


def declared_sizes(
    dims: Sequence[DynamicDim], at_capture: Mapping[str, int], limits: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """All corners of the declared ranges, then each dimension alone from its smallest size on.

    Args:
        dims: as they are declared.
        at_capture: sizes of the example, by dimension.
        limits: largest sizes that the program notes; where none is declared, one more is tried.
    """
    ends = {dim.name: (dim.min, _largest(dim, limits)) for dim in dims}
    for corner in itertools.islice(itertools.product(*ends.values()), 256):
        yield dict(zip(ends, corner, strict=True))
    for dim in dims:
        for size in range(dim.min, min(dim.min + LARGEST_TRIED, dim.max or sys.maxsize) + 1):
            yield {**at_capture, dim.name: size}


def _largest(dim: DynamicDim, limits: Mapping[str, int]) -> int:
    """The largest size that is tried. limits: as `declared_sizes` takes them."""
    return dim.max or limits.get(dim.name, 4 * LARGEST_TRIED) + 1
