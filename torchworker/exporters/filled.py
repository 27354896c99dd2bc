"""Recurrent operators, attention and sums by Einstein's convention in ONNX are only asked what they can answer.

ONNX Runtime 1.31's kernels for them end the process over a question that no signature allows and any client may send;
around them it is made one that they answer, and the answer is cut to what was asked.
"""

from __future__ import annotations

from typing import Any

import numpy

RECURRENT = ("LSTM", "GRU", "RNN")
OF_WHOLE_GRAPHS = ("Attention", "Einsum")
"""Operators where the batch may be any dimension, or a mask has one row for all."""
X, SEQUENCE_LENS, INITIAL_H, INITIAL_C = 0, 4, 5, 6
"""Places of their inputs (https://onnx.ai/onnx/operators/onnx__LSTM.html)."""


def keep_batches_filled(model: Any) -> int:
    """Have no recurrent operator see a batch without rows; what it computes for the others stays the same.

    model: onnx_ir.Model, changed in place. Returns how many operators were found.
    """
    found = [node for node in model.graph.all_nodes() if node.op_type in RECURRENT and node.domain == ""]
    for node in found:
        _fill(node)
    return len(found)


def keep_samples_there(model: Any, batch: str) -> bool:
    """Have none of OF_WHOLE_GRAPHS see a batch without rows: the whole graph is given one, which is cut off again.

    Args:
        model: onnx_ir.Model with named dimensions, changed in place.
        batch: name of the first dimension of its inputs.

    Returns:
        Whether there is one, and so something was changed.
    """
    import onnx_ir as ir

    graph = model.graph
    if not any(node.op_type in OF_WHOLE_GRAPHS and not node.domain for node in graph.all_nodes()):
        return False
    first = graph[0]

    def add(kind: str, *inputs: Any, **attributes: Any) -> Any:
        made = ir.node(kind, list(inputs), attributes)
        graph.insert_before(first, made)
        return made.outputs[0]

    def constant(*values: int) -> Any:
        return add("Constant", value=ir.tensor(numpy.array(values, numpy.int64)))

    given = [value for value in graph.inputs if _axis_of(value, batch) == 0]
    uses = {value: list(value.uses()) for value in given}
    zero, size = constant(0), add("Shape", given[0], start=0, end=1)
    pads = add("Concat", zero, add("Cast", add("Equal", size, zero), to=int(ir.DataType.INT64)), axis=0)
    for value in given:
        filled = add("Pad", value, pads, None, zero)
        # Which is so but for the batch without rows; tools that infer shapes go on from it.
        filled.dtype, filled.shape = value.dtype, value.shape
        for user, place in uses[value]:
            user.replace_input_with(place, filled)
    for place, output in enumerate(graph.outputs):
        axis = _axis_of(output, batch)
        if axis is None:
            continue
        axes = ir.node("Constant", [], {"value": ir.tensor(numpy.array([axis], numpy.int64))})
        cut = ir.node("Slice", [output, zero, size, axes.outputs[0]])
        graph.extend([axes, cut])
        taken = cut.outputs[0]
        taken.dtype, taken.shape = output.dtype, output.shape
        # It has a row more than what its dimension is called after.
        output.shape = None
        graph.outputs[place] = taken
        taken.name, output.name = output.name, f"{output.name}.filled"
    return True


def _axis_of(value: Any, batch: str) -> int | None:
    """Which of its dimensions is called so; None for none."""
    names = [str(getattr(size, "value", size)) for size in value.shape or ()]
    return names.index(batch) if batch in names else None


def _fill(node: Any) -> None:
    import onnx_ir as ir

    graph = node.graph
    by_batch = "layout" in node.attributes and node.attributes["layout"].as_int() == 1

    def add(kind: str, *inputs: Any, **attributes: Any) -> Any:
        made = ir.node(kind, list(inputs), attributes)
        graph.insert_before(node, made)
        return made.outputs[0]

    def constant(*values: int, dtype: Any = numpy.int64) -> Any:
        return add("Constant", value=ir.tensor(numpy.array(values, dtype)))

    axis = 0 if by_batch else 1
    size = add("Shape", node.inputs[X], start=axis, end=axis + 1)
    missing = add("Cast", add("Equal", size, constant(0)), to=int(ir.DataType.INT64))
    pads = add("Concat", constant(0), missing, axis=0)
    for place, batch in ((X, axis), (SEQUENCE_LENS, 0), (INITIAL_H, axis), (INITIAL_C, axis)):
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is None:
            continue
        # A sequence has at least one step.
        filler = add("Constant", value=ir.tensor(numpy.array(1, numpy.int32))) if place == SEQUENCE_LENS else None
        node.replace_input_with(place, add("Pad", value, pads, filler, constant(batch)))
    first = constant(0)
    # Y has the time before the batch, or behind it; the states have their directions there.
    axes = [0 if by_batch else 2, axis, axis]
    after = node
    for output, batch in zip(node.outputs, axes, strict=False):
        used, returned = list(output.uses()), [place for place, value in enumerate(graph.outputs) if value is output]
        if not used and not returned:
            continue
        cut = ir.node("Slice", [output, first, size, constant(batch)])
        graph.insert_after(after, cut)
        after, taken = cut, cut.outputs[0]
        taken.dtype, taken.shape = output.dtype, output.shape
        # It has a row more than what its dimension is called after.
        output.shape = None
        for user, place in used:
            user.replace_input_with(place, taken)
        for place in returned:
            graph.outputs[place] = taken
            taken.name, output.name = output.name, f"{output.name}.filled"
