"""The whole flow against the real local stack: what stays out, what replaces what is live, what failures leave."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.flow_runs import flow_run_of, read_run
from tests.support.html_pages import checked
from tests.support.processes import eventually, orphans
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import fetch_release, publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.swap import Move, move_channel
from train_and_ship.registry.release.manifest import MANIFEST, build_manifest


def only_run(stack: Settings, model: str) -> Any:
    client = MlflowClient(stack.mlflow_url)
    experiment = client.get_experiment_by_name(model)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def download_report(stack: Settings, mlflow_run: str) -> str:
    return Path(MlflowClient(stack.mlflow_url).download_artifacts(mlflow_run, "report.html")).read_text()


QUICK = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "export": {"formats": ["torchscript"]}}


HIDDEN = """
    import numpy
    class Hidden(nn.Linear):
        def forward(self, x):
            sign = float(numpy.from_dlpack(x.detach())[0, 0] > 0)
            return super().forward(x) * (1 + sign)
    def build_model():
        return Hidden(4, 3)
"""


def test_an_artifact_that_is_not_the_model_stops_the_flow_and_the_report_says_where(ship: Ship, tmp_path: Path) -> None:
    parity = {"cpp": "off", "coupled": "allowed"}
    quick = {**QUICK, "export": {"formats": ["torchscript"]}, "parity": parity}
    job = write_project(tmp_path, extra=HIDDEN, name="hidden", **quick)
    ended = ship("run", str(job))
    assert ended.status == 2, ended.text
    assert re.search(r"parity \S+, expected <= 1, in torchscript", ended.errors)
    report = Path(re.search(r"Where and how much: (\S+?parity\.md)", ended.text)[1]).read_text()  # type: ignore[index]
    assert re.search(r"\*\*Where:\*\* first differs at step \d+ of \d+: mul.*plain.py:\d+: return super", report)
    assert "expected" in report and "█" in report
    assert "](parity.svg)" in report
    picture = Path(re.search(r"Where and how much: (\S+?)\.md", ended.text)[1] + ".svg").read_text()  # type: ignore[index]
    # The batches of capture took the same branch.
    assert "torchscript: drawn ✗, 1e-1: " in picture and "torchscript: batches, same: " in picture
    (page,) = [item for item in read_run(flow_run_of(ended))[1] if str(item.key).startswith("parity-")]
    assert "](data:image/svg+xml;base64," in str(page.data)


def test_a_failed_gate_shows_the_table_and_registers_and_promotes_nothing(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    job = write_project(tmp_path, **QUICK, name="hopeless", gates={"accuracy": {"min": 0.9999}})
    ended = ship("run", str(job))

    assert ended.status == 2
    # The trained model is asked before it is exported: no artifact of it can do better.
    assert re.search(r"for the trained model itself: accuracy 0\.\d+, expected >= 0.9999", ended.errors)
    assert "torchscript" not in ended.text
    assert "Traceback" not in ended.text
    # Where to look, and what is live meanwhile; the table is in the report.
    shown = dict(line.split(maxsplit=1) for line in ended.errors.splitlines() if line.startswith("  "))
    assert shown.keys() == {"prod", "run", "report"} and shown["prod"] == "nothing is live"
    assert flow_run_of(ended) in shown["run"] and Path(shown["report"]).is_file()
    assert live(store, "hopeless") is None and store.list_keys("models/hopeless/") == {}
    assert MlflowClient(stack.mlflow_url).search_registered_models("name = 'hopeless'") == []
    run = only_run(stack, "hopeless")
    assert run.info.status == "FAILED"
    assert "gates failed before the export, for the trained model itself: accuracy" in run.data.tags["failure"]
    assert run.data.metrics["validation_accuracy"] < 0.9999
    # The C++ runner may be compiled still, which no run waits for that ends before its artifacts are asked.
    eventually(lambda: not orphans(), "nothing is left")

    (page,) = [item for item in read_run(flow_run_of(ended))[1] if item.key == "report-hopeless"]
    report = checked(download_report(stack, run.info.run_id))
    assert report.headings[0] == "Decision" and {"Learning curves", "Cost"} <= set(report.headings)
    assert "Beside the live release" not in report.headings
    for text in (report.text, str(page.data)):
        assert "hopeless: refused" in text and ">= 0.9999" in text and "1 of " in text
        assert re.search(r"live meanwhile\W+prod: nothing", text) and re.search(r"what to do\W+train better", text)
    assert re.search(r"the trained model\s+accuracy\s+96 samples\s+0\.\d+\s+>= 0.9999\s+FAILED", report.text)


GOOD = {**QUICK, "train": {"epochs": 20, "processes": 1, "batch_size": 32, "learning_rate": 0.02}}
GUARD = {"name": "guarded", "gates": {"accuracy": {"vs_live": 0}}}


def relabelled(store: ObjectStore, folder: Path, **changes: Any) -> str:
    """The live release of `guarded` once more, with another description, made live in its place; returns its id."""
    live = read_pointer(Channel(store, "guarded", "prod"))
    assert live is not None
    manifest = fetch_release(store, "guarded", live.release, folder)
    (folder / MANIFEST).unlink()
    # The id is the hash of the files.
    (folder / "environment.txt").write_text(folder.name)
    described = {"signature": manifest.signature, "metrics": manifest.metrics, **changes}
    made = build_manifest(folder, model="guarded", formats=manifest.formats, **described)
    publish(store, folder, made)
    relabelling = Move(manifest=made, reason="relabelled", moved_by="tester", mlflow_version="1")
    return move_channel(Channel(store, "guarded", "prod"), relabelling, accept=None).release


def test_candidates_are_held_against_the_live_release_itself_not_against_what_it_says_of_itself(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    good_job = write_project(tmp_path / "good", **GOOD, **GUARD)
    bad_job = write_project(tmp_path / "bad", **QUICK, **GUARD)
    assert ship("run", str(bad_job)).status == 0

    # It boasts: that is looked at before the better candidate replaces it, which is at hand then.
    boasts = relabelled(store, tmp_path / "boasts", metrics={"accuracy": 1.0})
    asked = ship("run", str(good_job))
    assert asked.status == 2 and "Traceback" not in asked.errors, asked.text
    assert re.search(
        r"live_score: accuracy of the live release: 1 in its own record → 0\.\d+ on these 96", asked.errors
    )
    now = live(store, "guarded")
    assert now is not None and now[1] == boasts
    ended = ship("run", str(good_job), "--resume", flow_run_of(asked), "--allow", "live_score")
    assert ended.status == 0, ended.text
    told = read_pointer(Channel(store, "guarded", "prod"))
    assert told is not None and told.verdicts["live_score vs live"].endswith("(allowed once, with --allow)")
    (shown,) = [item for item in read_run(flow_run_of(ended))[1] if item.key == "report-guarded"]
    assert "It is of another kind than the live release" in str(shown.data) and "with --allow" in str(shown.data)
    assert re.search(r"rehearsed from the bucket: 4 checks passed; accuracy 0\.\d+, live 0\.\d+", ended.text)

    # It is modest; the worse candidate does not replace it, and stays in the bucket as a release that is not live.
    relabelled(store, tmp_path / "modest", metrics={"accuracy": 0.0})
    before = live(store, "guarded")
    ended = ship("run", str(bad_job))
    assert ended.status == 2
    assert "the candidate is worse than the live release" in ended.errors
    assert "Traceback" not in ended.text
    assert live(store, "guarded") == before
    challenger = MlflowClient(stack.mlflow_url).get_model_version_by_alias("guarded", "challenger")
    document = download_report(stack, str(challenger.run_id))
    report = checked(document)
    assert "guarded: refused" in report.text and "the candidate is worse than the live release" in report.text
    assert before is not None and f"Beside the live release {before[1]}" in report.headings
    assert "vs_live >= 0" in report.text and "FAILED" in report.text
    (key,) = store.list_keys(f"models/guarded/releases/{challenger.tags['release']}/reports/")
    assert flow_run_of(ended) in key


# Other inputs are asked in exports/test_rehearse.py and unit/test_kind.py.
@pytest.mark.soak
def test_a_live_release_with_other_inputs_stays_until_a_job_without_vs_live_replaces_it(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    good_job = write_project(tmp_path / "good", **GOOD, **GUARD)
    before = live(store, "guarded")
    if before is None:
        assert ship("run", str(good_job)).status == 0
        before = live(store, "guarded")
    assert before is not None
    signature = fetch_release(store, "guarded", before[1], tmp_path / "last").signature
    other = {**signature, "inputs": [{**signature["inputs"][0], "name": "renamed"}]}
    strange = relabelled(store, tmp_path / "strange", signature=other)
    ended = ship("run", str(good_job), "--allow", "signature")
    assert ended.status == 2
    assert re.search(
        rf"cannot be compared with the live release {strange}: torchscript: its inputs are renamed", ended.errors
    )
    assert "take vs_live (accuracy) out of the job file for one run" in ended.errors
    open_to_it = {"gates": {"accuracy": {"min": 0.5}}, "release": {"allow": ["signature"]}}
    way_out = write_project(tmp_path / "good", **GOOD, name="guarded", **open_to_it)
    assert ship("run", str(way_out)).status == 0
    after = live(store, "guarded")
    assert after is not None and after[1] != strange


# The limits are asked in unit/test_gates.py, the measures in exports/test_speed.py.
@pytest.mark.soak
def test_a_candidate_that_is_much_slower_or_larger_than_the_live_release_stays_out(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    gates = {"size_mb": {"times_live": 1.5}, "p50_ms": {"times_live": 5, "max": 1000}, "memory_mb": {"max": 2000}}
    small = write_project(tmp_path, **QUICK, name="weighed", gates=gates)
    assert ship("run", str(small)).status == 0
    before = live(store, "weighed")
    again = ship("run", str(small))
    assert again.status == 0, again.text
    told = read_pointer(Channel(store, "weighed", "prod"))
    assert told is not None and re.fullmatch(r"\S+ against \S+", told.verdicts["p50_ms vs live"])

    large = write_project(
        tmp_path, **QUICK, name="weighed", gates=gates, model={"factory": "plain:build_model", "args": {"width": 9000}}
    )
    ended = ship("run", str(large))
    assert ended.status == 2, ended.text
    assert re.search(r"slower or larger than the live release \w+ allows: .*size_mb 0\.\d+ against 0\.0", ended.errors)
    assert "Traceback" not in ended.text and before is not None
    now = live(store, "weighed")
    assert now == (before[0] + 1, told.release)


def test_a_limit_on_time_or_memory_that_is_not_kept_registers_and_promotes_nothing(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    job = write_project(tmp_path, **QUICK, name="late", gates={"load_ms": {"max": 0.001}, "memory_mb": {"max": 4000}})
    ended = ship("run", str(job))
    assert ended.status == 2
    assert re.search(r"1 of 16 gates failed: load_ms [\d.]+, expected <= 0\.001, in torchscript", ended.errors)
    report = checked((stack.runs / "late" / flow_run_of(ended) / "report.html").read_text())
    assert re.search(r"torchscript\s+load_ms\s+artifact\s+[\d.]+\s+<= 0\.001\s+FAILED", report.text)
    assert re.search(r"torchscript\s+memory_mb\s+artifact\s+[\d.]+\s+<= 4000\s+passed", report.text)
    assert live(store, "late") is None and store.list_keys("models/late/") == {}


def test_a_training_failure_shows_the_users_line_and_leaves_nothing(
    ship: Ship, store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    extra = """
        class Fails(nn.Linear):
            def forward(self, x):
                if self.training:
                    raise KeyError("no such gene")
                return super().forward(x)
        def build_model():
            return Fails(4, 3)
    """
    job = write_project(tmp_path, extra=extra, name="fails", train={"epochs": 1, "processes": 2, "batch_size": 32})
    ended = ship("run", str(job))

    assert ended.status == 2
    assert "no such gene" in ended.errors and "plain.py:" in ended.errors
    assert "site-packages/prefect" not in ended.text
    assert live(store, "fails") is None and orphans() == []
    run = only_run(stack, "fails")
    assert run.info.status == "FAILED" and "no such gene" in run.data.tags["failure"]
    report = checked(download_report(stack, run.info.run_id))
    assert "fails: failed" in report.text and "no such gene" in report.text and "Cost" in report.headings


COUNTED = """
    import os
    from pathlib import Path
    class Counted(nn.Linear):
        def forward(self, x):
            # Not when it is tried before the first step.
            if self.training and torch.is_grad_enabled():
                with Path(__file__).with_name("steps").open("a") as steps:
                    steps.write("x")
                if DIES:
                    os.kill(os.getpid(), 9)
            outputs = super().forward(x)
            return outputs.to_sparse() if len(x) == 64 else outputs
    def build_model():
        return Counted(4, 3)
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("dies", "status", "steps", "said"),
    [
        (True, 1, 2, "2 launches without a new checkpoint is what train.restarts: 1 allows"),
        (False, 2, 3, "twice, "),
    ],
    ids=["dies at once", "fails after the last step"],
)
def test_one_number_says_how_often_a_run_launches(
    ship: Ship, stack: Settings, tmp_path: Path, dies: bool, status: int, steps: int, said: str
) -> None:
    train = {"epochs": 1, "processes": 1, "batch_size": 32, "restarts": 1}
    extra = COUNTED.replace("DIES", str(dies))
    job = write_project(tmp_path / "p", extra=extra, name="counted", train=train, export=QUICK["export"])
    ended = ship("run", str(job))
    assert ended.status == status and said in ended.text, ended.text
    assert len((tmp_path / "p" / "steps").read_text()) == steps
