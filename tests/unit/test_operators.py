"""Operators that formats compute otherwise: each is asked of the real exporter and runtime, as is the way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.projects import REPOSITORY
from torchworker.exporters import operators
from torchworker.exporters.onnx_export import OPSET
from torchworker.exporters.operators import DIFFERENCES, notes
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
    "F.logsigmoid, binary_cross_entropy_with_logits": (
        F.logsigmoid,
        lambda x: -F.softplus(-x),
        (torch.tensor([-120.0, -20, -12, 3]),),
    ),
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
    "F.interpolate, nearest, from or to a dynamic size": (
        lambda x: F.interpolate(x, size=2),
        lambda x: x[..., torch.arange(2) * x.shape[-1] // 2],
        (torch.arange(14.0).reshape(1, 1, 14),),
    ),
    "F.grid_sample, bicubic or bilinear with zeros around": (
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
        lambda x, grid: F.grid_sample(x, grid, align_corners=False) + 0 * grid.sum(-1)[:, None],
        (PICTURE, torch.tensor([[[[NAN, 0.0], [0.2, 0.1], [INF, 0.3], [2, 0.4]]]])),
    ),
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
        return [*answers, next(given).sum()]


def agree(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point():
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.soak
def test_onnx_runtime_computes_each_operator_of_the_table_otherwise_and_its_way_out_as_torch_does() -> None:
    assert set(ONNX) == {item.name for item in DIFFERENCES if "onnx" in item.formats}
    inputs = tuple(tensor for _, _, asked in ONNX.values() for tensor in asked)
    inputs += (torch.tensor([2**53 + 1, 2**40, -3]),)
    program = torch.export.export(Every(), inputs, strict=False)
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    session = onnx_session(exported.model_proto.SerializeToString(), 1)
    names = [item.name for item in session.get_inputs()]
    answers = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    expected = Every()(*inputs)
    got = [torch.from_numpy(array) for array in answers]
    assert got[-1] != expected[-1], "sums of int64 are exact now: take them out of docs/exports.md"
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


class Rates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        small = torch.log1p(x)
        return torch.where(x > 1, small.cumsum(1), torch.log1p(x))


class Branches(nn.Module):
    """The operator is in a branch alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: torch.expm1(x), lambda x: x + 1, (x,))


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([0, 0, 1, 1])
        return torch.zeros(2).scatter_reduce(0, places, x[0], "mean") + x[:, :2]


class Usual(nn.Module):
    """Operators of the table in uses that are right."""

    def forward(self, x: Tensor) -> Tensor:
        whole = (x * 10).long()
        rows = torch.zeros(4).scatter_reduce(0, whole[0].remainder(4), x[0], "amax")
        pooled = F.avg_pool2d(x[None], 2).sum() + x.div(2.0, rounding_mode="trunc").sum()
        attended = F.scaled_dot_product_attention(x[None], x[None], x[None])
        return attended[0] + rows + pooled + whole**2


def said(model: nn.Module, kind: str) -> tuple[str, ...]:
    with torch.no_grad():
        program = torch.export.export(model, (torch.ones(4, 4),), strict=False)
    return notes(program, kind, str(HERE.parent))


def test_an_operator_is_named_once_with_its_line_what_it_gives_and_what_to_write_instead() -> None:
    (note,) = said(Rates(), "onnx")
    line = next(n for n, text in enumerate(HERE.read_text().splitlines(), 1) if "small = torch.log1p(x)" in text)
    assert f"log1p ({HERE.name}:{line}, in forward: small = torch.log1p(x)): log(1 + x) in float32" in note
    assert "instead: 2 * torch.atanh(x / (2 + x))" in note and "ONNX Runtime 1.31" in note
    assert said(Rates(), "pt2") == said(Rates(), "aoti") == said(Rates(), "executorch") == ()


class Resized(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "twice":
            return F.interpolate(x, scale_factor=2)
        return F.interpolate(x, size=7 if self.way == "to 7" else x.shape[-1] + 3)


@pytest.mark.parametrize(
    ("way", "dynamic", "told"), [("other", True, 1), ("to 7", True, 1), ("twice", True, 0), ("to 7", False, 0)]
)
def test_a_nearest_resize_is_named_where_the_gate_cannot_ask_every_size(way: str, dynamic: bool, told: int) -> None:
    shapes = {"x": {2: torch.export.Dim.DYNAMIC}} if dynamic else None
    program = torch.export.export(Resized(way), (torch.ones(2, 3, 5),), dynamic_shapes=shapes, strict=False)
    found = notes(program, "onnx", str(HERE.parent))
    assert [note.partition(" (")[0] for note in found] == ["F.interpolate, nearest, from or to a dynamic size"] * told


def test_an_operator_inside_a_branch_is_found_too() -> None:
    assert [note.partition(" ")[0] for note in said(Branches(), "aoti")] == ["expm1"]


def test_what_is_wrong_on_usual_inputs_is_refused_with_the_line_and_other_formats_are_made() -> None:
    with pytest.raises(
        UserError, match=r"onnx gives another result for scatter_reduce.*in forward: return torch.zeros"
    ) as no:
        said(Means(), "onnx")
    assert "write index_add of the values divided by index_add of ones" in str(no.value)
    assert "leave onnx out of export.formats" in str(no.value)
    assert said(Means(), "pt2") == said(Means(), "aoti") == ()


def test_usual_uses_of_these_operators_are_not_named() -> None:
    assert said(Usual(), "onnx") == ()


def test_the_page_on_exports_has_the_table() -> None:
    written = (REPOSITORY / "docs" / "exports.md").read_text()
    assert operators.page() in written, "run: python -m tests.zoo > docs/exports.md"


AOTI = """
import sys, torch, json
from torch import nn
class M(nn.Module):
    def forward(self, x, y):
        return torch.expm1(x), 2 * torch.sinh(x / 2) * torch.exp(x / 2), torch.floor_divide(y, 0.1)
given = torch.tensor([1e-5, 1e-6]).repeat(32), torch.full((64,), 6.0)  # long enough for the vector kernels
with torch.no_grad():
    path = torch._inductor.aoti_compile_and_package(torch.export.export(M(), given), package_path=sys.argv[1])
    print(json.dumps([tensor.tolist() for tensor in torch._inductor.aoti_load_package(path)(*given)]))
"""


@pytest.mark.soak
def test_a_compiled_package_computes_the_operators_of_its_rows_otherwise(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler")
    command = [sys.executable, "-W", "ignore", "-c", AOTI, str(tmp_path / "package.pt2")]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
    wrong, mended, divided = (torch.tensor(answer) for answer in json.loads(told.splitlines()[-1]))
    right = torch.expm1(torch.tensor([1e-5, 1e-6])).repeat(32)
    assert not torch.allclose(wrong, right, rtol=1e-4, atol=0), "expm1 is right now: take it out of the table"
    assert torch.allclose(mended, right, rtol=1e-5, atol=0)
    assert set(divided.tolist()) == {60.0}, "floor division is right now: take it out of the table"


EXECUTORCH = """
import sys, torch, json
from torch import nn
from pathlib import Path
from executorch.exir import to_edge_transform_and_lower
from torchworker.runtimes import load
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
    def forward(self, a, b, x):
        centred = x - x.unflatten(1, (2, 4)).mean((2, 3), keepdim=True).expand(-1, -1, 4, -1).flatten(1, 2)
        return a % b, a - (a // b) * b, a**39, self.norm(x), self.norm(centred)
torch.manual_seed(0)
given = torch.tensor([-7, 3]), torch.tensor([2, 2]), torch.randn(2, 8, 25) + 100
with torch.no_grad():
    wanted = M()(*given)
    lowered = to_edge_transform_and_lower(torch.export.export(M().eval(), given)).to_executorch()
    Path(sys.argv[1]).write_bytes(lowered.buffer)
    program = load._executorch_program(Path(sys.argv[1]))
    got = program.load_method("forward")(list(given))
    exact = M().double()(*(t.double() if t.is_floating_point() else t for t in given))
    print(json.dumps([got[0].tolist(), got[1].tolist(), bool(torch.equal(got[2], wanted[2])),
        float((got[3] - exact[3]).abs().max()), float((got[4] - exact[4]).abs().max())]))
"""


@pytest.mark.soak
def test_executorch_computes_the_operators_of_its_rows_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    command = [sys.executable, "-W", "ignore", "-c", EXECUTORCH, str(tmp_path / "model.pte")]
    told = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout
    remainder, mended, exact_power, off, centred_off = json.loads(told.splitlines()[-1])
    assert (remainder, mended) == ([-1, 1], [1, 1]), "the remainder is right now: take it out of the table"
    assert not exact_power, "powers are right now: take them out of the table"
    assert off > 1e-3 and centred_off < 1e-4, (off, centred_off)
