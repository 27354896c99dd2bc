"""A month of nights, lived through on a real stack of its own, and its whole history held against what had to happen.

    python -m tests.month                      # the month: prints it, writes docs/month.md and docs/month.svg
    python -m tests.month --nights 1 2 6       # some of them, and nothing is written

Exits with 1 when anything is not as it had to be.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import machine, write
from tests.support.local_stack import enter_local_stack
from tests.support.processes import processes_of
from tests.support.projects import REPOSITORY
from train_and_ship.infra import stack
from train_and_ship.infra.settings import Settings

PAGE, PICTURE = REPOSITORY / "docs" / "month.md", REPOSITORY / "docs" / "month.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, nargs="+", help="only these")
    parser.add_argument("--keep", action="store_true", help="leave the folder with the logs of all services")
    asked = parser.parse_args()
    # So that the stack is stopped then, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="ship-month-"))
    enter_local_stack(folder / "home")
    settings = Settings.load()
    try:
        try:
            stack.up(settings, lambda line: print(line, flush=True))
            wrong = _month(settings, folder, asked.nights)
        finally:
            stack.down(settings)
        wrong += [f"expected nothing to be left when the stack is down, got {left}" for left in processes_of(settings)]
    finally:
        if asked.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for what in wrong:
        print(f"MISMATCH  {what}", file=sys.stderr)
    print(f"{len(wrong)} mismatches" if wrong else "the whole history is as it had to be")
    return 1 if wrong else 0


def _month(settings: Settings, folder: Path, chosen: list[int] | None) -> list[str]:
    """Live through it; returns what was not as it had to be."""
    from tests.support.month.history import mismatches, tell
    from tests.support.month.month import Lived, Month
    from tests.support.month.nights import nights
    from tests.support.month.picture import picture, rows_of, table

    def report(lived: Lived) -> None:
        night, live = lived.night, lived.live.release[:8] if lived.live else "nothing"
        print(
            f"night {night.number:>2}  {lived.seconds:5.1f} s  {lived.state:<8}  live {live}  {night.happens}",
            flush=True,
        )

    began, month = time.monotonic(), Month(settings, folder)
    try:
        month.live_through([night for night in nights() if chosen is None or night.number in chosen], report)
        took = time.monotonic() - began
        told = tell(month)
        wrong = mismatches(month, told)
    finally:
        month.close()
    shown = table(rows := rows_of(month.lived, told, folder))
    print(shown)
    if chosen is None and not wrong:
        about = f"{machine('torch', 'prefect', 'mlflow')} {len(rows)} nights in {took / 60:.1f} minutes."
        write(PAGE, "month", f"{about}\n\n{shown}")
        PICTURE.write_text(picture(rows))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
