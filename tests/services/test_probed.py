"""Commands of one day try a bucket's conditional writes once, and again when anything has changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fault_proxy import Answer, FaultProxy, Rule
from tests.support.fixture_types import Connect
from tests.support.stack_servers import S3Server
from train_and_ship.infra import probed
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings

VERSIONING = r"\?versioning"
Command = Callable[[], ObjectStore]


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


@pytest.fixture
def command(
    connect: Connect, bucket: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """What the next command makes of the bucket."""
    connect(bucket, proxy.url)
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))

    def made() -> ObjectStore:
        return ObjectStore.from_settings(Settings.load(), short_lived=True)

    return made


def tried(proxy: FaultProxy) -> int:
    return len(proxy.sent("PUT", "/.probe/"))


def test_the_second_command_asks_for_the_versioning_and_tries_nothing(command: Command, proxy: FaultProxy) -> None:
    found = command().probe()
    first, asked = tried(proxy), len(proxy.sent("GET", VERSIONING))
    assert first > 0 and command().probe() == found
    assert tried(proxy) == first and len(proxy.sent("GET", VERSIONING)) == asked + 1


def test_another_versioning_another_bucket_and_another_day_are_tried_anew(
    command: Command, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command().probe()
    first = tried(proxy)
    s3_client(Settings.load()).put_bucket_versioning(
        Bucket=Settings.load().bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    command().probe()
    assert tried(proxy) == 2 * first
    later = time.time() + probed.SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    command().probe()
    assert tried(proxy) == 3 * first
    (kept,) = (tmp_path / "home/probed").iterdir()
    settings = Settings.load()
    other = replace_bucket(settings)
    other.create_bucket_if_missing()
    other.probe()
    assert tried(proxy) == 4 * first and len(list(kept.parent.iterdir())) == 2


def replace_bucket(settings: Settings) -> ObjectStore:
    return ObjectStore.from_settings(settings, f"{settings.bucket}-other", short_lived=True)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 2}', "future"])
def test_a_file_that_says_nothing_of_use_is_as_none(
    command: Command, proxy: FaultProxy, tmp_path: Path, damage: str
) -> None:
    found = command().probe()
    first = tried(proxy)
    (kept,) = (tmp_path / "home/probed").iterdir()
    if damage == "future":
        damage = json.dumps({**json.loads(kept.read_text()), "at": time.time() + 3600})
    kept.write_text(damage)
    assert command().probe() == found and tried(proxy) == 2 * first


def test_where_the_versioning_may_not_be_asked_every_command_tries(
    command: Command, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.add(Rule(Answer(403, "AccessDenied"), "GET", VERSIONING))
    command().probe()
    first = tried(proxy)
    command().probe()
    assert tried(proxy) == 2 * first and not (tmp_path / "home/probed").exists()


def test_a_store_that_was_seen_to_break_a_promise_is_tried_by_the_next_command(
    command: Command, proxy: FaultProxy
) -> None:
    store = command()
    store.probe()
    first = tried(proxy)
    store.distrust()
    command().probe()
    assert tried(proxy) == 2 * first
