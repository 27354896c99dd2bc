"""The digits job as one careful script: train, export, validate, register, promote, without train-and-ship.

The baseline of benchmarks/ship_vs_by_hand.py. Needs the local stack (`ship up`) or its addresses in
MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL. The last line printed is JSON: seconds by stage.
"""
# ruff: noqa: E402

import time

STARTED = time.perf_counter()  # before the heavy imports: they are part of the bill

import base64
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import boto3
import mlflow
import onnx
import onnxruntime
import torch
from botocore.exceptions import ClientError
from mlflow.entities import Metric
from mlflow.models import infer_signature
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples/digits")]
from digits import build_dataset, build_model
from train import MODEL, TRAIN

NAME = "digits-by-hand"
MINIMUM_ACCURACY = 0.97
FILES = {"torchscript": "model.pt", "onnx": "model.onnx", "pt2": "model.pt2"}
BUCKET = os.environ.get("SHIP_BUCKET", "models").removeprefix("s3://")

Run = Callable[[Tensor], Tensor]


def train(out: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, f"--nproc-per-node={TRAIN['processes']}", str(HERE / "train.py"), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def export(model: nn.Module, images: Tensor, out: Path) -> None:
    torch.jit.script(model).save(out / FILES["torchscript"])
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images[:4],), dynamic_shapes=dynamic)
    torch.export.save(program, out / FILES["pt2"])
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(program, f=out / FILES["onnx"], dynamo=True, external_data=False, verbose=False, **names)


def load(out: Path) -> dict[str, Run]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(out / FILES["onnx"], options, providers=["CPUExecutionProvider"])
    return {
        "torchscript": torch.jit.load(out / FILES["torchscript"]),
        "onnx": lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0]),
        "pt2": torch.export.load(out / FILES["pt2"]).module(),
    }


def p50_ms(run: Run, image: Tensor) -> float:
    for _ in range(5):
        run(image)
    seconds = []
    for _ in range(30):
        begin = time.perf_counter()
        run(image)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1000


@torch.no_grad()
def validate(model: nn.Module, images: Tensor, labels: Tensor, out: Path) -> dict[str, dict[str, float]]:
    report = {}
    for name, run in load(out).items():
        for size in (1, 64, 128):
            torch.testing.assert_close(run(images[:size]), model(images[:size]), rtol=1e-4, atol=1e-5)
        accuracy = (run(images).argmax(1) == labels).float().mean().item()
        if accuracy < MINIMUM_ACCURACY:
            raise SystemExit(f"{name}: accuracy {accuracy:.4f}, expected at least {MINIMUM_ACCURACY}")
        latency = {f"p50_ms_batch_{size}": p50_ms(run, images[:size]) for size in (1, 64)}
        report[name] = {"accuracy": accuracy, **latency}
    return report


def register(model: nn.Module, report: dict[str, dict[str, float]], out: Path) -> str:
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000"))
    mlflow.set_experiment(NAME)
    client = mlflow.MlflowClient()
    images, labels = (t.numpy() for t in build_dataset("train").tensors)
    with mlflow.start_run() as run, torch.no_grad():
        mlflow.log_params({**TRAIN, **MODEL})
        now = int(time.time() * 1000)
        epochs = json.loads((out / "metrics.json").read_text())
        points = [(k, v, row["epoch"]) for row in epochs for k, v in row.items() if k != "epoch"]
        points += [(f"{name}.{k}", v, 0) for name, row in report.items() for k, v in row.items()]
        client.log_batch(run.info.run_id, metrics=[Metric(k, v, now, step) for k, v, step in points])
        mlflow.log_input(mlflow.data.from_numpy(images, targets=labels, name="digits"), context="training")
        example = images[:2]
        logged = mlflow.onnx.log_model(
            onnx.load(out / FILES["onnx"]),
            name="model",
            signature=infer_signature({"image": example}, {"logits": model(torch.from_numpy(example)).numpy()}),
            extra_files=[str(out / f) for f in (FILES["torchscript"], FILES["pt2"], "report.json")],
            save_as_external_data=False,
            onnx_execution_providers=["CPUExecutionProvider"],
            pip_requirements=[f"onnxruntime=={onnxruntime.__version__}"],
        )
    version = mlflow.register_model(logged.model_uri, NAME).version
    client.set_registered_model_alias(NAME, "champion", version)
    return version


def put_new(s3, key: str, body: bytes) -> None:
    """Write a key that must not exist yet; the same bytes already there are fine."""
    digest = hashlib.sha256(body)
    checksum = {"ChecksumSHA256": base64.b64encode(digest.digest()).decode()}
    metadata = {"sha256": digest.hexdigest()}
    try:
        s3.put_object(Bucket=BUCKET, Key=key, Body=body, IfNoneMatch="*", Metadata=metadata, **checksum)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
            raise
        if s3.head_object(Bucket=BUCKET, Key=key)["Metadata"].get("sha256") != digest.hexdigest():
            raise SystemExit(f"{key} exists with other bytes") from error


def promote(out: Path, version: str) -> str:
    s3 = boto3.client(
        "s3",
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL", "http://127.0.0.1:4566"),
        aws_access_key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        region_name=os.environ.get("AWS_REGION", "us-east-1"),
    )
    bodies = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    table = {name: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)} for name, b in bodies.items()}
    release = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
    manifest = json.dumps({"files": table, "mlflow_version": version}, indent=1).encode()

    prefix = f"models/{NAME}/releases/{release}"
    for name, body in bodies.items():
        put_new(s3, f"{prefix}/{name}", body)
    put_new(s3, f"{prefix}/MANIFEST.json", manifest)  # last: no manifest, no release

    pointer = f"models/{NAME}/channels/prod.json"
    try:
        found = s3.get_object(Bucket=BUCKET, Key=pointer)
        live, condition = json.load(found["Body"]), {"IfMatch": found["ETag"]}
    except s3.exceptions.NoSuchKey:
        live, condition = {"generation": 0, "release": None}, {"IfNoneMatch": "*"}
    moved = {
        "generation": live["generation"] + 1,
        "release": release,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "previous": live["release"],
    }
    s3.put_object(Bucket=BUCKET, Key=pointer, Body=json.dumps(moved).encode(), **condition)
    return release


def main() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # A model this small gains nothing from more, and on a busy machine the threads wait for each other.
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    last = STARTED

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = round(now - last, 3), now

    done("imports")
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder:
        out = Path(folder)
        train(out)
        done("train")

        model = build_model(**MODEL)
        model.load_state_dict(load_file(out / "weights.safetensors"))
        model.eval()
        images, labels = build_dataset("validation").tensors
        export(model, images, out)
        done("export")

        report = validate(model, images, labels, out)
        (out / "report.json").write_text(json.dumps(report, indent=1))
        done("validate")

        version = register(model, report, out)
        done("register")

        release = promote(out, version)
        done("promote")

    print(json.dumps({"seconds": seconds, "release": release, "version": version, "report": report}))


if __name__ == "__main__":
    main()
