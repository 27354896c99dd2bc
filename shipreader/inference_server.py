"""The process behind `ship serve`: the Open Inference Protocol over HTTP and gRPC, for one model on loopback.

It is told what to serve by lines of JSON on its standard input, answers each with one on its standard output, and ends
with the last of them: nobody else can change what is served, and it does not outlive who started it.

    {"model": "digits", "generation": 7, "artifact": "/…/model.onnx", "signature": {…}, "batch_size": 64}
    {"loaded": 7, "threads": "2 threads, which sleep when idle: …"}       or {"error": "…"}, and the one before stays
    {"fresh": true, "tried": true}      every few seconds: whether what is served is known to be live, or readiness
                                        ends; whether a rollout runs still, or its candidate gets no more requests
    {"computing": 0.0, "canary": ""}    seconds for which it has computed what it computes now; what is wrong with
                                        the candidate
    {"candidate": {"model": {…}, "share": 500, …}}     what a rollout tries beside it from now on, or null
    {"candidate": "7-3f2a9c01d4e5b6a7c8d9"}            heard; loading it holds up nothing else

The new release is loaded before requests go to it; those that are with the old one are answered by it. It imports
uvicorn and uvloop, and what the files that it puts together import, from an environment of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import sys
from typing import Any

import uvicorn
import uvloop

from shipreader.inference_canary import CanaryDocument
from shipreader.inference_connections import bounded
from shipreader.inference_grpc import grpc_server
from shipreader.inference_http import application, watching
from shipreader.inference_limits import LOOPBACK, Limits
from shipreader.inference_model import ModelDocument
from shipreader.inference_served import Served
from shipreader.inference_tensors import MOST_BYTES

STOP_SECONDS = 10


def http_server(app: Any, limits: Limits) -> uvicorn.Server:
    """One whose connections are bounded. It writes down no requests, and none that are no HTTP."""
    config = uvicorn.Config(
        app,
        http=bounded(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def listener(port: int) -> socket.socket:
    """Bound on loopback; it listens when its server starts."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((LOOPBACK, port))
    return found


async def serve(model: str, port: int, limits: Limits) -> None:
    """Serve on `port`, gRPC on the next, metrics and health on the one after, until standard input ends."""
    # What a library prints goes to the log; the answers have the descriptor for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        # A connection is one, and both protocols have so many.
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, max(soft, 4096)), most))
    served = Served(model, limits)
    servers = [
        (http_server(application(served), limits), listener(port)),
        (http_server(watching(served), limits), listener(port + 2)),
    ]
    rpc = grpc_server(served, port + 1, limits)
    lines = asyncio.StreamReader(limit=MOST_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running: list[asyncio.Task[None]] = []
    while line := await lines.readline():
        said = json.loads(line)
        if "fresh" in said:
            served.fresh = said["fresh"]
            if not said["tried"]:
                served.follow(None)
            working = served.model.seconds_at_work() if served.model is not None else 0.0
            print(json.dumps({"computing": working, "canary": served.said_of_canary}), file=answers)
            continue
        if "candidate" in said:
            wanted = CanaryDocument.of(said["candidate"]) if said["candidate"] else None
            served.follow(wanted)
            print(json.dumps({"candidate": wanted.model.version if wanted else None}), file=answers)
            continue
        document = ModelDocument(**said)
        try:
            words = await asyncio.to_thread(served.load, document)
        except Exception as error:
            logging.exception("generation %d", document.generation)
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
            continue
        # Whatever was tried was tried beside another one.
        served.follow(None)
        logging.info("generation %d; %s", document.generation, words)
        if not running:
            await rpc.start()
            running = [loop.create_task(server.serve(sockets=[where])) for server, where in servers]
            # uvicorn says so by a flag.
            while not all(server.started for server, _ in servers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        print(json.dumps({"loaded": document.generation, "threads": words}), file=answers)
    for server, _ in servers:
        server.should_exit = True
    # All at once: whoever started us waits for 20 s.
    await asyncio.gather(rpc.stop(STOP_SECONDS), *running)
    served.observing.close()


def main() -> None:
    """`model port limits`, the last as a JSON object."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    model, port, limits = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(model, int(port), Limits(**json.loads(limits))))
