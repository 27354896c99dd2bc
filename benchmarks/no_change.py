"""What retraining costs when there is nothing to do, beside `ship run` of the same job.

    python benchmarks/no_change.py [rounds]

Needs a running stack (`ship up`). The digits job is shipped, and from then on asked again; the data is read each time.
The same once more with its data as a snapshot, which is known without being read.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from report import PAGE, ROOT, machine, write

ROUNDS = 5
SHIP = Path(sys.executable).with_name("ship")
ARRAYS = """

def build_snapshot(split: str, snapshot: str) -> TensorDataset:
    import numpy

    found = numpy.load(f"{snapshot}/{split}.npz")
    return TensorDataset(torch.from_numpy(found["images"]), torch.from_numpy(found["labels"]))
"""
SAVE = """
import sys, numpy
from digits import build_dataset
for split in ("train", "validation"):
    images, labels = build_dataset(split).tensors
    numpy.savez(f"{sys.argv[1]}/{split}.npz", images=images.numpy(), labels=labels.numpy())
"""


def ship(*words: str) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run([SHIP, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ship {' '.join(words)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began, done.stdout


def project(folder: Path, name: str) -> tuple[Path, Path]:
    """The digits example under another name, and the same with a snapshot: two job files."""
    shutil.copytree(ROOT / "examples/digits", folder, dirs_exist_ok=True)
    code = folder / "digits.py"
    code.write_text(code.read_text() + ARRAYS)
    data = folder / "data"
    data.mkdir()
    subprocess.run([sys.executable, "-c", SAVE, str(data)], cwd=folder, check=True)
    ship("snapshot", str(data))
    job = yaml.safe_load((folder / "job.yaml").read_text())
    plain, kept = folder / "job.yaml", folder / "kept.yaml"
    plain.write_text(yaml.safe_dump({**job, "name": name}))
    kept.write_text(
        yaml.safe_dump({
            **job, "name": f"{name}-kept", "data": {"factory": "digits:build_snapshot", "snapshot": {"path": "data"}},
        })
    )  # fmt: skip
    return plain, kept


def last_decision(name: str) -> dict[str, object]:
    _, told = ship("history", name, "--decisions", "--json", "--last", "1")
    (decision,) = json.loads(told)
    assert decision["decision"] == "skipped", decision
    return dict(decision)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    name = f"unchanged-{int(time.time())}"
    rows, whole, decided, kept_decided = [], [], [], []
    with tempfile.TemporaryDirectory() as home:
        plain, kept = project(Path(home) / "digits", name)
        for job in (plain, kept):
            ship("run", str(job))
            ship("retrain", str(job))
        for number in range(1, rounds + 1):
            seconds, told = ship("retrain", str(plain))
            assert re.search("nothing has changed", told), told
            asked = float(str(last_decision(name)["seconds"]))
            kept_seconds, _ = ship("retrain", str(kept))
            kept_asked = float(str(last_decision(f"{name}-kept")["seconds"]))
            run, _ = ship("run", str(plain))
            whole.append(seconds / run)
            decided.append(asked)
            kept_decided.append(kept_asked)
            rows.append(
                f"| {number} | {seconds:.1f} | {asked:.1f} | {kept_seconds:.1f} | {kept_asked:.1f} | {run:.1f} "
                f"| {seconds / run:.2f} | {kept_seconds / run:.2f} |"
            )
    columns = (
        "round", "retrain, whole, s", "answer, s", "with a snapshot, whole, s", "answer, s", "`ship run`, s", "ratio",
        "ratio with a snapshot",
    )  # fmt: skip
    text = "\n".join([
        "## A retraining run without changes",
        "",
        machine("torch", "prefect", "mlflow"),
        "Measured with `python benchmarks/no_change.py`: examples/digits on a running local stack, alternately, one "
        "uncounted round first. *Whole* is the command from its start to its end (imports of Python, Prefect and, "
        "without a snapshot, torch); *answer* is from the question to the recorded decision inside the flow run, "
        "reading the data included.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *rows,
        "",
        f"**Median: an answer in {statistics.median(decided):.1f} s, in {statistics.median(kept_decided):.1f} s with a "
        f"snapshot; the whole command takes {statistics.median(whole):.2f} of a `ship run`.**",
    ])  # fmt: skip
    print(text)
    write(PAGE, "no_change", text)


if __name__ == "__main__":
    main()
