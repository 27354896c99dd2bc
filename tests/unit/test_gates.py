from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import GateError
from registry.gates import require_not_slower, require_not_worse, verdict_table, worst
from registry.job import Job, load_job
from tests.projects import write_project
from torchworker.contract import Verdict


def job(folder: Path, **gates: object) -> Job:
    return load_job(write_project(folder, gates=gates))[0]


def test_the_worst_format_speaks_for_the_release(tmp_path: Path) -> None:
    metrics = {
        "onnx": {"accuracy": 0.98, "mean_squared_error": 0.2},
        "pt2": {"accuracy": 0.97, "mean_squared_error": 0.1},
    }
    assert worst(job(tmp_path, accuracy={"min": 0.1}), metrics) == {"accuracy": 0.97, "mean_squared_error": 0.2}


def test_a_candidate_within_the_margin_of_the_live_release_passes(tmp_path: Path) -> None:
    plain = job(tmp_path, accuracy={"vs_live": -0.01})
    require_not_worse(plain, {"accuracy": 0.98}, {"accuracy": 0.985}, "r1")
    # Without the gate nothing is asked, not even whether it could be measured.
    require_not_worse(job(tmp_path, accuracy={"min": 0.1}), {"accuracy": 0.10}, {}, "r1", "its inputs are others")


def test_a_candidate_beyond_the_margin_is_refused_with_the_numbers(tmp_path: Path) -> None:
    plain = job(tmp_path, accuracy={"vs_live": -0.01})
    with pytest.raises(GateError) as caught:
        require_not_worse(plain, {"accuracy": 0.95}, {"accuracy": 0.985}, "r1")
    assert "accuracy 0.95 against 0.985" in str(caught.value)
    assert "-0.035" in caught.value.table and "FAILED" in caught.value.table


def test_for_an_error_metric_lower_is_better(tmp_path: Path) -> None:
    plain = job(tmp_path, mean_squared_error={"vs_live": 0})
    require_not_worse(plain, {"mean_squared_error": 0.1}, {"mean_squared_error": 0.2}, "r1")
    with pytest.raises(GateError):
        require_not_worse(plain, {"mean_squared_error": 0.3}, {"mean_squared_error": 0.2}, "r1")


def test_what_was_not_measured_on_either_side_fails_closed(tmp_path: Path) -> None:
    plain = job(tmp_path, accuracy={"vs_live": 0})
    with pytest.raises(GateError, match="accuracy: not measured on the live release"):
        require_not_worse(plain, {"accuracy": 1.0}, {"mean_squared_error": 0.2}, "r1")
    with pytest.raises(GateError, match="accuracy: not measured on the candidate"):
        require_not_worse(plain, {}, {"accuracy": 0.2}, "r1")
    with pytest.raises(GateError):
        require_not_worse(plain, {"accuracy": float("nan")}, {"accuracy": 0.2}, "r1")
    with pytest.raises(GateError):
        require_not_worse(plain, {"accuracy": 0.9}, {"accuracy": float("nan")}, "r1")


def test_a_live_release_that_cannot_be_scored_fails_closed_and_the_way_out_is_named(tmp_path: Path) -> None:
    plain = job(tmp_path, accuracy={"vs_live": 0})
    with pytest.raises(GateError, match=r"live release r1: its inputs are y.*ship once without vs_live \(accuracy\)"):
        require_not_worse(plain, {"accuracy": 1.0}, {}, "r1", "its inputs are y")


def test_times_are_held_against_the_live_release_as_multiples(tmp_path: Path) -> None:
    plain = job(tmp_path, p50_ms={"times_live": 1.2}, size_mb={"times_live": 1.0})
    require_not_slower(plain, {"p50_ms": 1.2, "size_mb": 4.0}, {"p50_ms": 1.0, "size_mb": 4.0}, "r1")
    with pytest.raises(GateError, match=r"p50_ms 1\.5 against 1\..*The live release stays") as caught:
        require_not_slower(plain, {"p50_ms": 1.5, "size_mb": 4.0}, {"p50_ms": 1.0, "size_mb": 4.0}, "r1")
    assert "1.5" in caught.value.table and "FAILED" in caught.value.table
    # Without the gate nothing is asked.
    require_not_slower(job(tmp_path, p50_ms={"max": 1}), {"p50_ms": 9.0}, {}, "r1", "it died")


def test_times_that_could_not_be_measured_beside_live_fail_closed_and_the_way_out_is_named(tmp_path: Path) -> None:
    plain = job(tmp_path, memory_mb={"times_live": 2})
    with pytest.raises(GateError, match=r"memory_mb: not measured.*ship once without times_live \(memory_mb\)"):
        require_not_slower(plain, {"memory_mb": 1.0}, {}, "r1")
    with pytest.raises(GateError, match="memory_mb: the live release takes other inputs"):
        require_not_slower(plain, {"memory_mb": 1.0}, {"memory_mb": 1.0}, "r1", "the live release takes other inputs")


def test_the_table_shows_numbers_limits_and_what_was_not_measured() -> None:
    table = verdict_table(
        [
            Verdict(format="onnx", gate="parity", case="batch 1", measured=0.25, limit="<= 1", passed=True),
            Verdict(format="pt2", gate="accuracy", case="9 samples", measured=None, limit=">= 1", passed=False),
        ]
    )
    assert "onnx    parity    batch 1    0.25          <= 1   passed" in table
    assert "pt2     accuracy  9 samples  not measured  >= 1   FAILED" in table
