"""Which inputs are rows of which embedding: what a model can be asked that no sample has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchworker.parity.probes import DRAWN, Inputs, Table
from torchworker.process.failure import UserError
from torchworker.project.answers import Answers

LOOKUPS = {
    "aten::embedding": 2,
    "aten::_embedding_bag": 8,
    "aten::_embedding_bag_forward_only": 8,
}
"""Operators that take a table and its rows first, with the position of the row that stands for nothing."""


def tables_of(answers: Answers, pool: Inputs) -> dict[str, Table]:
    """The smallest embedding that each input of whole numbers goes into as it is; found by asking the model.

    Args:
        answers: of the model.
        pool: real samples, [n, …] by input.
    """
    few = {name: tensor[:DRAWN].contiguous() for name, tensor in pool.items()}
    looked = _Lookups()
    try:
        with looked:
            answers.eager(few)
    except UserError:
        return {}
    found: dict[str, Table] = {}
    for name, tensor in few.items():
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            continue
        tables = [table for rows, table in looked.seen if _same_rows(rows, tensor)]
        if tables:
            found[name] = min(tables, key=lambda table: table.rows)
    return found


def _same_rows(rows: Tensor, tensor: Tensor) -> bool:
    return rows.numel() == tensor.numel() and torch.equal(rows.reshape(-1), tensor.reshape(-1).to(rows.dtype))


class _Lookups(TorchDispatchMode):
    """Notes what embeddings are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Tensor, Table]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (position := LOOKUPS.get(func._schema.name)) is not None:
            padding = args[position] if len(args) > position else -1
            self.seen.append((args[1].clone(), Table(args[0].shape[0], padding if padding >= 0 else None)))
        return func(*args, **(kwargs or {}))
