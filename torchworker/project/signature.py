"""What an exported model takes and gives: named tensors, and which of their dimensions may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project, TensorSpec
from torchworker.process.failure import UserError
from torchworker.project.user_code import describe_tensor, dtype_name, forward, name_inputs, name_outputs

BATCH = "batch"
"""The first dimension of every input."""


def dims_of(
    named: Mapping[str, Tensor], declared: Sequence[DynamicDim], project: Project, max_batch: int | None = None
) -> tuple[DynamicDim, ...]:
    """The batch and the declared dimensions, held against one batch of the data.

    Args:
        named: one batch by input, [batch, …].
        declared: dimensions beside the batch.
        project: for messages.
        max_batch: largest batch; None for no limit.

    Raises:
        UserError: an input or axis is not there, or the data's own size is outside the declared range.
    """
    batch = DynamicDim(name=BATCH, min=1, max=max_batch, axes={name: (0,) for name in named})
    for dim in declared:
        where = f"export.dynamic.{dim.name}"
        found: dict[str, int] = {}
        for name, axes in dim.axes.items():
            if name not in named:
                raise UserError(f"{where}.axes: expected inputs among {', '.join(named)}, got {name!r}")
            for axis in axes:
                if axis >= named[name].dim():
                    raise UserError(
                        f"{where}.axes.{name}: expected an axis below {named[name].dim()}, because the data "
                        f"({project.data.where}) gives {name} as {describe_tensor(named[name])}; got {axis}"
                    )
                found[f"{name} axis {axis}"] = named[name].shape[axis]
        if len(set(found.values())) > 1:
            sizes = ", ".join(f"{place}: {size}" for place, size in found.items())
            raise UserError(f"{where}: expected one size on all its axes, and the data has {sizes}")
        size = next(iter(found.values()))
        if size < dim.min or (dim.max is not None and size > dim.max):
            limit = f"{dim.min} to {dim.max}" if dim.max is not None else f"at least {dim.min}"
            raise UserError(
                f"{where}: expected sizes that include the data's own, got {limit}, and the data has {size}"
            )
    return (batch, *declared)


def require_alike(
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    targets: tuple[Tensor, Tensor],
    declared: Sequence[DynamicDim],
    project: Project,
) -> None:
    """Samples that artifacts are held against have one shape, but for sizes that the job says may vary.

    Args:
        first, other: two validation batches by input, [batch, …].
        targets: of both, [batch, …]; their sizes may vary where the job declares any dimension.
        declared: dimensions beside the batch.
        project: for messages.

    Raises:
        UserError: another size differs, or one is outside its declared range.
    """
    shapes = [
        [list(tensor.shape[1:]) for tensor in (*named.values(), target)]
        for named, target in zip((first, other), targets, strict=True)
    ]
    ranks = [[len(shape) for shape in found] for found in shapes]
    varying: dict[tuple[int, int], dict[str, list[int]]] = {}
    declared_axes = {(name, axis) for dim in declared for name, axes in dim.axes.items() for axis in axes}
    if first.keys() == other.keys() and ranks[0] == ranks[1]:
        if declared:
            dims_of(other, declared, project)
        for name in first:
            for axis, sizes in enumerate(zip(first[name].shape, other[name].shape, strict=True)):
                if axis and sizes[0] != sizes[1] and (name, axis) not in declared_axes:
                    varying.setdefault(sizes, {}).setdefault(name, []).append(axis)
        if not varying and (declared or shapes[0][-1] == shapes[1][-1]):
            return
    raise UserError(
        f"{project.data.where}: validation batches are of different shapes: samples of {shapes[0]} and of "
        f"{shapes[1]}; pad them all to one length, in the dataset or in data.collate{_declaring(varying, declared)}"
    )


def require_batches_alike(
    model: nn.Module, batches: tuple[Any, Any], declared: Sequence[DynamicDim], project: Project
) -> None:
    """`require_alike` of batches as a model takes them, unless what is exported takes others.

    Args:
        model: that is trained.
        batches: two (inputs, target), each [batch, …], as the data gives them.
        declared: dimensions beside the batch, of what is exported.
        project: for messages.
    """
    if project.raw is not None or (project.serving is not None and declared):
        # Its own inputs are asked in `try_served`, and in the export.
        return
    first, other = (name_inputs(model, inputs, project) for inputs, _ in batches)
    require_alike(first, other, (batches[0][1], batches[1][1]), declared, project)


def _declaring(varying: Mapping[tuple[int, int], Mapping[str, Sequence[int]]], declared: Sequence[DynamicDim]) -> str:
    """What a job file would say of them: two sizes that differ, to where they are."""
    if not varying:
        return ""
    names = (name for number in range(1, 99) if (name := f"length_{number}") not in {dim.name for dim in declared})
    said = [
        f"{name}: {{axes: {{{', '.join(f'{of}: {_axes(axes)}' for of, axes in places.items())}}}}}"
        for name, places in zip(names, varying.values(), strict=False)
    ]
    return f", or say that they may vary, if the model takes any size: export: {{dynamic: {{{', '.join(said)}}}}}"


def _axes(axes: Sequence[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else str(list(axes))


def sizes_of(named: Mapping[str, Tensor], dims: Sequence[DynamicDim]) -> dict[str, int]:
    """The size that each dynamic dimension has in these inputs."""
    return {dim.name: named[name].shape[axes[0]] for dim in dims for name, axes in [next(iter(dim.axes.items()))]}


def resized(named: Mapping[str, Tensor], dims: Sequence[DynamicDim], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The same inputs with other sizes: cut, or repeated up to them.

    Args:
        named: by input, [batch, …].
        dims: where each dimension is.
        sizes: dimension name to size, 0 allowed; dimensions that are not named stay.

    Returns:
        Contiguous tensors of the same dtypes; those of which nothing changes are the same objects.
    """
    changed = dict(named)
    for dim in dims:
        if dim.name not in sizes:
            continue
        for name, axes in dim.axes.items():
            for axis in axes:
                changed[name] = _resized(changed[name], axis, sizes[dim.name])
    return changed


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    repeats = [1] * tensor.dim()
    repeats[axis] = max(1, -(-size // tensor.shape[axis]))
    return tensor.repeat(repeats).narrow(axis, 0, size).contiguous()


def other_sizes(named: Mapping[str, Tensor], dims: Sequence[DynamicDim]) -> dict[str, int]:
    """For each dimension a size that differs from the present one and from what the others get."""
    sizes: dict[str, int] = {}
    taken = set(sizes_of(named, dims).values())
    for dim in dims:
        # More first: cut inputs may contradict others, such as lengths.
        largest = dim.max if dim.max is not None else max(taken) + len(dims) + 1
        choices = [size for size in (*range(max(taken) + 1, largest + 1), *range(largest, dim.min - 1, -1))]
        size = next((size for size in choices if size not in taken), None)
        if size is not None:
            sizes[dim.name] = size
            taken.add(size)
    return sizes


def input_specs(named: Mapping[str, Tensor], dims: Sequence[DynamicDim]) -> tuple[TensorSpec, ...]:
    """Inputs with the names of their dynamic dimensions in their shapes."""
    specs = []
    for name, tensor in named.items():
        shape: list[int | str] = list(tensor.shape)
        for dim in dims:
            for axis in dim.axes.get(name, ()):
                shape[axis] = dim.name
        specs.append(TensorSpec(name=name, dtype=dtype_name(tensor), shape=shape))
    return tuple(specs)


def of_one_sample(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The same with a batch of 1: a model whose samples are coupled is asked one at a time, and nothing is batched."""
    return tuple(replace(spec, shape=[1 if size == BATCH else size for size in spec.shape]) for spec in specs)


def without_batch(dims: Sequence[DynamicDim]) -> tuple[DynamicDim, ...]:
    """The declared dimensions alone, for a signature of one sample."""
    return tuple(dim for dim in dims if dim.name != BATCH)


def samples_of_a_call(inputs: Sequence[TensorSpec], batch: int) -> int:
    """How many samples are put into one call: `batch`, or 1 where the signature has a batch of 1."""
    return 1 if all(spec.shape and spec.shape[0] == 1 for spec in inputs) else batch


def output_specs(
    model: nn.Module, named: Mapping[str, Tensor], dims: Sequence[DynamicDim], project: Project
) -> tuple[TensorSpec, ...]:
    """Outputs, found by calling the model at several sizes: what follows a dynamic dimension gets its name.

    A size that changes in another way, such as the length of a decoded sequence, is `<output>_<axis>`.

    Args:
        model: in eval mode.
        named: one batch by input, [batch, …], in forward's order.
        dims: the batch and the declared dimensions.
        project: for messages.

    Raises:
        UserError: forward fails on the batch itself.
    """
    calls = [(sizes_of(named, dims), name_outputs(forward(model, named, project), project))]
    rows = next(iter(named.values())).shape[0]
    variants = [resized(named, dims, other_sizes(named, dims))]
    variants += [{name: tensor[row : row + 1] for name, tensor in named.items()} for row in {0, rows // 2, rows - 1}]
    for variant in variants:
        try:
            outputs = name_outputs(forward(model, variant, project), project)
        except UserError:
            # Inputs may belong together in ways that cutting breaks; what the model takes is not decided here.
            continue
        calls.append((sizes_of(variant, dims), outputs))
    return tuple(_output_spec(name, calls) for name in calls[0][1])


def _output_spec(name: str, calls: Sequence[tuple[Mapping[str, int], Mapping[str, Tensor]]]) -> TensorSpec:
    first = calls[0][1][name]
    shape: list[int | str] = []
    for axis, size in enumerate(first.shape):
        seen = [(sizes, outputs[name].shape[axis]) for sizes, outputs in calls if outputs[name].dim() == first.dim()]
        names = [dim for dim in seen[0][0] if all(sizes[dim] == found for sizes, found in seen)]
        if names:
            shape.append(names[0])
        else:
            shape.append(size if all(found == size for _, found in seen) else f"{name}_{axis}")
    return TensorSpec(name=name, dtype=dtype_name(first), shape=shape)
