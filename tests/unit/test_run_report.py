"""The report of a run: complete, honest about what it does not know, and harmless whatever it is told."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.html_pages import checked
from tests.support.run_report_files import EVIL, EVIL_IMAGE, EVIL_MARKDOWN, page_of, run_files, speed
from train_and_ship.registry.cost import FLOW, LEDGER, Ledger, Rates, Spent, read_costs
from train_and_ship.registry.release.documents import recall
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.cost_section import cost_section
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import Page, Section, Text, markdown
from train_and_ship.registry.report.run import Ending
from train_and_ship.registry.run_folder import Against
from train_and_ship.registry.text import Table, duration, money


def test_names_that_are_attacks_are_shown_and_do_nothing() -> None:
    page = page_of(run_files())
    document = html(page)
    found = checked(document)
    assert EVIL in found.text and EVIL_IMAGE in found.text and EVIL_MARKDOWN in found.text
    assert found.links == [
        f"http://127.0.0.1:5000/#/experiments/1/runs/2{end}"
        for end in ("", "/artifacts/report.html?workflowType=machine_learning")
    ]
    text = markdown(page)
    # Whatever renders it sees no tag, no image and no link of theirs.
    outside = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"<(?=[A-Za-z/?!$])(?!http)", outside) and not re.search(r"\[[xy]", outside)
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
    page = page_of(files, verdict=Ending.FAILED, why="it broke", table="format  gate\nonnx    parity")
    found = checked(html(page))
    assert len(found.headings) == left, found.headings
    assert found.headings[0] == "Decision" and "it broke" in found.text and found.headings[-1] == "Lineage"


def test_a_refused_run_begins_with_what_failed_what_is_live_and_what_to_do_and_folds_the_gates() -> None:
    said = [("live meanwhile", "prod: release r0"), ("what to do", "train better")]
    table, why = "format  gate\nonnx    accuracy", "plain: 1 of 9 gates failed: accuracy 0.1, expected >= 0.2, in onnx."
    page = page_of(run_files(), verdict=Ending.REFUSED, why=why, table=table, meanwhile=said, facts=[])
    document = html(page)
    places = [document.index(text) for text in ("1 of 9 gates", "prod: release r0", "train better", "Decision", table)]
    assert places == sorted(places) and document.count("1 of 9 gates failed") == 1
    assert re.search(r"<summary>All gates</summary>\s*<pre>format  gate\nonnx", document)
    assert '<span class="verdict bad">refused</span>' in document
    text = markdown(page)
    assert text.index("1 of 9 gates") < text.index("live meanwhile") < text.index("## Decision") < text.index(table)


@pytest.mark.parametrize(
    ("ending", "badge"), [(Ending.PROMOTED, "verdict"), (Ending.KEPT, "verdict still"), (Ending.FAILED, "verdict bad")]
)
def test_a_badge_is_green_where_something_went_live_grey_where_not_and_red_where_it_went_wrong(
    ending: Ending, badge: str
) -> None:
    assert f'<span class="{badge}">{ending}</span>' in html(page_of(None, verdict=ending))


def test_a_run_that_never_began_has_its_reason_alone() -> None:
    found = checked(html(page_of(None, verdict=Ending.FAILED, why="job file x.yaml: found none")))
    assert found.headings == ["Decision"] and "job file x.yaml: found none" in found.text
    assert "x.yaml: found none" in markdown(page_of(None, why="job file x.yaml: found none"))


@pytest.mark.parametrize(
    ("low", "high"), [(-0.01, 0.2), (0.1, 0.105), (-0.105, -0.1), (-1e-4, 0.2), (0.0, 0.0), (-1.0, 1.0)]
)
def test_no_number_of_an_interval_stands_on_another(low: float, high: float) -> None:
    svg = charts.intervals([charts.Span(name="m", low=low, high=high, middle=low, limit=0.0, passed=True)])
    below = re.findall(r'<text x="([\d.]+)" y="58.0" text-anchor="(\w+)" class="small">([^<]+)<', svg)
    spans = []
    for x, anchor, text in below:
        wide = 6.5 * len(text)
        left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        spans.append((left, left + wide, text))
    spans.sort()
    assert "0" in [text for *_, text in spans]
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans)), spans


def test_markdown_and_html_say_the_same_numbers() -> None:
    page = page_of(run_files())
    numbers = set(re.findall(r"\d+\.\d+", checked(html(page)).text))
    told = set(re.findall(r"\d+\.\d+", re.sub(r"<http\S+>", "", markdown(page))))
    assert told <= numbers


def test_what_another_version_wrote_is_read_as_far_as_it_is_known() -> None:
    written = {"live": "r1", "speed": {**speed(1.0), "watts": 3.0}, "weather": "fine"}
    found = recall(Against, written)
    assert found is not None and found.live == "r1"
    assert found.speed is not None and found.speed.measured["onnx"].speeds[1].p50_ms == 64.0
    assert recall(Against, {"live": "r1"}) == Against(live="r1")
    # What lacks what a section shows is left out, and the page is made all the same.
    assert recall(Against, {"live": "r1", "speed": {**speed(1.0), "machine": 7}}) is None
    assert recall(Against, {"live": ["r1"]}) is None and recall(Against, {"live": "r1", "changes": "abc"}) is None
    assert recall(Against, {"speed": None}) is None and recall(Against, {"live": "r1", "speed": [1]}) is None


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
        charts.error_histogram([("nothing", [0] * len(charts.ERROR_BINS), False)]),
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
