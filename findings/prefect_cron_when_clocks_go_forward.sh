#!/usr/bin/env bash
# prefect 3.8.8: what a cron schedule does with a time of day that there is not depends on the Python of the server.
# `30 2 * * *` in Europe/Berlin on 2027-03-28, where clocks go from 02:00 to 03:00, is not left out: with Python 3.11 and
# 3.12 the run starts an hour early, at 01:30, with 3.13 an hour late, at 03:30; the package is the same. In a zone whose
# clocks change at midnight (Africa/Cairo, `30 0 * * *`) the early one is on the day before, which then has two runs and
# its own day none. Who trains on "yesterday's data" has one day twice; who counts on an order with another job at
# 02:00 has it turned round in one of the two.
# seen: 2026-11-29: 3.11 and 3.12: Berlin 28 01:30 +0100, Cairo 29 23:30 +0200; 3.13: Berlin 28 03:30 +0200, Cairo 30 01:30 +0300
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ask.py" <<'PYTHON'
import asyncio
import sys
from datetime import datetime
from zoneinfo import ZoneInfo

from prefect.server.schemas.schedules import CronSchedule


def runs(cron: str, zone: str, day: datetime) -> list[str]:
    found = asyncio.run(CronSchedule(cron=cron, timezone=zone).get_dates(n=2, start=day.replace(tzinfo=ZoneInfo(zone))))
    return [f"{run.astimezone(ZoneInfo(zone)):%d %H:%M %z}" for run in found]


berlin = runs("30 2 * * *", "Europe/Berlin", datetime(2027, 3, 27))
cairo = runs("30 0 * * *", "Africa/Cairo", datetime(2027, 4, 29))
print(f"Python {sys.version_info[0]}.{sys.version_info[1]}: Berlin {berlin[1]}, Cairo {cairo[1]}")
assert berlin[0] == "27 02:30 +0100", berlin
if sys.version_info < (3, 13):
    assert (berlin[1], cairo[1]) == ("28 01:30 +0100", "29 23:30 +0200"), "the behaviour has changed"
else:
    assert (berlin[1], cairo[1]) == ("28 03:30 +0200", "30 01:30 +0300"), "the behaviour has changed"
PYTHON
asked=0
for python in python3.11 python3.12 python3.13; do
    # A shim may be there without its Python.
    "$python" -c "" 2> "$folder/log" || continue
    "$python" -m venv "$folder/$python"
    "$folder/$python/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8 "fastapi<0.151" "sqlalchemy<2.1" 2> "$folder/log"
    "$folder/$python/bin/python" "$folder/ask.py"
    asked=$((asked + 1))
done
test "$asked" -gt 0 || { echo "none of python3.11, python3.12, python3.13 is here"; exit 1; }
