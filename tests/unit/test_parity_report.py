from __future__ import annotations

import base64
from xml.etree import ElementTree

import torch

from torchworker.contract import ERROR_DECADES, ErrorCounts, Mismatch
from torchworker.parity.histogram import ErrorHistogram
from train_and_ship.registry.report.parity_failure import embedded, error_histograms, parity_report


def mismatch(probe: str, ratio: float = 3.5) -> Mismatch:
    return Mismatch(
        format="onnx",
        probe=probe,
        output="logits",
        note="max |Δ| 1.0e-03 at [3, 1] expected 0.5, got 0.501",
        ratio=ratio,
        distribution=["1e-4 to 1e-3  7  ██"],
    )


def test_the_report_names_format_question_element_place_and_sizes() -> None:
    text = parity_report("digits", [mismatch("batch_64"), mismatch("nan.x", float("inf"))], {"onnx": "first differs"})
    assert "## onnx" in text and "**Where:** first differs." in text
    assert "batch_64" in text and "[3, 1] expected 0.5, got 0.501" in text and "3.5" in text and "∞" in text
    assert "1e-4 to 1e-3  7  ██" in text


def test_many_questions_are_counted_not_listed() -> None:
    text = parity_report("digits", [mismatch(f"sample{index}") for index in range(9)], {})
    assert "sample4" in text and "sample5" not in text and "And 4 more." in text
    assert "**Where:** not looked for." in text


def spread() -> list[ErrorCounts]:
    counted = ErrorHistogram()
    eager = torch.full((10,), 20.0)
    got = eager.clone()
    got[0] += 3
    got[1] += 3e-4
    got[2] = float("nan")
    counted.add("drawn", got, eager)
    counted.add("batches", eager, eager)
    counted.add("batches", eager[:3], eager)
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    counted.add("NaN and infinity", odd, odd)
    return counted.counts("onnx", frozenset(["drawn"]))


def test_differences_are_counted_by_decade_absolute_and_in_units_of_the_output() -> None:
    drawn, batches, odd = spread()
    place = {decade: 2 + position for position, decade in enumerate(ERROR_DECADES)}
    assert (drawn.format, drawn.probes, drawn.failed, batches.failed) == ("onnx", "drawn", True, False)
    assert drawn.absolute[0] == 7 and drawn.absolute[-1] == 1 and sum(drawn.absolute) == 10
    assert drawn.absolute[place[0]] == 1 and drawn.absolute[place[-4]] == 1
    assert drawn.relative[place[-1]] == 1 and drawn.relative[place[-5]] == 1
    # Shapes that differ have no differences.
    assert batches.absolute[0] == sum(batches.absolute) == 10
    assert odd.absolute[0] == 3


def test_histograms_are_a_picture_with_a_row_for_each_kind_of_probe_and_the_failed_ones_red() -> None:
    svg = error_histograms(spread())
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f".//{space}rect")
    titles = [bar.findtext(f"{space}title") for bar in bars]
    assert "onnx: drawn ✗, same: 7" in titles and "onnx: batches, same: 10" in titles
    assert {bar.get("class") for bar, title in zip(bars, titles, strict=True) if "drawn" in str(title)} == {"bad"}
    assert {bar.get("class") for bar, title in zip(bars, titles, strict=True) if "batches" in str(title)} == {"a"}
    assert ".a{fill:#4878a8}" in svg and ".bad,text.bad{fill:#c8443c}" in svg
    assert all(0 < float(str(bar.get("x"))) < float(str(root.get("width"))) for bar in bars)
    address = embedded(svg)
    assert base64.b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode() == svg
    assert f"]({address})" in parity_report("digits", [mismatch("batch_64")], {}, address)
