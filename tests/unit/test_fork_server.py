"""The process that has torch and forks the stages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from train_and_ship.infra.fork_server import child_environment

PRINTS_A_SET = "print(*{'in_features', 'out_features', 'bias', 'stride', 'padding', 'dilation', 'groups', 'mode'})"


def order_of_a_set() -> str:
    return subprocess.check_output([sys.executable, "-c", PRINTS_A_SET], env=child_environment(), text=True)


def test_a_set_of_strings_has_the_same_order_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert len({order_of_a_set() for _ in range(5)}) == 1


def test_a_seed_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert child_environment()["PYTHONHASHSEED"] == "7"
