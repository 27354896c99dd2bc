"""The torchrun of one machine, as a value. Every engine starts this and nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from train_and_ship.infra.fork_server import HASH_SEED
from train_and_ship.infra.launchers.spec import Spec

RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=2"
"""A lost machine is noticed after 5 s instead of 15, and the others wait 2 s for newcomers instead of 30."""


def environment(spec: Spec) -> dict[str, str]:
    """Variables that torchrun and the ranks need on any machine, then the job's own."""
    return {
        # The current folder stays off the import path, so a user's files cannot shadow ours.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": HASH_SEED,
        # With the agents' store shared, ranks that start again find keys of the last time and hang (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **spec.env,
    }


def agent_argv(spec: Spec, *, endpoint: str, local_addr: str, is_host: str) -> tuple[str, ...]:
    """torchrun on one machine.

    Args:
        spec: the job.
        endpoint: HOST:PORT of the store where the machines meet.
        local_addr: address by which the others reach this machine; its host name need not resolve then.
        is_host: `1` where this torchrun holds the store, else `0`.
    """
    return (
        *(spec.python, "-P", "-m", "torch.distributed.run"),
        f"--nnodes={spec.min_nodes}:{spec.nodes}",
        f"--nproc-per-node={spec.nproc}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={spec.name}",
        f"--rdzv-conf=is_host={is_host},{RENDEZVOUS}",
        f"--local-addr={local_addr}",
        f"--max-restarts={spec.max_restarts}",
        "--monitor-interval=0.1",
        "--shutdown-timeout=5",
        *spec.argv,
    )


def shell_line(argv: tuple[str, ...], variables: Mapping[str, str]) -> str:
    """The argv as one line for a shell, where `@NAME@` becomes the shell expression of that name."""
    line = shlex.join(argv)
    for name, expression in variables.items():
        line = line.replace(f"@{name}@", expression)
    return line
