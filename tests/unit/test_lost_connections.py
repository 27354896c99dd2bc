"""What torch raises when another rank went away."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from torchworker.process.failure import is_lost_connection


@pytest.mark.parametrize(
    "words",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234",
        "Application timeout caused pair closure",
        "Connection reset by peer",
    ],
)
def test_a_lost_connection_is_known_by_gloos_words_also_inside_a_call_of_the_users(words: str) -> None:
    outer = ValueError("forward failed")
    outer.__cause__ = RuntimeError(words)
    assert is_lost_connection(outer)


def test_a_connection_of_the_users_own_is_none() -> None:
    assert not is_lost_connection(ConnectionResetError("Connection reset by peer"))
    assert not is_lost_connection(RuntimeError("the database went away"))
    assert is_lost_connection(dist.DistBackendError("anything"))
