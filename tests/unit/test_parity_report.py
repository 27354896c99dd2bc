from __future__ import annotations

from registry.parity_report import parity_report
from torchworker.contract import Mismatch


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
