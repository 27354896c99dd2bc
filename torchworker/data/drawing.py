"""Which validation samples the gates look at, where there are too many to look at all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import torch


def drawn_places(size: int, most: int | None, seed: int, labels: Sequence[int] | None = None) -> list[int] | None:
    """Places of samples drawn without replacement: with labels, from each in proportion, as a stratified sample.

    The first of them would be one class where data lies in the order of its classes, as image folders do.

    Args:
        size: samples there are.
        most: how many may be drawn; None for all.
        seed: of the draw.
        labels: label of each sample, or None where they have none.

    Returns:
        Places from 0, ascending; None when all samples are taken.
    """
    if most is None or size <= most:
        return None
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    if labels is None:
        return sorted(order[:most])
    left = _shares(Counter(labels), most)
    places = []
    for place in order:
        if left[labels[place]]:
            left[labels[place]] -= 1
            places.append(place)
    return sorted(places)


def _shares(counts: Counter[int], most: int) -> dict[int, int]:
    """How many of each label, by largest remainder."""
    exact = {label: Fraction(count * most, counts.total()) for label, count in counts.items()}
    shares = {label: int(share) for label, share in exact.items()}
    rest = sorted(exact, key=lambda label: (shares[label] - exact[label], label))
    for label in rest[: most - sum(shares.values())]:
        shares[label] += 1
    return shares
