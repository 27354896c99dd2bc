"""Operators that a format computes otherwise than torch does, without a word, found in the captured graph.

Samples may not show it: a logarithm near zero, whole numbers beyond 2^24, a mask that is all padding. So the graph is
read for them, and docs/exports.md is written from the same table. Tests ask the real runtimes whether each row still
holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from torchworker.exporters.attention import AT_20
from torchworker.process.failure import UserError, is_theirs

When = Callable[[Node], bool]


def _always(_: Node) -> bool:
    return True


def _whole(node: Node) -> bool:
    """Of whole numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _argument(node: Node, name: str) -> Any:
    """An argument by its name in the operator's schema; None where it is left out."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name)
    return None


def _given(name: str) -> When:
    return lambda node: _argument(node, name) is not None


def _power(node: Node) -> bool:
    """A power of whole numbers whose exponent is no small number that is known."""
    exponent = _argument(node, "exponent")
    return _whole(node) and not (isinstance(exponent, int) and exponent in (0, 1, 2, 3))


def _blends_with_nothing(node: Node) -> bool:
    """grid_sample whose weights are NaN in torch where the grid is: bicubic, or bilinear with zeros around."""
    mode, padding = _argument(node, "interpolation_mode"), _argument(node, "padding_mode")
    return (mode, padding) == (0, 0) or mode in (2,)


def _of_any_size(node: Node) -> bool:
    """A resize between sizes of which one is dynamic, but for a whole factor: fixed sizes are what the gate asks."""
    factors = _argument(node, "scale_factors")
    if factors and all(float(factor).is_integer() for factor in factors):
        return False
    source = _argument(node, "input")
    values = [node.meta.get("val"), source.meta.get("val") if isinstance(source, Node) else None]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape[2:]]
    return any(isinstance(size, torch.SymInt) for size in sizes)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One operator that one format computes otherwise."""

    name: str
    """As the user writes it."""
    operators: Sequence[str]
    """Names in the graph, without overloads: `log1p` is aten.log1p."""
    formats: Sequence[str]
    seen: str
    """Where it was seen: exporter and runtime, with versions."""
    wrong: str
    """What is given instead."""
    way_out: str
    """What to write instead; a test holds that against the model too."""
    refused: bool = False
    """Whether usual inputs show it, not only those of a corner: then the format is not made."""
    when: When = _always
    """Which nodes of these operators."""


ORT = "torch 2.13, ONNX Runtime 1.31"
DIFFERENCES: Sequence[Difference] = (
    Difference(
        name="scatter_reduce(…, 'mean')", operators=("scatter_reduce", "scatter_reduce_"), formats=("onnx",), seen=ORT,
        wrong="the last value of each place instead of their mean",
        way_out="index_add of the values divided by index_add of ones, clamp(min=1)",
        refused=True, when=lambda node: _argument(node, "reduce") == "mean",
    ),
    Difference(
        name="avg_pool2d, avg_pool3d with divisor_override", operators=("avg_pool2d", "avg_pool3d"), formats=("onnx",),
        seen=ORT, wrong="the divisor is left out: sums are divided by the size of the window",
        way_out="avg_pool without it, times the size of the window, divided by the divisor",
        refused=True, when=_given("divisor_override"),
    ),
    Difference(
        name="log1p", operators=("log1p", "log1p_"), formats=("onnx",), seen=f"{ORT} (and OpenVINO 2026.4)",
        wrong="log(1 + x) in float32: 0.1 % off at 1e-5, 0 below 6e-8",
        way_out="2 * torch.atanh(x / (2 + x)), up to some 1e6",
    ),
    Difference(
        name="expm1", operators=("expm1", "expm1_"), formats=("onnx", "aoti"), seen=f"{ORT}; AOTInductor of torch 2.13",
        wrong="exp(x) - 1 in float32: 0.1 % off at 1e-5, 0 below 6e-8",
        way_out="2 * torch.sinh(x / 2) * torch.exp(x / 2)",
    ),
    Difference(
        name="logaddexp", operators=("logaddexp",), formats=("onnx",), seen=f"{ORT} (and OpenVINO 2026.4)",
        wrong="log(exp(a) + exp(b)) in float32: inf above 88, -inf below -104",
        way_out="torch.maximum(a, b) + F.softplus(-(a - b).abs())",
    ),
    Difference(
        name="F.logsigmoid, binary_cross_entropy_with_logits",
        operators=("log_sigmoid", "log_sigmoid_forward", "binary_cross_entropy_with_logits"), formats=("onnx",),
        seen=f"{ORT} (and OpenVINO 2026.4)",
        wrong="the logarithm of a rounded sigmoid: -inf below -18, 0.05 % off at -12",
        way_out="-F.softplus(-x); F.softplus(x) - x * target",
    ),
    Difference(
        name="torch.div(…, rounding_mode='trunc') of whole numbers", operators=("div", "div_", "divide"),
        formats=("onnx",), seen=ORT, wrong="through float32: quotients of numbers above 2^24 are rounded",
        way_out="(a - torch.fmod(a, b)) // b",
        when=lambda node: _whole(node) and _argument(node, "rounding_mode") == "trunc",
    ),
    Difference(
        name="powers of whole numbers", operators=("pow", "pow_"), formats=("onnx",), seen=ORT,
        wrong="through float64: results above 2^53 are rounded", way_out="multiply", when=_power,
    ),
    Difference(
        name="powers of whole numbers", operators=("pow", "pow_"), formats=("executorch",), seen="ExecuTorch 1.5.1",
        wrong="through float64: results above 2^53 are rounded", way_out="multiply", when=_whole,
    ),
    Difference(
        name="log2", operators=("log2", "log2_"), formats=("onnx",), seen=ORT,
        wrong="just below the whole number at 2^15, 2^30 and 2^-13, so that floor() is one too small",
        way_out="for the number of the power: torch.bucketize(x, 2.0 ** torch.arange(32), right=True) - 1",
    ),
    Difference(
        name="atan2", operators=("atan2",), formats=("onnx",), seen=f"{ORT} (and OpenVINO 2026.4)",
        wrong="-π instead of π at y = 0, x < 0; 0 where one of both is NaN",
        way_out="decide the axis y = 0 by torch.where, if its sign matters",
    ),
    Difference(
        name="floor division and remainder of floats", operators=("floor_divide", "remainder"),
        formats=("onnx", "aoti"), seen=f"{ORT}; AOTInductor of torch 2.13",
        wrong="the quotient is rounded before it is cut: 6 // 0.1 is 60 and 6 % 0.1 is 0, where torch gives 59 and 0.1",
        way_out="whole numbers in a smaller unit", when=_real,
    ),
    Difference(
        name="remainder (%) of whole numbers", operators=("remainder",), formats=("executorch",),
        seen="ExecuTorch 1.5.1", wrong="the sign is the dividend's: -7 % 2 is -1, where torch gives 1",
        way_out="a - (a // b) * b", when=_whole,
    ),
    Difference(
        name="GroupNorm, InstanceNorm", operators=("group_norm", "instance_norm"), formats=("executorch",),
        seen="ExecuTorch 1.5.1",
        wrong="the variance is the mean of squares less the square of the mean: 1e-2 off at a mean of 100 standard "
        "deviations, which the gate asks for, NaN at 10,000",
        way_out="subtract the mean of each channel (group) first: norm(x - x.mean((2, 3), keepdim=True))",
    ),
    Difference(
        name="logcumsumexp", operators=("logcumsumexp",), formats=("onnx",), seen=ORT,
        wrong="NaN for a row that is -inf throughout", way_out="clamp(min=-1e30) before it",
    ),
    Difference(
        name="max_pool1d", operators=("max_pool1d",), formats=("onnx",), seen=ORT,
        wrong="-3.4e38 for a window that is all NaN, where torch gives NaN",
        way_out="max_pool2d of x[:, :, None] with a window of (1, size)",
    ),
    Difference(
        name="F.interpolate, nearest, from or to a dynamic size",
        operators=("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), formats=("onnx",), seen=ORT,
        wrong="the neighbour of the right pixel at 125 of the 3,969 pairs of sizes up to 63, such as 14 to 2, of which "
        "the gate asks the smallest and the largest alone",
        way_out="x[..., torch.arange(n) * x.shape[-1] // n], a dimension at a time", when=_of_any_size,
    ),
    Difference(
        name="F.grid_sample, bicubic or bilinear with zeros around", operators=("grid_sampler", "grid_sampler_2d"),
        formats=("onnx",), seen=ORT,
        wrong="a number where the grid is NaN or infinite, where torch gives NaN; the gate asks for it unless "
        "parity.not_finite is off",
        way_out="add 0 * grid.sum(-1)[:, None] to what it gives", when=_blends_with_nothing,
    ),
    Difference(
        name=AT_20, operators=("scaled_dot_product_attention",), formats=("onnx",),
        seen=f"{ORT}, opset 20, which is left for heads or samples that are broadcast",
        wrong="the mean of all values for a row that is masked throughout (a sample that is all padding), where torch "
        "gives 0",
        way_out="multiply what it gives by mask.any(-1, keepdim=True)", when=_given("attn_mask"),
    ),
)  # fmt: skip


def notes(program: ExportedProgram, kind: str, folder: str) -> tuple[str, ...]:
    """What a format computes otherwise than the model, one line a kind of difference, with the user's line.

    Args:
        program: as captured, before anything is made of it.
        kind: the format.
        folder: where the user's code is.

    Raises:
        UserError: for an operator that is wrong on usual inputs.
    """
    told: dict[str, str] = {}
    for node in _calls(program):
        for difference in DIFFERENCES:
            if kind not in difference.formats or not _is(node, difference):
                continue
            said = f"{difference.name}{_place(node, folder)}: {difference.wrong} ({difference.seen})"
            if difference.refused:
                raise UserError(
                    f"export: {kind} gives another result for {said}; write {difference.way_out}, or leave {kind} out "
                    "of export.formats"
                )
            told.setdefault(difference.name, f"{said}; instead: {difference.way_out}")
    return tuple(told.values())


def page() -> str:
    """The table for docs/exports.md."""
    lines = [
        "| operator | format | instead of torch's result | write | seen with |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for item in DIFFERENCES:
        wrong = f"{item.wrong}; **refused**" if item.refused else item.wrong
        lines.append(f"| {item.name} | {', '.join(item.formats)} | {wrong} | {item.way_out} | {item.seen} |")
    return "\n".join(lines)


def _calls(program: ExportedProgram) -> Iterator[Node]:
    """Every operator of the program, those inside branches and loops too."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            yield from (node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _is(node: Node, difference: Difference) -> bool:
    namespace, _, name = node.target._schema.name.partition("::")  # type: ignore[union-attr]
    return namespace == "aten" and name in difference.operators and difference.when(node)


def _place(node: Node, folder: str) -> str:
    """` (net.py:12, in forward: y = torch.log1p(x))`; empty when torch does not say."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', node.meta.get("stack_trace") or "")
    for file, line, function, source in reversed(frames):
        if is_theirs(file, Path(folder)):
            return f" ({Path(file).relative_to(folder)}:{line}, in {function}: {source.strip()})"
    return ""
