"""Which versions of this package and of train-and-ship understand each other, and which torch it needs."""

from __future__ import annotations

PROTOCOL = 1
"""Raised with every change of the messages in contract.py, or of what a stage does with them."""
TORCH = (2, 13), (2, 15)
"""The oldest torch, and the first that is too new, as in pyproject.toml."""
