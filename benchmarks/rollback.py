"""What a rollback takes: the whole command, beside the least that Python and boto3 take to reach the same bucket.

Needs the local stack (`ship up`), or addresses of an S3 store and MLflow. Two models of its own, with a short history
and a long one; sides run alternately. Writes the result into docs/benchmarks.md.
"""

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from report import PAGE, machine, write

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.password import read_password
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.transfer import in_parallel
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.history import read_record, record, record_key
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.registry.tracking.connection import connect
from train_and_ship.ship.password import variables_of

SHIP = str(Path(sys.executable).with_name("ship"))
HELLO = """
import boto3
from botocore.config import Config
client = boto3.client("s3", endpoint_url={endpoint!r}, config=Config(retries={{"mode": "standard"}}))
client.head_bucket(Bucket={bucket!r})
"""
KILOBYTES = 400
"""Size of a release: about that of the digits example in three formats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Took:
    seconds: float
    """Wall clock of the whole process."""
    cpu: float
    """User and system seconds of the process."""


def took(argv: list[str]) -> Took:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return Took(seconds=seconds, cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def two_releases(settings: Settings, store: ObjectStore, model: str) -> Manifest:
    """Published, registered in MLflow as versions 1 and 2, and promoted one after the other. Returns the second."""
    client = connect(settings.mlflow_url)
    client.create_registered_model(model)
    run = client.create_run("0").info
    for version in ("1", "2"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part in range(8):
                (folder / f"part{part}.bin").write_bytes(os.urandom(KILOBYTES * 1000 // 8))
            manifest = build_manifest(folder, model=model, formats={}, signature={}, metrics={})
            publish(store, folder, manifest)
        client.create_model_version(
            model, source=f"{run.artifact_uri}/m", run_id=run.run_id, tags={"release": manifest.release}
        )
        promote(store, manifest, version)
    return manifest


def promote(store: ObjectStore, manifest: Manifest, version: str) -> None:
    """Put a release of two live. version: in MLflow."""
    move = Move(manifest=manifest, reason="benchmark", moved_by="benchmark", mlflow_version=version)
    move_channel(Channel(store, manifest.model, "prod"), move, accept=None)


def lengthen(store: ObjectStore, model: str, moves: int) -> None:
    """Give the channel a history of so many moves, as if its two releases had been promoted in turns."""
    live = read_pointer(Channel(store, model, "prod"))
    first = read_record(store, record_key(model, "prod", 1))
    assert live is not None

    def move(generation: int) -> Pointer:
        this, other = (first, live) if (moves - generation) % 2 else (live, first)
        return dataclasses.replace(this, generation=generation, previous=other.release, nonce=uuid.uuid4().hex)

    in_parallel(lambda number: record(store, move(int(number))), [str(number) for number in range(3, moves)])
    store.replace(pointer_key(model, "prod"), move(moves).encode(), live.etag)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--moves", type=int, default=10_000, help="length of the long history")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    os.environ.update(variables_of(settings, read_password(settings.home) or ""))
    short, long = (f"bench-rollback-{kind}-{uuid.uuid4().hex[:6]}" for kind in ("short", "long"))
    newer = {model: two_releases(settings, store, model) for model in (short, long)}
    lengthen(store, long, arguments.moves)

    hello = [sys.executable, "-c", HELLO.format(endpoint=settings.s3_endpoint, bucket=settings.bucket)]
    rows: dict[str, list[Took]] = {"hello": [], "short": [], "long": []}
    for number in range(arguments.rounds + 1):
        # The first round warms the disk's cache.
        for side in rows:
            argv = hello
            if side != "hello":
                model = short if side == "short" else long
                promote(store, newer[model], version="2")
                argv = [SHIP, "rollback", model, "--why", "benchmark"]
            one = took(argv)
            if number:
                rows[side].append(one)

    def median(side: str) -> tuple[float, float]:
        return (
            statistics.median(one.seconds for one in rows[side]),
            statistics.median(one.cpu for one in rows[side]),
        )

    few = 2 * (arguments.rounds + 2)
    titles = {
        "hello": "Python and boto3 say hello: one HEAD of the bucket",
        "short": f"`ship rollback`, history of {few} moves at most",
        "long": f"`ship rollback`, history of {arguments.moves:,} moves",
    }
    base = median("hello")
    table = ["| | median s | slowest s | CPU s | ÷ hello |", "|---|---|---|---|---|"]
    for side, title in titles.items():
        seconds, cpu = median(side)
        slowest = max(one.seconds for one in rows[side])
        table.append(f"| {title} | {seconds:.2f} | {slowest:.2f} | {cpu:.2f} | {seconds / base[0]:.2f} |")
    ratio = median("long")[0] / median("short")[0]
    text = (
        f"## A rollback\n\n{machine('boto3', 'mlflow')}\n"
        f"Measured with `python benchmarks/rollback.py`: the whole command, from the shell's fork to its exit, on a "
        f"running local stack; a release of 8 files and {KILOBYTES} kB is read back, the store is probed, the channel "
        "moves and the two MLflow aliases follow. Rounds alternate; before each the newer release is promoted "
        "again.\n\n" + "\n".join(table) + f"\n\n**{arguments.moves:,} moves ÷ {few} moves: {ratio:.2f}.**"
    )
    print(text)
    write(PAGE, "rollback", text)


if __name__ == "__main__":
    main()
