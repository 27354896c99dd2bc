"""Serving machines follow a channel in the background: bucket down, faults, many at once, killed, alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shipreader import bucket as reader_bucket
from shipreader.errors import UnavailableError
from shipreader.reader import Reader
from shipreader.records import Release
from shipreader.report import read_reports
from tests.support.fault_proxy import Answer, CutReply, DropReply, DropRequest, Fault, FaultProxy, OtherBytes, Rule
from tests.support.fixture_types import Connect, MakeReader
from tests.support.ports import free_port
from tests.support.processes import PATIENCE
from tests.support.projects import REPOSITORY
from tests.support.releases import MODEL, content, move, published
from tests.support.stack_servers import S3Server
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.release.manifest import MANIFEST


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def served(reader: Reader) -> Release:
    assert reader.current is not None
    return reader.current


def test_a_follower_is_told_of_every_move_it_sees(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    move(object_store, releases[0])
    seen: list[Release] = []
    with make_reader(on_change=seen.append) as reader:
        for count, manifest in enumerate(releases, 1):
            move(object_store, manifest)
            until(lambda count=count: len(seen) == count)  # type: ignore[misc]
            assert reader.current == seen[-1]
    assert [release.id for release in seen] == [manifest.release for manifest in releases]
    assert [release.generation for release in seen] == [1, 2, 3]
    assert not any(thread.name.startswith("shipreader-") for thread in threading.enumerate())


def test_a_follower_serves_on_while_the_bucket_is_down_and_says_so_once(
    connect: Connect, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = S3Server(tmp_path_factory.mktemp("down"), free_port())
    server.start()
    try:
        store = connect("models", server.url)
        store.create_bucket_if_missing()
        first, second = (published(store, tmp_path / str(seed), seed) for seed in range(2))
        move(store, first)
        client = s3_client(Settings.load())
        options: dict[str, Any] = {"bucket": "models", "folder": tmp_path / "served", "client": client}
        with Reader(MODEL, interval=0.02, **options) as reader:
            server.kill()
            until(lambda: "no answer" in reader.status().problem)
            checked = reader.status().checked_at
            until(lambda: caplog.text.count("still serving release") == 1)
            assert reader.current is not None and reader.current.id == first.release
            assert (tmp_path / "served" / "current" / "file0.bin").is_file()
            # A machine that restarts meanwhile serves what it has.
            with Reader(MODEL, interval=10, **options) as restarted:
                assert restarted.current == reader.current
                assert "kept from before" in caplog.text
            server.start()
            move(store, second)
            until(lambda: reader.current is not None and reader.current.id == second.release)
            assert reader.status().problem == "" and checked != reader.status().checked_at
        assert "following the channel again" in caplog.text
    finally:
        server.kill()


def test_a_new_machine_without_a_bucket_says_so(connect: Connect, tmp_path: Path) -> None:
    connect("models", f"http://127.0.0.1:{free_port()}")
    reader = Reader(MODEL, bucket="models", folder=tmp_path, client=s3_client(Settings.load()))
    with pytest.raises(UnavailableError, match="no answer"):
        reader.start()


@pytest.mark.parametrize(
    ("fault", "said"), [(OtherBytes(b"x" * 1003), "SHA-256"), (Answer(403, "AccessDenied"), "may not read it")]
)
def test_a_bad_release_is_not_downloaded_again_at_every_look_but_the_next_move_is_followed_at_once(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path, fault: Fault, said: str
) -> None:
    first, bad, good = (published(object_store, tmp_path / str(seed), seed) for seed in range(3))
    move(object_store, first)
    proxy.add(Rule(fault, "GET", f"{bad.release}/file3"))
    with make_reader(interval=0.2, jitter=0) as reader:
        move(object_store, bad)
        until(lambda: said in reader.status().problem)
        looks, downloads = len(proxy.sent("GET", "/channels/")), len(proxy.sent("GET", "/file2"))
        until(lambda: len(proxy.sent("GET", "/channels/")) >= looks + 12)
        # Pauses of 2, 4, 8… intervals.
        assert 1 <= len(proxy.sent("GET", "/file2")) - downloads < 6
        assert reader.current is not None and reader.current.id == first.release
        move(object_store, good)
        until(lambda: reader.current is not None and reader.current.id == good.release)


def test_a_release_that_a_callback_cannot_take_is_a_problem_until_it_can(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(4)]
    move(object_store, releases[0])
    seen: list[str] = []
    full = threading.Event()

    def on_change(release: Release) -> None:
        seen.append(release.id)
        if full.is_set():
            raise RuntimeError("no room on the GPU")

    with make_reader(on_change=on_change) as reader:
        full.set()
        move(object_store, releases[1])
        until(lambda: seen.count(releases[1].release) >= 2)
        status = reader.status()
        assert status.release is not None and status.release.id == releases[0].release
        assert (status.seen, served(reader).id) == (2, releases[1].release)
        assert status.problem == f"on_change failed for release {releases[1].release}: RuntimeError: no room on the GPU"
        checked = status.checked_at
        for manifest in releases[2:]:
            move(object_store, manifest)
            until(lambda manifest=manifest: manifest.release in seen)  # type: ignore[misc]
        # What is served is still here, however far the channel is ahead, and nobody knows it to be live.
        assert reader.status().checked_at == checked
        assert status.release.artifact("onnx").is_file()
        full.clear()
        until(lambda: reader.status().problem == "")
        now = reader.status()
        assert now.release == served(reader) and now.release.id == releases[3].release
        assert (now.checked_at or 0) > (checked or 0)
    # Said once a release, however often it was tried.
    assert caplog.text.count(f"on_change failed for release {releases[1].release}\n") == 1


def test_what_is_served_is_known_to_be_live_since_the_look_however_long_a_callback_takes(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    move(object_store, published(object_store, tmp_path / "release"))
    called: list[float] = []
    reader = make_reader(on_change=lambda _: called.append(time.time()))
    reader.pull()
    assert 0 < (reader.status().checked_at or 0) <= called[0]


def test_what_was_kept_from_before_is_handed_over_when_the_bucket_is_away(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    make_reader().pull()
    proxy.add(Rule(DropRequest(), "GET"))
    seen: list[str] = []
    with make_reader(on_change=lambda release: seen.append(release.id)) as reader:
        assert seen == [manifest.release]
        status = reader.status()
        assert status.release == served(reader) and "no answer" in status.problem
        # It serves, and whoever wants to know how old that may be is not satisfied.
        assert status.ready() and not status.ready(max_stale=3600)


def test_single_faults_are_got_over(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)
    for fault in (DropReply(), DropRequest(), Answer(503, "SlowDown"), Answer(500, "InternalError")):
        proxy.rules.clear()
        proxy.add(Rule(fault, "GET", "/channels/", times=1))
        proxy.add(Rule(fault, "GET", MANIFEST, times=1))
        proxy.add(Rule(fault, "GET", "/file2", times=2))
        assert make_reader(tmp_path / str(fault)).pull().id == manifest.release


def test_a_download_that_breaks_off_goes_on_from_there(
    object_store: ObjectStore,
    make_reader: MakeReader,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(reader_bucket, "PIECE_BYTES", 100)
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest)

    proxy.add(Rule(CutReply(), "GET", "/file0.bin", times=2))
    assert make_reader().pull().id == manifest.release
    # In pieces of 100: what is left of the last one is asked for again.
    starts = [request.headers.get("range") for request in proxy.sent("GET", "/file0.bin")]
    assert starts[:2] == [None, "bytes=500-"] and len(starts) == 3 and starts[2] in ("bytes=700-", "bytes=750-")


def test_many_readers_share_a_folder_and_never_see_a_torn_release(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path
) -> None:
    releases = [published(object_store, tmp_path / str(seed), seed) for seed in range(4)]
    expected = {manifest.release: content(tmp_path / str(seed)) for seed, manifest in enumerate(releases)}
    move(object_store, releases[0])
    make_reader().pull()
    stopping = threading.Event()
    readers: list[Reader] = []

    def serve(_: int) -> int:
        looks = 0
        with make_reader(interval=0.01) as reader:
            readers.append(reader)
            before = 0
            while not stopping.is_set():
                release = reader.current
                assert release is not None and release.generation >= before
                before = release.generation
                with_link = (tmp_path / "served" / "current").resolve()
                try:
                    assert content(with_link) == expected[with_link.name]
                except FileNotFoundError:
                    # Two moves since the link was read: only the last two releases are kept.
                    continue
                looks += 1
        return looks

    with ThreadPoolExecutor(4) as pool:
        serving = [pool.submit(serve, number) for number in range(4)]
        for turn in range(12):
            move(object_store, releases[(turn + 1) % 4])
            time.sleep(0.05)
        try:
            until(lambda: len(readers) == 4 and all(served(reader).generation == 13 for reader in readers))
        finally:
            stopping.set()
        assert all(job.result() > 0 for job in serving)


READER = """
import sys
from pathlib import Path
from shipreader.bucket import s3_client
from shipreader.reader import Reader
Reader("digits", bucket=sys.argv[1], folder=sys.argv[2], client=s3_client()).pull()
"""


def test_a_reader_killed_in_the_middle_leaves_the_last_good_release_and_no_rubbish(
    object_store: ObjectStore, make_reader: MakeReader, proxy: FaultProxy, tmp_path: Path
) -> None:
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    good = make_reader().pull()
    move(object_store, second)
    started = threading.Event()
    process: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        started.wait()
        process[0].kill()

    proxy.add(Rule(DropRequest(), "GET", "/file1", before=kill, times=1))
    argv = [sys.executable, "-c", READER, object_store.bucket, str(tmp_path / "served")]
    process.append(subprocess.Popen(argv, cwd=REPOSITORY, env=os.environ.copy()))
    started.set()
    assert process[0].wait(timeout=PATIENCE) == -9
    assert (tmp_path / "served" / "current").resolve() == good.folder
    assert content(good.folder) == content(tmp_path / "0")
    assert make_reader().pull().id == second.release
    assert not [path for path in (tmp_path / "served").rglob(".draft*")]


# ---- as a serving machine has it


def test_the_reader_installs_alone_and_its_command_follows_a_channel(
    object_store: ObjectStore, connect: Connect, store_url: str, tmp_path: Path
) -> None:
    source = REPOSITORY / "shipreader"
    # A copy: building in place leaves a build folder behind.
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "installed"
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--target", str(target), str(tmp_path / "source")], check=True)
    first, second = (published(object_store, tmp_path / str(seed), seed) for seed in range(2))
    move(object_store, first)
    folder = tmp_path / "served"
    argv = [sys.executable, "-m", "shipreader", MODEL, "--to", str(folder), "--follow", "--interval", "0.05"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"digits prod: generation 1, {first.release} -> {folder}/current\n"
        move(object_store, second)
        assert process.stdout.readline() == f"digits prod: generation 2, {second.release} -> {folder}/current\n"
        until(lambda: [one["generation"] for one in read_reports(folder)] == [2])
    finally:
        process.terminate()
    assert process.wait(timeout=PATIENCE) == 0
    assert read_reports(folder) == []
    script = (
        "import sys, shipreader.reader, shipreader.__main__, shipreader.signatures\n"
        "print(shipreader.__file__, {'torch', 'prefect', 'mlflow', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{target / 'shipreader' / '__init__.py'} set()"
