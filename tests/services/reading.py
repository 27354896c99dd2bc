"""What tests of the reader share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from registry.release import MANIFEST
from shipreader.reader import Reader
from tests.support.fault_proxy import Fault, Forward, Reply, Request

MakeReader = Callable[..., Reader]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}


@dataclass(frozen=True)
class Other(Fault):
    """Other bytes than the object's."""

    body: bytes
    encoding: str = "identity"

    def apply(self, request: Request, forward: Forward) -> Reply | None:
        size = str(len(self.body))
        return Reply(200, [("ETag", '"1"'), ("Content-Encoding", self.encoding), ("Content-Length", size)], self.body)
