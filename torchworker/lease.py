"""Run a command for as long as somebody at the other end of standard input says so. On every machine of a job.

`python -m torchworker.lease SECONDS COMMAND…`: the first line on standard input is a JSON object of variables that the
command gets beside those that are there; each byte after it extends the lease. When it runs out or the input ends, the
command is killed. Its ranks die with it (see lifeline).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time

from torchworker.process.lifeline import die_with_parent
from torchworker.process.readable import readable


def main() -> None:
    """Run the command; ends as it does, or kills it when the lease runs out."""
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    given = _given(seconds)
    if given is None:
        sys.exit("lease: the controller is gone before it said what to start")
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **given},
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    threading.Thread(target=_hold, args=(child, seconds), daemon=True).start()
    status = child.wait()
    # As a shell says it: 128 and the signal.
    sys.exit(status if status >= 0 else 128 - status)


def _given(seconds: float) -> dict[str, str] | None:
    """The variables of the first line; None when it does not come to its end in time."""
    deadline, line = time.monotonic() + seconds, b""
    while b"\n" not in line:
        left = deadline - time.monotonic()
        if left <= 0 or not readable(sys.stdin.fileno(), left) or not (part := os.read(sys.stdin.fileno(), 4096)):
            return None
        line += part
    found: dict[str, str] = json.loads(line.partition(b"\n")[0])
    return found


def _hold(child: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if readable(sys.stdin.fileno(), left):
            if not os.read(sys.stdin.fileno(), 4096):
                break
            deadline = time.monotonic() + seconds
    print("lease: the controller is gone, so this machine stops", file=sys.stderr, flush=True)
    child.kill()


if __name__ == "__main__":
    main()
