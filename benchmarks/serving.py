"""Requests per second of `ship serve`, with and without batching, at 1 and at 32 clients.

Both servers run at the same time and are asked alternately, one at a time. The model is a multilayer perceptron of 4.3
million weights, asked one row at a time: where each row alone reads all weights, batching pays.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from report import PAGE, machine, write

from shipreader.records import Manifest, Release
from train_and_ship.infra.processes import port_is_free
from train_and_ship.infra.toolenv import environment
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.ship.serve import Server, requirements

IN, HIDDEN, OUT = 64, 2048, 10
CLIENTS = (1, 32)
# aiohttp comes with MLServer, and asks several times faster than what we have.
ASK = """
import asyncio, json, sys, time, aiohttp
url, clients, seconds, width = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": [0.5] * width}]})
times, failed = [], 0
async def ask(session, until):
    global failed
    while time.perf_counter() < until:
        began = time.perf_counter()
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            await answer.read()
            failed += answer.status != 200
        times.append(time.perf_counter() - began)
async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(ask(session, time.perf_counter() + seconds) for _ in range(clients)))
began = time.perf_counter()
asyncio.run(main())
times.sort()
print(json.dumps({"rate": len(times) / (time.perf_counter() - began), "p50": times[len(times) // 2],
                  "p99": times[int(len(times) * 0.99)], "failed": failed}))
"""


def release(folder: Path) -> Release:
    folder.mkdir()
    generator = np.random.default_rng(0)
    widths = [IN, HIDDEN, HIDDEN, OUT]
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
    python = environment("mlserver", requirements(), print)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = release(folder / "release")
        urls = {}
        for side, size in (("batching", 64), ("one by one", 1)):
            server = Server(folder=folder / side.replace(" ", "-"), model="mlp", port=free_port(), batch_size=size)
            server.load(model)
            stack.enter_context(server.running())
            urls[side] = f"{server.url}/v2/models/mlp/infer"

        def ask(side: str, clients: int, seconds: float) -> dict[str, float]:
            argv = [str(python), "-c", ASK, urls[side], str(clients), str(seconds), str(IN)]
            return dict(json.loads(subprocess.check_output(argv, text=True)))

        for side in urls:
            ask(side, 8, 2)
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for number in range(options.rounds):
            for clients in CLIENTS:
                for side in list(urls)[:: 1 if number % 2 else -1]:
                    answer = ask(side, clients, options.seconds)
                    found.setdefault((clients, side), []).append(answer)
                    print(number, clients, side, answer, f"load {os.getloadavg()[0]:.1f}", flush=True)
    lines = [
        "## `ship serve`, requests per second",
        "",
        machine("onnxruntime"),
        "Measured with `python benchmarks/serving.py`: MLServer 1.7.1, a perceptron of 4.3 million weights, one "
        f"row a request, JSON, both servers alternately, {options.rounds} rounds of {options.seconds:g} s; clients and "
        "servers share the machine. Medians; times are batching / one by one.",
        "",
        "| clients | batching, requests/s | one by one, requests/s | ratio | p50 ms | p99 ms | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients in CLIENTS:
        sides = [found[clients, side] for side in urls]
        rates = [[answer["rate"] for answer in side] for side in sides]
        ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
        times = [
            " / ".join(f"{1000 * statistics.median(answer[key] for answer in side):.1f}" for side in sides)
            for key in ("p50", "p99")
        ]
        failed = sum(answer["failed"] for side in sides for answer in side)
        medians = [f"{statistics.median(rate):,.0f}" for rate in rates]
        lines.append(
            f"| {clients} | {medians[0]} | {medians[1]} | {ratio:.2f} | {times[0]} | {times[1]} | {failed:.0f} |"
        )
    text = "\n".join(lines)
    print(text)
    write(options.write, "serving", text)


if __name__ == "__main__":
    main()
