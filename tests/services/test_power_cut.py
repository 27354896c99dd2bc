"""The power goes off at every operation of a reader on its folder, and of a run on what waits for the bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from shipreader.reader import Reader
from tests.support.fixture_types import MakeReader
from tests.support.power_cut import cut_everywhere
from tests.support.releases import CHANNEL, MODEL, content, published
from torchworker.durable import DAMAGED
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import WAITING, read_decisions, record_waiting

EVERY = pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.soak)], ids=["some", "all"])
"""One of so many states."""
PULL = """
import sys
from pathlib import Path
from shipreader.reader import Reader
from tests.support.power_cut import promise
from tests.support.releases import CHANNEL, MODEL, move
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import read_manifest

folder, settings = Path(sys.argv[1]), Settings.load()
store = ObjectStore.from_settings(settings)
reader = Reader(MODEL, bucket=store.bucket, folder=folder / "served", channel=CHANNEL, client=s3_client(settings))
for generation, release in enumerate(sys.argv[2:], 1):
    move(store, read_manifest(store, MODEL, release))
    assert reader.pull().generation == generation
    promise(folder, str(generation))
"""
DECIDE = """
import sys
from pathlib import Path
from tests.support.power_cut import promise
from tests.support.releases import CHANNEL, MODEL
from train_and_ship.registry.channels.decisions import FAILED, Decision, keep_until_recorded

folder = Path(sys.argv[1])
for number in range(2):
    said = {"why": f"answer {number}" * 100, "flow_run": "a-b", "asked": "ada", "live": "a" * 20}
    at = f"2026-11-30T0{number}:00:00.000+00:00"
    keep_until_recorded(folder / "a-b", Decision(model=MODEL, channel=CHANNEL, decision=FAILED, at=at, **said))
    promise(folder, str(number))
"""


@EVERY
def test_a_reader_serves_after_a_power_cut_what_it_served_and_brings_what_is_live(
    object_store: ObjectStore, make_reader: MakeReader, tmp_path: Path, every: int
) -> None:
    first, second, third = (published(object_store, tmp_path / str(seed), seed) for seed in range(3))
    releases = first.release, second.release, first.release, third.release
    states = cut_everywhere(PULL, tmp_path / "cut", *releases)
    for number, state in enumerate(states[::every]):
        folder = state.put(tmp_path / "states" / str(number)) / "served"
        reader = make_reader(folder)
        held = _held(reader)
        least = max(map(int, state.promised), default=0)
        if least:
            assert held is not None and held[0] >= least, state
        if held is not None:
            assert held[1] == releases[held[0] - 1], state
        assert reader.pull().id == third.release, state
        assert content(folder / "current") == content(tmp_path / "2"), state


def _held(reader: Reader) -> tuple[int, str] | None:
    """Generation and release that the folder has, verified; what is served while the bucket is away."""
    with reader._local.locked():
        found = reader._held()
    return (found.generation, found.id) if found is not None else None


@EVERY
def test_an_answer_that_waits_for_the_bucket_gets_there_after_a_power_cut(
    object_store: ObjectStore, tmp_path: Path, every: int
) -> None:
    channel = Channel(object_store, MODEL, CHANNEL)
    for number, state in enumerate(cut_everywhere(DECIDE, tmp_path / "cut")[:: max(1, every // 4)]):
        runs = state.put(tmp_path / "states" / str(number))
        recorded = record_waiting(object_store, runs)
        assert recorded == 1 or not state.promised, state
        assert record_waiting(object_store, runs) == 0 and not (runs / "a-b" / WAITING).exists(), state
    assert {decision.why[:8] for decision in read_decisions(channel, 10)} == {"answer 0", "answer 1"}


def test_an_answer_that_cannot_be_read_is_kept_aside_and_ends_no_later_run(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    torn = tmp_path / "runs" / "a-b" / WAITING
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b'{"asked": "ada", "at": "20')
    assert record_waiting(object_store, tmp_path / "runs") == 0
    assert [path.name for path in torn.parent.iterdir()] == [WAITING + DAMAGED]
