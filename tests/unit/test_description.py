"""The markdown on a model version's page."""

from __future__ import annotations

from typing import Any

from torchworker.contract import Measured, MeasureResult, ValidateResult, Verdict
from train_and_ship.registry.report import description
from train_and_ship.registry.report.speed import speed_table
from train_and_ship.registry.text import shorten
from train_and_ship.registry.verdicts import unproven_in_cpp


def verdict(format: str, gate: str, case: str, measured: float | None, limit: str, **more: Any) -> Verdict:
    return Verdict(
        **{"format": format, "gate": gate, "case": case, "measured": measured, "limit": limit, "passed": True, **more}
    )


def describe(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "model": "digits",
        "release": "r-1",
        "formats": {"onnx": "model.onnx", "pt2": "model.pt2"},
        "sizes": {"model.onnx": 14_900, "model.pt2": 2_500_000},
        "verdicts": [
            verdict("onnx", "parity", "batch 1", 1.25, "<= 8"),
            verdict("pt2", "parity", "batch 1", 0.0, "<= 8"),
            verdict("onnx", "accuracy", "360 samples", 0.97777, ">= 0.97"),
        ],
        "metrics": {"onnx": {"accuracy": 0.97777}, "pt2": {"accuracy": 0.97777}},
        "training": {"epoch": 12, "train_loss": 0.05, "time": 1e9},
        "links": {"flow run": "http://127.0.0.1:4200/runs", "nowhere": ""},
        "captured": {},
        "left_out": {},
        **changes,
    }
    verdicts, metrics = arguments.pop("verdicts"), arguments.pop("metrics")
    result = ValidateResult(verdicts=verdicts, metrics=metrics, reference="the trained model", validation_samples=360)
    return description.describe(result=result, **arguments)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_first_line_is_plain_and_says_what_matters() -> None:
    assert lines(describe())[0] == "accuracy 0.9778, all 3 gates passed: digits r-1 as onnx, pt2."


def test_formats_are_columns_and_conditions_are_lines() -> None:
    text = lines(describe())
    assert "| case | limit | onnx | pt2 |" in text
    assert "| batch 1 | <= 8 | 1.25 ✓ | 0 ✓ |" in text
    assert "| accuracy | 360 samples | >= 0.97 | 0.9778 ✓ |" in text
    assert "| accuracy | 0.9778 | 0.9778 |" in text


def test_the_values_are_those_of_the_epoch_that_ships_and_why_it_does_stands_before_them() -> None:
    assert "### Last epoch (12)" in lines(describe())
    text = lines(describe(shipped="epoch 12 of 20: accuracy 0.98 is the best."))
    place = text.index("### Epoch that ships (12)")
    assert text[place + 1] == "epoch 12 of 20: accuracy 0.98 is the best."
    assert "| train_loss | 0.05 |" in text[place:]


def test_files_are_listed_with_their_sizes() -> None:
    assert "| model.onnx | onnx | 14.9 kB |" in lines(describe())
    assert "| model.pt2 | pt2 | 2.5 MB |" in lines(describe())


def test_a_failed_gate_stands_out_with_its_note() -> None:
    failed = verdict("onnx", "accuracy", "360 samples", None, ">= 0.97", passed=False, note="a | b\nc")
    text = lines(describe(verdicts=[failed]))
    assert "1 of 1 gates failed" in text[0]
    assert "| accuracy | 360 samples | >= 0.97 | **not measured ✗ failed** |" in text
    assert "- onnx, accuracy, 360 samples: a \\| b c" in text


def test_a_link_without_an_address_is_left_out() -> None:
    assert "Release `r-1` · [flow run](http://127.0.0.1:4200/runs)" in lines(describe())


def test_a_description_can_do_without_everything_optional() -> None:
    text = describe(sizes={}, verdicts=[], metrics={}, training={}, links={})
    assert text == "not validated: digits r-1 as onnx, pt2.\n\nRelease `r-1`\n"


def test_shortening_ends_at_a_line_and_says_so() -> None:
    text = shorten("first line\n" * 100, 200)
    assert len(text) <= 200
    assert text.startswith("first line\n")
    assert "shortened" in text
    assert shorten("short", 200) == "short"
    assert len(shorten("x" * 500, 200)) <= 200


def test_a_check_that_was_not_run_is_neither_passed_nor_failed_in_the_record_of_a_move() -> None:
    passed = Verdict(format="onnx", gate="parity", case="batch 1", measured=0.2, limit="<= 1", passed=True)
    unasked = Verdict(
        format="onnx", gate="parity", case="batch 9", measured=None, limit="<= 1", passed=False, ran=False
    )
    assert description.in_short([passed, unasked]) == {
        "parity": "1 of 1 passed, 1 not run, 0.2 to 0.2 (<= 1)",
        "not run": "onnx batch 9",
    }


def test_a_cpp_proof_that_was_not_run_is_said_beside_what_passed() -> None:
    proofs = [
        verdict("aoti", "parity", "batch 1", 0.2, "<= 1"),
        verdict("aoti in C++", "parity", "without Python", None, "<= 1", passed=False, ran=False),
    ]
    first = lines(describe(verdicts=proofs, metrics={}))[0]
    assert first == "all 1 gates passed, not run: aoti in C++ without Python: digits r-1 as onnx, pt2."
    assert unproven_in_cpp(proofs) == {"aoti"}


def test_a_format_whose_cpp_proof_was_not_run_is_recommended_with_these_words() -> None:
    measured = Measured(format="aoti", bytes=10, load_ms=1.0, memory_bytes=10)
    speed = MeasureResult(
        measured={"aoti": measured}, serve={"latency": "aoti"}, speedups={}, too_slow={}, verdicts=[], threads=1,
        machine="a machine",
    )  # fmt: skip
    assert speed_table(speed).rows[0][-1] == "latency"
    assert speed_table(speed, {"aoti"}).rows[0][-1] == "latency, not run in C++"
