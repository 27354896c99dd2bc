"""Points on curves, from the events of a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train_and_ship.registry.tracking.curves import (
    EventPoints,
    RankTimes,
    event_points,
    file_points,
    history_points,
    rank_times,
)

EPOCH = {"event": "epoch", "epoch": 2, "epochs": 3, "train_loss": 0.5, "eta_seconds": 9, "time": 100.0}
STEP = {"event": "step", "epoch": 2, "epochs": 3, "step": 40, "steps": 60, "loss": 0.25, "eta_seconds": 9, "time": 99.0}


def write(path: Path, *events: dict[str, Any]) -> Path:
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    return path


def curves(event: dict[str, Any]) -> dict[str, tuple[int, float]]:
    return {point.key: (point.step, point.value) for point in event_points(event)}


def test_an_epoch_is_drawn_over_epochs_and_a_step_over_steps() -> None:
    assert curves(EPOCH) == {"train_loss": (2, 0.5)}
    assert curves(STEP) == {"steps/loss": (40, 0.25)}
    assert curves({"event": "started", "processes": 2, "time": 1.0}) == {}


def test_learning_rate_memory_and_each_ranks_step_are_curves_when_the_event_has_them() -> None:
    full = {**STEP, "learning_rate": 0.003, "memory_bytes": 250_000_000, "step_seconds": {"0": 0.01, "1": 0.04}}
    assert curves(full) == {
        "steps/loss": (40, 0.25),
        "steps/learning_rate": (40, 0.003),
        "steps/memory_megabytes": (40, 250.0),
        "ranks/step_seconds_0": (40, 0.01),
        "ranks/step_seconds_1": (40, 0.04),
        "ranks/slowest_to_median": (40, 4.0),
        "ranks/straggler": (40, 1),
    }


def test_a_value_that_is_no_number_is_left_out() -> None:
    assert curves({**EPOCH, "train_loss": float("nan"), "note": "x", "more": None}) == {}


def test_a_history_gives_the_same_points_as_its_epochs_did() -> None:
    row = {key: value for key, value in EPOCH.items() if key not in ("event", "epochs", "eta_seconds")}
    assert history_points([row]) == event_points(EPOCH)


def test_a_rank_far_above_the_median_is_the_straggler_also_of_two() -> None:
    assert RankTimes(seconds={0: 1.0, 1: 1.4}).straggler is None
    assert RankTimes(seconds={0: 1.0, 1: 1.6}).straggler == 1
    assert RankTimes(seconds={0: 1.0, 1: 1.1, 2: 1.0, 3: 1.9}).straggler == 3
    assert RankTimes(seconds={0: 1.0}).straggler is None
    assert RankTimes(seconds={0: 0.0, 1: 0.0}).straggler is None
    assert rank_times(STEP) is None


def test_a_growing_file_is_read_on_and_half_a_line_waits(tmp_path: Path) -> None:
    path = write(tmp_path / "events", EPOCH)
    events = EventPoints(path)
    assert [point.step for point in events.read()] == [2]
    with path.open("a") as file:
        file.write(json.dumps({**EPOCH, "epoch": 3})[:20])
        file.flush()
        assert events.read() == []
        file.write(json.dumps({**EPOCH, "epoch": 3})[20:] + "\n")
    assert [point.step for point in events.read()] == [3]
    events.close()


def test_a_file_is_read_on_under_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "events", EPOCH)
    events = EventPoints(path)
    path.rename(tmp_path / "done")
    assert len(events.read()) == 1
    events.close()


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "events", EPOCH)
    with path.open("a") as file:
        file.write('{"event": "st')
        file.write("\n")
    write(path, {**EPOCH, "epoch": 3})
    assert [point.step for point in file_points(path)] == [2, 3]


def test_steps_of_a_long_run_thin_out_and_epochs_do_not(tmp_path: Path) -> None:
    day = 24 * 3600
    steps = [{**STEP, "step": second, "time": float(second)} for second in range(0, day, 2)]
    path = write(tmp_path / "events", *steps, {**EPOCH, "time": float(day)})
    points = file_points(path)
    assert points[-1].key == "train_loss"
    assert 5_000 < len(points) < 10_000
    # Whoever reads the file, in whatever pieces, gets the same.
    assert file_points(path) == points


def test_no_file_has_no_points(tmp_path: Path) -> None:
    assert file_points(tmp_path / "nothing") == []
