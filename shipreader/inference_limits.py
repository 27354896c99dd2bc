"""How much a server takes at once, and from whom. The standard library alone: `ship serve` reads it too."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
OWN_HOSTS = (LOOPBACK, "localhost", "::1")
"""Names by which who is on this machine asks."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one server. Those of a request's own size are in shipreader/inference_tensors.py."""

    requests: int = 256
    """Computed or waiting, HTTP and gRPC together; one more is refused."""
    bytes_at_once: int = 2**30
    """Of all requests together, as they came, and of all answers that are not taken yet."""
    connections: int = 512
    """For each protocol; one more is refused."""
    head_bytes: int = 32 * 2**10
    """Of a request's headers, names and values, and of the trailers behind its body."""
    url_bytes: int = 8 * 2**10
    head_seconds: float = 10.0
    """For the headers, from the connection or their first byte on."""
    silence_seconds: float = 20.0
    """Between two pieces of a body, or of an answer that is being taken."""
    body_seconds: float = 300.0
    """For a body, and for an answer to be taken."""
    linger_seconds: float = 2.0
    """A request that was refused before it was read may go on so long; then its connection is closed."""
    compute_seconds: float = 300.0
    """Whoever computes one batch for longer hangs."""
    hosts: tuple[str, ...] = ()
    """Names besides this machine's own that requests may carry as Host: of a proxy in front."""
