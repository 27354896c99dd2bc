"""What other tools take for equal: each rule with its documented inputs and tolerances, written after its source."""

from collections.abc import Callable

import torch
from defects import Call, Case, eager
from torch import Tensor

BATCH = 16
"""Samples at which models are captured."""


def similar(case: Case, size: int, seed: int, low_high: bool = False) -> dict[str, Tensor]:
    """Random inputs as people make them: normal (or uniform in 0..1) floats; whole numbers and masks of samples."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(next(iter(case.data.values()))), (size,), generator=g)
    return {
        name: (torch.rand if low_high else torch.randn)((size, *tensor.shape[1:]), generator=g)
        if tensor.is_floating_point()
        else tensor[rows]
        for name, tensor in case.data.items()
    }


def assert_close(call: Call, case: Case) -> bool:
    """torch.testing.assert_close with its defaults on three random batches of the captured size."""
    for seed in range(3):
        inputs = similar(case, BATCH, seed)
        expected = eager(case.model)(inputs)
        torch.testing.assert_close(call({k: v.clone() for k, v in inputs.items()}), expected, equal_nan=True)
    return True


def verify(call: Call, case: Case) -> bool:
    """torch.onnx.export(verify=True): torch/onnx/_internal/exporter/_core.py, step 6, on the inputs of capture."""
    inputs = {name: tensor[:BATCH] for name, tensor in case.data.items()}
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=False):
        difference = (got.double() - expected.double()).abs()
        relative = difference / (expected.double().abs() + 1e-7)
        if float(difference.max()) >= 5e-3 or float(relative.max()) >= 1e-1:
            return False
    return True


def polygraphy(call: Call, case: Case) -> bool:
    """`polygraphy run`: one iteration of uniform inputs in 0..1; each element within atol 1e-5 or rtol 1e-5."""
    inputs = similar(case, BATCH, 1, low_high=True)
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=True):
        if got.shape != expected.shape:
            return False
        difference = (got.double() - expected.double()).abs()
        if bool(((difference > 1e-5) & (difference > 1e-5 * expected.double().abs())).any()):
            return False
    return True


def optimum(call: Call, case: Case) -> bool:
    """Optimum's validate_model_outputs: dummy inputs of batch 2, shapes equal, numpy.allclose with atol 1e-5."""
    inputs = similar(case, 2, 2)
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=True):
        if got.shape != expected.shape or not torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5):
            return False
    return True


def aitune(call: Call, case: Case) -> bool:
    """NVIDIA AITune 0.6, torch/task/correctness.py: recorded samples; shapes as recorded, all finite. It compares no
    value."""
    inputs = {name: tensor[:BATCH] for name, tensor in case.data.items()}
    expected = eager(case.model)(inputs)
    got = call({name: tensor.clone() for name, tensor in inputs.items()})
    return [tensor.shape for tensor in got] == [tensor.shape for tensor in expected] and finite(got)


def navigator(call: Call, case: Case) -> bool:
    """Triton Model Navigator 0.14, commands/correctness: recorded samples; NaN, infinity or another number of outputs
    fail, and what the largest difference was is written down."""
    inputs = {name: tensor[:BATCH] for name, tensor in case.data.items()}
    expected = eager(case.model)(inputs)
    got = call({name: tensor.clone() for name, tensor in inputs.items()})
    for one, other in zip(got, expected, strict=True):
        torch.broadcast_shapes(one.shape, other.shape)
    return finite(got)


def finite(outputs: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outputs)


def olive(call: Call, case: Case) -> bool:
    """Olive 0.13, OnnxDiscrepancyCheck with `max_elements_above_0_01: 0`: one random input. Without limits, its
    default, it fails on nothing."""
    inputs = similar(case, 1, 3)
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=True):
        if bool(((got.double() - expected.double()).abs() > 0.01).any()):
            return False
    return True


PEERS: dict[str, Callable[[Call, Case], bool]] = {
    "assert_close": assert_close,
    "Polygraphy": polygraphy,
    "Optimum": optimum,
    "verify=True": verify,
    "Olive": olive,
    "AITune": aitune,
    "Navigator": navigator,
}


def passes(rule: Callable[[Call, Case], bool], call: Call, case: Case) -> bool:
    try:
        return rule(call, case)
    except Exception:
        return False
