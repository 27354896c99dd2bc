#!/bin/bash
# Prefect 3.8.8, `prefect worker start --type process`: the worker of a second user of a machine cannot start.
#
# The runner makes a folder "runner_storage" in the machine's folder for temporary files (tempfile.gettempdir()). It
# belongs to the user whose worker came first. The worker of anybody else ends with a PermissionError that names that
# folder, whatever its own PREFECT_HOME is, which is where one would look for state of Prefect.
#
# Why it matters: on a shared training machine, where each person or service has a user of their own, the second worker
# dies at its start, and runs stay "Late" without a reason in Prefect's pages. A TMPDIR of its own for each worker helps.
#
# seen: 2026-12-01: first: started; second: PermissionError: [Errno 13] Permission denied: '…/runner_storage/…'; the folder
# belongs to the first
#
# Needs root, to be two users. Exits with 1 when this is no longer so.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "needs root, to run as two users"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check prefect==3.8.8

cat > "$work/two.py" <<'PY'
import os, subprocess, sys, tempfile

work = sys.argv[1]
shared = os.path.join(work, "tmp")
os.mkdir(shared)
os.chmod(shared, 0o1777)

RUNNER = """
import asyncio, os, sys
from prefect.runner import Runner

async def begin():
    async with Runner(name="worker"):
        print("started as", os.getuid())

asyncio.run(begin())
"""

def start(user):
    # Rights are given up after the interpreter is loaded, so that it may lie anywhere.
    code = f"import prefect.runner, os; os.setgroups([]); os.setgid({user}); os.setuid({user})\n{RUNNER}"
    home = os.path.join(work, f"home-{user}")
    os.makedirs(home, exist_ok=True)
    os.chown(home, user, user)
    variables = {"HOME": home, "PREFECT_HOME": home, "TMPDIR": shared, "PREFECT_API_URL": "http://127.0.0.1:1/api",
                 "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=home, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr

first, second = start(20001), start(20002)
print("first: ", "started" if "started as 20001" in first else first[-600:])
last = [line for line in second.splitlines() if "Error" in line][:1]
print("second:", "started" if "started as 20002" in second else last)
assert "started as 20001" in first, "the first did not start either"
assert "started as 20002" not in second and "PermissionError" in second and "runner_storage" in second, second[-2000:]
print("As found: the second user's runner cannot start; the folder belongs to", os.stat(f"{shared}/runner_storage").st_uid)
PY
"$work/env/bin/python" "$work/two.py" "$work"
