#!/usr/bin/env bash
# Triton Inference Server 2.51.0 (from the wheel nvidia-pytriton 0.7.0) with --model-control-mode=poll on S3.
# A poll asks S3 when each file below a model's folder was last modified, and reads config.pbtxt and loads only if the
# newest of these is later than before. S3 tells whole seconds. So where a poll falls between two writes of one second,
# the second write is not noticed, however long one waits: 2/model.py is uploaded, Triton polls, config.pbtxt is put
# again and names version 2 now, and version 1 stays. Nothing is logged. Who uploads a version and then flips the
# configuration, which may take less than a second, may have a release that is complete in the bucket and never served.
# A write below the folder in a later second ends it: the same config.pbtxt put again is enough. Waiting a second before
# the last write avoids it.
# seen: 2026-11-29: last modified: 2/model.py 14:20:15, config.pbtxt 14:20:15; a poll in between
# seen: 2026-11-29: 12 polls later: version 1 is served; config.pbtxt was read 0 times
# seen: 2026-11-29: the same config.pbtxt put again at 14:20:37: version 2 is served
set -euo pipefail
folder=$(mktemp -d)
python_id=
stop() {
    if [ -n "$python_id" ]; then kill "$python_id" && wait "$python_id"; fi || true
    rm -rf "$folder"
}
trap stop EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    nvidia-pytriton==0.7.0 numpy==1.26.4 "moto[server]==5.2.5" boto3==1.44.8
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' &
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

CONFIG = """backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
version_policy { specific { versions: [ VERSION ] } }
"""
# Answers with the number of its version.
MODEL = """import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.answer = pb_utils.Tensor("y", np.array([float(args["model_version"])], dtype=np.float32))

    def execute(self, requests):
        return [pb_utils.InferenceResponse(output_tensors=[self.answer]) for _ in requests]
"""
POLLS = 12
SECONDS = 175
END = time.monotonic() + SECONDS


class Requests(logging.Handler):
    """Notes what Triton asks of S3; nothing else here lists the repository or gets config.pbtxt."""

    def __init__(self):
        super().__init__()
        self.polls, self.reads = [], 0

    def emit(self, record):
        if "GET /models?list-type=2&prefix=live/ " in record.getMessage():
            self.polls.append(time.time())
        self.reads += "GET /models/live/number/config.pbtxt " in record.getMessage()


def put(name, text):
    s3.put_object(Bucket="models", Key=f"live/number/{name}", Body=text.encode())


def put_config(version):
    put("config.pbtxt", CONFIG.replace("VERSION", str(version)))


def modified(name):
    return f"{s3.head_object(Bucket='models', Key=f'live/number/{name}')['LastModified']:%H:%M:%S}"


def served():
    """The version that answers, None while there is none."""
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0]}]}
    try:
        with urllib.request.urlopen(f"{url}/v2/models/number/infer", json.dumps(body).encode(), timeout=5) as reply:
            answer = json.load(reply)
    except OSError:
        return None
    assert answer["outputs"][0]["data"] == [float(answer["model_version"])], answer
    return int(answer["model_version"])


def triton_ended():
    """It is not waited for, so that its id stays its own."""
    return os.waitid(os.P_PID, triton.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(condition, what):
    while not condition():
        if triton_ended() or time.monotonic() > END:
            reason = "Triton ended" if triton_ended() else f"{SECONDS} s are over (a busy machine?)"
            raise SystemExit(f"{Path('triton.log').read_text()[-2000:]}\n{reason}; waited for: {what}")
        time.sleep(0.03)


def wait_for_polls(count):
    """Until one more than count began, so that as many are done."""
    start = len(seen.polls)
    wait_for(lambda: len(seen.polls) > start + count, "a poll between two writes of one second, and those after it")


def write_in_one_second():
    """Put 2/model.py, wait until a poll read config.pbtxt, and replace that. Whether it was one second."""
    wait_for_polls(0)
    start = 2 * seen.polls[-1] - seen.polls[-2] - 0.1
    if start % 1 > 0.3:
        # The next poll does not begin early in a second.
        return False
    time.sleep(max(start - time.time(), 0))
    reads = seen.reads
    put("2/model.py", MODEL)
    wait_for(lambda: seen.reads > reads, "config.pbtxt is read after 2/model.py was put")
    if time.time() > int(start) + 0.9:
        return False
    put_config(2)
    if modified("2/model.py") == modified("config.pbtxt"):
        return True
    put_config(1)
    wait_for_polls(3)
    return False


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
seen = Requests()
log = logging.getLogger("werkzeug")
log.addHandler(seen)
log.setLevel(logging.INFO)
log.propagate = False
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_DEFAULT_REGION="us-east-1")
s3 = boto3.client("s3", endpoint_url=address)
s3.create_bucket(Bucket="models")
put("1/model.py", MODEL)
put_config(1)

packages = Path(sysconfig.get_path("purelib"))
home = Path("triton").resolve()
shutil.copytree(packages / "pytriton" / "tritonserver", home)
# The stub runs the model in the interpreter that it was built for.
stub = home / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
shutil.copy(stub, home / "backends" / "python")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
argv = [str(home / "bin" / "tritonserver"), f"--model-repository=s3://{address}/models/live"]
argv += [f"--backend-directory={home / 'backends'}", "--model-control-mode=poll", "--repository-poll-secs=1"]
argv += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
argv += [f"--backend-config=python,shm-default-byte-size={2**20}"]
argv += [f"--backend-config=python,shm-region-prefix-name={home.parent.name}"]
environment = {
    **os.environ,
    "AWS_EC2_METADATA_DISABLED": "true",
    "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
with open("triton.log", "wb") as output:
    triton = subprocess.Popen(argv, env=environment, stdout=output, stderr=output, start_new_session=True)
try:
    wait_for(lambda: served() == 1, "version 1 is served")
    with urllib.request.urlopen(f"{url}/v2", timeout=5) as reply:
        assert json.load(reply)["version"] == "2.51.0"
    wait_for_polls(2)
    while not write_in_one_second():
        pass
    reads = seen.reads
    times = f"2/model.py {modified('2/model.py')}, config.pbtxt {modified('config.pbtxt')}"
    print(f"last modified: {times}; a poll in between")
    wait_for_polls(POLLS)
    print(f"{POLLS} polls later: version {served()} is served; config.pbtxt was read {seen.reads - reads} times")
    if served() != 1 or seen.reads != reads:
        raise SystemExit("the second write is noticed: the behaviour has changed")
    put_config(2)
    wait_for(lambda: served() == 2, "version 2 is served after a write in a later second")
    print(f"the same config.pbtxt put again at {modified('config.pbtxt')}: version {served()} is served")
finally:
    os.kill(triton.pid, signal.SIGTERM)
    end = time.monotonic() + 40
    while not triton_ended() and time.monotonic() < end:
        time.sleep(0.1)
    # The stubs that run the models may outlive it, and then their shared memory is left too.
    os.killpg(triton.pid, signal.SIGKILL)
    for left in Path("/dev/shm").glob(f"{home.parent.name}*"):
        left.unlink()
    triton.wait()
PYTHON
python_id=$!
code=0
wait "$python_id" || code=$?
python_id=
exit "$code"
