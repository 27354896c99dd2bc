"""Which network interface a rank talks through, on a machine that may have many."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

SIOCGIFADDR = 0x8915


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the interface that leads to rank 0.

    Gloo would otherwise listen on the address that the host's own name resolves to, which on Debian is 127.0.1.1
    and reachable for nobody else.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str, port: int) -> str | None:
    """Name of the interface with the IPv4 address that packets to the host leave from; None when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # No packet is sent: connecting a datagram socket only asks for a route.
            probe.connect((host, port))
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == own:
                    return name
    return None
