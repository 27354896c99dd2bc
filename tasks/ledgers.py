"""The ledgers of the runs of this process: what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from train_and_ship.infra.fork_server import running_fork_servers
from train_and_ship.registry.cost import Ledger

_ledgers: dict[Path, Ledger] = {}


def ledger_of(folder: Path) -> Ledger:
    """What measures the run of this folder in this process, begun on first use."""
    if folder not in _ledgers:
        _ledgers[folder] = Ledger(folder, _spent_by_children, _spent_by_server)
    return _ledgers[folder]


def close_ledger(folder: Path) -> None:
    """All that is to be counted has been done. Nothing happens when this process measures no such run."""
    if (ledger := _ledgers.pop(folder, None)) is not None:
        ledger.close()


def _spent_by_children() -> Mapping[str, float]:
    spent: Counter[str] = Counter()
    for server in running_fork_servers():
        spent.update(server.spent())
    return spent


def _spent_by_server() -> float:
    return sum(server.own_seconds() for server in running_fork_servers())
