#!/usr/bin/env bash
# prefect 3.8.8: a flow that waits in `apause_flow_run` dies when its server is away for longer than its client repeats a
# request, and the answer that the server takes after that (201, status ACCEPT) is never read.
# The client repeats a refused connection 5 times, about a minute; the pause itself may last a week, and Prefect keeps
# its state and the answer in the database. Here the client repeats once (PREFECT_CLIENT_MAX_RETRIES=1, two seconds) and
# the server is stopped for eight. The flow ends as Failed though the person said yes: whoever gates a release by a pause
# has to read the answer again from the run's inputs, under the key of the pause.
# seen: 2026-11-29: the flow raised ConnectError; the answer was ACCEPTed afterwards and lies in the run's inputs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8 "fastapi<0.151" "sqlalchemy<2.1" 2> "$folder/log"
cat > "$folder/ask.py" <<'PYTHON'
import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}/api"
os.environ |= {
    "PREFECT_HOME": os.getcwd(), "PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "1",
    "PREFECT_CLIENT_RETRY_JITTER_FACTOR": "0", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
}

import httpx
from prefect import flow
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run


def start() -> subprocess.Popen:
    prefect = Path(sys.executable).with_name("prefect")
    log = open("server.log", "ab")
    server = subprocess.Popen([prefect, "server", "start", "--port", str(port)], stdout=log, stderr=log)
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return server
        except httpx.HTTPError:
            time.sleep(0.2)
        assert server.poll() is None, Path("server.log").read_text()[-2000:]


class Approval(RunInput):
    approve: bool


known: list[str] = []
died = threading.Event()


@flow
async def release() -> bool:
    known.append(flow_run.get_id())
    return (await apause_flow_run(wait_for_input=Approval, timeout=600, poll_interval=1)).approve


def run() -> None:
    try:
        print("the flow ended with", asyncio.run(release()))
    except Exception as error:
        print(f"the flow raised {type(error).__name__}")
    died.set()


def state() -> dict:
    return httpx.get(f"{url}/flow_runs/{known[0]}").json()["state"]


server = start()
try:
    threading.Thread(target=run, daemon=True).start()
    while not known or state()["type"] != "PAUSED":
        time.sleep(0.3)
    keys = state()["state_details"]["run_input_keyset"]
    time.sleep(2)
    server.terminate()
    server.wait()
    time.sleep(8)
    server = start()
    reply = httpx.post(f"{url}/flow_runs/{known[0]}/resume", json={"run_input": {"approve": True}})
    print("the answer:", reply.status_code, reply.json()["status"])
    assert died.wait(60), "the flow goes on waiting: the behaviour has changed"
    stored = httpx.get(f"{url}/flow_runs/{known[0]}/input/{keys['response']}")
    print("stored:", stored.status_code, stored.text[:60])
    assert reply.json()["status"] == "ACCEPT" and stored.is_success
finally:
    server.terminate()
    server.wait()
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/ask.py" 2> "$folder/log" | tee "$folder/said"
grep --quiet "^the flow raised" "$folder/said" || { echo "the flow outlives its server: the behaviour has changed"; exit 1; }
