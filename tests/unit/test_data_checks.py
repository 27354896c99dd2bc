"""What is asked of data, from facts as a worker finds them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from scipy import stats

from torchworker.contract import InspectResult, decode
from train_and_ship.infra.errors import GateError
from train_and_ship.registry.data.checks import Report, require_good_data, require_held_out, shared_samples
from train_and_ship.registry.data.checks import check_data as check_decoded
from train_and_ship.registry.data.drift import bins_of_columns, bins_of_labels, ks, psi
from train_and_ship.registry.job.data import Checks
from train_and_ship.registry.report.data_sections import data_page
from train_and_ship.tasks import inspect


def percentiles(values: Any) -> list[float]:
    found: list[float] = np.sort(values)[np.maximum(-(-len(values) * np.arange(101) // 100), 1) - 1].tolist()
    return found


def drawn(mean: float = 0.0, samples: int = 2000, seed: int = 0) -> list[float]:
    return percentiles(np.random.default_rng(seed).normal(mean, 1, samples))


def facts(mean: float = 0.0, seed: int = 0, labels: dict[str, int] | None = None) -> dict[str, Any]:
    def tensor(dtype: str, shape: list[int], values: int) -> dict[str, Any]:
        limits = {"missing": 0, "outside": 0, "low": -3.0, "high": 3.0}
        return {"dtype": dtype, "shapes": [shape], "values": values, **limits}

    def split(samples: int) -> dict[str, Any]:
        return {
            "samples": samples,
            "fingerprint": "f" * 32,
            "tensors": {"x": tensor("float32", [2], 2 * samples), "target": tensor("int64", [], samples)},
            "columns": {
                "x[0]": {"quantiles": drawn(mean, samples, seed), "values": samples},
                "x[1]": {"quantiles": drawn(0, samples, seed + 1), "values": samples},
            },
            "labels": labels or {"0": samples // 2, "1": samples - samples // 2},
            "repeated": 0,
        }

    return {"train": split(2000), "validation": split(500), "overlap": 0, "seconds": 0.0}


def of_no_samples(found: dict[str, Any]) -> dict[str, Any]:
    found["train"]["labels"] = {"0": 0, "1": 0}
    return found


def known(found: dict[str, Any]) -> InspectResult:
    """Facts as a worker's answer is read."""
    decoded: InspectResult = decode(InspectResult, found)
    return decoded


def check_data(checks: Checks, now: dict[str, Any], live: dict[str, Any] | None, release: str) -> Report:
    return check_decoded(checks, known(now), None if live is None else known(live), release)


def failures(checks: dict[str, Any], now: dict[str, Any], live: dict[str, Any] | None = None) -> list[str]:
    report = check_data(Checks.model_validate(checks), now, live, "r1")
    return [f"{item.check} {item.where}" for item in report.failed]


def changed(**train: Any) -> dict[str, Any]:
    found = facts()
    found["train"] = {**found["train"], **train}
    return found


def with_tensor(name: str, split: str = "train", **values: Any) -> dict[str, Any]:
    found = facts()
    found[split]["tensors"][name] |= values
    return found


def test_sound_data_passes_everything() -> None:
    asked = {
        "tensors": {"x": {"dtype": "float32", "shape": [2], "min": -9, "max": 9}, "target": {"dtype": "int64"}},
        "labels": {"allowed": [0, 1], "min_share": 0.3},
        "samples": 100,
        "shrinks": 0.1,
        "drift": {"psi": 0.2, "ks": 0.2},
    }
    report = check_data(Checks.model_validate(asked), facts(), facts(seed=10), "r1")
    assert report.failed == [] and report.live == "r1"
    assert {item.check for item in report.findings} == {
        "schema", "missing", "outside", "labels", "overlap", "repeated", "samples", "shrinks", "psi", "ks",
    }  # fmt: skip


def test_another_dtype_or_shape_is_refused() -> None:
    asked = {"tensors": {"x": {"dtype": "float64", "shape": [None, 3]}}}
    assert failures(asked, facts()) == ["schema train x"] * 2 + ["schema validation x"] * 2
    assert failures({"tensors": {"x": {"shape": [None]}}}, with_tensor("x", shapes=[[2], [7]])) == []
    with pytest.raises(GateError, match=r"data.checks.tensors: expected x, target; got image"):
        failures({"tensors": {"image": {"dtype": "float32"}}}, facts())


def test_missing_and_outside_values_are_counted_against_their_limit() -> None:
    assert failures({}, with_tensor("x", missing=1)) == ["missing train x"]
    assert failures({"missing": 0.01}, with_tensor("x", missing=40)) == []
    asked = {"tensors": {"x": {"max": 1}}}
    assert failures(asked, with_tensor("x", "validation", outside=1)) == ["outside validation x"]
    assert failures({**asked, "outside": 0.5}, with_tensor("x", outside=1)) == []


def test_labels_that_should_not_be_there_and_labels_that_are_rare() -> None:
    asked = {"labels": {"allowed": [0, 1], "min_share": 0.05}}
    assert failures(asked, changed(labels={"0": 1000, "1": 990, "7": 10})) == ["labels train target"]
    assert failures(asked, changed(labels={"0": 1990, "1": 10})) == ["labels train target"]
    # One that is allowed and does not occur is as rare as can be.
    assert failures(asked, changed(labels={"0": 2000})) == ["labels train target"]
    assert failures(asked, changed(labels={})) == ["labels train target"]


def test_held_out_samples_that_are_training_samples_are_told_and_most_of_them_are_refused() -> None:
    shared = facts()
    assert shared_samples(0, 500) == "" and "training samples" not in data_page("m", known(shared), None)
    shared["overlap"] = 250
    told = "250 of 500 validation samples (50.0%) are training samples, bit by bit"
    assert shared_samples(250, 500) == told and told in data_page("m", known(shared), None)
    require_held_out(None, 250, 500)
    with pytest.raises(GateError, match=r"251 of 500 validation samples \(50\.2%\) are training .* \{overlap: 1\.0\}"):
        require_held_out(None, 251, 500)
    # Whoever gives checks gives their limit, and check_data has asked it.
    require_held_out(Checks(overlap=1.0), 251, 500)


def test_overlap_repeats_and_a_shrunken_set() -> None:
    shared = facts()
    shared["overlap"] = 1
    assert failures({}, shared) == ["overlap validation samples in the training data"]
    assert failures({"overlap": 0.01}, shared) == []
    assert failures({"repeated": 0.1}, changed(repeated=300)) == ["repeated train"]
    assert failures({"samples": 3000}, facts()) == ["samples train"]
    assert failures({"shrinks": 0.2}, changed(samples=1000), facts()) == ["shrinks train, against the live release"]


def test_drift_of_a_column_and_of_labels_against_the_live_release() -> None:
    assert failures({}, facts(mean=0.7), facts(seed=5)) == ["psi x[0]"]
    assert failures({"drift": {"ks": 0.1, "psi": None}}, facts(mean=0.7), facts(seed=5)) == ["ks x[0]"]
    assert failures({"drift": {"ignore": ["x[0]"]}}, facts(mean=0.7), facts(seed=5)) == []
    assert failures({"drift": None}, facts(mean=0.7), facts(seed=5)) == []
    assert failures({}, facts(labels={"0": 1800, "1": 200}), facts()) == ["psi target"]
    assert failures({}, facts(mean=0.7)) == []


def test_another_kind_of_tensor_than_the_live_releases_is_drift() -> None:
    assert failures({}, with_tensor("x", dtype="float64"), facts()) == ["schema train x, against the live release"]
    renamed = copy.deepcopy(facts())
    renamed["train"]["tensors"]["y"] = renamed["train"]["tensors"].pop("x")
    assert failures({}, renamed, facts()) == [
        "schema train x, against the live release", "schema train y, against the live release",
    ]  # fmt: skip


def test_what_may_be_chance_is_no_drift() -> None:
    small = [drawn(samples=40, seed=seed) for seed in range(40)]
    beyond = [psi(bins_of_columns(small[0], other), 40, 40).beyond(0.25) for other in small[1:]]
    values = [psi(bins_of_columns(small[0], other), 40, 40).value for other in small[1:]]
    # With so few samples the index alone would cry wolf.
    assert sum(value > 0.25 for value in values) > 10 and sum(beyond) <= 2
    assert not any(ks(small[0], other, 40, 40).beyond(0.05) for other in small[1:])


def test_the_statistics_are_those_of_the_whole_samples() -> None:
    generator = np.random.default_rng(3)
    before, now = generator.normal(0, 1, 5000), generator.normal(0.4, 1.2, 4000)
    first, second = percentiles(before), percentiles(now)
    whole = stats.ks_2samp(now, before)
    assert ks(first, second, 5000, 4000).value == pytest.approx(whole.statistic, abs=0.015)
    edges = [-np.inf, *np.quantile(before, np.linspace(0.1, 0.9, 9)), np.inf]
    shares = [np.histogram(values, edges)[0] / len(values) for values in (before, now)]
    by_definition = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    assert psi(bins_of_columns(first, second), 5000, 4000).value == pytest.approx(by_definition, rel=0.15)


def test_a_constant_that_moved_and_a_new_label_are_seen() -> None:
    assert psi(bins_of_columns([0.0] * 101, [0.0] * 101), 500, 500).value == 0
    for other in (-1.0, 1.0):
        assert psi(bins_of_columns([0.0] * 101, [other] * 101), 500, 500).beyond(1)
    assert psi(bins_of_labels({"a": 500}, {"a": 400, "b": 100}), 500, 500, least=0.001).beyond(0.25)


def test_a_refusal_names_check_place_value_and_limit_and_the_page_draws_what_moved() -> None:
    report = check_data(Checks(), facts(mean=0.7), facts(seed=5), "r1")
    with pytest.raises(GateError) as caught:
        require_good_data("digits", report)
    assert "psi of x[0]: 0." in caught.value.message and "expected at most 0.25" in caught.value.message
    assert "Nothing was trained" in caught.value.message and "FAILED" in caught.value.table
    page = data_page("digits", known(facts(mean=0.7)), report)
    assert "data of the live release r1" in page and "█" in page
    assert page.index("**x&#91;0&#93;**") < page.index("**x&#91;1&#93;**")


@pytest.mark.parametrize("empty", [0, 1])
def test_labels_of_no_samples_are_compared_with_nothing(empty: int) -> None:
    """Who may publish says what the data of a release was like."""
    sides = [facts(), facts()]
    of_no_samples(sides[empty])
    report = check_data(Checks.model_validate({"drift": {"psi": 0.1}}), sides[0], sides[1], "r1")
    assert report.live == "r1" and not report.failed
    assert "target" not in {one.column for one in report.distributions}


def test_what_a_release_says_of_its_data_and_cannot_be_compared_is_as_if_it_said_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    logger = type("Logger", (), {"warning": lambda _, *words: said.append(words)})()
    monkeypatch.setattr(inspect, "get_run_logger", lambda: logger)
    strange = facts()
    strange["train"]["columns"]["x[0]"]["quantiles"] = [1.0]
    asked = Checks.model_validate({"drift": {"psi": 0.1}})
    report = inspect._checked(asked, known(facts()), known(strange), "r1")
    assert report.live == "" and not report.failed and said[0][1] == "r1"
