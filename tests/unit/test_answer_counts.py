"""What was answered beside what was right: counted by the worker, drawn in the report."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

from tests.support.html_pages import checked
from tests.support.run_report_files import page_of, run_files
from torchworker.contract import AnswerCounts, ValidateResult
from torchworker.project import answer_counts
from torchworker.project.answer_counts import BINS, CountedAnswers
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import markdown


def counted(metric: str, *batches: tuple[Tensor, Tensor]) -> AnswerCounts | None:
    answers = CountedAnswers([metric] if metric else [])
    for outputs, target in batches:
        answers.add(outputs, target)
    return answers.counted("onnx")


def one_hot(*classes: int, of: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), of).float()


def test_classes_are_counted_by_what_was_right_and_what_was_answered_without_padding() -> None:
    found = counted("accuracy", (one_hot(0, 1, 2), torch.tensor([0, 2, -100])), (one_hot(1, 1), torch.tensor([2, 1])))
    assert found == AnswerCounts(format="onnx", counts=[[1, 0, 0], [0, 1, 0], [0, 2, 0]])


def test_elements_of_a_segmentation_count_each() -> None:
    outputs = one_hot(0, 1, 1, 0, of=2).T[None]
    found = counted("accuracy", (outputs, torch.tensor([[0, 1, 0, 0]])))
    assert found is not None and found.counts == [[2, 1], [0, 1]]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_is_two_classes(shape: tuple[int, ...]) -> None:
    outputs, target = torch.tensor([2.0, -1.0, 3.0, -2.0]).reshape(shape), torch.tensor([1.0, 0.0, 0.0, math.nan])
    found = counted("accuracy", (outputs, target))
    assert found is not None and found.counts == [[1, 1], [0, 1]]


def test_numbers_are_counted_by_what_was_right_and_how_far_the_answer_was_from_it() -> None:
    right = torch.tensor([0.0, 10.0, 5.0, math.inf])
    found = counted("mean_squared_error", (right + torch.tensor([0.0, 2.0, -1.0, 0.0]), right))
    assert found is not None and tuple(found.numbers) == (0.0, 10.0, 2.0)
    places = {(row, column) for row, counts in enumerate(found.counts) for column, count in enumerate(counts) if count}
    assert places == {(BINS // 2, 0), (BINS - 1, BINS - 1), (BINS // 4, BINS // 2)}


@pytest.mark.parametrize(
    ("metric", "outputs", "target"),
    [
        ("", one_hot(0), torch.tensor([0])),
        ("accuracy", one_hot(0, of=answer_counts.MOST_CLASSES + 1), torch.tensor([0])),
        ("accuracy", one_hot(0), torch.tensor([-100])),
        ("mean_absolute_error", torch.ones(3), torch.ones(3)),
    ],
)
def test_where_nothing_can_be_told_there_is_nothing(metric: str, outputs: Tensor, target: Tensor) -> None:
    assert counted(metric, (outputs, target)) is None


def test_residuals_keep_to_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_counts, "MOST_NUMBERS", 5)
    batch = (torch.arange(4.0) + 1, torch.arange(4.0))
    found = counted("mean_squared_error", batch, batch, batch)
    assert found is not None and sum(map(sum, found.counts)) == 5


def validated(answers: AnswerCounts) -> ValidateResult:
    found = run_files().validated
    assert found is not None
    return dataclasses.replace(found, answers=answers)


def test_the_report_draws_a_matrix_and_names_the_mistakes_where_there_are_no_pictures() -> None:
    counts = [[9, 1, 0], [0, 10, 0], [3, 0, 7]]
    page = page_of(run_files(validated=validated(AnswerCounts(format="onnx", counts=counts))))
    found = checked(html(page))
    assert found.charts == 12 and "Confusion matrix" in found.text and "2, answered 0: 3, 30.0%" in found.text
    text = markdown(page)
    assert re.search(r"\| 2\s*\| 0\s*\| 3\s*\| 30.0%\s*\|.*\n.*\| 0\s*\| 1\s*\| 1\s*\| 10.0%", text), text


def test_of_many_classes_the_most_frequent_mistakes_are_named_alone() -> None:
    counts = [[5 if row == column else 0 for column in range(30)] for row in range(30)]
    counts[7][3] = 2
    page = page_of(run_files(validated=validated(AnswerCounts(format="onnx", counts=counts))))
    assert checked(html(page)).charts == 11 and re.search(r"\| 7\s*\| 3\s*\| 2\s*\| 28.6%", markdown(page))


def test_the_report_draws_residuals() -> None:
    answers = counted("mean_squared_error", (torch.arange(9.0) * 1.1, torch.arange(9.0)))
    assert answers is not None
    found = checked(html(page_of(run_files(validated=validated(answers)))))
    assert found.charts == 12 and "Residuals" in found.text and "+0.8" in found.text
