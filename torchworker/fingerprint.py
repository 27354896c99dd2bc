"""A hash of a set of samples that does not depend on their order or on how ranks shared them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

_MODULUS = 1 << 128


class Fingerprint:
    """Sum modulo 2^128 of one BLAKE2b-128 digest a sample: batches and ranks add up in any order.

    AdHash, from Bellare and Micciancio, "A New Paradigm for Collision-Free Hashing" (1997).
    """

    def __init__(self) -> None:
        self.total = 0
        self.samples = 0

    def update(self, inputs: Any, target: Tensor, count: int) -> None:
        """Add the first `count` samples of a collated batch; every tensor is [batch, …]."""
        rows = []
        header = b""
        for tensor in (leaf for leaf in pytree.tree_leaves((inputs, target)) if isinstance(leaf, Tensor)):
            header += f"{tensor.dtype}{list(tensor.shape[1:])};".encode()
            flat = tensor.detach().cpu().contiguous().reshape(tensor.shape[0], -1)
            rows.append(flat.view(torch.uint8).numpy() if flat.numel() else flat.numpy())
        for sample in range(count):
            digest = hashlib.blake2b(header, digest_size=16)
            for row in rows:
                digest.update(row[sample].tobytes())
            self.total = (self.total + int.from_bytes(digest.digest(), "big")) % _MODULUS
        self.samples += count

    def merge(self, total: int, samples: int) -> None:
        """Add what another rank has seen."""
        self.total = (self.total + total) % _MODULUS
        self.samples += samples

    def hexdigest(self) -> str:
        """32 hexadecimal digits over the samples and their number."""
        return hashlib.blake2b(f"{self.samples}:{self.total:032x}".encode(), digest_size=16).hexdigest()


def whole_fingerprint(mine: Fingerprint) -> str:
    """The hash over what all ranks have seen. Every rank calls it."""
    parts: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(parts, (mine.total, mine.samples))
    whole = Fingerprint()
    for total, samples in parts:
        whole.merge(total, samples)
    return whole.hexdigest()
