"""A process that holds secrets keeps them from the code of jobs, which runs as the same user.

`python -m train_and_ship.infra.private MODULE ARGUMENTS…` runs a module so.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

from train_and_ship.infra.job_environment import SIGNING_PASSWORD, holds_secret

PR_SET_DUMPABLE = 4

_taken: dict[str, str] = {}


def keep_private() -> None:
    """Let no other process of this user read the memory or the environment of this one, where it holds secrets.

    Before any code of a job runs. The process is made "not dumpable" (prctl(2), PR_SET_DUMPABLE): what /proc has of its
    environment, memory and files belongs to root, and debuggers need root's rights. A program that it starts is
    dumpable again and gets what it is given. Not kept out: whoever has CAP_SYS_PTRACE, as root has, and with newer
    kernels CAP_PERFMON or CAP_SYS_ADMIN (seen on 6.18).
    """
    if any(holds_secret(name) for name in os.environ):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_password() -> None:
    """Out of the environment with the signing key's password: what this process starts from now on does not have it."""
    keep_private()
    if SIGNING_PASSWORD in os.environ:
        _taken[SIGNING_PASSWORD] = os.environ.pop(SIGNING_PASSWORD)


def signing_password() -> str:
    """The signing key's password, also after it was taken; empty when there is none."""
    return os.environ.get(SIGNING_PASSWORD) or _taken.get(SIGNING_PASSWORD, "")


def main() -> None:
    """Run the module that the first argument names, whose processes inherit the environment as it is."""
    keep_private()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
