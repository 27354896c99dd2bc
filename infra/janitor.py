"""Keeps what runs leave on this machine to an age and a size: the oldest goes first, and never what is needed.

What goes by age: what a run has left half done (a week after its last word), copies of releases and rehearsals of those
that were refused (unused for a week), copies of data, projects that were deployed and their environments (unused for a
month). What goes when there is more than SHIP_DISK:
complete stages of runs (a week after the last word, an hour when the run came to its end; the newest of these stays),
copies of releases (the latest of each model stays), of data, rehearsals, and of deployed projects and environments
what was unused for a week.

What a running process uses stays (`in_use.py`), and so does a run that waits for Prefect or in the queue of an engine.
Reports, decisions that wait for the bucket, and all else that lies in a run's folder beside its stages is
small, and stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchworker.durable import DAMAGED
from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import LOCKS, forget_gone, unused
from train_and_ship.infra.locked_environment import ENVIRONMENT_BYTES
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.rundir import COMPLETED
from train_and_ship.infra.settings import Settings

HOUR, DAY = 3600.0, 24 * 3600.0
KEEP_SECONDS = 7 * DAY
"""A run can be gone on with for so long without losing the stage that it was in."""
SNAPSHOT_SECONDS = 30 * DAY
LEFTOVERS = ("*.work", "checkpoints", "*.attempts", f"*{DAMAGED}")
"""Of a stage that was not completed; a complete one takes its own away."""
ATTEMPT = "train.attempts/current.json"
"""Names a job of an engine that is queued or at work, and that a later process finds again."""
PAGE, PAGES = 200, 50
_Sizes = dict[tuple[int, int], int]
"""Bytes of files by device and inode."""
Waiting = Callable[[], set[str] | None]
"""Ids of the runs that Prefect knows and that are not over; None when it does not say."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What lies on this machine, in bytes; a file with several names counts once, where it is met first."""

    runs: int
    releases: int
    rehearsals: int
    snapshots: int
    projects: int
    """That were deployed, as they were unpacked here."""
    environments: int
    """Of those, one for each lock."""
    limit: int
    """SHIP_DISK."""

    @property
    def total(self) -> int:
        """Of all six."""
        return self.runs + self.releases + self.rehearsals + self.snapshots + self.projects + self.environments


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What was done."""

    freed: int
    """Bytes."""
    usage: Usage
    """Afterwards."""


@dataclass(kw_only=True)
class _Item:
    """Something that goes as a whole."""

    kind: str
    folder: Path
    """What processes hold: of a run, of a copy."""
    parts: Sequence[Path]
    """What goes; all of `folder`, or some folders in it."""
    used: float
    """Unix seconds of its last use."""
    files: _Sizes
    """Of what goes."""
    too_old: bool = False
    """Goes whatever there is room for."""
    can_go: bool = True
    """Goes when there is no room."""


def usage(settings: Settings) -> Usage:
    """How much is there. Reads only; links are not followed, and what vanishes meanwhile is not there."""
    seen: set[tuple[int, int]] = set()
    sizes = {}
    for kind in ("runs", "releases", "rehearsals", "data", "projects", "environments"):
        if kind == "environments":
            trees = [_environment(folder) for folder in _folders(settings.home / kind)]
            found = {file: size for tree in trees for file, size in tree.items()}
        else:
            found = _files(settings.home / kind)[0]
        sizes[kind] = sum(size for file, size in found.items() if file not in seen)
        seen |= found.keys()
    return Usage(
        runs=sizes["runs"],
        releases=sizes["releases"],
        rehearsals=sizes["rehearsals"],
        snapshots=sizes["data"],
        projects=sizes["projects"],
        environments=sizes["environments"],
        limit=settings.disk_limit(),
    )


def clean(settings: Settings, *, waiting: Waiting | None = None, now: float | None = None) -> Cleaned:
    """Delete what is too old, and the oldest of what can go while there is more than SHIP_DISK. Can be repeated.

    Args:
        settings: where it is, and how much may be.
        waiting: who knows which runs are not over; None asks Prefect, once, when a run would lose something.
        now: unix seconds.
    """
    moment = time.time() if now is None else now
    home = settings.home
    # Of a janitor that was killed.
    shutil.rmtree(home / "deleted", ignore_errors=True)
    for kind in ("", "runs", "releases", "rehearsals"):
        forget_gone(home / kind)
    items = [*_runs(home, moment), *_copies(home, moment)]
    before = usage(settings)
    if before.total > before.limit or any(item.kind == "runs" and item.too_old for item in items):
        _keep_waiting(items, (waiting or partial(waiting_runs, settings))())
    freed = 0
    for item in items:
        if item.too_old:
            freed += _delete(home, item)
    if freed:
        before = usage(settings)
    over = before.total - before.limit
    if over <= 0:
        return Cleaned(freed=freed, usage=before)
    # A file with several names is gone with the last of them.
    owners = Counter(file for item in items if not item.too_old for file in item.files)
    for item in sorted(items, key=lambda item: item.used):
        if over <= 0:
            break
        if item.can_go and not item.too_old and _delete(home, item):
            owners.subtract(item.files.keys())
            gone = sum(size for file, size in item.files.items() if not owners[file])
            over -= gone
            freed += gone
    return Cleaned(freed=freed, usage=usage(settings))


def waiting_runs(settings: Settings) -> set[str] | None:
    """Ids of the flow runs that are not over, and of those that they go on with; None when Prefect does not say."""
    states = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]
    found: set[str] = set()
    for page in range(PAGES):
        query = {"flow_runs": {"state": {"type": {"any_": states}}}, "limit": PAGE, "offset": page * PAGE}
        try:
            reply = prefect_api(settings, "POST", "/flow_runs/filter", query)
            runs = reply.json() if reply.is_success else None
        except (ShipError, ValueError):
            return None
        if runs is None:
            return None
        for run in runs:
            found |= {str(run["id"]), str(run.get("parameters", {}).get("resume", ""))}
        if len(runs) < PAGE:
            return found
    return None


# ---- below


def _runs(home: Path, moment: float) -> Iterator[_Item]:
    for model in _folders(home / "runs"):
        runs = {run: _trees(run) for run in _folders(model) if "-" in run.name}
        complete = [run for run in runs if (run / COMPLETED).is_file()]
        newest = max(complete, key=lambda run: runs[run][1], default=None)
        for run, (trees, written) in runs.items():
            if (run / ATTEMPT).exists():
                continue
            age = moment - written
            half_done = sorted({path for pattern in LEFTOVERS for path in run.glob(pattern) if path.is_dir()})
            if half_done and age > KEEP_SECONDS:
                yield _part(run, half_done, trees, written, too_old=True)
            stages = sorted(path for path in _folders(run) if path not in half_done)
            if stages and run != newest and age > (HOUR if run in complete else KEEP_SECONDS):
                yield _part(run, stages, trees, written)


def _copies(home: Path, moment: float) -> Iterator[_Item]:
    for kind in ("releases", "rehearsals"):
        for model in _folders(home / kind):
            copies = {copy: copy.stat().st_mtime for copy in _folders(model)}
            drafts = {copy for copy in copies if copy.name.startswith(".")}
            latest = max(copies.keys() - drafts, key=lambda copy: copies[copy], default=None)
            for copy, used in copies.items():
                age = moment - used
                # A copy that is being fetched has another name than the one that is held.
                stays = age < DAY if copy in drafts else kind == "releases" and copy == latest
                yield _copy(kind, copy, used, too_old=age > KEEP_SECONDS, can_go=not stays)
    for copy in _folders(home / "data"):
        used = copy.stat().st_mtime
        yield _copy("data", copy, used, too_old=moment - used > SNAPSHOT_SECONDS)
    for kind in ("projects", "environments"):
        for folder in _folders(home / kind):
            age = moment - (used := folder.stat().st_mtime)
            # A job of an engine may be at work with it when no process here holds it any more.
            stays = age <= KEEP_SECONDS
            files = _environment(folder) if kind == "environments" else _files(folder)[0]
            yield _Item(
                kind=kind, folder=folder, parts=[folder], used=used, files=files, too_old=age > SNAPSHOT_SECONDS,
                can_go=not stays,
            )  # fmt: skip


def _part(
    run: Path, parts: Sequence[Path], trees: Mapping[str, _Sizes], used: float, *, too_old: bool = False
) -> _Item:
    files = {file: size for part in parts for file, size in trees.get(part.name, {}).items()}
    return _Item(kind="runs", folder=run, parts=parts, used=used, files=files, too_old=too_old)


def _copy(kind: str, folder: Path, used: float, *, too_old: bool, can_go: bool = True) -> _Item:
    files, _ = _files(folder)
    return _Item(kind=kind, folder=folder, parts=[folder], used=used, files=files, too_old=too_old, can_go=can_go)


def _environment(folder: Path) -> _Sizes:
    """As whoever made it says, in one number: to look through an environment takes longer than most stages."""
    with contextlib.suppress(OSError, ValueError):
        seen = folder.stat()
        return {(seen.st_dev, seen.st_ino): int((folder / ENVIRONMENT_BYTES).read_text())}
    return _files(folder)[0]


def _keep_waiting(items: list[_Item], waiting: set[str] | None) -> None:
    """Take runs that are not over from the list; all runs where nobody says which these are."""
    items[:] = [
        item for item in items if item.kind != "runs" or (waiting is not None and item.folder.name not in waiting)
    ]


def _delete(home: Path, item: _Item) -> int:
    """Bytes of what is gone; 0 where a process uses it, or it cannot be deleted."""
    with contextlib.suppress(OSError), unused(item.folder) as free:
        if not free:
            return 0
        # One rename: nobody ever sees half of it.
        bin_ = make_folder(home / "deleted") / uuid.uuid4().hex
        bin_.mkdir()
        for number, part in enumerate(item.parts):
            part.rename(bin_ / str(number))
        shutil.rmtree(bin_, ignore_errors=True)
        return sum(item.files.values())
    return 0


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            folders = [entry for entry in found if entry.is_dir(follow_symlinks=False) and entry.name != LOCKS]
        return sorted(Path(entry.path) for entry in folders)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Path) -> tuple[_Sizes, float]:
    """Bytes of every file below a folder by device and inode, and unix seconds of the latest change."""
    trees, written = _trees(folder)
    return {file: size for tree in trees.values() for file, size in tree.items()}, written


def _trees(folder: Path) -> tuple[dict[str, _Sizes], float]:
    """The same for each folder in it, by name; under no name for the files beside these."""
    trees: dict[str, _Sizes] = {}
    written = 0.0
    # There may be a million: no Path for each.
    waiting = [(os.fspath(folder), "")]
    while waiting:
        place, top = waiting.pop()
        try:
            written = max(written, os.stat(place).st_mtime)  # noqa: PTH116
            with os.scandir(place) as found:
                for entry in found:
                    first = top or (entry.name if entry.is_dir(follow_symlinks=False) else "")
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, first))
                        continue
                    seen = entry.stat(follow_symlinks=False)
                    written = max(written, seen.st_mtime)
                    if stat.S_ISREG(seen.st_mode):
                        trees.setdefault(first, {})[seen.st_dev, seen.st_ino] = seen.st_size
        except (FileNotFoundError, NotADirectoryError):
            # It went meanwhile.
            continue
    return trees, written
