"""Ports of this machine: whether one is free, and who has it."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from train_and_ship.infra.processes import TOKEN_VARIABLE
from train_and_ship.infra.settings import LOOPBACK


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections that are merely winding down do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class Holder:
    """Who listens on a port, as far as this user may see."""

    pid: int | None = None
    name: str = ""
    user: str = ""
    """Its name, where it is another one."""
    home: str = ""
    """Of the stack that it belongs to, where it is one of ours."""

    def __str__(self) -> str:
        if self.home:
            return f"your stack in {self.home}"
        if self.pid is not None:
            return f"pid {self.pid} ({self.name}){f' of {self.user}' if self.user else ''}"
        return f"a program of {self.user}" if self.user else "another program"


def port_holder(port: int) -> Holder:
    """Who listens on the port of this machine."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    break
                process = psutil.Process(connection.pid)
                other = process.username() if process.uids().real != os.getuid() else ""
                home = ""
                with contextlib.suppress(psutil.Error):
                    environment = process.environ()
                    home = environment.get("SHIP_HOME", "") if TOKEN_VARIABLE in environment and not other else ""
                return Holder(pid=connection.pid, name=process.name(), user=other, home=home)
    return Holder(user=_user_of_socket(port))


def _user_of_socket(port: int) -> str:
    """Who listens, by the kernel's table: whose process it is only its owner may see. Empty where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            # Local address, state (0A listens) and user.
            if int(words[1].rpartition(":")[2], 16) == port and words[3] == "0A":
                with contextlib.suppress(KeyError):
                    return pwd.getpwuid(int(words[7])).pw_name
                return f"user {words[7]}"
    return ""


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
