"""What a rollout costs the requests of `ship serve`: none, a candidate for 5 % of the keys, and one on the side.

All servers run at the same time and are asked alternately, one at a time, by clients that name a user in each request.
Two models: a perceptron of 4.3 million weights, where batching pays, and one of 3,400, where a request costs little
more than HTTP. With `--before REF` another version of the server is asked too, from the git repository. The server's
CPU time for a request is less disturbed by other work of the machine than rates are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from report import PAGE, ROOT, machine, write
from serving import IN, free_port, release

import shipreader
from shipreader.rollouts import Candidate
from train_and_ship.ship.server import Server

HIDDEN = {"4.3 million weights": 2048, "3,400 weights": 32}
CLIENTS = (1, 32)
SHARE = 500
KEYS = ("rate", "p50", "p99", "cpu", "candidate")
NONE, CANARY, SHADOW, BEFORE = "no rollout", "5 % canary", "5 % shadow", "before"
ASK = """
import asyncio, json, sys, time, aiohttp
url, clients, seconds, width = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
inputs = [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width}]
bodies = [json.dumps({"parameters": {"user_id": f"user-{user}"}, "inputs": inputs}) for user in range(2000)]
headers, times, failed, candidates = {"Content-Type": "application/json"}, [], 0, 0
async def ask(session, first, until):
    global failed, candidates
    number = first
    while time.perf_counter() < until:
        number += 1
        began = time.perf_counter()
        async with session.post(url, data=bodies[number * 7919 % 2000], headers=headers) as answer:
            text = await answer.read()
            failed += answer.status != 200
            candidates += b'"model_version":"1-' in text
        times.append(time.perf_counter() - began)
async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(ask(session, 61 * client, until) for client in range(clients)))
began = time.perf_counter()
asyncio.run(main())
times.sort()
print(json.dumps({"count": len(times), "rate": len(times) / (time.perf_counter() - began),
                  "p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)],
                  "failed": failed, "candidate": candidates / len(times)}))
"""


@contextlib.contextmanager
def package(ref: str, folder: Path) -> Iterator[None]:
    """Servers that start meanwhile are those of another version."""
    folder.mkdir()
    archive = subprocess.Popen(["git", "archive", ref, "shipreader"], cwd=ROOT, stdout=subprocess.PIPE)
    assert archive.stdout is not None
    with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
        tar.extractall(folder, filter="data")
    own, shipreader.__path__ = shipreader.__path__, [str(folder / "shipreader")]
    try:
        yield
    finally:
        shipreader.__path__ = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--before", metavar="REF", help="another version of the server, such as main")
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    sides = [*([BEFORE] if options.before else []), NONE, CANARY, SHADOW]
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for model, hidden in HIDDEN.items():
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            live, other = release(folder / "live", hidden), release(folder / "candidate", hidden, seed=1)
            tried = dataclasses.replace(other, rollout="r")
            servers = {side: Server(folder=folder / side, model="mlp", port=free_port()) for side in sides}
            for side, server in servers.items():
                stack.enter_context(contextlib.closing(server))
                with package(options.before, folder / "before") if side == BEFORE else contextlib.nullcontext():
                    server.load(live)
                if side in (CANARY, SHADOW):
                    server.try_candidate(Candidate(tried, SHARE, "user_id", 0, side == SHADOW, "r", 1))

            def ask(side: str, clients: int, seconds: float, servers: dict[str, Server] = servers) -> dict[str, float]:
                url = f"{servers[side].url}/v2/models/mlp/infer"
                argv = [sys.executable, "-c", ASK, url, str(clients), str(seconds), str(IN)]
                port = str(servers[side].port)
                (server,) = [process for process in psutil.Process().children() if port in process.cmdline()]
                before = sum(server.cpu_times()[:2])
                answer = dict(json.loads(subprocess.check_output(argv, text=True)))
                return {**answer, "cpu": (sum(server.cpu_times()[:2]) - before) / answer["count"]}

            time.sleep(2)
            for side in sides:
                ask(side, 8, 1)
            for number in range(options.rounds):
                for clients in CLIENTS:
                    # Not the same one always after the same other one.
                    turn = number % len(sides)
                    for side in (sides[turn:] + sides[:turn])[:: 1 if number % 2 else -1]:
                        answer = {**ask(side, clients, options.seconds), "load": os.getloadavg()[0]}
                        found.setdefault((model, clients, side), []).append(answer)
                        print(model, number, clients, side, answer, flush=True)
    loads = [answer["load"] for answers in found.values() for answer in answers]
    before = f" `before` is the server of `{options.before}`." if options.before else ""
    lines = [
        "## A rollout beside what `ship serve` serves",
        "",
        machine("onnxruntime"),
        f"Measured with `{' '.join(['python benchmarks/canary.py', *sys.argv[1:]])}`: perceptrons, one row a request, "
        f"JSON with a user in it, all servers alternately, {options.rounds} rounds of {options.seconds:g} s; clients "
        f"and servers share the machine with other work, its load was {min(loads):.0f} to {max(loads):.0f}. Medians; "
        f"ratios are medians of a round's value divided by that without a rollout in the same round.{before}",
        "",
        "| model | clients | server | requests/s | ratio | p50 ms | p99 ms | ratio | CPU ms a request | ratio | "
        "by the candidate | failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, clients, side), answers in sorted(
        found.items(), key=lambda item: (item[0][:2], sides.index(item[0][2]))
    ):
        middle = {key: statistics.median(one[key] for one in answers) for key in KEYS}
        base = found[model, clients, NONE]
        rounds = list(zip(answers, base, strict=True))
        ratio = {key: statistics.median(one[key] / of[key] for one, of in rounds) for key in ("rate", "p99", "cpu")}
        lines.append(
            f"| {model} | {clients} | {side} | {middle['rate']:,.0f} | {ratio['rate']:.2f} | "
            f"{1000 * middle['p50']:.1f} | {1000 * middle['p99']:.1f} | {ratio['p99']:.2f} | "
            f"{1000 * middle['cpu']:.2f} | {ratio['cpu']:.2f} | {100 * middle['candidate']:.1f} % | "
            f"{sum(one['failed'] for one in answers):.0f} |"
        )
    text = "\n".join(lines)
    print(text)
    write(options.write, "canary", text)


if __name__ == "__main__":
    main()
