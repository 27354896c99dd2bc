"""Which inputs are rows of which embedding: what a model can be asked that no sample has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchworker.parity.probes import DRAWN, Inputs, Table
from torchworker.process.failure import UserError
from torchworker.project.answers import Answers


def tables_of(answers: Answers, pool: Inputs) -> dict[str, Table]:
    """The smallest embedding that each input of whole numbers goes into as it is; found by asking the model.

    Tables that no `nn.Embedding` or `nn.EmbeddingBag` holds are not seen.

    Args:
        answers: of the model.
        pool: real samples, [n, …] by input.
    """
    few = {name: tensor[:DRAWN].contiguous() for name, tensor in pool.items()}
    seen: list[tuple[Tensor, Table]] = []

    def note(module: nn.Embedding | nn.EmbeddingBag, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        rows = args[0] if args else kwargs.get("input")
        if isinstance(rows, Tensor):
            seen.append((rows.clone(), Table(module.num_embeddings, module.padding_idx)))

    with ExitStack() as hooks:
        for module in answers.model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        try:
            answers.eager(few)
        except UserError:
            return {}
    found: dict[str, Table] = {}
    for name, tensor in few.items():
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            continue
        tables = [table for rows, table in seen if _same_rows(rows, tensor)]
        if tables:
            found[name] = min(tables, key=lambda table: table.rows)
    return found


def _same_rows(rows: Tensor, tensor: Tensor) -> bool:
    return rows.numel() == tensor.numel() and torch.equal(rows.reshape(-1), tensor.reshape(-1).to(rows.dtype))
