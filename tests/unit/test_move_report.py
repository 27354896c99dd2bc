"""The report of a rollback and of a promotion: who, why, what was checked and what changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.support.html_pages import checked
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.channels.targets import Scored, Target, Verified
from train_and_ship.registry.diff import Difference
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.move import move_page, noticed
from train_and_ship.registry.report.page import markdown
from train_and_ship.registry.report.run import Ending, Outcome
from train_and_ship.registry.text import Link

EVIL = "<script>alert(1)</script>"
LIVE = Pointer(
    model="hostile", channel="prod", generation=7, release="b" * 20, manifest_sha256="0" * 64, previous=None, nonce="n",
    moved_at="2026-11-24T02:00:00Z", moved_by="ada", reason="all gates passed", flow_run="", mlflow_version="2",
)  # fmt: skip
CHANNEL = Channel(ObjectStore.from_settings(Settings.load()), "hostile")  # Nobody asks it anything.
VERIFIED = Verified(
    target=Target(channel=CHANNEL, release="a" * 20, mlflow_version="1", live=LIVE, expects_live=True),
    manifest=Manifest(model="hostile", release="a" * 20, files={}, formats={}, signature={}, metrics={}, serve={}),
    verdicts={"bytes": "8 files, read back and hashed"},
    scored=Scored(live="b" * 20, samples=360, candidate={"accuracy": 0.97}, against={"accuracy": 0.98}, problem=""),
)
CHANGES = [
    Difference(group="metrics", name=f"accuracy {EVIL}", before="0.98", after="0.97", change="-0.01 (-1.0%)"),
    Difference(group="packages", name="torch", before="2.13.0", after="2.12.0"),
]


def page(verified: Verified = VERIFIED, changes: list[Difference] = CHANGES, problem: str = "") -> Any:
    outcome = Outcome(
        verdict=Ending.ROLLED_BACK, title="hostile release aaa is live on prod", why=f"grace: {EVIL}",
        facts=[("replaces", "b" * 20)], places=[("Prefect run", Link(text="calm-owl", url="http://127.0.0.1:4200/r"))],
    )  # fmt: skip
    return move_page(outcome, verified, verified.verdicts, changes, problem)


def test_it_tells_who_moved_what_and_everything_that_changes_by_it() -> None:
    found = checked(html(page()))
    assert found.headings == [
        "Decision", "What was checked", "Beside the live release", f"What changes, from release {'b' * 20}",
    ]  # fmt: skip
    for part in (f"grace: {EVIL}", "read back and hashed", "360 held-out samples", "-0.01 (-1.0%)", "2.12.0"):
        assert part in found.text, part
    text = markdown(page())
    assert "2.12.0" in text and "<script" not in text.replace("\\<script", "")


def test_a_person_who_is_asked_sees_first_what_a_caller_would_notice() -> None:
    assert [row[1] for row in noticed(CHANGES).rows] == [f"accuracy {EVIL}"]


def test_a_release_whose_own_record_is_damaged_can_be_left_and_the_report_says_what_nobody_can_tell() -> None:
    damaged = dataclasses.replace(VERIFIED, scored=None)
    found = checked(html(page(damaged, [], "lineage.json: expected what the manifest says, got another")))
    assert "Nobody can tell: lineage.json: expected what the manifest says, got another" in found.text
    first = dataclasses.replace(damaged, target=dataclasses.replace(VERIFIED.target, live=None))
    assert "Nothing was live before." in checked(html(page(first, []))).text
    assert "No difference." in checked(html(page(damaged, []))).text
