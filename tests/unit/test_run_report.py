"""The report of a run: complete, honest about what it does not know, and harmless whatever it is told."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from registry import charts
from registry.cost import FLOW, LEDGER, Ledger, Rates, Spent, read_costs
from registry.cost_section import cost_section, duration, money
from registry.job import Job
from registry.observation import Point
from registry.page import Link, Page, Section, Table, Text, markdown
from registry.page_html import html
from registry.run_files import RunFiles
from registry.run_report import Outcome, run_page
from tests.support.html_pages import checked

EVIL = "<script>alert(1)</script>"
EVIL_IMAGE = '"><img src=http://evil.example/x onerror=alert(1)>'
EVIL_MARKDOWN = "![x](http://evil.example/x.png) [y](javascript:alert(1)) | `"
JOB = Job.model_validate(
    {
        "name": "hostile",
        "model": {"factory": "plain:build_model", "args": {"kind": EVIL}},
        "data": {"factory": "plain:build_dataset", "checks": {}},
        "train": {"epochs": 2},
        "gates": {"accuracy": {"vs_live": 0}},
        "release": {"policy": "better"},
    }
)


def split(samples: int, labels: dict[str, int]) -> dict[str, Any]:
    quantiles = [place / 10 for place in range(101)]
    return {
        "samples": samples, "fingerprint": "f" * 32, "repeated": 0, "labels": labels,
        "columns": {EVIL: {"quantiles": quantiles, "values": samples}}, "tensors": {},
    }  # fmt: skip


def speed(factor: float) -> dict[str, Any]:
    def calls(batch: int) -> dict[str, float]:
        return {"batch": batch, "calls": 9, "p50_ms": factor * batch, "p99_ms": 2.0, "thread_ms": 1.0, "cpu_ms": 1.0}

    onnx = {
        "format": "onnx", "bytes": 1000, "load_ms": 3.0, "memory_bytes": None, "problem": "",
        "speeds": [calls(1), calls(64)],
    }  # fmt: skip
    return {"measured": {"onnx": onnx}, "serve": {"latency": "onnx"}, "threads": 1, "machine": f"a machine {EVIL}"}


def verdict(gate: str, case: str, measured: float, passed: bool = True, note: str = "") -> dict[str, Any]:
    return {
        "format": "onnx", "gate": gate, "case": case, "measured": measured, "limit": "<= 1", "passed": passed,
        "note": note, "ran": True,
    }  # fmt: skip


def run_files(**changes: Any) -> RunFiles:
    """A run whose every name is an attack."""
    known: dict[str, Any] = {
        "folder": Path("/runs/hostile/one"),
        "job": JOB,
        "about": {
            "flow_run_name": EVIL, "flow_run_id": "0" * 8, "git_commit": "abc", "snapshot": "",
            "begun": "2026-11-24T02:00:00.000+00:00",
        },
        "costs": [Spent(stage="train", wall=10.0, cpu=18.0, gpu=0.0, attempts=1)],
        "facts": {
            "train": split(90, {"0": 60, EVIL: 30}), "validation": split(10, {"0": 5, EVIL: 5}), "overlap": 0,
            "seconds": 0.1,
        },
        "checks": {
            "live": "r1",
            "findings": [
                {"check": "schema", "where": EVIL, "measured": EVIL_MARKDOWN, "limit": "none", "passed": False},
                {"check": "psi", "where": EVIL, "measured": "0.1", "limit": "at most 0.25", "passed": True},
            ],
            "distributions": [
                {
                    "column": EVIL, "bins": {"names": [EVIL, "b"], "before": [0.5, 0.5], "now": [0.1, 0.9]},
                    "psi": {"value": 0.3, "chance": 0.1}, "ks": None,
                }
            ],
        },
        "made_from": {"git_commit": "abc", "code": "c" * 16, "packages": {"torch": "2.13.0", "python": "3.11.2"}},
        "trained": {
            "train_samples": 90, "validation_samples": 10, "data_fingerprint": "d" * 32, "environment": {"torch": "2"},
            "notes": [EVIL], "history": [{"epoch": 1}],
        },
        "points": [
            Point(name, value, step, 0.0)
            for step, value in ((1, 1.0), (2, 0.5))
            for name in ("train_loss", "validation_loss", f"validation_{EVIL}")
        ],
        "exported": {"artifacts": {"onnx": {"method": EVIL}}, "left_out": {"pt2": EVIL_MARKDOWN}},
        "validated": {
            "verdicts": [verdict("parity", "batch 1", 0.25), verdict(EVIL, "10 samples", 2.0, False, EVIL_IMAGE)],
            "reference": "the model in float64", "validation_samples": 10, "metrics": {"onnx": {EVIL: 0.5}},
            "int8": {}, "speed": speed(1.0),
            "errors": [{"format": "onnx", "probes": "batches", "failed": False, "relative": [5] + [1] * 14}],
        },
        "lineage": {"start": "", "inputs": {"config": "e" * 16}},
        "registered": {
            "release": "a" * 20, "version": "3", "version_url": "javascript:alert(1)",
            "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/2", "stage": "",
        },
        "compared": {
            "live_problem": "", "candidate": {"onnx": {"accuracy": 0.9}},
            "live": {"onnx": {"accuracy": 0.8}}, "samples": 10, "candidate_speed": {}, "live_speed": {},
            "intervals": {"accuracy": {"low": -0.01, "high": 0.2}},
        },
        "against": {"live": "r1", "speed": speed(2.0)},
    }  # fmt: skip
    return RunFiles(**{**known, **changes})


def ended(**changes: Any) -> Outcome:
    known: dict[str, Any] = {
        "verdict": "kept", "good": True, "title": f"hostile {EVIL}", "why": EVIL_IMAGE, "table": "",
        "facts": [("asked by", EVIL_MARKDOWN)], "places": [("Prefect run", Link(text=EVIL, url="javascript:alert(1)"))],
    }  # fmt: skip
    return Outcome(**{**known, **changes})


def page_of(files: RunFiles | None, **changes: Any) -> Page:
    return run_page(ended(**changes), files, Rates(cpu_hour=0.05, currency="EUR"), "models")


def test_names_that_are_attacks_are_shown_and_do_nothing() -> None:
    page = page_of(run_files())
    document = html(page)
    found = checked(document)
    assert EVIL in found.text and EVIL_IMAGE in found.text and EVIL_MARKDOWN in found.text
    assert found.links == [
        f"http://127.0.0.1:5000/#/experiments/1/runs/2{end}" for end in ("", "/artifacts/report.html")
    ]
    text = markdown(page)
    # Whatever renders it sees no tag, no image and no link of theirs.
    outside = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<(?!http)", outside) and not re.search(r"(?<!\\)\[[xy]", outside)
    assert "(<javascript" not in text


def test_a_whole_run_has_every_section_with_its_pictures() -> None:
    found = checked(html(page_of(run_files())))
    assert [title.split(" r1")[0] for title in found.headings] == [
        "Decision", "Beside the live release", "Speed", "Parity", "Gates and metrics", "Learning curves", "Data",
        "Cost", "What was trained", "Lineage",
    ]  # fmt: skip
    # Interval; latency at two batches; limit and errors; two curves; drift, labels, a column; seconds.
    assert found.charts == 11
    for part in ("-0.01 to +0.2", "95% sure > 0", "FAILED", "parent release r1", "started from scratch", "a machine"):
        assert part in found.text, part
    assert "not measured beside these" in found.text


@pytest.mark.parametrize(
    ("stopped", "left"),
    [
        (["compared", "against"], 9),
        (["compared", "against", "registered", "lineage", "validated", "exported"], 6),
        (["compared", "against", "registered", "lineage", "validated", "exported", "trained", "made_from", "facts"], 5),
    ],
)
def test_a_run_that_stopped_tells_what_it_came_to(stopped: list[str], left: int) -> None:
    files = run_files(**dict.fromkeys(stopped))
    page = page_of(files, verdict="failed", good=False, why="it broke", table="format  gate\nonnx    parity")
    found = checked(html(page))
    assert len(found.headings) == left, found.headings
    assert found.headings[0] == "Decision" and "it broke" in found.text and found.headings[-1] == "Lineage"


def test_a_run_that_never_began_has_its_reason_alone() -> None:
    found = checked(html(page_of(None, verdict="failed", good=False, why="job file x.yaml: found none")))
    assert found.headings == ["Decision"] and "job file x.yaml: found none" in found.text
    assert "x.yaml: found none" in markdown(page_of(None, why="job file x.yaml: found none"))


def test_markdown_and_html_say_the_same_numbers() -> None:
    page = page_of(run_files())
    numbers = set(re.findall(r"\d+\.\d+", checked(html(page)).text))
    told = set(re.findall(r"\d+\.\d+", re.sub(r"<http\S+>", "", markdown(page))))
    assert told <= numbers


# ---- cost


def test_what_a_stage_takes_is_written_down_and_added_up_over_processes(tmp_path: Path) -> None:
    children = {"train": 0.0, "inspect": 0.0}
    first = Ledger(tmp_path, lambda: children, lambda: 0.0)
    with first.stage("train") as meter:
        children["train"], children["inspect"] = 7.0, 2.0
        meter.cpu = 1.0
        meter.ranks_started("cuda:0", 4)
        # All are launched again after one was lost.
        meter.ranks_started("cuda:0", 4)
        time.sleep(0.05)
    first.close()
    # Another process goes on with the run, and dies in the next stage.
    second = Ledger(tmp_path, lambda: {}, lambda: 0.0)
    with second.stage("train") as meter:
        meter.ranks_started("cpu", 4)
    stage = second.stage("export")
    stage.__enter__()

    costs = {item.stage: item for item in read_costs(tmp_path)}
    assert 8.0 <= costs["train"].cpu < 8.5 and costs["train"].attempts == 2
    assert 0.2 <= costs["train"].gpu <= 4 * costs["train"].wall + 0.1
    assert costs["inspect"].cpu == 2.0 and costs["inspect"].wall == 0.0
    assert (costs["export"].attempts, costs["export"].killed) == (0, 1)
    assert costs[FLOW].killed == 1
    page = markdown(page_of(run_files(costs=list(costs.values()))))
    assert "Killed before their end, and not counted: export (1), " in page


def test_a_stage_that_raises_is_counted_and_half_a_line_is_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, lambda: {}, lambda: 0.0)
    with pytest.raises(ValueError), ledger.stage("export"):
        raise ValueError
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"began": "x", "sta')
    costs = {item.stage: item for item in read_costs(tmp_path)}
    assert costs["export"].attempts == 1 and costs["export"].killed == 0


def text_of(rates: Rates, *costs: Spent) -> str:
    section = cost_section(costs, rates)
    return markdown(Page(title="t", verdict="v", good=True, intro="", facts=Table(rows=()), sections=[section]))


def test_a_price_is_shown_only_when_all_that_was_used_has_one() -> None:
    cpu, gpu = Spent(stage="a", wall=60, cpu=3600), Spent(stage="b", wall=1800, cpu=0, gpu=7200)
    assert "Price" not in text_of(Rates(), cpu) and "price" not in text_of(Rates(), cpu)
    assert "Price: 2.00 EUR, at 2 EUR a CPU-hour." in text_of(Rates(cpu_hour=2, currency="EUR"), cpu)
    half = text_of(Rates(cpu_hour=2), cpu, gpu)
    assert "No price, because SHIP_GPU_HOUR_PRICE is not set." in half and "2.0000 GPU-hours" in half
    whole = text_of(Rates(cpu_hour=2, gpu_hour=3, currency="EUR"), cpu, gpu)
    assert "Price: 8.00 EUR, at 2 EUR a CPU-hour and 3 EUR a GPU-hour." in whole
    # Nothing costs nothing only when somebody said so.
    assert "Price: 0.00, at 0 a CPU-hour." in text_of(Rates(cpu_hour=0), cpu)


def test_spans_and_prices_are_told_in_the_digits_that_count() -> None:
    assert [duration(value) for value in (0.417, 12.34, 245, 3800)] == ["0.42 s", "12.3 s", "4 min 5 s", "1 h 3 min"]
    assert [money(value, "EUR") for value in (1234.5, 0.0123, 0.0000012)] == [
        "1,234.50 EUR",
        "0.012 EUR",
        "1.2e-06 EUR",
    ]


# ---- charts


def test_charts_are_well_formed_for_numbers_that_are_awkward() -> None:
    drawn = [
        charts.lines({"one point": [(1.0, 0.5)]}, "epoch"),
        charts.lines({"flat": [(float(x), 0.0) for x in range(5)]}, "epoch"),
        charts.lines({"tiny": [(0.0, 1e-12), (1.0, 2e-12)], "huge": [(0.0, 1e12)]}, "step"),
        charts.lines({"long": [(float(x), float(x % 7)) for x in range(5000)]}, "step"),
        charts.bars([("zero", [0.0]), ("none", [None])], ["only"]),
        charts.intervals([charts.Span(name="equal", low=0.0, high=0.0, middle=0.0, limit=0.0, passed=False)]),
        charts.spread([("nothing", [0, 0], False)], ["a", "b"]),
        charts.bars([("control\x00\x1b characters", [1.0])], ["only"]),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg" and "nan" not in svg.lower().replace("tiny", "")
    assert drawn[3].count(",") < 300


def test_a_page_escapes_what_stands_in_its_own_markup() -> None:
    blocks = [Table(header=('"onload="x', "b", "c", "d"), rows=[("1", "2", "3", "4")]), Text(text="&lt;\x00\ud800")]
    page = Page(
        title="t", verdict='" onclick="x', good=True, intro="", facts=Table(rows=()),
        sections=[Section(title="s", blocks=blocks)],
    )  # fmt: skip
    assert "&lt;��" in checked(html(page)).text
    html(page).encode()
    markdown(page).encode()


def test_facts_of_a_run_that_was_never_resumed_read_back_as_they_were(tmp_path: Path) -> None:
    assert read_costs(tmp_path) == []
    (tmp_path / LEDGER).write_text(json.dumps({"began": "1", "stage": "train", "at": "now"}) + "\n")
    assert read_costs(tmp_path) == [Spent(stage="train", killed=1)]
