"""What a probe found out about a bucket, kept for the other commands of a day.

A flow that lives for days probes once, and from then on asks whether the bucket's versioning is still what it was:
commands, each of which lives for a second, do the same together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from torchworker.durable import write_durably
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.rundir import TORN
from train_and_ship.infra.store_probe import StoreTraits, Versioning

SECONDS = 24 * 3600
"""After which a bucket is probed again: its server may be another one by then."""
_FORMAT = 1


class Probed:
    """Of one bucket, in a folder of this user's. What cannot be read or written is as if nothing had been found out."""

    def __init__(self, folder: Path, address: str, bucket: str) -> None:
        """address: of the store; with the bucket's name it says which one it is."""
        name = hashlib.sha256(f"{address}\n{bucket}".encode()).hexdigest()[:20]
        self._path = folder / f"{name}.json"

    def read(self, versioning: Versioning) -> StoreTraits | None:
        """What was found out under the versioning that the bucket has now; None where that is not known any more."""
        try:
            known = json.loads(self._path.read_bytes())
            current = known["format"] == _FORMAT and 0 <= time.time() - known["at"] < SECONDS
            return StoreTraits(**known["traits"]) if current and known["versioning"] == versioning else None
        except (OSError, *TORN):
            return None

    def write(self, traits: StoreTraits, versioning: Versioning) -> None:
        """Keep it, unless nobody may ask for the versioning: then nobody would notice that it has changed."""
        if versioning == Versioning.UNKNOWN:
            return
        known = {"format": _FORMAT, "at": time.time(), "versioning": versioning, "traits": asdict(traits)}
        with contextlib.suppress(OSError):
            make_folder(self._path.parent)
            write_durably(self._path, json.dumps(known).encode())

    def forget(self) -> None:
        """Have the next command probe again."""
        with contextlib.suppress(OSError):
            self._path.unlink()
