"""int8 variants of what was captured: ONNX Runtime's quantizers on the ONNX file, torchao's on the exported program.

Weights have 7 bits (`reduce_range`): processors without VNNI add two 8-bit products in 16 bits, which overflows without
a word. So an artifact gives the same answers wherever it serves.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from torchworker.exporters.aoti import compiled, compiler
from torchworker.exporters.program import capture
from torchworker.exporters.subject import Subject
from torchworker.parity.int8 import Noise
from torchworker.process.failure import UserError, describe
from torchworker.runtimes.load import Call, flat, load_artifact

COMPILED_SQNR_DB = 20.0
"""Between a quantized program and itself, compiled: noise of 10 % of the signal. A step of quantization apart here and
there is fine, which is some 40 dB (parity/int8.py); Inductor's kernels may be far more wrong than that. Chosen, not
derived."""
DYNAMIC_OPERATORS = ("MatMul", "Gemm", "LSTM")
"""Not Conv: its scales would be found anew in every call, which makes it slower than in float. Not Attention: the
quantizer takes ONNX's own for the one of ONNX Runtime, and writes what does not load."""

Batch = dict[str, Tensor]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer logs every operator that it leaves in float, and every improvement it would like."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@_quiet()
def onnx_dynamic(model: Path, path: Path) -> str:
    """Weights in int8, activations quantized in every call. model: the float ONNX file.

    Raises UserError where the model has nothing that is quantized so.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = path.with_suffix(".part")
    try:
        _prepare(model, prepared)
        quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=list(DYNAMIC_OPERATORS),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        _require_quantized(prepared, path, "onnx-int8-dynamic")
    finally:
        prepared.unlink(missing_ok=True)
    return "onnxruntime, dynamic: int8 weights a channel"


@_quiet()
def onnx_static(model: Path, path: Path, calibration: Sequence[Batch]) -> str:
    """Weights and activations in int8 (QDQ). calibration: batches of training inputs, which give the ranges.

    Raises UserError where the model has nothing that is quantized so.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: tensor.contiguous().numpy() for name, tensor in batch.items()}

    prepared = path.with_suffix(".part")
    try:
        _prepare(model, prepared)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        _require_quantized(prepared, path, "onnx-int8-static")
    finally:
        prepared.unlink(missing_ok=True)
    return f"onnxruntime, static QDQ: int8 weights a channel, uint8 activations, {_counted(calibration)}"


def _prepare(model: Path, path: Path) -> None:
    """Shapes inferred and the graph simplified, without which less is quantized."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(model, path)
    except Exception:
        # Symbolic shape inference does not know every operator, ONNX's own Attention for one. Shapes that the file says
        # are those of weights before the quantizer turns them, which it then finds to differ.
        import onnx_ir

        plain = onnx_ir.load(model)
        for graph in plain.graphs():
            for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
                if not value.is_graph_output():
                    value.shape = value.type = None
        onnx_ir.save(plain, path)
        quant_pre_process(path, path, skip_symbolic_shape=True)
        # It has inferred those of the weights anew.
        plain = onnx_ir.load(path)
        for value in plain.graph.initializers.values():
            value.shape = value.type = None
        onnx_ir.save(plain, path)


def _require_quantized(model: Path, path: Path, kind: str) -> None:
    """Raises UserError, and the file is gone, unless something is computed in int8 that was not before.

    Args:
        model: the float ONNX file that was quantized.
        path: what came of it.
        kind: the variant.
    """
    before, after = _operators(model), _operators(path)
    if any("quant" in name.lower() or "Integer" in name or name.startswith("Q") for name in after - before):
        return
    path.unlink()
    takes = f"it takes {', '.join(DYNAMIC_OPERATORS)}" if kind == "onnx-int8-dynamic" else "it takes constant weights"
    other = "; onnx-int8-static quantizes convolutions" if kind == "onnx-int8-dynamic" and before["Conv"] else ""
    most = ", ".join(f"{name} {count}" for name, count in before.most_common(4))
    raise UserError(
        f"export.quantize: {kind}: nothing was quantized: {takes}, and the model's operators are {most}{other}"
    )


def _operators(model: Path) -> Counter[str]:
    """How often an ONNX file has each operator, those of loops and branches too."""
    import onnx_ir

    return Counter(node.op_type for node in onnx_ir.load(model).graph.all_nodes())


def pt2e(subject: Subject, path: Path, calibration: Sequence[Batch]) -> str:
    """torchao's PT2E with the X86Inductor quantizer, compiled by AOTInductor. Raises UserError without torchao."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise UserError(
            f"export.quantize: pt2e-int8 needs torchao ({describe(error)}): pip install 'torchao>=0.18,<0.19'"
        ) from error
    named = compiler()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=True))
    captured = capture(subject)
    # Preparing changes the module, and the exporters beside this one may share it.
    prepared = prepare_pt2e(copy.deepcopy(captured.program.module()), quantizer)
    for batch in calibration:
        prepared(*batch.values())
    converted: fx.GraphModule = convert_pt2e(prepared)
    if not any("quantize" in str(node.target) for node in converted.graph.nodes):
        raise UserError("export.quantize: pt2e-int8: nothing was quantized: it takes convolutions and linear layers")
    quantized = capture(replace(subject, model=converted))
    with quantized.assuming():
        compiled(quantized.program, subject, path, freezing=True)
    call = load_artifact("pt2e-int8", path, torch.get_num_threads())
    found = agreement(call, converted, calibration[0])
    if found < COMPILED_SQNR_DB:
        path.unlink()
        raise UserError(
            f"export.quantize: pt2e-int8: compiled, the quantized program gives other outputs ({found:.1f} dB of "
            f"signal to noise between the two, expected {COMPILED_SQNR_DB:g}): a defect of this torch's int8 kernels"
        )
    return f"torchao PT2E, int8 weights and activations, {_counted(calibration)} → AOTInductor, {named}"


def agreement(call: Call, program: fx.GraphModule, inputs: Batch) -> float:
    """Decibels of signal to noise between a compiled program and itself."""
    noise = Noise()
    outputs = program(*inputs.values())
    for name, (got, wanted) in enumerate(zip(call(inputs), flat(outputs), strict=True)):
        noise.add(str(name), got, wanted)
    return noise.decibels


def _counted(calibration: Sequence[Batch]) -> str:
    samples = sum(len(next(iter(batch.values()))) for batch in calibration)
    return f"calibrated on {samples} training samples"
