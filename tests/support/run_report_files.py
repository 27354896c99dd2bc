"""The files of a run whose every name is an attack, and the report that is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from torchworker.contract import decode
from train_and_ship.registry.cost import Rates, Spent
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.report.page import Page
from train_and_ship.registry.report.run import Ending, Outcome, run_page
from train_and_ship.registry.run_folder import RunFiles
from train_and_ship.registry.text import Link
from train_and_ship.registry.tracking.curves import Point

EVIL = "<script>alert(1)</script>"
EVIL_IMAGE = '"><img src=http://evil.example/x onerror=alert(1)>'
EVIL_MARKDOWN = "![x](http://evil.example/x.png) [y](javascript:alert(1)) | `"
JOB = Job.model_validate(
    {
        "name": "hostile",
        "model": {"factory": "plain:build_model", "args": {"kind": EVIL}},
        "data": {"factory": "plain:build_dataset", "checks": {}},
        "train": {"epochs": 2},
        "gates": {"accuracy": {"vs_live": 0}},
        "release": {"policy": "better"},
    }
)


def split(samples: int, labels: dict[str, int]) -> dict[str, Any]:
    quantiles = [place / 10 for place in range(101)]
    return {
        "samples": samples, "fingerprint": "f" * 32, "repeated": 0, "labels": labels,
        "columns": {EVIL: {"quantiles": quantiles, "values": samples}}, "tensors": {},
    }  # fmt: skip


def speed(factor: float) -> dict[str, Any]:
    def calls(batch: int) -> dict[str, float]:
        return {"batch": batch, "calls": 9, "p50_ms": factor * batch, "p99_ms": 2.0, "thread_ms": 1.0, "cpu_ms": 1.0}

    onnx = {
        "format": "onnx", "bytes": 1000, "load_ms": 3.0, "memory_bytes": None, "problem": "",
        "speeds": [calls(1), calls(64)],
    }  # fmt: skip
    return {
        "measured": {"onnx": onnx}, "serve": {"latency": "onnx"}, "threads": 1, "machine": f"a machine {EVIL}",
        "speedups": {}, "too_slow": {}, "verdicts": [],
    }  # fmt: skip


def verdict(gate: str, case: str, measured: float, passed: bool = True, note: str = "") -> dict[str, Any]:
    return {
        "format": "onnx", "gate": gate, "case": case, "measured": measured, "limit": "<= 1", "passed": passed,
        "note": note, "ran": True,
    }  # fmt: skip


def run_files(**changes: Any) -> RunFiles:
    """A run whose every name is an attack."""
    known: dict[str, Any] = {
        "folder": Path("/runs/hostile/one"),
        "job": JOB,
        "about": {
            "job": {}, "flow_run_name": EVIL, "flow_run_id": "0" * 8, "git_commit": "abc", "snapshot": "",
            "begun": "2026-11-24T02:00:00.000+00:00",
        },
        "costs": [Spent(stage="train", wall=10.0, cpu=18.0, gpu=0.0, attempts=1)],
        "facts": {
            "train": split(90, {"0": 60, EVIL: 30}), "validation": split(10, {"0": 5, EVIL: 5}), "overlap": 0,
            "seconds": 0.1,
        },
        "checks": {
            "live": "r1",
            "findings": [
                {"check": "schema", "where": EVIL, "measured": EVIL_MARKDOWN, "limit": "none", "passed": False},
                {"check": "psi", "where": EVIL, "measured": "0.1", "limit": "at most 0.25", "passed": True},
            ],
            "distributions": [
                {
                    "column": EVIL, "bins": {"names": [EVIL, "b"], "before": [0.5, 0.5], "now": [0.1, 0.9]},
                    "psi": {"value": 0.3, "chance": 0.1}, "ks": None,
                }
            ],
        },
        "made_from": {"git_commit": "abc", "code": "c" * 16, "packages": {"torch": "2.13.0", "python": "3.11.2"}},
        "trained": {
            "weights": "w", "train_samples": 90, "validation_samples": 10, "data_fingerprint": "d" * 32,
            "environment": {"torch": "2"},
            "notes": [EVIL], "history": [{"epoch": 1}],
        },
        "points": [
            Point(name, value, step, 0.0)
            for step, value in ((1, 1.0), (2, 0.5))
            for name in ("train_loss", "validation_loss", f"validation_{EVIL}")
        ],
        "exported": {
            "artifacts": {"onnx": {"file": "model.onnx", "method": EVIL, "seconds": 1.0}},
            "left_out": {"pt2": EVIL_MARKDOWN}, "libraries": [], "inputs": [], "outputs": [], "dims": [],
            "reference": EVIL,
        },
        "validated": {
            "verdicts": [verdict("parity", "batch 1", 0.25), verdict(EVIL, "10 samples", 2.0, False, EVIL_IMAGE)],
            "reference": "the model in float64", "validation_samples": 10, "metrics": {"onnx": {EVIL: 0.5}},
            "int8": {}, "speed": speed(1.0),
            "errors": [
                {"format": "onnx", "probes": "batches", "failed": False, "absolute": [], "relative": [5] + [1] * 14}
            ],
        },
        "lineage": {"start": "", "inputs": {"config": "e" * 16}},
        "registered": {
            "release": "a" * 20, "version": "3", "version_url": "javascript:alert(1)",
            "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/2", "stage": "",
        },
        "compared": {
            "verdicts": [], "live_problem": "", "candidate": {"onnx": {"accuracy": 0.9}},
            "live": {"onnx": {"accuracy": 0.8}}, "samples": 10, "candidate_speed": {}, "live_speed": {},
            "intervals": {"accuracy": {"low": -0.01, "high": 0.2}},
        },
        "against": {"live": "r1", "speed": speed(2.0)},
    }  # fmt: skip
    kinds = get_type_hints(RunFiles)
    asked = {**known, **changes}
    return RunFiles(**{
        name: decode(kinds[name], value) if isinstance(value, dict) else value for name, value in asked.items()
    })  # fmt: skip


def ended(**changes: Any) -> Outcome:
    known: dict[str, Any] = {
        "verdict": Ending.KEPT, "title": f"hostile {EVIL}", "why": EVIL_IMAGE, "table": "",
        "facts": [("asked by", EVIL_MARKDOWN)], "places": [("Prefect run", Link(text=EVIL, url="javascript:alert(1)"))],
    }  # fmt: skip
    return Outcome(**{**known, **changes})


def page_of(files: RunFiles | None, **changes: Any) -> Page:
    return run_page(ended(**changes), files, Rates(cpu_hour=0.05, currency="EUR"), "models")
