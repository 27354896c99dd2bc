"""The team's project, and where its data comes from: what changes from day to day."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from train_and_ship.registry.data.snapshots import take

PARCELS = Path(__file__).parent / "parcels"
HELD_OUT = 3000
NOISE = 0.1
KM_IN_A_MILE = 1.609
LARGEST = np.array([1000, 30, 1, 24, 50, 40], dtype=np.float32)
"""As in parcels.py, which imports nothing of ours and is not imported here."""


def drawn(parcels: int, seed: int) -> dict[str, NDArray[Any]]:
    """So many parcels, float32 [parcels, 6] in their own units, and whether each came late, int64 [parcels]."""
    chance = np.random.default_rng(seed)
    part = chance.random((parcels, 6), dtype=np.float32)
    km, kg, load, hour, rain, stops = (part * 2 - 1).T
    lateness = np.sin(3 * km) * kg + 0.8 * np.cos(4 * load + 2 * hour) + rain * stops + 0.4 * km
    late = lateness + NOISE * chance.standard_normal(parcels) > 0.2
    return {"parcels": part * LARGEST, "late": late.astype(np.int64)}


class Project:
    """A folder with the job file, the code and the data, as a team has it under its hands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        shutil.copytree(PARCELS, folder)
        self.data.mkdir()
        self._sent: dict[str, int] = {}
        self._write("held-out", drawn(HELD_OUT, seed=0))

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def rows(self) -> int:
        """Parcels to train on, as the source counts them: not every file can be read."""
        return sum(self._sent[file.stem] for file in self._deliveries())

    def _deliveries(self) -> list[Path]:
        return sorted(self.data.glob("delivery-*.npz"))

    def _write(self, name: str, delivery: Mapping[str, NDArray[Any]]) -> None:
        self._sent[name] = len(delivery["late"])
        np.savez(self.data / f"{name}.npz", parcels=delivery["parcels"], late=delivery["late"])

    def take_snapshot(self) -> None:
        """What `ship snapshot data/` does."""
        take(self.data)

    def deliver(self, number: int, parcels: int) -> None:
        self._write(f"delivery-{number:02}", drawn(parcels, seed=number))
        self.take_snapshot()

    def deliver_damaged(self, number: int, parcels: int) -> None:
        """Some weights are missing, and some distances are the 9999 that a scanner writes when it does not know."""
        delivery = drawn(parcels, seed=number)
        delivery["parcels"][::7, 1] = np.nan
        delivery["parcels"][::11, 0] = 9999
        self._write(f"delivery-{number:02}", delivery)
        self.take_snapshot()

    def deliver_half(self, number: int, parcels: int) -> None:
        """The manifest is there, and its last file is cut off."""
        self.deliver(number, parcels)
        path = self.data / f"delivery-{number:02}.npz"
        path.write_bytes(path.read_bytes()[:-100])

    def take_back(self, number: int) -> None:
        (self.data / f"delivery-{number:02}.npz").unlink()
        self.take_snapshot()

    def measure_in(self, miles: bool) -> None:
        """The source sends everything once more, distances in miles or in kilometres as before."""
        for file in self._deliveries():
            delivery = drawn(self._sent[file.stem], seed=int(file.stem.rpartition("-")[2]))
            if miles:
                delivery["parcels"][:, 0] /= KM_IN_A_MILE
            self._write(file.stem, delivery)
        self.take_snapshot()

    def set_job(self, part: str, **values: Any) -> None:
        """Change keys of one part of the job file."""
        job = yaml.safe_load(self.job.read_text())
        job[part] |= values
        self.job.write_text(yaml.safe_dump(job, sort_keys=False))

    def comment(self) -> None:
        """Change the code, and nothing that it does."""
        code = self.folder / "parcels.py"
        code.write_text(f"{code.read_text()}\n# Reviewed.\n")
