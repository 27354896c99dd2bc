#!/usr/bin/env bash
# onnxruntime 1.31.1: its threads go on running for tens of milliseconds of CPU time after each call, waiting for the next.
# A session with two threads that is asked 5 times a second for a model of a millisecond takes several times the CPU of the
# calls themselves, and answers no faster: by default idle threads spin. `top` shows a busy server, autoscalers that look at
# CPU start a second one, and in a container with a CPU limit the spinning is what is throttled. With
# session.intra_op.allow_spinning set to "0" the threads sleep, and the same calls take what they take.
# seen: 2026-11-29: CPU milliseconds a call at 5 calls a second: 11 by default, 1 with sleeping threads; a call takes 1.0 and 1.1 ms
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WIDTH, CALLS, PAUSE = 2048, 20, 0.2
weights = np.random.default_rng(0).normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in "xy")
node = helper.make_node("MatMul", ["x", "w"], ["y"])
graph = helper.make_graph([node], "one", [x], [y], [numpy_helper.from_array(weights, "w")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
fed = {"x": np.ones((1, WIDTH), np.float32)}


def cost(spinning):
    """CPU milliseconds a call, pauses included, and milliseconds of a call in the middle."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    if spinning is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, fed)
    time.sleep(PAUSE)
    times, used = [], time.process_time()
    for _ in range(CALLS):
        began = time.perf_counter()
        session.run(None, fed)
        times.append(time.perf_counter() - began)
        time.sleep(PAUSE)
    return 1000 * (time.process_time() - used) / CALLS, 1000 * statistics.median(times)


(asleep, slow), (default, fast) = cost("0"), cost(None)
print(
    f"CPU milliseconds a call at {1 / PAUSE:.0f} calls a second: {default:.0f} by default, {asleep:.0f} with sleeping "
    f"threads; a call takes {fast:.1f} and {slow:.1f} ms"
)
if default < 3 * asleep:
    raise SystemExit("idle threads cost little by default: the behaviour has changed")
PYTHON
