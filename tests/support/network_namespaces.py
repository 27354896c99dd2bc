"""Several machines and the network between them, as Linux network namespaces. Needs root and iproute2.

Each host has its own network, host name and process ids. Killing the process that `on()` starts ends everything it
started there, as a power cut would; `cut()` takes the cable out without telling anybody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = "ctl"


def missing() -> str | None:
    """Why there can be no lab here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for command in ("ip", "unshare"):
        if shutil.which(command) is None:
            return f"the command {command} is not installed (Debian: apt-get install iproute2 util-linux)"
    trial = f"try-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", trial], capture_output=True).returncode != 0:
        return "this kernel does not let us create network namespaces"
    subprocess.run(["ip", "netns", "del", trial], check=True)
    return None


class Lab:
    """A controller and hosts h1…hn on one switch. The namespaces have random names, so labs do not meet."""

    def __init__(self, hosts: int) -> None:
        self.addresses = {CONTROLLER: f"{NETWORK}.100", **{f"h{n}": f"{NETWORK}.{n}" for n in range(1, hosts + 1)}}
        self._tag = f"ship{uuid.uuid4().hex[:6]}"
        self._made: list[str] = []

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(name for name in self.addresses if name != CONTROLLER)

    def namespace(self, host: str) -> str:
        return f"{self._tag}-{host}"

    def up(self) -> None:
        switch = self._make("sw")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        # Also as torch asks for them, from sockets that speak both protocols.
        names = "".join(f"{address} {host}\n::ffff:{address} {host}\n" for host, address in self.addresses.items())
        for host, address in self.addresses.items():
            here = self._make(host)
            _ip("-n", switch, "link", "add", f"p-{host}", "type", "veth", "peer", "name", "eth0", "netns", here)
            _ip("-n", switch, "link", "set", f"p-{host}", "master", "br0", "up")
            _ip("-n", here, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", here, "link", "set", "eth0", "up")
            # `ip netns exec` puts this over /etc/hosts for what it starts.
            etc = Path("/etc/netns") / here
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (etc / "resolv.conf").write_text("# Nobody outside can be asked.\n")

    def _make(self, host: str) -> str:
        name = self.namespace(host)
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def down(self) -> None:
        for name in self._made:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                # Only what this lab runs can be inside its namespaces.
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def cut(self, host: str) -> None:
        """Take the host's cable out."""
        _ip("-n", self.namespace("sw"), "link", "set", f"p-{host}", "down")

    def plug(self, host: str) -> None:
        _ip("-n", self.namespace("sw"), "link", "set", f"p-{host}", "up")

    def running(self, host: str) -> list[int]:
        """Process ids (as seen from outside) of everything that runs on the host."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def power_off(self, host: str) -> None:
        """Kill everything on the host at once and cut it off, so that not even a goodbye gets out."""
        self.cut(host)
        for pid in self.running(host):
            subprocess.run(["kill", "-KILL", str(pid)], capture_output=True)

    def on(self, host: str, *argv: str) -> list[str]:
        """The argv that runs this on the host."""
        return [*self._enter(host), 'hostname "$0"; exec "$@"', host, *argv]

    def connect(self) -> list[str]:
        """The same as a template for `train.launcher.torchrun.connect`."""
        return [*self._enter("{host}"), "hostname {host}; exec {command}"]

    def _enter(self, host: str) -> list[str]:
        space = ["ip", "netns", "exec", self.namespace(host)]
        return [*space, "unshare", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c"]


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)
