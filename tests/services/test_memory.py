"""How much memory a large release takes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from tests.support.ceph_rgw import RgwServer
from tests.support.fixture_types import Connect
from tests.support.projects import REPOSITORY
from train_and_ship.infra.objectstore import IN_FLIGHT_BYTES

LARGE_BYTES = 256_000_000
MEASURED = """
import resource, sys
from pathlib import Path
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.registry.bucket.releases import fetch_release, publish
folder = Path(sys.argv[1])
store = ObjectStore.from_settings(Settings.load())
store.probe()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = build_manifest(folder, model="digits", formats={}, signature={}, metrics={})
publish(store, folder, manifest)
fetch_release(store, "digits", manifest.release, Path(sys.argv[2]))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_size_of_a_file(connect: Connect, rgw_server: RgwServer, tmp_path: Path) -> None:
    store = connect("large", rgw_server.url)
    store.create_bucket_if_missing()
    folder = tmp_path / "release"
    folder.mkdir()
    piece = random.Random(0).randbytes(1_000_000)
    with (folder / "model.onnx").open("wb") as file:
        for number in range(LARGE_BYTES // len(piece)):
            file.write(number.to_bytes(4, "big") + piece[4:])
    argv = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "copy")]
    before, after = map(int, subprocess.check_output(argv, cwd=REPOSITORY).split())
    # In kilobytes. What is in flight is bounded; the rest is threads and their buffers.
    assert (after - before) * 1024 < IN_FLIGHT_BYTES + 64 * 2**20 < LARGE_BYTES
    for path in (folder / "model.onnx", tmp_path / "copy" / "model.onnx"):
        path.unlink()
