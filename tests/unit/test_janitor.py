"""What killed runs left goes; what somebody may come back for stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

from train_and_ship.infra.janitor import KEEP_SECONDS, clean


def run_of(runs: Path, name: str) -> Path:
    run = runs / "digits" / name
    for folder in ("train", "export.work", "checkpoints/step-00000001", "train.attempts/one"):
        (run / folder).mkdir(parents=True)
        (run / folder / "file").write_bytes(b"12345")
    (run / "report.md").write_text("said")
    return run


def test_half_done_stages_of_runs_that_nobody_came_back_for_go_and_all_else_stays(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a-b")
    assert clean(tmp_path) == 0 and (run / "export.work").is_dir()

    assert clean(tmp_path, now=time.time() + KEEP_SECONDS + 60) == 15
    assert sorted(path.name for path in run.iterdir()) == ["report.md", "train"]
    assert (run / "train" / "file").read_bytes() == b"12345"


def test_a_run_that_is_still_written_to_is_left_alone_however_old_it_is(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a-b")
    later = time.time() + KEEP_SECONDS + 60
    os.utime(run / "checkpoints/step-00000001/file", (later, later))
    assert clean(tmp_path, now=later) == 0 and (run / "checkpoints").is_dir()
