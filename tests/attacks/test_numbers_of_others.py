"""Numbers in what a live release says of itself: nobody counted or measured them, and later runs compute with them."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed

from tests.support.html_pages import checked
from tests.support.run_report_files import page_of, run_files, speed
from torchworker.contract import MeasureResult, RehearsedRelease, RehearseResult, decode
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.data.checks import check_data, findings_table
from train_and_ship.registry.diff import ReleaseRecord, _differences
from train_and_ship.registry.gates import live_score
from train_and_ship.registry.job.data import Checks
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import MOST_ROWS, SIGNATURE, Kind, KindChange, kind_table
from train_and_ship.registry.release.documents import told_data, told_serve, told_speed
from train_and_ship.registry.release.manifest import DATA, VERDICTS, Manifest
from train_and_ship.registry.report.data_sections import data_page
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import markdown
from train_and_ship.registry.run_folder import Against
from train_and_ship.tasks import outcome
from train_and_ship.tasks.rehearse import _values

TENSOR = {
    "dtype": "float32", "shapes": [[4]], "values": 400, "missing": 0, "outside": 0, "low": -1.5, "high": 2.0,
}  # fmt: skip
SPLIT = {
    "samples": 100, "fingerprint": "f" * 32, "tensors": {"x": TENSOR}, "repeated": 0, "labels": {"0": 60, "1": 40},
    "columns": {"x[0]": {"quantiles": [place / 10 - 3 for place in range(101)], "values": 100}},
}  # fmt: skip
TOLD: dict[str, Any] = {"train": SPLIT, "validation": SPLIT, "overlap": 0, "seconds": 0.1, "classes": ["a", "b"]}


def altered(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which one leaf is another one."""
    found = copy.deepcopy(document)
    *above, last = path.split("/")
    place: Any = found
    for name in above:
        place = place[int(name) if isinstance(place, list) else name]
    place[int(last) if isinstance(place, list) else last] = value
    return found


def record(files: dict[str, Any], **described: Any) -> ReleaseRecord:
    manifest = Manifest(
        model="tiny", release="a" * 20, files={}, signature={}, **{"formats": {}, "metrics": {}, **described}
    )
    return ReleaseRecord(manifest=manifest, files={name: json.dumps(said) for name, said in files.items()})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train/columns/x[0]/values", -1, r"train\.columns\.x\[0\]\.values: expected a whole number from 0, got -1"),
        ("train/columns/x[0]/values", 5e-324, "expected a whole number from 0, got 5e-324"),
        ("train/samples", 10**400, "train.samples: expected a whole number from 0, got one of 1,329 bits"),
        ("train/labels/0", -60, "train.labels.0: expected a whole number from 0, got -60"),
        (
            "train/columns/x[0]/quantiles/100",
            float("inf"),
            "expected a number that is finite, got inf",
        ),
        ("train/tensors/x/low", float("nan"), "tensors.x.low: expected a number that is finite, got nan"),
        ("train/columns/x[0]/quantiles/0", 5.0, r"columns\.x\[0\]\.quantiles: expected ascending numbers"),
        ("train/labels", {"1" * 1001: 1}, "train.labels: expected names of at most 1,000 characters, got 1,001"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_counts_and_percentiles_that_cannot_be_tell_nothing_in_words(path: str, value: Any, said: str) -> None:
    found = record({DATA: altered(TOLD, path, value)})
    whole = f"tiny {'a' * 20}: what it says of itself cannot be read: ValueError: {DATA}: "
    with pytest.raises(ReleaseError, match=whole + ".*" + said):
        _ = found.data
    assert [words.startswith(whole) for words in found.not_understood()] == [True]
    # And the release that says it does not go live.
    with pytest.raises(ReleaseError, match=said):
        found.require_understood()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("measured/onnx/speeds/0/p50_ms", 10**400, "speeds.0.p50_ms: expected a number from 0 to 1e.100, got one of"),
        ("measured/onnx/speeds/0/p50_ms", -1.0, "p50_ms: expected a number from 0 to 1e.100, got -1.0"),
        ("measured/onnx/speeds/0/batch", 0.5, "batch: expected a whole number from 0, got 0.5"),
        ("measured/onnx/speeds/1/p50_ms", 1e308, "got 1e.308"),
        ("machine", "*_<" * 4000, "speed.machine: expected at most 10,000 characters, got 12,000"),
        ("measured/onnx/speeds", [{}] * 1001, "speed.measured.onnx.speeds: expected at most 1,000, got more"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_times_that_nobody_measured_tell_nothing_in_words(path: str, value: Any, said: str) -> None:
    found = record({VERDICTS: {"speed": altered(speed(1.0), path, value), "validation_samples": 9}})
    with pytest.raises(ReleaseError, match=said):
        _ = found.speed
    # The rest is compared.
    assert found.kind.samples == 9 and len(found.not_understood()) == 1


def test_what_a_release_of_ours_says_is_understood() -> None:
    ours = record({DATA: TOLD, VERDICTS: {"speed": speed(1.0), "validation_samples": 9}})
    assert ours.not_understood() == [] and ours.data is not None and ours.data.train.labels == {"0": 60, "1": 40}
    assert ours.speed is not None and ours.speed.measured["onnx"].speeds[0].p50_ms == 1.0
    ours.require_understood()
    # Another version, which measured or counted less.
    assert record({}).not_understood() == [] and told_data({"train": {}}) is None and told_speed({"speed": 3}) is None


def test_of_times_those_of_known_formats_are_read() -> None:
    many = speed(1.0)
    many["measured"] |= {f"k{number}": many["measured"]["onnx"] for number in range(5000)}
    found = told_speed({"speed": many})
    assert found is not None and list(found.measured) == ["onnx"]


@pytest.mark.parametrize("samples", [-1, 0, 10**400, 0.5, "9", None], ids=lambda value: str(value)[:9])
def test_a_live_release_that_was_measured_on_no_number_of_samples_is_held_against_its_record(samples: Any) -> None:
    told = record({VERDICTS: {"validation_samples": samples}}, metrics={"accuracy": 1.0})
    assert told.kind.samples == 0 and bool(told.not_understood()) is (samples != 0)
    (only,) = contradictions(told.kind)
    assert only.live == "1 in its own record"


def contradictions(live: Kind) -> list[KindChange]:
    result = RehearseResult(
        verdicts=[], candidate={}, live={"onnx": {"accuracy": 0.1}}, live_problem="", samples=400,
        live_spread={"accuracy": 0.3}, constant={"accuracy": 0.3},
    )  # fmt: skip
    job = Job.model_validate(
        {"name": "tiny", "model": {"factory": "a:b"}, "data": {"factory": "a:c"}, "train": {"epochs": 1}}
    )
    return live_score(job, result).contradictions(live, job.direction)


@pytest.mark.parametrize("said", [1e200, 1.7e308])
def test_a_number_whose_square_is_none_contradicts_like_any_other(said: float) -> None:
    (only,) = contradictions(Kind(metrics={"accuracy": said}, samples=400))
    assert only.live.startswith("1") and "in its own record" in only.live
    assert contradictions(Kind(metrics={"accuracy": -said}, samples=400)) == []


@pytest.mark.parametrize("serve", [{"fastest": "onnx"}, {"throughput": "onnx"}, {}])
def test_what_a_release_recommends_for_a_purpose_of_its_own_is_not_asked_for(serve: dict[str, str]) -> None:
    measured = speed(3.0)
    measured["measured"] = {"live onnx": measured["measured"]["onnx"]}
    found: Any = decode(MeasureResult, measured)
    release = RehearsedRelease(
        folder="", files={}, formats={"onnx": "model.onnx"}, inputs=[], outputs=[], serve=told_serve(serve), hashes={}
    )
    assert _values(found, "live", release, ["p50_ms"]) == {"p50_ms": 3.0}
    words = record({}, formats={"onnx": "model.onnx"}, serve=serve).not_understood()
    assert ["MANIFEST.json: serve: expected latency and throughput, got fastest" in one for one in words] == (
        [True] if "fastest" in serve else []
    )


def test_a_verdict_of_no_format_ends_a_comparison_in_words() -> None:
    verdict = {"gate": "parity", "measured": 0.5, "format": None}
    one, two = record({VERDICTS: {"verdicts": []}}), record({VERDICTS: {"verdicts": [verdict]}})
    for sides in ((one, two), (two, one)):
        with pytest.raises(ReleaseError, match="cannot be read: TypeError: parity: expected a name, got NoneType"):
            list(_differences("parity", *sides))


# ---- in reports


def test_what_is_not_understood_stands_in_the_report_and_a_long_processor_is_cut() -> None:
    told = decode(MeasureResult, {**speed(2.0), "machine": "m" * 9000})
    against = Against(live="r1", speed=told, not_understood=["tiny r1: verdicts.json: samples: got <b>-1</b>"])
    page = page_of(run_files(against=against))
    assert "tells nothing by it: tiny r1: verdicts.json: samples: got <b>-1</b>" in checked(html(page)).text
    assert len(markdown(page)) < 20_000


def test_a_report_is_written_whatever_the_numbers_of_a_section_are() -> None:
    # As an older version has kept them, which believed them.
    told = decode(MeasureResult, altered(speed(2.0), "measured/onnx/speeds/0/p50_ms", 10**400))
    found = checked(html(page_of(run_files(against=Against(live="r1", speed=told)))))
    assert "It cannot be shown: OverflowError" in found.text
    assert {"Speed", "Parity", "Cost", "Lineage"} <= set(found.headings)


def test_of_tens_of_thousands_of_labels_the_most_frequent_are_kept_and_drawn() -> None:
    asked = Checks.model_validate({"drift": {"psi": 5.0}})
    facts = told_data(TOLD)
    strange = {str(number) + "é" * 50: 1 for number in range(3000)}
    live = told_data(altered(altered(TOLD, "train/labels", {**strange, "1": 30_000}), "train/samples", 33_000))
    assert facts is not None and live is not None
    report = check_data(asked, facts, live, "r1")
    (target,) = (one for one in report.distributions if one.column == "target")
    assert len(target.bins.names) == 21 and target.bins.names[-1] == "2,982 others"
    assert sum(target.bins.before) == pytest.approx(1) and sum(target.bins.now) == pytest.approx(1)
    assert len(json.dumps(dataclasses.asdict(report))) < 10_000 and len(data_page("tiny", facts, report)) < 10_000


def test_of_thousands_of_tensors_and_differences_some_are_shown_and_the_others_counted() -> None:
    asked = Checks.model_validate({"drift": {"psi": 5.0}})
    live = told_data(altered(TOLD, "train/tensors", {f"{number}" + "n" * 900: TENSOR for number in range(3000)}))
    facts = told_data(TOLD)
    assert facts is not None and live is not None
    failed = check_data(asked, facts, live, "r1").failed
    assert len(failed) == 102 and failed[-1].where == "train, 2,900 more tensors of the live release"
    assert max(len(one.where) for one in failed) < 250
    table = findings_table(failed * 3)
    assert len(table.rows) == 200 and table.notes == ["and 106 more, which data_checks.json of the run has"]
    changes = [KindChange(kind=SIGNATURE, of=f"input {number}", live="a", candidate="b") for number in range(1250)]
    kinds = kind_table(changes)
    assert len(kinds.rows) == MOST_ROWS and kinds.notes == ["and 1,150 more differences"]


def test_a_run_that_cannot_be_reported_keeps_no_other_from_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), state=Crashed(message="gone")) for _ in range(2)]
    for run in runs:
        (tmp_path / "tiny" / str(run.id)).mkdir(parents=True)
    told: list[tuple[str, str]] = []

    class Client:
        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def read_flow_runs(self, **_: object) -> list[FlowRun]:
            return runs

    def noting(what: str, fails: Callable[[str], bool]) -> Any:
        async def note(*words: Any) -> None:
            name = str(words[0].id) if isinstance(words[0], FlowRun) else words[1].name
            if fails(name):
                raise OverflowError("int too large to convert to float")
            told.append((what, name))

        return note

    first, second = (str(run.id) for run in runs)
    monkeypatch.setattr(outcome, "get_client", Client)
    monkeypatch.setattr(outcome, "_report", noting("reported", lambda name: name == first))
    monkeypatch.setattr(outcome, "_end_from_outside", noting("ended", lambda _: False))
    settings: Settings = SimpleNamespace(runs=tmp_path)  # type: ignore[assignment]
    asyncio.run(outcome.report_abandoned("tiny", "", settings))
    assert told == [("ended", first), ("reported", second), ("ended", second)]
