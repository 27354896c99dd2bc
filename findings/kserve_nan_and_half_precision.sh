#!/usr/bin/env bash
# kserve 0.21.0, the Python model server, v2 protocol over HTTP: NaN and infinity in an answer become null with status 200,
# and a model that answers FP16 cannot be asked with JSON at all.
# The server writes answers with orjson, which has null for numbers that JSON has no word for: [NaN, inf, 1.0] arrives as
# [null, null, 1.0], so a client cannot tell "infinite" from "missing", and many read 0. The same answer with
# binary_data_output arrives bit for bit. An FP16 output in JSON is 400 even where its numbers are plain. Who ships
# models whose logits can be -inf (masks) or that run in half precision has to ask for binary data.
# seen: 2026-11-29: [NaN, inf, 1.0] over JSON: 200, [None, None, 1.0]; as binary data: 200, [nan, inf, 1.0]; FP16 over JSON: 400, "Sending FP16 data via JSON is not supported."
set -euo pipefail
folder=$(mktemp -d)
python_id=
stop() {
    if [ -n "$python_id" ]; then kill "$python_id" && wait "$python_id"; fi || true
    rm -rf "$folder"
}
trap stop EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kserve==0.21.0 numpy==2.4.6
cd "$folder"
cat > server.py <<'PYTHON'
import sys

import kserve.protocol.rest.server as rest
import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer

config = rest.uvicorn.Config
# On this machine alone: by itself it listens on all addresses.
rest.uvicorn.Config = lambda *given, **named: config(*given, **{**named, "host": "127.0.0.1"})
ANSWERS = {"FP32": np.array([np.nan, np.inf, 1], np.float32), "FP16": np.array([0.5, 1, 2], np.float16)}


class Odd(Model):
    """Answers with three numbers of the datatype that its name has."""

    def __init__(self, datatype):
        super().__init__(datatype)
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        output = InferOutput("y", [3], self.name)
        output.set_data_from_numpy(ANSWERS[self.name], binary_data=payload.use_binary_outputs)
        return InferResponse(
            payload.id,
            self.name,
            [output],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1).start([Odd("FP32"), Odd("FP16")])
PYTHON
port=$("$folder/venv/bin/python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
"$folder/venv/bin/python" server.py "$port" >log 2>&1 &
python_id=$!
"$folder/venv/bin/python" - "$port" <<'PYTHON' || { tail -n 20 log; exit 1; }
import json
import sys
import time
import urllib.error
import urllib.request

import numpy as np

url = f"http://127.0.0.1:{sys.argv[1]}/v2"
end = time.monotonic() + 120
while True:
    try:
        urllib.request.urlopen(f"{url}/models/FP16/ready", timeout=5)
        break
    except OSError:
        if time.monotonic() > end:
            raise SystemExit("the server does not answer") from None
        time.sleep(0.2)


def ask(name, **parameters):
    """Status, headers and body."""
    x = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0.0]}
    body = json.dumps({"id": "1", "inputs": [x], "parameters": parameters}).encode()
    request = urllib.request.Request(f"{url}/models/{name}/infer", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


status, _, body = ask("FP32")
data = json.loads(body)["outputs"][0]["data"]
binary_status, headers, bits = ask("FP32", binary_data_output=True)
numbers = np.frombuffer(bits[int(headers["Inference-Header-Content-Length"]) :], np.float32)
half_status, _, said = ask("FP16")
print(
    f"[NaN, inf, 1.0] over JSON: {status}, {data}; as binary data: {binary_status}, {numbers.tolist()}; "
    f"FP16 over JSON: {half_status}, {said.decode()[:150]}"
)
assert status == binary_status == 200 and np.isnan(numbers[0]) and np.isinf(numbers[1]), (status, numbers)
if data != [None, None, 1.0] or half_status == 200:
    raise SystemExit("the behaviour has changed")
PYTHON
