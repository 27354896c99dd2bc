"""nn.RNN at any length: torch 2.13 has loops and ONNX operators for LSTM and GRU, and neither for this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS: Mapping[Any, str] = {torch.ops.aten.rnn_tanh.input: "Tanh", torch.ops.aten.rnn_relu.input: "Relu"}
"""Operator to the name of its nonlinearity in ONNX."""
_NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {"Tanh": torch.tanh, "Relu": torch.relu}


def loops() -> Mapping[Any, Callable[..., Any]]:
    """Operator to what computes it with a loop, which torch.export keeps as one."""
    return {operator: partial(_layers, _NONLINEARITIES[name]) for operator, name in ACTIVATIONS.items()}


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator to what writes it as ONNX, for torch.onnx.export's custom_translation_table."""
    return {operator: partial(_as_onnx, name) for operator, name in ACTIVATIONS.items()}


def _layers(
    nonlinearity: Callable[[Tensor], Tensor],
    sequence: Tensor,
    states: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """aten's rnn_tanh.input and rnn_relu.input.

    Args:
        nonlinearity: after each step.
        sequence: [T, B, inputs], or [B, T, inputs] with batch_first.
        states: [layers · directions, B, hidden].
        params: of each layer and direction: weights for inputs and state, and their biases if has_biases.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as nn.RNN has them.

    Returns:
        What the last layer says [T, B, directions · hidden], or [B, T, …] with batch_first; the last states.
    """
    from torch._decomp.decompositions import _rnn_helper, gather_params

    given = gather_params(params, has_biases, False)  # type: ignore[no-untyped-call]
    said, last = _rnn_helper(  # type: ignore[no-untyped-call]
        sequence, list(states.unbind(0)), given, has_biases, num_layers, dropout,
        train, bidirectional, batch_first, partial(_layer, nonlinearity),
    )  # fmt: skip
    return said, torch.stack(last, 0)


def _layer(
    nonlinearity: Callable[[Tensor], Tensor],
    sequence: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer in one direction.

    Args:
        nonlinearity: after each step.
        sequence: [T, B, inputs].
        state: [B, hidden].
        params: as of _layers, of this one.
        has_biases: whether there are four or two of them.
        reverse: from the end.

    Returns:
        What it says at each step [T, B, hidden], and the last state [B, hidden].
    """
    from torch._higher_order_ops.while_loop import while_loop

    by_input, by_state, *biases = params
    given = torch.nn.functional.linear(sequence, by_input, biases[0] if has_biases else None)
    given = given.flip(0) if reverse else given
    # A loop takes no two tensors that share memory, as the weights of a layer do.
    by_state, bias = by_state.clone(), biases[1].clone() if has_biases else None

    def goes_on(step: Tensor, said: Tensor, state: Tensor) -> Tensor:
        return step < given.size(0)

    def advance(step: Tensor, said: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place: Any = step.item()
        torch._check(place >= 0)  # type: ignore[no-untyped-call]
        torch._check(place < given.size(0))  # type: ignore[no-untyped-call]
        state = nonlinearity(torch.nn.functional.linear(state, by_state, bias) + given[place])
        said = said.clone()
        said[place] = state
        return step + 1, said, state

    said = torch.empty(given.size(0), *state.shape, dtype=state.dtype, device=state.device)
    _, said, state = while_loop(  # type: ignore[no-untyped-call]
        goes_on, advance, [torch.tensor(0), said, state.clone()]
    )
    return said.flip(0) if reverse else said, state


def _as_onnx(
    activation: str,
    sequence: Any,
    states: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, Any]:
    """The same with ONNX's RNN (https://onnx.ai/onnx/operators/onnx__RNN.html), one a layer.

    Args:
        activation: Tanh or Relu.
        sequence, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first: as of _layers.
    """
    import onnxscript

    # Its annotations know tensors of ONNX only, and it takes numbers too.
    op: Any = onnxscript.opset20
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    hidden = states.shape[2]
    said = op.Transpose(sequence, perm=[1, 0, 2]) if batch_first else sequence
    last = []
    for layer in range(num_layers):
        first = layer * directions
        ways = [params[way * each : (way + 1) * each] for way in range(first, first + directions)]

        def stacked(place: int, ways: Sequence[Any] = ways) -> Any:
            return op.Concat(*(op.Unsqueeze(way[place], [0]) for way in ways), axis=0)

        biases = op.Concat(stacked(2), stacked(3), axis=1) if has_biases else None
        answers, state = op.RNN(
            said,
            stacked(0),
            stacked(1),
            biases,
            None,
            op.Slice(states, [first], [first + directions], [0]),
            activations=[activation] * directions,
            direction="bidirectional" if bidirectional else "forward",
            hidden_size=hidden,
        )
        # [T, directions, B, hidden] → [T, B, directions · hidden].
        said = op.Reshape(op.Transpose(answers, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, directions * hidden]))
        last.append(state)
    return op.Transpose(said, perm=[1, 0, 2]) if batch_first else said, op.Concat(*last, axis=0)
