#!/usr/bin/env bash
# prefect 3.8.8: `pause_flow_run` and `apause_flow_run` differ where a pause is met again that was answered before.
# With the same `key`, as in a flow that is retried, the sync function returns the stored answer; the async one reads it
# and returns None, under the same signature. `if answer.approve` is an AttributeError then, and code that takes None for
# "nobody said yes" refuses what was approved.
# seen: 2026-11-29: sync: the answer twice; async: the answer, then None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8 "fastapi<0.151" "sqlalchemy<2.1" 2> "$folder/log"
cat > "$folder/ask.py" <<'PYTHON'
import asyncio
import os
import threading
import time

os.environ |= {"PREFECT_HOME": os.getcwd(), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
os.environ |= {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_runs import apause_flow_run, pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run


class Approval(RunInput):
    approve: bool


def answer(run: str) -> None:
    with get_client(sync_client=True) as client:
        url = str(client.api_url).rstrip("/")
    while httpx.get(f"{url}/flow_runs/{run}").json()["state"]["type"] != "PAUSED":
        time.sleep(0.3)
    time.sleep(1)
    httpx.post(f"{url}/flow_runs/{run}/resume", json={"run_input": {"approve": True}}).raise_for_status()


ASKED = {"wait_for_input": Approval, "timeout": 300, "poll_interval": 1, "key": "release"}


@flow
def sync_flow() -> list[object]:
    threading.Thread(target=answer, args=[flow_run.get_id()]).start()
    return [pause_flow_run(**ASKED), pause_flow_run(**ASKED)]


@flow
async def async_flow() -> list[object]:
    threading.Thread(target=answer, args=[flow_run.get_id()]).start()
    return [await apause_flow_run(**ASKED), await apause_flow_run(**ASKED)]


first, again = sync_flow()
print("sync: ", first, "then", again)
assert first.approve and again.approve
first, again = asyncio.run(async_flow())
print("async:", first, "then", again)
assert first.approve and again is None, "the async function returns the answer too: the behaviour has changed"
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/ask.py" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
