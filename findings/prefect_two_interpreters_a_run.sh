#!/bin/bash
# Prefect 3.8.8, work pools of type process: a run costs two interpreters, each of which imports Prefect, one after the
# other, unless its deployment names a command.
#
# A worker is said to start `python -m prefect.engine` for a run. It starts a supervisor, which finds out where the code
# lies and starts the engine then. With a `command` among the job variables, even the very same `python -m
# prefect.engine`, there is the engine alone. The pool's template shows no default that would tell the two apart.
#
# Why it matters: on a small machine that is 1.3 s more of CPU time for each run (5.7 against 4.4 s for a worker that
# takes one run and ends). Nights of many models, and clicks on "Run", wait as much longer between Pending and Running.
#
# seen: 2026-12-01: completed: 2; interpreters of a run: 2 without a command (…/_workspace_supervisor, prefect.engine), 1
# with 'python -m prefect.engine'
#
# Exits with 1 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; wait 2>/dev/null; rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8 'fastapi<0.151' 'sqlalchemy<2.1'
bin="$work/env/bin"
export PATH="$bin:$PATH" PREFECT_HOME="$work/home" PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
export PREFECT_LOGGING_LEVEL=WARNING
port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export PREFECT_API_URL="http://127.0.0.1:$port/api"
"$bin/prefect" server start --host 127.0.0.1 --port "$port" > "$work/server.log" 2>&1 &
server=$!
"$bin/python" - "$PREFECT_API_URL/health" <<'PY'
import sys, time, urllib.request
for _ in range(300):
    try:
        urllib.request.urlopen(sys.argv[1], timeout=2)
        break
    except OSError:
        time.sleep(0.5)
PY
mkdir "$work/code" "$work/watch"
cat > "$work/code/hello.py" <<'PY'
from prefect import flow

@flow
def hello() -> int:
    return 1
PY
# Each interpreter says what it is when it starts.
cat > "$work/watch/sitecustomize.py" <<'PY'
import os, sys

if "SAID" in os.environ:
    with open(os.environ["SAID"], "a") as file:
        file.write(" ".join(sys.orig_argv[1:])[:300].replace("\n", " ") + "\n")
PY
"$bin/prefect" work-pool create local --type process > /dev/null
cat > "$work/deploy.py" <<'PY'
import sys
from prefect import flow

source = flow.from_source(source=sys.argv[1], entrypoint="hello.py:hello")
source.deploy("plain", work_pool_name="local", print_next_steps=False)
source.deploy("named", work_pool_name="local", print_next_steps=False, job_variables={"command": "python -m prefect.engine"})
PY
"$bin/python" "$work/deploy.py" "$work/code" > /dev/null

count() {
  "$bin/prefect" deployment run "hello/$1" > /dev/null
  PYTHONPATH="$work/watch" SAID="$work/said-$1" "$bin/prefect" worker start --pool local --run-once > "$work/worker-$1.log" 2>&1
  # The worker itself is one of them.
  grep -vc 'worker start' "$work/said-$1" || true
}
plain=$(count plain)
named=$(count named)
sed 's#'"$work"'#…#g; s/^/  /' "$work/said-plain"
completed=$("$bin/python" - <<'PY'
import asyncio
from prefect.client.orchestration import get_client

async def ask():
    async with get_client() as client:
        return [run.state_name for run in await client.read_flow_runs()]

print(asyncio.run(ask()).count("Completed"))
PY
)
echo "completed: $completed; interpreters of a run: $plain without a command, $named with 'python -m prefect.engine'"
if [ "$completed" != 2 ] || [ "$plain" != 2 ] || [ "$named" != 1 ]; then exit 1; fi
echo "As found: the same engine, and two interpreters instead of one"
