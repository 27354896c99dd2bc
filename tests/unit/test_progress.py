"""What the progress of a training says in Prefect."""

from __future__ import annotations

from train_and_ship.tasks.train import describe_progress


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_an_event_without_extras_is_one_line() -> None:
    assert describe_progress("epoch 1/2", {"event": "step"}) == "epoch 1/2"


def test_learning_rate_memory_and_the_straggler_are_shown() -> None:
    event = {"learning_rate": 0.003, "memory_bytes": 412_300_000, "step_seconds": {"0": 0.0081, "1": 0.0172}}
    assert lines(describe_progress("epoch 1/2", event)) == [
        "epoch 1/2",
        "learning rate 0.003 memory 412.3 MB in the largest process",
        "| process | step |",
        "| --- | --- |",
        "| rank 0 | 8.1 ms |",
        "| rank 1 | 17.2 ms |",
        "**rank 1 is slow: 17.2 ms a step, 2.1 times the median; the others wait for it**",
    ]


def test_of_many_ranks_the_slowest_are_shown_with_the_median() -> None:
    event = {"step_seconds": {str(rank): 0.01 + 0.0001 * rank for rank in range(64)}}
    text = lines(describe_progress("epoch 1/2", event))
    assert len(text) == 1 + 2 + 8 + 1
    assert text[-1] == "| median of 64 | 13.1 ms |"
