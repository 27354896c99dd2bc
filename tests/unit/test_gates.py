from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from torchworker.contract import Interval, RehearseResult, TrainResult, Verdict
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.agreement import require_may_pass
from train_and_ship.registry.bucket.releases import Published
from train_and_ship.registry.gates import (
    VersusLive,
    compare,
    how_drawn,
    require_good_enough,
    require_not_slower,
    require_rehearsed,
    worst,
)
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.verdicts import headline, verdict_table
from train_and_ship.tasks.results import Rehearsed


def job(folder: Path, **gates: object) -> Job:
    return load_job(write_project(folder, gates=gates))[0]


def require_not_worse(
    job: Job, candidate: dict[str, float], live: dict[str, float], name: str, problem: str = ""
) -> None:
    require_good_enough(job, VersusLive(live=name, candidate=candidate, theirs=live, problem=problem))


def judged(folder: Path, release: dict[str, object], low: float, high: float) -> bool:
    """Whether a policy lets a candidate pass whose improvement in accuracy lies between these two."""
    one = load_job(write_project(folder, release=release))[0]
    versus = VersusLive(
        live="r1", candidate={"accuracy": 0.9}, theirs={"accuracy": 0.9}, intervals={"accuracy": (low, high)}
    )
    return all(item.passed for item in compare(one, versus))


def test_better_needs_the_whole_interval_above_the_margin(tmp_path: Path) -> None:
    assert judged(tmp_path, {"policy": "better"}, 0.001, 0.02)
    assert not judged(tmp_path, {"policy": "better"}, 0.0, 0.0)
    assert not judged(tmp_path, {"policy": "better"}, -0.001, 0.05)
    assert not judged(tmp_path, {"policy": "better", "margin": 0.01}, 0.005, 0.05)


def test_an_interval_over_groups_says_so_and_too_few_groups_are_not_sure(tmp_path: Path) -> None:
    one = load_job(write_project(tmp_path, release={"policy": "better"}))[0]
    same = {"accuracy": 0.9}
    twelve = VersusLive(live="r1", candidate=same, theirs=same, intervals={"accuracy": (-0.1, 0.1)}, groups=12)
    five = VersusLive(live="r1", candidate=same, theirs=same, groups=5)
    assert "95% interval over 12 groups" in compare(one, twelve)[0].why
    assert "5 groups are too few to be 95% sure, which takes 6: validate on more groups" in compare(one, five)[0].why
    assert how_drawn(one, 12) == "paired bootstrap over 12 groups of samples (data.group)"
    assert "independent" in how_drawn(one, 0) and "5 groups are too few" in how_drawn(one, 5)


def test_not_worse_allows_a_loss_up_to_the_margin_and_the_very_same_model(tmp_path: Path) -> None:
    assert judged(tmp_path, {"policy": "not_worse"}, 0.0, 0.0)
    assert judged(tmp_path, {"policy": "not_worse", "margin": 0.01}, -0.009, 0.02)
    assert not judged(tmp_path, {"policy": "not_worse", "margin": 0.01}, -0.02, 0.09)


def test_always_asks_nothing_and_an_interval_that_is_no_number_fails(tmp_path: Path) -> None:
    assert judged(tmp_path, {"policy": "always"}, -0.5, -0.4)
    assert not judged(tmp_path, {"policy": "not_worse", "margin": 1.0}, float("nan"), float("nan"))


def test_a_policy_without_an_interval_fails_closed_and_says_why(tmp_path: Path) -> None:
    one = load_job(write_project(tmp_path, release={"policy": "better"}))[0]
    versus = VersusLive(live="r1", candidate={"accuracy": 0.99}, theirs={"accuracy": 0.5})
    with pytest.raises(GateError, match=r"is not shown to be better than the live release r1: .*no interval"):
        require_good_enough(one, versus)
    with pytest.raises(GateError, match=r"take release.policy: better out of the job file for one run"):
        require_good_enough(one, VersusLive(live="r1", candidate={}, theirs={}, problem="its inputs are y"))


def test_a_refusal_shows_both_numbers_and_the_interval(tmp_path: Path) -> None:
    one = load_job(write_project(tmp_path, release={"policy": "better", "margin": 0.01}))[0]
    versus = VersusLive(
        live="r1", candidate={"accuracy": 0.91}, theirs={"accuracy": 0.9}, intervals={"accuracy": (-0.012, 0.03)}
    )
    with pytest.raises(GateError) as caught:
        require_good_enough(one, versus)
    assert "accuracy 0.91 against 0.9, improvement +0.01, 95% interval -0.012 to +0.03" in caught.value.message
    assert "95% sure > 0.01" in caught.value.table and "FAILED" in caught.value.table


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
    with pytest.raises(
        GateError, match=r"live release r1: its inputs are y.*take vs_live \(accuracy\) out of the job file"
    ):
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
    with pytest.raises(GateError, match=r"memory_mb: not measured.*take times_live \(memory_mb\) out of the job file"):
        require_not_slower(plain, {"memory_mb": 1.0}, {}, "r1")
    with pytest.raises(GateError, match="memory_mb: the live release takes other inputs"):
        require_not_slower(plain, {"memory_mb": 1.0}, {"memory_mb": 1.0}, "r1", "the live release takes other inputs")


def failed(format: str, gate: str, measured: float | None, limit: str, case: str = "96 samples") -> Verdict:
    return Verdict(format=format, gate=gate, case=case, measured=measured, limit=limit, passed=False)


def test_the_headline_of_a_refusal_has_the_number_the_limit_and_the_formats() -> None:
    poor = [failed(kind, "f1", 0.115, ">= 0.2") for kind in ("onnx", "pt2")]
    passed = replace(failed("onnx", "accuracy", 0.9, ">= 0.5"), passed=True)
    assert headline([*poor, passed]) == "f1 0.115, expected >= 0.2, in all 2 formats"
    late = failed("onnx", "load_ms", 3.25, "<= 1", "artifact")
    assert headline([late, replace(passed, format="pt2")]) == "load_ms 3.25, expected <= 1, in onnx (artifact)"
    # The worst of each, by which side its limit is on; what could not be measured says so.
    more = [failed("onnx", "parity", value, "<= 1", f"batch {value}") for value in (2.0, 7.0)]
    assert headline([*more, failed("pt2", "f1", None, ">= 0.2")]) == (
        "parity 7, expected <= 1, in onnx (2 times); f1 not measured, expected >= 0.2, in pt2 (96 samples)"
    )


def test_the_table_shows_numbers_limits_and_what_was_not_measured() -> None:
    table = verdict_table(
        [
            Verdict(format="onnx", gate="parity", case="batch 1", measured=0.25, limit="<= 1", passed=True),
            Verdict(format="pt2", gate="accuracy", case="9 samples", measured=None, limit=">= 1", passed=False),
        ]
    ).text()
    assert "onnx    parity    batch 1    0.25          <= 1   passed" in table
    assert "pt2     accuracy  9 samples  not measured  >= 1   FAILED" in table


def test_a_candidate_that_is_live_already_need_not_be_better_than_itself(tmp_path: Path) -> None:
    one = load_job(write_project(tmp_path, release={"policy": "better"}))[0]
    metrics = {"onnx": {"accuracy": 0.9}}
    result = RehearseResult(
        verdicts=(), candidate=metrics, live=metrics, live_problem="", samples=9,
        intervals={"accuracy": Interval(low=0.0, high=0.0)},
    )  # fmt: skip
    published = Published(release="r1", sent_bytes=0, present_bytes=0, etags={})
    Rehearsed(job=one, published=published, result=result, live="r1").require_good_enough()
    with pytest.raises(GateError, match="is not shown to be better"):
        Rehearsed(job=one, published=published, result=result, live="r2").require_good_enough()


def test_a_rehearsal_in_which_nothing_was_checked_is_no_pass() -> None:
    result = RehearseResult(verdicts=[], candidate={}, live={}, live_problem="", samples=0)
    with pytest.raises(GateError, match=r"release r1, as it came back .* nothing was checked\. It was not made live"):
        require_rehearsed("release r1", result, "It was not made live.")


def test_a_refused_rehearsal_tells_ten_checks_of_a_format_and_how_many_more() -> None:
    def checked(kind: str, count: int, passed: bool) -> list[Verdict]:
        return [
            Verdict(format=kind, gate="rehearsal", case=f"batch {n}", measured=9, limit="<= 1", passed=passed)
            for n in range(count)
        ]

    verdicts = [*checked("onnx", 2000, False), *checked("pt2", 500, True), *checked("torchscript", 1, False)]
    result = RehearseResult(verdicts=verdicts, candidate={}, live={}, live_problem="", samples=0)
    with pytest.raises(GateError) as refused:
        require_rehearsed("release r1", result, "It was not made live.")
    assert "onnx (batch 8), onnx (batch 9), torchscript (batch 0) and 1990 more. It was not" in str(refused.value)
    assert "batch 10" not in str(refused.value) and len(str(refused.value)) < 5000


# ---- the trained model, before it is exported


def trained(accuracy: float, samples: int = 96, **more: float) -> TrainResult:
    return TrainResult(
        weights="", history=[{"validation_accuracy": 0.1}, {"validation_accuracy": accuracy, **more}],
        train_samples=96, validation_samples=samples, data_fingerprint="", environment={}, notes=(),
    )  # fmt: skip


def test_a_trained_model_that_cannot_pass_a_gate_is_refused_before_the_export(tmp_path: Path) -> None:
    gates = {"accuracy": {"min": 0.9}, "mean_absolute_error": {"max": 2.0}, "p50_ms": {"max": 0.001}}
    one = load_job(write_project(tmp_path, gates=gates))[0]
    with pytest.raises(
        GateError, match=r"2 of 3 gates failed before the export.* accuracy 0.52, expected >= 0.9"
    ) as caught:
        require_may_pass(one, trained(0.52, validation_mean_absolute_error=3.0))
    assert "the trained model" in caught.value.table and "<= 2" in caught.value.table
    require_may_pass(one, trained(0.95, validation_mean_absolute_error=1.0))


@pytest.mark.parametrize(
    ("accuracy", "samples", "job"),
    [
        (0.899, 96, {}),
        (0.875, 40, {}),
        (float("nan"), 96, {}),
        (0.5, 20_000, {}),
        (0.5, 96, {"export": {"validation_samples": 90}}),
        (0.5, 96, {"gates": {"accuracy": {"vs_live": 0.0}}}),
        (0.5, 96, {"train": {"entrypoint": "plain:main"}}),
        (0.5, 96, {"parity": {"coupled": "allowed"}}),
    ],
    ids=[
        "rounding",
        "two samples of few",
        "no number",
        "a drawn sample",
        "a smaller sample",
        "against live",
        "a loop of one's own",
        "coupled",
    ],
)
def test_what_is_not_certain_is_left_to_the_artifacts(
    tmp_path: Path, accuracy: float, samples: int, job: dict[str, Any]
) -> None:
    one = load_job(write_project(tmp_path, **{"gates": {"accuracy": {"min": 0.9}}, **job}))[0]
    require_may_pass(one, trained(accuracy, samples))
