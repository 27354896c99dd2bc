"""Servers side by side: the one of `ship serve`, with and without batching, MLServer, and KServe's own.

All run at the same time and are asked alternately, one at a time. The model is a multilayer perceptron of 4.3 million
weights, asked one row at a time: where each row alone reads all weights, batching pays. Then each is told, while it is
asked, to serve another release, again and again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from report import PAGE, machine, write
from servers import KServe, MLServer

from shipreader.records import Manifest, Release
from train_and_ship.infra.ports import port_is_free
from train_and_ship.infra.toolenv import environment
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.ship.server import Server

IN, HIDDEN, OUT = 64, 2048, 10
CLIENTS = (1, 32)
FLIPPED, FLIP_CLIENTS = 0, 8
# aiohttp comes with MLServer, and asks several times faster than what we have.
ASK = """
import asyncio, json, sys, time, aiohttp
url, clients, seconds, width = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width}]})
times, failed, versions = [], 0, set()
async def ask(session, until):
    global failed
    while time.perf_counter() < until:
        began = time.perf_counter()
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            text = await answer.read()
            failed += answer.status != 200
            if answer.status == 200:
                versions.add(json.loads(text).get("model_version"))
        times.append(time.perf_counter() - began)
async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, time.perf_counter() + seconds) for _ in range(clients)))
began = time.perf_counter()
asyncio.run(main())
times.sort()
print(json.dumps({"rate": len(times) / (time.perf_counter() - began), "p50": times[len(times) // 2],
                  "p99": times[int(len(times) * 0.99)], "failed": failed, "versions": len(versions)}))
"""


def release(folder: Path, hidden: int = HIDDEN, seed: int = 0) -> Release:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    widths = [IN, hidden, hidden, OUT]
    weights = [generator.normal(0, a**-0.5, (a, b)).astype(np.float32) for a, b in itertools.pairwise(widths)]
    nodes, value = [], "x"
    for number in range(len(weights)):
        last = number == len(weights) - 1
        nodes.append(helper.make_node("MatMul", [value, f"w{number}"], ["y" if last else f"m{number}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"m{number}"], [f"r{number}"]))
        value = f"r{number}"
    tensors = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in (("x", IN), ("y", OUT))
    ]
    initial = [numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "mlp", tensors[:1], tensors[1:], initial)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    signature = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", IN]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", OUT]}],
    }
    made = build_manifest(folder, model="mlp", formats={"onnx": "model.onnx"}, signature=signature, metrics={})
    manifest = Manifest("mlp", made.release, {}, made.formats, made.signature, {}, made.encode())
    return Release("prod", 1, folder, manifest, "")


def free_port() -> int:
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if all(port_is_free(near) for near in range(port, port + 3)):
            return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    mlserver = environment("mlserver", pins("mlserver"), print)
    kserve = environment("kserve", ["kserve==0.21.0", "onnxruntime==1.31.1"], print)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = release(folder / "release")
        servers = {
            "ship serve": Server(folder=folder / "ours", model="mlp", port=free_port()),
            "one by one": Server(folder=folder / "single", model="mlp", port=free_port(), batch_size=1),
        }
        urls = {side: f"{server.url}/v2/models/mlp/infer" for side, server in servers.items()}
        for side, make, python in (("MLServer", MLServer, mlserver), ("KServe", KServe, kserve)):
            made = make(python, folder / side, free_port())
            servers[side], urls[side] = made, made.url
        for server in servers.values():
            stack.enter_context(contextlib.closing(server))
            server.load(model)

        def ask(side: str, clients: int, seconds: float) -> dict[str, float]:
            argv = [str(mlserver), "-c", ASK, urls[side], str(clients), str(seconds), str(IN)]
            return dict(json.loads(subprocess.check_output(argv, text=True)))

        generations = itertools.count(2)

        def move(side: str, done: threading.Event) -> None:
            while not done.wait(0.5):
                servers[side].load(dataclasses.replace(model, generation=next(generations)))

        for side in urls:
            ask(side, 8, 2)
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for number in range(options.rounds):
            for clients in (*CLIENTS, FLIPPED):
                for side in list(urls)[:: 1 if number % 2 else -1]:
                    if clients == FLIPPED:
                        done = threading.Event()
                        mover = threading.Thread(target=move, args=(side, done))
                        mover.start()
                        answer = ask(side, FLIP_CLIENTS, options.seconds)
                        done.set()
                        mover.join()
                    else:
                        answer = ask(side, clients, options.seconds)
                    answer["load"] = os.getloadavg()[0]
                    found.setdefault((clients, side), []).append(answer)
                    print(number, clients, side, answer, flush=True)
    loads = [answer["load"] for answers in found.values() for answer in answers]
    lines = [
        "## Servers of `ship serve`, requests per second",
        "",
        machine("onnxruntime"),
        "Measured with `python benchmarks/serving.py`: MLServer 1.7.1 (batches within 2 ms), KServe 0.21.0 (no "
        "batching of its own), a perceptron of 4.3 million weights, one row a request, JSON, all servers alternately, "
        f"{options.rounds} rounds of {options.seconds:g} s; clients and servers share the machine, whose load was "
        f"{min(loads):.0f} to {max(loads):.0f}. Medians; `ratio` is the median of ship serve's rate divided by this "
        f"one's in the same round. While the channel moves, {FLIP_CLIENTS} clients ask and another release is loaded "
        "half a second after the one before.",
        "",
        "| | server | requests/s | ratio | p50 ms | p99 ms | failed | releases seen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for clients in (*CLIENTS, FLIPPED):
        what = "the channel moves" if clients == FLIPPED else f"{clients} client{'s' if clients > 1 else ''}"
        ours = found[clients, "ship serve"]
        for side in urls:
            answers = found[clients, side]
            middle = {key: statistics.median(answer[key] for answer in answers) for key in ("rate", "p50", "p99")}
            ratio = statistics.median(a["rate"] / b["rate"] for a, b in zip(ours, answers, strict=True))
            failed, seen = (sum(answer[key] for answer in answers) for key in ("failed", "versions"))
            lines.append(
                f"| {what} | {side} | {middle['rate']:,.0f} | {ratio:.2f} | {1000 * middle['p50']:.1f} | "
                f"{1000 * middle['p99']:.1f} | {failed:.0f} | {seen if clients == FLIPPED else '–'} |"
            )
    text = "\n".join(lines)
    print(text)
    write(options.write, "serving", text)


def pins(name: str) -> list[str]:
    """A requirements file of the tests."""
    path = Path(__file__).parents[1] / "tests" / "support" / f"{name}-requirements.txt"
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


if __name__ == "__main__":
    main()
