"""Operators that formats compute otherwise: each is asked of the real exporter and runtime, as is the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.projects import REPOSITORY
from torchworker.exporters import operators
from torchworker.exporters.operators import DIFFERENCES, notes
from torchworker.exporters.onnx_export import OPSET
from torchworker.process.failure import UserError
from torchworker.runtimes.load import onnx_session

HERE = Path(__file__)
INF, NAN = float("inf"), float("nan")
NEAR_ZERO = torch.tensor([-1e-7, 1e-8, 1e-6, 1e-5, 0.5])
TIMES = torch.tensor([2**40 + 3, -(2**40 + 3), 1_764_450_123_457])
POWERS = 2.0 ** torch.arange(0, 31)
PICTURE = torch.arange(32.0).reshape(1, 2, 4, 4)
WINDOWS = torch.full((1, 2, 8), NAN)
QUERIES = torch.arange(12.0).reshape(1, 1, 3, 4).sin()
MASK = torch.tensor([[True] * 3, [False] * 3, [True] * 3])[None, None]

Asked = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]
"""The operator, the way out, and inputs that tell the difference."""
ONNX: dict[str, Asked] = {
    "scatter_reduce(…, 'mean')": (
        lambda x, places: torch.zeros(3).scatter_reduce(0, places, x, "mean", include_self=False),
        lambda x, places: (
            torch.zeros(3).index_add(0, places, x)
            / torch.zeros(3).index_add(0, places, torch.ones_like(x)).clamp(min=1)
        ),
        (torch.arange(1.0, 6), torch.tensor([0, 0, 1, 2, 2])),
    ),
    "avg_pool2d, avg_pool3d with divisor_override": (
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.avg_pool2d(x, 2) * 4 / 3,
        (PICTURE,),
    ),
    "log1p": (torch.log1p, lambda x: 2 * torch.atanh(x / (2 + x)), (NEAR_ZERO,)),
    "expm1": (torch.expm1, lambda x: 2 * torch.sinh(x / 2) * torch.exp(x / 2), (NEAR_ZERO,)),
    "logaddexp": (
        torch.logaddexp,
        lambda a, b: torch.maximum(a, b) + F.softplus(-(a - b).abs()),
        (torch.tensor([100.0, -200, 3]), torch.tensor([100.0, -200, 1])),
    ),
    "F.logsigmoid": (F.logsigmoid, lambda x: -F.softplus(-x), (torch.tensor([-120.0, -20, -12, 3]),)),
    "torch.div(…, rounding_mode='trunc') of whole numbers": (
        lambda a, b: torch.div(a, b, rounding_mode="trunc"),
        lambda a, b: (a - torch.fmod(a, b)) // b,
        (TIMES, torch.full((3,), 1000)),
    ),
    "powers of whole numbers": (
        lambda a, b: a**b,
        lambda a, b: a * a * a * a * a,
        (torch.tensor([3001, 5003]), torch.tensor([5, 5])),
    ),
    "log2": (
        lambda x: torch.log2(x).floor(),
        lambda x: (torch.bucketize(x, 2.0 ** torch.arange(32), right=True) - 1).float(),
        (POWERS,),
    ),
    "atan2": (
        torch.atan2,
        lambda y, x: torch.where((y == 0) & (x < 0), torch.pi, torch.atan2(y, x)),
        (torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0])),
    ),
    "floor division and remainder of floats": (
        lambda x: torch.floor_divide(x, 0.1),
        lambda x: torch.floor_divide((x * 100).long(), 10).float() - 1,
        (torch.tensor([6.0]),),
    ),
    "logcumsumexp": (
        lambda x: x.logcumsumexp(1),
        lambda x: x.clamp(min=-1e30).logcumsumexp(1).clamp(max=0) - INF,
        (torch.full((1, 3), -INF),),
    ),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), lambda x: F.max_pool2d(x[:, :, None], (1, 2))[:, :, 0], (WINDOWS,)),
    "scaled_dot_product_attention with a mask": (
        lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask),
        lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask) * mask.any(-1, keepdim=True),
        (QUERIES, MASK),
    ),
}


class Every(nn.Module):
    """Every operator of ONNX's rows and its way out, each on its own inputs, in one graph."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given = iter(inputs)
        answers = []
        for operator, way_out, asked in ONNX.values():
            own = [next(given) for _ in asked]
            answers += [operator(*own), way_out(*own)]
        return answers


def agree(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)


def test_onnx_runtime_computes_each_operator_of_the_table_otherwise_and_its_way_out_as_torch_does() -> None:
    assert set(ONNX) == {item.name for item in DIFFERENCES if "onnx" in item.formats}
    inputs = tuple(tensor for _, _, asked in ONNX.values() for tensor in asked)
    program = torch.export.export(Every(), inputs, strict=False)
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    session = onnx_session(exported.model_proto.SerializeToString(), 1)
    names = [item.name for item in session.get_inputs()]
    answers = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    expected = Every()(*inputs)
    got = [torch.from_numpy(array) for array in answers]
    faults = []
    for position, name in enumerate(ONNX):
        wrong, mended = 2 * position, 2 * position + 1
        said = f"{name}: torch {expected[wrong]}, ONNX {got[wrong]}; the way out: {expected[mended]}, {got[mended]}"
        if agree(got[wrong], expected[wrong]):
            faults.append(f"is right now, take it out of the table: {said}")
        if not agree(expected[mended], expected[wrong]):
            faults.append(f"the way out is another function: {said}")
        if not agree(got[mended], expected[wrong]):
            faults.append(f"the way out is wrong in ONNX too: {said}")
    assert faults == []
