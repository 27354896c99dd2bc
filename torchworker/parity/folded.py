"""Weights that an ONNX file holds under other names or with other values, found by the rules of its exporter.

torch's exporter computes what has no inputs (onnxscript 0.7: of tensors up to 8,192 elements, and batch norms of any
size) and says in the file which names went into a constant. Each rule here computes the same from the trained weights
and asks for its bits. A constant that no rule explains shows nothing, and neither does one that differs in many places:
code of the model may have computed with the weight.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

Array = NDArray[Any]

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
"""In a value's metadata: the names that it was computed from, as a Python list."""
RECURRENT = {"LSTM": (4, (0, 3, 1, 2)), "GRU": (3, (1, 0, 2)), "RNN": (1, (0,))}
"""Gates, and where ONNX's are in torch's order: torch has i f g o and r z n, ONNX i o f c and z r h."""
NORMALIZED = ("Conv", "ConvTranspose", "Gemm")
"""Operators that take up a batch norm behind them."""
TYPES = (numpy.float16, numpy.float32, numpy.float64)
EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4)
"""Of batch norm, beside what the file itself speaks for: it is no weight, and gone from the file."""
FEW = 4
"""A constant in which more than one value in so many differs was computed by some other rule."""
AXES = 4
"""Constants of more dimensions are not looked at with their dimensions in another order."""


class Held(NamedTuple):
    """Names of trained tensors that the file holds though not as they are."""

    equal: frozenset[str]
    """Bit for bit, after what the exporter does with them."""
    different: frozenset[str]
    """With a few values that training did not leave."""


def folded(graph: Any, trained: Mapping[str, Array], by_name: Collection[str]) -> Held:
    """What of the trained weights a graph holds in another way than under their own names.

    Args:
        graph: onnx_ir.Graph.
        trained: name to tensor, of TYPES.
        by_name: those of them that the file holds under their names, bit for bit.
    """
    constants = dict(_constants(graph))
    found: list[tuple[str, bool | None]] = []
    for name in constants.keys() - trained.keys():
        found += _of_constant(graph.initializers[name], constants[name], trained).items()
    norms = _norms(constants, trained)
    for node in graph.all_nodes():
        if node.op_type in NORMALIZED and node.domain == "" and node.inputs[1] is not None:
            weight = node.inputs[1].name
            if weight in trained.keys() & constants.keys() and weight not in by_name:
                found += _of_normalized(node, constants, trained, norms).items()
    different = frozenset(name for name, same in found if same is False)
    return Held(frozenset(name for name, same in found if same) - different, different)


def _constants(graph: Any) -> Iterator[tuple[str, Array]]:
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            array = value.const_value.numpy()
            if array.dtype.type in TYPES and array.size:
                yield name, array


# --- copies: transposed, cut, put together, gates in another order ---------------------------------------------


def _of_constant(value: Any, constant: Array, trained: Mapping[str, Array]) -> dict[str, bool | None]:
    """Each weight that went into a constant: whether it is in there as it was trained; None where that is not known."""
    try:
        told = ast.literal_eval(value.metadata_props.get(FOLDED_FROM, "[]"))
    except (ValueError, SyntaxError):
        return {}
    names = [name for name in told if name in trained and trained[name].dtype == constant.dtype and trained[name].size]
    gates = {RECURRENT.get(user.op_type) for user, place in value.uses() if place in (1, 2, 3)} - {None}
    # What is made of one tensor alone and keeps its values is a transposition, and what goes into a recurrent operator
    # was put in order for it. Others may have been added to, or masked.
    certain = len(told) == 1 or bool(gates)
    found = {name: _copied(constant, trained[name], gates, certain) for name in names}
    whole = [name for name, same in found.items() if same and trained[name].size == constant.size]
    return {name: True for name in whole} if whole else found


def _copied(constant: Array, weight: Array, gates: Iterable[Any], certain: bool) -> bool | None:
    """Whether a part of the constant is the weight, or the constant a part of the weight, in some order of dimensions.

    Args:
        constant, weight: of one dtype.
        gates: of RECURRENT, of the operators that take the constant.
        certain: whether only the order can have been changed.
    """
    wanted = [weight]
    for count, order in gates:
        if len(weight) % count == 0:
            wanted.append(numpy.concatenate([numpy.split(weight, count)[place] for place in order]))
    squeezed = constant.squeeze()
    orders = itertools.permutations(range(squeezed.ndim)) if squeezed.ndim <= AXES else [range(squeezed.ndim)]
    verdicts = set()
    for order, expected in itertools.product(orders, wanted):
        got = squeezed.transpose(*order)
        for mine, trained in _pairs(got, expected):
            same = judged(mine, trained, trained != 0, None if certain else 1)
            verdicts.add(None if same is False and not gates and _computed(mine, trained, certain) else same)
    if True in verdicts:
        return True
    return False if False in verdicts else None


def _computed(got: Array, expected: Array, certain: bool) -> bool:
    """Whether code may have made a constant of a weight from which it differs in a few values.

    Args:
        got, expected: of one shape.
        certain: whether nothing else went into it.
    """
    off = _bits(got) != _bits(expected)
    if not certain:
        # Bounded by a number that is computed, or with values of its own in other places.
        rest, changed = expected[~off], expected[off]
        if changed.max() < rest.min() or changed.min() > rest.max() or numpy.isin(got[off], expected).any():
            return True
    # Activations that leave positive numbers alone.
    return bool((off == (expected < 0)).all())


def _pairs(got: Array, expected: Array) -> Iterator[tuple[Array, Array]]:
    """Parts that may be the same, flat: whole tensors, each part of a longer one, or the first rows."""
    flat, other = got.reshape(-1), expected.reshape(-1)
    if flat.size % other.size == 0:
        yield from ((part, other) for part in flat.reshape(-1, other.size))
    elif other.size % flat.size == 0:
        yield from ((flat, part) for part in other.reshape(-1, flat.size))
    elif got.ndim == expected.ndim and got.shape[1:] == expected.shape[1:] and len(got) < len(expected):
        yield flat, other[: flat.size]


def judged(
    got: Array, expected: Array, counted: Array, most: int | None = None, rounding: Array | None = None
) -> bool | None:
    """True for the same bits, False where a few values are others, None where it may be something else altogether.

    Args:
        got, expected: of one shape and dtype.
        counted: of that shape, bool: elements whose agreement says something; a product with zero does not.
        most: values that may differ; None for one in FEW of those that count.
        rounding: of that shape, a difference that says nothing as what is expected is not known to the last bit.
    """
    off = _bits(got) != _bits(expected)
    if not off.any():
        return True
    if rounding is not None:
        off &= numpy.abs(got - expected) > rounding
    differ = int(off.sum())
    if not differ:
        return None
    limit = int((counted & numpy.isfinite(expected)).sum()) // FEW
    if differ > (limit if most is None else min(limit, most)):
        return None
    mine, theirs = got[off].astype(numpy.float64), expected[off].astype(numpy.float64)
    near = numpy.abs(mine - theirs) <= 0.5 * numpy.abs(theirs)
    # Bounds and fillings that code writes are round numbers.
    written = [got.dtype.type(f"{value:.4g}") == value for value in mine]
    return False if near.all() and not any(written) else None


def _bits(array: Array) -> Array:
    return numpy.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


# --- batch norm, taken up by what is before it -----------------------------------------------------------------


def _of_normalized(
    node: Any, constants: Mapping[str, Array], trained: Mapping[str, Array], norms: Sequence[str]
) -> dict[str, bool | None]:
    """Weights of an operator and of the batch norm behind it: whether its constants are what folding makes of them.

    Args:
        node: onnx_ir.Node of NORMALIZED.
        constants: of the file.
        trained: name to tensor.
        norms: batch norms of the model that are not in the file.
    """
    name = node.inputs[1].name
    if constants[name].shape != trained[name].shape or constants[name].dtype != trained[name].dtype:
        return {}
    got, weight = _by_channel(node, constants[name]), _by_channel(node, trained[name])
    # It may be another operator's batch norm that was folded.
    same = judged(got, weight, weight != 0)
    if same is not None:
        return {name: same} | _of_bias(node, constants, trained, "", 1.0)
    best: tuple[tuple[int, int, bool], str, Array, Array] | None = None
    with numpy.errstate(all="ignore"):
        largest = numpy.abs(weight).argmax(1)[:, None]
        ratio = numpy.take_along_axis(got, largest, 1)[:, 0] / numpy.take_along_axis(weight, largest, 1)[:, 0]
        for norm in norms:
            gamma, variance = trained[f"{norm}.weight"], trained[f"{norm}.running_var"]
            if gamma.dtype != weight.dtype or len(gamma) != len(weight):
                continue
            for epsilon in _epsilons(ratio, gamma, variance):
                factor = gamma / numpy.sqrt(variance + epsilon)
                # Most norms are not the one, and products with all weights take long.
                if (numpy.abs(factor - ratio) <= 1e-3 * numpy.abs(ratio)).mean() < 0.5:
                    continue
                expected = weight * factor[:, None]
                off = int((numpy.abs(got - expected) > _rounding(expected)).sum())
                odd = int((_bits(got) != _bits(expected)).sum())
                bias = _of_bias(node, constants, trained, norm, factor)
                rank = (off, odd, not bias.get(f"{norm}.bias"))
                if best is None or rank < best[0]:
                    best = rank, norm, factor, expected
        if best is None:
            return {}
        _, norm, factor, expected = best
        same = judged(got, expected, expected != 0, rounding=_rounding(expected))
        names = [name, *([f"{norm}.weight", f"{norm}.running_var"] if same else [])]
        return dict.fromkeys(names, same) | _of_bias(node, constants, trained, norm, factor, certain=bool(same))


def _rounding(*terms: Array) -> Array:
    """What is lost in a sum of these, and by the number that is added to a variance, of which the file has no trace."""
    largest: Array = sum(numpy.abs(term) for term in terms) * numpy.asarray(8 * numpy.finfo(terms[0].dtype).eps)
    return largest


def _by_channel(node: Any, weight: Array) -> Array:
    """The weights of each channel of an operator's output, [channels, weights]."""
    if node.op_type == "ConvTranspose":
        group = node.attributes["group"].as_int() if "group" in node.attributes else 1
        parts = weight.reshape(group, len(weight) // group, weight.shape[1], -1)
        return parts.transpose(0, 2, 1, 3).reshape(group * weight.shape[1], -1)
    if node.op_type == "Gemm" and not ("transB" in node.attributes and node.attributes["transB"].as_int()):
        return weight.T
    return weight.reshape(len(weight), -1)


def _norms(constants: Mapping[str, Array], trained: Mapping[str, Array]) -> list[str]:
    """Batch norms of the model of which the file has nothing."""
    parts = ("weight", "bias", "running_mean", "running_var")
    named = [name.removesuffix(".running_var") for name in trained if name.endswith(".running_var")]
    return [
        norm
        for norm in named
        if all(f"{norm}.{part}" in trained and f"{norm}.{part}" not in constants for part in parts)
    ]


def _of_bias(
    node: Any,
    constants: Mapping[str, Array],
    trained: Mapping[str, Array],
    norm: str,
    factor: Array | float,
    *,
    certain: bool = False,
) -> dict[str, bool | None]:
    """The same of the operator's bias.

    Args:
        node, constants, trained: as of _of_normalized.
        norm: name of the batch norm, empty where there is none.
        factor: of each channel.
        certain: whether the operator's weights have shown it to be the factor, to a bit or so.
    """
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or value.name not in constants:
        return {}
    got, own = constants[value.name], trained.get(value.name)
    if norm:
        beta, mean = trained[f"{norm}.bias"], trained[f"{norm}.running_mean"]
        expected = ((own if own is not None else numpy.zeros_like(mean)) - mean) * factor + beta
    elif own is not None:
        expected = own
    else:
        return {}
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return {}
    rounding = _rounding(expected - beta, beta, *([] if certain else [mean * factor])) if norm else None
    if rounding is not None and certain:
        rounding = rounding / 8
    same = judged(got, expected, expected != 0, rounding=rounding)
    names = [value.name] if own is not None else []
    if norm and (same or own is None):
        names += [f"{norm}.bias", f"{norm}.running_mean"]
    return dict.fromkeys(names, same)


def _epsilons(ratio: Array, gamma: Array, variance: Array) -> list[float]:
    """What may be added to the variance: the usual numbers, and what the channels of least variance say, also rounded.

    Args:
        ratio: of what the file has and what was trained, [channels].
        gamma, variance: of the batch norm, [channels].
    """
    said = (gamma.astype(numpy.float64) / ratio) ** 2 - variance
    known = numpy.isfinite(said) & (said > 0)
    least = said[known][numpy.argsort(variance[known])[:3]].tolist()
    return list(dict.fromkeys([*EPSILONS, *(float(f"{value:.2e}") for value in least), *least]))
