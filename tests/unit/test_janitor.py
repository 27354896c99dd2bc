"""What runs leave on this machine has an age and a size; what is in use, or may be gone on with, stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train_and_ship.infra import janitor
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.janitor import DAY, HOUR, KEEP_SECONDS, SNAPSHOT_SECONDS, Cleaned, clean
from train_and_ship.infra.rundir import COMPLETED
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.status import disk_line

SIZE = 1 << 20
"""Bytes of one file; each folder that goes has one."""
WEEK = KEEP_SECONDS + DAY
NOW = time.time()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def settings(home: Path, limit: int = 1 << 40) -> Settings:
    return Settings.model_validate({"SHIP_HOME": home, "SHIP_DISK": str(limit)})


def cleaned(home: Path, limit: int = 1 << 40, *waiting: str, later: float = 0.0) -> Cleaned:
    return clean(settings(home, limit), waiting=lambda: set(waiting), now=NOW + later)


def fill(folder: Path, age: float = 0.0, size: int = SIZE) -> Path:
    """A folder with one file, both last touched so many seconds ago."""
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(os.urandom(size))
    for path in (folder / "file", folder):
        os.utime(path, (NOW - age, NOW - age))
    return folder


def run_of(home: Path, name: str, age: float = 0.0, *, complete: bool = False) -> Path:
    """A run with one complete stage."""
    run = home / "runs" / "digits" / name
    fill(run / "train", age)
    for said in ("report.html", *([COMPLETED] if complete else [])):
        (run / said).write_text("said")
        os.utime(run / said, (NOW - age, NOW - age))
    os.utime(run, (NOW - age, NOW - age))
    return run


def half_done(run: Path) -> Path:
    for folder in ("export.work", "checkpoints/step-00000001", "train.attempts/one", "validate.damaged"):
        fill(run / folder)
    return run


def stages(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_dir()}


# ---- age


def test_projects_and_environments_that_no_run_has_used_for_a_month_go(home: Path) -> None:
    kept = [fill(home / kind / "kept", age=29 * DAY) for kind in ("projects", "environments")]
    for kind in ("projects", "environments"):
        fill(home / kind / "old", age=31 * DAY)
    assert cleaned(home).freed == 2 * SIZE
    assert all(folder.is_dir() for folder in kept)
    assert not (home / "projects/old").exists() and not (home / "environments/old").exists()


def test_half_done_stages_of_runs_that_nobody_came_back_for_go_and_all_else_stays(home: Path) -> None:
    run = half_done(run_of(home, "a-b"))
    assert cleaned(home).freed == 0 and (run / "export.work").is_dir()

    assert cleaned(home, later=WEEK).freed == 4 * SIZE
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "train"]
    assert (run / "train" / "file").stat().st_size == SIZE


def test_a_run_that_is_still_written_to_is_left_alone_however_old_it_is(home: Path) -> None:
    run = half_done(run_of(home, "a-b"))
    later = NOW + WEEK
    os.utime(run / "checkpoints/step-00000001/file", (later, later))
    assert cleaned(home, later=WEEK).freed == 0 and (run / "checkpoints").is_dir()


def test_copies_that_nobody_has_used_for_long_go(home: Path) -> None:
    copy, failed, snapshot = (
        fill(home / name) for name in ("releases/digits/one", "rehearsals/digits/two", "data/three")
    )
    assert cleaned(home, later=WEEK).freed == 2 * SIZE
    assert not copy.exists() and not failed.exists() and snapshot.is_dir()
    assert cleaned(home, later=SNAPSHOT_SECONDS + DAY).freed == SIZE and not snapshot.exists()


def test_deployed_projects_and_their_environments_count_and_go_where_there_is_too_much(home: Path) -> None:
    project, old = fill(home / "projects" / "one", 8 * DAY), fill(home / "environments" / "old", 9 * DAY)
    used, fresh = fill(home / "environments" / "used", 10 * DAY), fill(home / "projects" / "fresh", 6 * DAY)
    # What an environment says of itself is believed: it has too many files to look at.
    (old / "BYTES").write_text("5000000000")
    os.utime(old, (NOW - 9 * DAY, NOW - 9 * DAY))
    said = disk_line(janitor.usage(settings(home, 200 * 10**9)))
    assert said.startswith("Disk: 5.0 GB of") and "deployed projects 2.1 MB, their environments 5.0 GB" in said
    hold(used)
    assert cleaned(home, 4 * SIZE).freed == 5_000_000_000 and project.is_dir()
    cleaned(home, 1)
    assert used.is_dir() and fresh.is_dir() and not project.exists() and not old.exists()


# ---- size


def test_above_the_size_the_oldest_goes_first_and_no_more_than_has_to(home: Path) -> None:
    oldest = run_of(home, "a-1", 20 * DAY)
    middle = fill(home / "data" / "middle", 10 * DAY)
    newest = fill(home / "rehearsals" / "digits" / "newest", DAY)
    done = cleaned(home, 2 * SIZE + SIZE // 2)
    assert done.freed == SIZE and done.usage.total <= 2 * SIZE + SIZE // 2
    assert stages(oldest) == set() and (oldest / "report.html").read_text() == "said"
    cleaned(home, SIZE + SIZE // 2)
    assert not middle.exists() and newest.is_dir()


def test_a_run_that_may_be_gone_on_with_stays_above_the_size(home: Path) -> None:
    failed = run_of(home, "a-1", KEEP_SECONDS - HOUR)
    done = cleaned(home, 1)
    assert stages(failed) == {"train"} and done.usage.total > done.usage.limit
    assert "the rest is in use or may be needed" in disk_line(done.usage)


def test_of_complete_runs_the_newest_stays_and_an_hour_passes_before_another_goes(home: Path) -> None:
    old, fresh, newest = (
        run_of(home, name, age, complete=True) for name, age in (("a-1", 2 * HOUR), ("a-2", HOUR / 2), ("a-3", 60))
    )
    cleaned(home, 1)
    assert [stages(run) for run in (old, fresh, newest)] == [set(), {"train"}, {"train"}]


def test_the_latest_copy_of_each_model_stays(home: Path) -> None:
    one, two, other = (
        fill(home / "releases" / name, age) for name, age in (("digits/1", DAY), ("digits/2", HOUR), ("wine/1", DAY))
    )
    cleaned(home, 1)
    assert not one.exists() and two.is_dir() and other.is_dir()


def test_a_file_with_two_names_counts_once_and_is_freed_with_the_second(home: Path) -> None:
    run, copy = run_of(home, "a-1", 20 * DAY), fill(home / "rehearsals" / "digits" / "copy", 2 * DAY)
    (copy / "file").unlink()
    os.link(run / "train" / "file", copy / "file")
    assert janitor.usage(settings(home)).total < 2 * SIZE
    assert cleaned(home, SIZE // 2).freed == SIZE
    assert stages(run) == set() and not copy.exists()


# ---- in use


def test_what_a_process_uses_stays_until_it_ends(home: Path) -> None:
    copy = fill(home / "data" / "used")
    program = f"""
from pathlib import Path
from train_and_ship.infra.in_use import hold
hold(Path({str(copy)!r}))
print("held", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert cleaned(home, 1).freed == 0 and copy.is_dir()
        process.kill()
    assert cleaned(home, 1).freed == SIZE and not copy.exists()


def test_what_this_process_holds_stays(home: Path) -> None:
    run = half_done(run_of(home, "a-1", 20 * DAY))
    hold(run)
    assert cleaned(home, 1, later=20 * DAY).freed == 0 and "export.work" in stages(run)


def test_a_run_that_prefect_has_not_ended_keeps_its_folder_for_longer_than_a_week(home: Path) -> None:
    run = half_done(run_of(home, "a-1"))
    assert cleaned(home, 1, "a-1", later=3 * KEEP_SECONDS).freed == 0 and "export.work" in stages(run)
    assert cleaned(home, 1, "b-2", later=3 * KEEP_SECONDS).freed and stages(run) == set()


def test_a_run_whose_job_waits_in_an_engines_queue_keeps_its_folder(home: Path) -> None:
    run = half_done(run_of(home, "a-1"))
    (run / janitor.ATTEMPT).write_text("{}")
    assert cleaned(home, 1, later=3 * KEEP_SECONDS).freed == 0
    assert stages(run) == {"train", "export.work", "checkpoints", "train.attempts", "validate.damaged"}


def test_no_run_loses_anything_while_prefect_does_not_say_which_ones_wait(home: Path) -> None:
    run, failed = half_done(run_of(home, "a-1")), fill(home / "rehearsals" / "digits" / "failed")
    clean(settings(home, 1), waiting=lambda: None, now=NOW + WEEK)
    assert "export.work" in stages(run) and not failed.exists()


def test_what_a_janitor_that_was_killed_left_goes_with_the_next(home: Path) -> None:
    fill(home / "deleted" / "1" / "0")
    cleaned(home)
    assert not (home / "deleted").exists()


# ---- how much


def test_the_line_of_ship_status_says_use_limit_and_what_it_is(home: Path) -> None:
    run_of(home, "a-1")
    fill(home / "data" / "one")
    said = disk_line(janitor.usage(settings(home, 200 * 10**9)))
    assert said.startswith("Disk: 2.1 MB of 200.0 GB (SHIP_DISK): runs 1.0 MB, copies of snapshots 1.0 MB")


@pytest.mark.parametrize(
    ("said", "limit"),
    [("200GB", 200 * 10**9), ("1.5 tb", 1_500_000_000_000), ("4096", 4096), ("7k", 7000), ("512B", 512)],
)
def test_a_size_is_a_number_with_a_unit(home: Path, said: str, limit: int) -> None:
    assert Settings.model_validate({"SHIP_HOME": home, "SHIP_DISK": said}).disk_limit() == limit


def test_a_share_is_of_the_disk_of_the_home_and_a_fifth_where_nothing_is_said(home: Path) -> None:
    whole = shutil.disk_usage(home.parent).total
    assert Settings.model_validate({"SHIP_HOME": home, "SHIP_DISK": "50%"}).disk_limit() == whole // 2
    assert Settings.model_validate({"SHIP_HOME": home}).disk_limit() == int(0.2 * whole)


@pytest.mark.parametrize("said", ["0", "0%", "101%", "many", "-1GB", "5 XB", "GB"])
def test_what_is_neither_is_named(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIP_DISK", said)
    with pytest.raises(SettingsError, match=f"SHIP_DISK: expected a size such as 200GB, .* got '{said}'"):
        Settings.load()


def test_a_copy_that_is_being_fetched_stays_and_the_latest_one_too(home: Path) -> None:
    latest, draft = (fill(home / "releases" / "digits" / name, age) for name, age in (("1", HOUR), (".2.ab", 60)))
    cleaned(home, 1)
    assert latest.is_dir() and draft.is_dir()
    cleaned(home, 1, later=2 * DAY)
    assert latest.is_dir() and not draft.exists()


def test_a_lock_goes_with_its_folder_and_one_of_a_folder_that_is_to_come_stays(home: Path) -> None:
    gone, to_come = home / "data" / "gone", home / "data" / "to-come"
    fill(gone)
    cleaned(home, 1)
    (home / ".locks" / "data,left").touch()
    hold(to_come)
    cleaned(home)
    assert [path.name for path in (home / ".locks").iterdir()] == ["data,to-come"]
