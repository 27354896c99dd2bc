"""State that a forward pass changes in eval mode: which exported formats lose, or count on with in every process.

An ONNX file has no state, and a package of AOTInductor loses that of one element (torch 2.13), both without a word; a
pt2 or TorchScript file counts on, each server process by itself and from where the file was written. So what is saved
with the model must not change, for any format. What is not saved (a table of angles that grows, memory to write into)
may, as long as the answers stay the same.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchworker import situations
from torchworker.contract import Project
from torchworker.process.failure import UserError, is_theirs
from torchworker.project.answers import same_values
from torchworker.project.watch import watched
from torchworker.project.weights import LARGE_BYTES, values_of

LARGEST_COPY = LARGE_BYTES
"""Bytes of a state of which a copy is made; of a larger one hashes do."""


@dataclass(frozen=True)
class Hashed:
    """A tensor, by its bytes."""

    like: tuple[torch.device, torch.dtype, torch.Size]
    digest: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Hashed:
        """Of its values as they are now."""
        content = values_of(tensor).flatten().view(torch.uint8).numpy().data
        return cls((tensor.device, tensor.dtype, tensor.shape), hashlib.blake2b(content, digest_size=16).digest())


State = Mapping[str, Tensor | Hashed]
"""Parameters and buffers by name, the buffers that are not saved among them."""


def state_of(model: nn.Module) -> State:
    """All parameters and buffers as they are now, by name: copies, or hashes where there is more than LARGEST_COPY."""
    tensors = {name: tensor.detach() for name, tensor in _tensors(model).items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST_COPY:
        return {name: Hashed.of(tensor) for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before: State, model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are no longer what they were, bit for bit; new ones count too.

    before: of `state_of`.
    """
    return [name for name, tensor in _tensors(model).items() if name not in before or not _same(before[name], tensor)]


def saved(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the names that are saved with the model."""
    state = model.state_dict()
    return [name for name in names if name in state]


def refusal(model: nn.Module, names: Sequence[str], inputs: Any, project: Project) -> UserError:
    """What to say of a model whose forward changes saved state in eval mode, with the place and the way out.

    Args:
        model: in eval mode.
        names: of what changes; at least one.
        inputs: of a batch on which it does, as the data gives them or by name.
        project: for messages.
    """
    parameters = dict(model.named_parameters())
    first = next((name for name in names if name in parameters), names[0])
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    owner = model.get_submodule(first.rpartition(".")[0])
    what = "parameter" if first in parameters else "buffer"
    where = place_of(model, first, inputs, project)
    start = f"{project.model.where}: forward changes the {what} {first!r}{more} in eval mode{where and f': {where}'}; "
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.max_norm is not None:
        return UserError(
            f"{start}max_norm writes the shortened rows back into the weights at every look-up, also when it is only "
            "asked; leave max_norm out and shorten in forward, which the formats can do: F.embedding(ids, "
            f"torch.renorm(weight, {owner.norm_type:g}, 0, {owner.max_norm:g}))"
        )
    return UserError(
        f"{start}{situations.KEPT_STATE}: some formats lose it without a word, others "
        "count on in each server process by itself. Change it in training only (if self.training), or take it as an "
        "input and return it as an output"
    )


def place_of(model: nn.Module, name: str, inputs: Any, project: Project) -> str:
    """Where forward changes a parameter or buffer, as `net.py:12, in forward: self.calls.add_(1), module Net`.

    As far as it can be found: where an operator writes into it, else a line of its module that assigns it, else the
    module. The forward pass that this takes changes the state further.

    Args:
        model: in eval mode.
        name: of the parameter or buffer.
        inputs: of a batch on which it changes, as the data gives them or by name.
        project: for messages.
    """
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    watch = watched(model, inputs, project)
    if watch is not None and name in watch.writes:
        return str(watch.writes[name])
    kind = f"module {path} ({type(owner).__name__})" if path else type(owner).__name__
    line = _assigning_line(type(owner), attribute, project.folder)
    return ", ".join(part for part in (line, kind) if part)


def _assigning_line(kind: type[nn.Module], attribute: str, folder: str) -> str:
    """A line of the class's source that sets the attribute; empty when there is none, or when it is not the user's."""
    try:
        source, first = inspect.getsourcelines(kind)
        file = Path(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError):
        return ""
    if not is_theirs(str(file), Path(folder)):
        return ""
    for number, line in enumerate(source, first):
        if re.search(rf"\bself\.{re.escape(attribute)}(\[.*\])?(\.data)?\s*[-+*/]?=[^=]", line):
            return f"{file.relative_to(folder)}:{number}: {line.strip()}"
    return ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.layout == torch.strided and not tensor.is_meta}


def _same(first: Tensor | Hashed, second: Tensor) -> bool:
    if isinstance(first, Hashed):
        return first == Hashed.of(second)
    return first.device == second.device and same_values(first, second.detach())
