"""Where does an artifact leave the model? Runs user code and artifact side by side on a question that failed.

The model runs in eager mode while every torch call is recorded with its result, its inputs and the line it is on. Then
every value inside the artifact is computed, and each recorded result is looked for among them. The place is the first
call whose inputs are found and whose result is not, and from which nothing found again follows: a call that an exporter
fused or folded away is not blamed, because what comes after it is found.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchworker.contract import LocateRequest, LocateResult
from torchworker.parity.reference import read_probes
from torchworker.process.failure import describe
from torchworker.project.recording import Step, record
from torchworker.project.served import build_served, served_project
from torchworker.project.user_code import build_model, enter
from torchworker.project.weights import load_weights
from torchworker.runtimes.load import load_script, onnx_session

CLOSE = 2.0**-14
"""Two values are the same place in the computation when they differ by less than this share of the largest one."""

Inside = list[tuple[str, Tensor]]
"""Values inside an artifact in the order they are computed, with what people call them."""


def locate(request: LocateRequest) -> LocateResult:
    """In words, for each format, where it first differs, or why that cannot be said."""
    torch.set_num_threads(1)
    enter(request.project)
    model = build_model(request.project)
    load_weights(model, Path(request.weights))
    model = build_served(model.eval(), request.project)
    project = served_project(request.project)
    folder = Path(request.folder)
    asked = {probe.name: probe for probe in read_probes(folder)}
    where = {}
    for kind, name in request.probes.items():
        inputs = {key: asked[name].inputs[key] for key in request.inputs}
        try:
            with torch.no_grad():
                steps = record(model, inputs, project)
                inside = values_inside(kind, folder / request.formats[kind], inputs)
            where[kind] = first_difference(steps, inside)
        except Exception as error:
            where[kind] = f"could not be located: {describe(error).splitlines()[0][:200]}"
    return LocateResult(where=where)


def first_difference(steps: list[Step], inside: Inside) -> str:
    """The place in words. steps: of the model; inside: every value of the artifact."""
    if not steps or not inside:
        return "could not be located: nothing inside can be compared"
    found = [any(_same(step.value, value) for _, value in inside) for step in steps]
    reached = list(found)
    # Backwards: whether anything that follows from a step is found again.
    for index in range(len(steps) - 1, -1, -1):
        for feed in steps[index].feeds:
            reached[feed] = reached[feed] or reached[index]
    for index, step in enumerate(steps):
        if not reached[index] and all(found[feed] or reached[feed] for feed in step.feeds):
            near = min(
                ((float((value.double() - step.value.double()).abs().max()), name) for name, value in inside
                 if value.shape == step.value.shape),
                default=None,
            )  # fmt: skip
            nearest = f"; nearest inside: {near[1]}, off by up to {near[0]:.2g}" if near else ""
            # ONNX has a batch norm's factors in the weights of the convolution before it.
            merged = ", or what the format merged it with"
            return f"first differs at step {index + 1} of {len(steps)}: {step.what}{merged}{nearest}"
    return f"all {len(steps)} steps of the model are found inside; what is done to inputs or outputs differs"


def _same(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or not two.is_floating_point() or one.numel() == 0:
        return False
    difference = (one.double() - two.double()).abs().nan_to_num(0.0, float("inf"), 0.0)
    largest = one.double()[one.isfinite()].abs().max() if bool(one.isfinite().any()) else torch.tensor(0.0)
    return torch.equal(one.isnan(), two.isnan()) and float(difference.max()) <= CLOSE * float(largest)


def values_inside(kind: str, path: Path, inputs: Mapping[str, Tensor]) -> Inside:
    """The inputs and every tensor that the artifact computes from them."""
    return [*((f"input {name}", tensor) for name, tensor in inputs.items()), *_INSIDE[kind](path, inputs)]


class _Watched(torch.fx.Interpreter):
    def __init__(self, program: torch.fx.GraphModule) -> None:
        super().__init__(program)
        self.inside: Inside = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and n.op in ("call_function", "call_module", "call_method"):
                self.inside.append((f"node {n.name}", tensor.clone()))
        return result


def _in_pt2(path: Path, inputs: Mapping[str, Tensor]) -> Inside:
    """torch.export: node by node."""
    program = torch.export.load(str(path)).module()
    assert isinstance(program, torch.fx.GraphModule)
    watched = _Watched(program)
    watched.run(*inputs.values())
    return watched.inside


def _in_onnx(path: Path, inputs: Mapping[str, Tensor]) -> Inside:
    """ONNX: every value of the top graph as one more output, with ONNX Runtime's own optimizations off."""
    import onnx_ir

    model = onnx_ir.load(path)
    present = {value.name for value in model.graph.outputs}
    nodes = {value.name: node.op_type for node in model.graph for value in node.outputs if value.name}
    model.graph.outputs.extend(
        value for node in model.graph for value in node.outputs if value.name and value.name not in present
    )
    content = onnx_ir.to_proto(model).SerializeToString()
    session = onnx_session(content, 1, as_written=True, folder=path.parent)
    wanted = [item.name for item in session.get_outputs()]
    values = session.run(wanted, {item.name: inputs[item.name].numpy() for item in session.get_inputs()})
    by_name = dict(zip(wanted, values, strict=True))
    return [
        (f"node {kind} {name}", torch.as_tensor(by_name[name]))
        for name, kind in nodes.items()
        if hasattr(by_name.get(name), "shape")
    ]


def _in_torchscript(path: Path, inputs: Mapping[str, Tensor]) -> Inside:
    """TorchScript: the tensors of the inlined graph's straight part; what is inside a branch or loop is not seen."""
    program = load_script(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        graph = program.graph.copy()
        torch._C._jit_pass_inline(graph)
        lowered, weights = torch._C._jit_pass_lower_graph(graph, program._c)
        for _ in range(len(list(lowered.outputs()))):
            lowered.eraseOutput(0)
        names = []
        for node in lowered.nodes():
            for output in node.outputs():
                if output.type().kind() == "TensorType":
                    lowered.registerOutput(output)
                    names.append(f"node {node.kind()}")
        lowered.makeMultiOutputIntoTuple()
        values = torch._C._create_function_from_graph("inside", lowered)(*inputs.values(), *weights)
    return [(name, value.clone()) for name, value in zip(names, values, strict=True)]


_INSIDE = {"pt2": _in_pt2, "onnx": _in_onnx, "torchscript": _in_torchscript}
LOCATABLE = tuple(_INSIDE)
