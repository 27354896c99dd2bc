"""Where an artifact leaves the model: which question is looked at."""

from __future__ import annotations

import pytest

from torchworker.contract import Mismatch
from train_and_ship.tasks.explain import _question


@pytest.mark.parametrize(
    ("probe", "asked"),
    [
        ("zero", "zero"),
        ("batch_17, not contiguous", "batch_17"),
        ("samples 64 to 127", "batch_8"),
        ("3 samples", "batch_8"),
    ],
)
def test_a_question_of_real_samples_is_looked_at_by_a_batch_of_capture(probe: str, asked: str) -> None:
    item = Mismatch(format="onnx", probe=probe, output="y", note="off", ratio=2.0, distribution=())
    assert _question(item, 8) == asked
