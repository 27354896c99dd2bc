"""A hash of a set of samples that does not depend on their order or on how ranks shared them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from torchworker.contract import Reading
from torchworker.process.failure import UserError
from torchworker.project.weights import values_of

_MODULUS = 1 << 128


class Fingerprint:
    """Sum modulo 2^128 of one BLAKE2b-128 digest a sample: batches and ranks add up in any order.

    AdHash, from Bellare and Micciancio, "A New Paradigm for Collision-Free Hashing" (1997).
    """

    def __init__(self) -> None:
        self.total = 0
        self.samples = 0

    def add(self, item: Any) -> None:
        """Add one sample as the dataset gives it: tensors, arrays, images, numbers and text, nested at will.

        Raises UserError for a value whose bytes are not known.
        """
        self.total = (self.total + digest_of(item)) % _MODULUS
        self.samples += 1

    def merge(self, total: int, samples: int) -> None:
        """Add what another rank has seen."""
        self.total = (self.total + total) % _MODULUS
        self.samples += samples

    def hexdigest(self) -> str:
        """32 hexadecimal digits over the samples and their number."""
        return hashlib.blake2b(f"{self.samples}:{self.total:032x}".encode(), digest_size=16).hexdigest()

    def reading(self) -> Reading:
        """How many samples, and the hash over them."""
        return Reading(samples=self.samples, fingerprint=self.hexdigest())


def digest_of(item: Any) -> int:
    """BLAKE2b-128 of one sample, or of a part of it. Raises UserError for a value whose bytes are not known."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(item):
        header, content = _bytes(leaf)
        digest.update(header.encode())
        digest.update(content)
    return int.from_bytes(digest.digest(), "big")


def inputs_of(item: Any) -> Any:
    """The inputs of an item of a dataset, which is a pair (inputs, target)."""
    return item[0] if isinstance(item, tuple | list) and len(item) == 2 else item


def _bytes(leaf: Any) -> tuple[str, bytes]:
    """What a value is, and its content."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        content: bytes = values_of(leaf).reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{leaf.dtype}{list(leaf.shape)};", content
    if isinstance(leaf, bool | int | float | complex | str | bytes | None):
        return f"{type(leaf).__name__};", repr(leaf).encode()
    if hasattr(leaf, "tobytes"):
        # NumPy has dtype and shape, images have mode and size.
        traits = [str(getattr(leaf, name, "")) for name in ("dtype", "shape", "mode", "size")]
        return f"{type(leaf).__name__}{traits};", leaf.tobytes()
    raise UserError(
        f"data: a sample holds a {type(leaf).__name__}, which cannot be fingerprinted; give tensors, arrays, images, "
        "numbers or text, and make objects of them in the collate function"
    )


def whole_readings(mine: Mapping[str, Fingerprint]) -> dict[str, Reading]:
    """By split, what all ranks have read. Every rank calls it."""
    parts: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, {split: (found.total, found.samples) for split, found in mine.items()})
    whole = {split: Fingerprint() for split in mine}
    for part in parts:
        for split, (total, samples) in part.items():
            whole[split].merge(total, samples)
    return {split: found.reading() for split, found in whole.items()}
