"""Held-out samples are asked in a drawn order until time is up; what was not asked is said."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support.parity import CODE, NOTHING, as_artifact
from tests.support.projects import write_project
from torchworker.contract import (
    PLACES,
    VALIDATION,
    ExportRequest,
    Int8Limits,
    Project,
    Reading,
    TensorSpec,
    ValidateRequest,
    ValidateResult,
    Verdict,
    decode,
)
from torchworker.parity import reference
from torchworker.parity.int8 import examine
from torchworker.parity.probes import Probe
from torchworker.parity.reference import SECONDS, asked_of, read_probes, write_reference
from torchworker.project.answers import same_values
from torchworker.project.metrics import MetricSums
from torchworker.stages.score import _as_in_the_dataset
from torchworker.stages.validate import _quality, too_few_asked
from train_and_ship.registry.cost import LEDGER
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.verdicts import asked_words, headline
from train_and_ship.tasks.export import seconds_of_parity

SAMPLES, BATCH = 40, 4
INPUTS = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(SAMPLES) % 2
SPECS = [TensorSpec(name="input", dtype="float32", shape=["batch", 3])]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).eval()


def asked_for(seconds: float | None, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], Reading]:
    """The held-out samples with the answers that there was time for; each batch takes a second."""
    ticks = count()
    project = Project(name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[])
    request = ExportRequest(
        project=project, folder=str(folder), weights="", formats=[], batch=BATCH, seed=0, validation_limit=100,
        parity_seconds=seconds,
    )  # fmt: skip
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(reference, "time", SimpleNamespace(thread_time=lambda: float(next(ticks))))
        _, read = write_reference(request, model, {"input": INPUTS[:BATCH]}, TensorDataset(INPUTS, LABELS))
    return load_file(folder / VALIDATION), read


@pytest.fixture(scope="module")
def three_batches(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return asked_for(2.5, model, tmp_path_factory.mktemp("budget"))[0]


def test_samples_are_asked_in_the_drawn_order_until_time_is_up_and_everything_else_is_asked_all_the_same(
    model: nn.Module, three_batches: dict[str, Tensor], tmp_path: Path
) -> None:
    everything, read = asked_for(None, model, tmp_path)
    probes = [(probe.name, probe.inputs) for probe in read_probes(tmp_path)]
    assert asked_of(everything) == SAMPLES and read.samples == SAMPLES
    kept, cut = asked_for(2.5, model, tmp_path)
    assert asked_of(kept) == 3 * BATCH and float(kept[SECONDS]) == 3.0 and cut == read
    assert sorted(key for key in kept if key.startswith("eager")) == [f"eager.output/{start}" for start in (0, 4, 8)]
    places = kept[PLACES]
    assert sorted(places.tolist()) == list(range(SAMPLES)) and places[: 3 * BATCH].tolist() != list(range(3 * BATCH))
    # All of them for the metrics, and the same answers as without a limit.
    assert torch.equal(kept["input.input"], INPUTS[places]) and torch.equal(kept["target"], LABELS[places])
    assert all(
        torch.equal(tensor, everything[key]) for key, tensor in kept.items() if key != "seconds" and key != "asked"
    )
    # Probes are made of the dataset's first samples, asked or not.
    again = [(probe.name, probe.inputs) for probe in read_probes(tmp_path)]
    assert [name for name, _ in again] == [name for name, _ in probes]
    assert all(same_values(one["input"], two["input"]) for (_, one), (_, two) in zip(probes, again, strict=True))


def test_a_file_of_before_has_answers_to_all_samples_and_lies_in_the_datasets_order() -> None:
    before = {"target": LABELS}
    assert asked_of(before) == SAMPLES and _as_in_the_dataset(before).tolist() == list(range(SAMPLES))
    assert _as_in_the_dataset({"target": LABELS[:3], PLACES: torch.tensor([7, 1, 4])}).tolist() == [1, 2, 0]


def quality(kept: Mapping[str, Tensor], call: Any, *metrics: str) -> tuple[MetricSums, list[Verdict]]:
    request = ValidateRequest(
        folder="", formats={}, inputs=SPECS, outputs=[TensorSpec(name="output", dtype="float32", shape=["batch", 2])],
        metrics=metrics, gates=(), forbidden_modules=(), forbidden_folder="", threads=1,
    )  # fmt: skip
    sums, _, result = _quality("pt2", call, kept, request, BATCH)
    return sums, result.verdicts


def test_what_was_asked_and_differs_fails_and_metrics_are_of_all_samples(
    model: nn.Module, three_batches: dict[str, Tensor]
) -> None:
    truth = as_artifact(model)
    last_asked, first_unasked = (three_batches["input.input"][place] for place in (3 * BATCH - 1, 3 * BATCH))

    def wrong_on(sample: Tensor) -> Any:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            (out,) = truth(inputs)
            out[(inputs["input"] == sample).all(1)] += torch.tensor([100.0, 0])
            return [out]

        return call

    def of_parity(call: Any) -> tuple[str, bool]:
        told = quality(three_batches, call, "accuracy")[1]
        return told[0].case, all(item.passed for item in told)

    assert of_parity(truth) == ("12 of 40 samples", True)
    assert of_parity(wrong_on(last_asked)) == ("12 of 40 samples", False)
    # Not asked of the model, so not held against it; but the metric sees it.
    assert of_parity(wrong_on(first_unasked)) == ("12 of 40 samples", True)
    sums, _ = quality(three_batches, truth, "accuracy")
    right = (model(INPUTS).argmax(1) == LABELS).float().mean()
    assert sums.means()["accuracy"] == pytest.approx(float(right))
    # Where no metric is wanted, as of the C++ runner, an artifact is asked no more than is compared.
    calls: list[int] = []
    quality(three_batches, lambda inputs: [calls.append(len(inputs["input"])), *truth(inputs)][1:])
    assert sum(calls) == 3 * BATCH


def test_an_int8_variant_is_held_against_the_model_on_what_was_asked_and_measured_on_all(
    model: nn.Module, three_batches: dict[str, Tensor]
) -> None:
    # Right on what was asked; always the first class on the rest.
    asked = three_batches["input.input"][: 3 * BATCH]
    truth = as_artifact(model)

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        (out,) = truth(inputs)
        known = (inputs["input"][:, None] == asked).all(2).any(1)
        return [torch.where(known[:, None], out, torch.tensor([1.0, 0]))]

    inputs = {"input": asked[:BATCH]}
    golden = Probe(name="batch_4", group="batches", inputs=inputs, eager={"output": truth(inputs)[0]})
    limits = Int8Limits(sqnr_db=30, agreement=0.99, flip_margin=0.25, metric_loss=0.01, speedup=1.0)
    found, metrics = examine(call, [golden], three_batches, SPECS, ["output"], ["accuracy"], BATCH, limits)
    assert (found.reason, found.losses) == ("", {"accuracy": 0.0})
    rest = three_batches["target"][3 * BATCH :]
    right = (model(asked).argmax(1) == three_batches["target"][: 3 * BATCH]).sum() + (rest == 0).sum()
    assert metrics["accuracy"] == pytest.approx(int(right) / SAMPLES)


@pytest.mark.parametrize(
    ("asked", "samples", "passed", "limit", "said"),
    [
        (
            12,
            40,
            False,
            ">= 40",
            "the model was asked for 60 s: parity.seconds: 250 would do for 40; parity.min_samples",
        ),
        (64, 10_000, False, ">= 256", "the model was asked for 60 s: parity.seconds: 300 would do for 256"),
        (256, 10_000, True, ">= 256", "the model was asked for 60 s"),
    ],
)
def test_too_few_samples_are_a_failed_gate_that_names_the_keys(
    asked: int, samples: int, passed: bool, limit: str, said: str
) -> None:
    (verdict,) = too_few_asked(asked, samples, 256, 60.0)
    assert (verdict.gate, verdict.measured, verdict.passed, verdict.limit) == (
        "parity.min_samples",
        asked,
        passed,
        limit,
    )
    assert verdict.case == f"{asked} of {samples} samples asked" and verdict.note.startswith(said)


def test_a_refusal_says_how_long_would_be_enough() -> None:
    told = (
        "parity.min_samples 64, expected >= 256, in the model (64 of 10000 samples asked): the model was asked for 60 s"
    )
    assert headline(too_few_asked(64, 10_000, 256, 60.0)).startswith(f"{told}: parity.seconds: 300 would do")


def test_where_all_samples_were_asked_there_are_never_too_few() -> None:
    assert too_few_asked(12, 12, 256, 60.0) == []


def result(asked: int | None, passed: bool = True) -> ValidateResult:
    sound = Verdict(format="onnx", gate="parity", case="batch 1", measured=0.5, limit="<= 1", passed=passed)
    return ValidateResult(verdicts=[sound], metrics={}, reference="", validation_samples=10_000, asked=asked)


def test_what_was_asked_is_said_with_the_share_that_may_differ_unless_something_does() -> None:
    said = "Held against the model on 300 of 10,000 held-out samples"
    assert (
        asked_words(result(300))
        == f"{said}: none differs, so of others like them at most 1.00% do (95 %, rule of three)"
    )
    assert asked_words(result(300, passed=False)) == said
    assert "at most 0.03%" in asked_words(result(10_000)) and "at most 100.00%" in asked_words(result(2))
    # Written by an older version.
    before = {"verdicts": [], "metrics": {}, "reference": "", "validation_samples": 5}
    assert asked_words(decode(ValidateResult, before)) == ""
    # 1 - 3/n is what n samples without a difference leave with 5 %, to the percent.
    assert pytest.approx(0.05, abs=0.001) == (1 - 3 / 300) ** 300


def test_the_time_is_a_tenth_of_the_training_and_a_minute_at_least_unless_the_job_says(tmp_path: Path) -> None:
    job = load_job(write_project(tmp_path, train={"epochs": 1, "processes": 1, "batch_size": 32}))[0]
    assert seconds_of_parity(job, tmp_path) == 60.0
    began = '{"began": "a", "stage": "train", "at": ""}'
    ended = began + '\n{"ended": "a", "stage": "train", "wall": 500.0, "cpu": 1.0, "gpu": 0}\n'
    (tmp_path / LEDGER).write_text(ended)
    assert seconds_of_parity(job, tmp_path) == 60.0
    (tmp_path / LEDGER).write_text(ended + ended.replace('"a"', '"b"'))
    assert seconds_of_parity(job, tmp_path) == pytest.approx(100.0)
    shorter = job.parity.model_copy(update={"seconds": 5.0})
    assert seconds_of_parity(job.model_copy(update={"parity": shorter}), tmp_path) == 5.0
