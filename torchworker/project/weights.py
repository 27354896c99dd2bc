"""Tensors and model weights as safetensors: no pickle, whatever their memory is like, tied parameters stored once.

safetensors takes tensors that are contiguous and share no memory, which those of a model need not be: an output is a
transposed view, buffers are views of one table, images are in NHWC order. All that is written goes through here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from torchworker.process.failure import UserError

TIED = "tied"
"""Entry of the file's header: names that it leaves out, each with the name that has the tensor."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, each with its values alone: contiguous, on the CPU, in memory of its own.

    Args:
        tensors: of any strides and on any device, which may be views of each other.
        path: of the file.
        metadata: texts that go into its header.
    """
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        values = values_of(tensor)
        memory = values.untyped_storage().data_ptr()
        own[name] = values.clone() if memory in taken else values
        taken.add(memory)
    save_file(own, path, metadata=dict(metadata) if metadata is not None else None)
    # It makes files that nobody else can read, whatever the umask says.
    path.chmod(0o666 & ~_umask())


def values_of(tensor: Tensor) -> Tensor:
    """The tensor's values in memory that says it all: on the CPU, contiguous, and not the lazy conjugate or negative of
    what lies there, which safetensors and `.view(torch.uint8)` would take for the values."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A single element is contiguous in torch whatever its stride, and cannot be looked at as bytes.
    odd = values.dim() and values.stride(-1) != 1
    return values.clone(memory_format=torch.contiguous_format) if odd else values


def _umask() -> int:
    """Of this process; `os.umask` would change it for a moment, for all threads."""
    told = Path("/proc/self/status").read_text()
    return next((int(line.split()[1], 8) for line in told.splitlines() if line.startswith("Umask:")), 0o077)


def save_weights(model: nn.Module, path: Path) -> None:
    """Parameters and buffers of the model; what is one tensor under several names is stored once.

    Raises TypeError for a state that is no tensor, which is a module's `get_extra_state`.
    """
    state = model.state_dict()
    tied = tied_names(state)
    save_tensors({name: tensor for name, tensor in state.items() if name not in tied}, path, _said(tied))


def save_in_turn(
    state: Mapping[str, Tensor], tied: Mapping[str, str], whole: Callable[[Tensor], Tensor], path: Path | None
) -> None:
    """Write what `save_weights` writes, byte by byte, with one tensor in memory at a time.

    Args:
        state: parameters and buffers, or parts of them; of each, dtype and shape of the whole one.
        tied: of `tied_names`, the same in all processes that call this.
        whole: makes of a part the whole tensor, called for each that is stored, in one order.
        path: of the file; None where another process writes it.
    """
    own = {name: tensor for name, tensor in state.items() if name not in tied}
    # The library says of empty tensors what it says of others, but for sizes, and in which order they are.
    said = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in own.items()}, _said(tied))
    header = json.loads(said[8 : 8 + int.from_bytes(said[:8], "little")])
    at = 0
    for name in (names := [name for name in header if name in own]):
        end = at + own[name].numel() * own[name].element_size()
        header[name] |= {"shape": list(own[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if path is not None else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = whole(own[name])
            if file is not None and tensor.numel():
                file.write(values_of(tensor).flatten().view(torch.uint8).numpy().data)
            # Before the next one is there.
            del tensor


def tied_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Names of what is one tensor with another that comes before it in their order, each with that one's name.

    Of a tensor of which this process has a part, the part tells.

    Raises TypeError for a state that is no tensor.
    """
    same: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} in the state of the model is a {type(tensor).__name__}; expected tensors alone")
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        view = (tensor.device, part.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and (first := same.setdefault(view, name)) != name:
            tied[name] = first
    return tied


def _said(tied: Mapping[str, str]) -> dict[str, str] | None:
    """The file's metadata. One entry: safetensors 0.8 writes several in an order that differs by process."""
    return {TIED: json.dumps(tied)} if tied else None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load in place, so that what is tied in the model stays so. Raises RuntimeError when names or shapes do not match.

    What the file has once for several names, each of them gets.
    """
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    # Files of before have an entry a name.
    tied: dict[str, str] = json.loads(metadata[TIED]) if metadata.get(TIED, "").startswith("{") else metadata
    here = model.state_dict()
    for name, kept in tied.items():
        # They also leave out what is a part of another tensor, and comes with it.
        if name in here and kept in state:
            state[name] = state[kept] if here[name].shape == state[kept].shape else here[name]
    model.load_state_dict(state)


def start_from(model: nn.Module, path: Path, sha256: str = "") -> None:
    """Load the weights of an earlier release in place.

    Args:
        model: whose weights they become.
        path: of the file, in a folder that is named by the release.
        sha256: hexadecimal, what the file must have; empty where nobody says.

    Raises:
        UserError: with what differs when they do not fit, or when the file is another one.
    """
    if sha256:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != sha256:
            raise UserError(f"retrain.start: live: {path}: expected SHA-256 {sha256}, got {got}")
    try:
        load_weights(model, path)
    except RuntimeError as error:
        differs = "; ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip()) or str(error)
        raise UserError(
            f"retrain.start: live: the weights of release {path.parent.name} do not fit the model that model.factory "
            f"makes: {differs}; use retrain.start: scratch, or bring back the model that the release was trained with"
        ) from None
