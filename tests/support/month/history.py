"""What has to be true of a month when it is over; every sentence that is not is returned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.support.month.month import MODEL, Lived, Month, is_worker
from tests.support.month.nights import Fault
from tests.support.processes import processes_of
from train_and_ship.registry.channels.decisions import FAILED, KEPT, PROMOTED, SKIPPED, WAITING
from train_and_ship.registry.tracking.connection import connect

STATES = {PROMOTED: ("Promoted",), KEPT: ("Kept",), SKIPPED: ("Skipped",), FAILED: ("Failed", "Refused")}
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the commands tell about a month that is over."""

    answers: dict[str, list[Record]]
    """`ship history --decisions`, by flow run, in order of time."""
    moves: list[Record]
    """`ship history`, oldest first."""
    live: list[str]
    """The release that `ship live --at` names for each morning; empty for none."""
    doctor: str
    """What `ship doctor` found."""

    def last(self, lived: Lived) -> Record:
        """The last answer of a night."""
        return self.answers.get(lived.run, [{}])[-1]


def tell(month: Month) -> Told:
    """Ask the commands, as a person would who was away for the month."""

    def said(*words: str) -> Any:
        done = month.ship(*words, "--json")
        return json.loads(done.output) if done.status == 0 else None

    answers: dict[str, list[Record]] = {}
    for answer in said("history", MODEL, "--decisions", "--last", "100"):
        answers.setdefault(answer["flow_run"], []).append(answer)
    mornings = [said("live", MODEL, "--at", lived.morning.isoformat()) for lived in month.lived]
    doctor = month.ship("doctor", MODEL)
    return Told(
        answers=answers,
        moves=said("history", MODEL),
        live=[found["release"] if found else "" for found in mornings],
        doctor=doctor.text,
    )


def mismatches(month: Month, told: Told) -> list[str]:
    """Hold what the bucket, Prefect, MLflow and a serving machine say against what each night had to bring."""
    found = []
    champion: Record = {}
    previous: Record = {}
    challenger = ""
    for lived, live_then in zip(month.lived, told.live, strict=True):
        found += [f"night {lived.night.number}: {what}" for what in _night(lived, told.answers.get(lived.run, []))]
        last = told.last(lived)
        if last.get("decision") == PROMOTED:
            champion, previous = last, champion
        if last.get("decision") == KEPT:
            challenger = last["mlflow_version"]
        release = champion.get("candidate", "")
        seen = {
            "`ship live --at` in the morning": live_then,
            "the pointer": lived.live.release if lived.live else "",
            "the serving machine": lived.served,
        }
        aliases = {
            "champion": champion.get("mlflow_version"),
            "previous": previous.get("mlflow_version"),
            "challenger": challenger or None,
        }
        found += [
            f"night {lived.night.number}: expected {release or 'nothing'} to be live, got {got or 'nothing'} from {who}"
            for who, got in seen.items()
            if got != release
        ]
        found += [
            f"night {lived.night.number}: expected MLflow's alias {alias} at version {version}, got {got}"
            for alias, version in aliases.items()
            if (got := lived.aliases.get(alias)) != version
        ]
    return [*found, *_moves(month, told), *_runs(month, told), *_left_over(month, told)]


def _night(lived: Lived, answers: list[Record]) -> Iterator[str]:
    """What retraining answered, why, when, and in which state its run ended."""
    night = lived.night
    if (got := tuple(answer["decision"] for answer in answers)) != night.answers:
        yield f"expected the answers {night.answers}, got {got}: {[answer['why'] for answer in answers]}"
        return
    if lived.state not in (expected := STATES[night.answers[-1]]):
        yield f"expected the run to end as {' or '.join(expected)}, got {lived.state}"
    if not re.search(night.why, answers[-1]["why"]):
        yield f"expected a reason like {night.why!r}, got {answers[-1]['why']!r}"
    for answer in answers:
        if not answer["asked"].startswith(f"night {night.number} ("):
            yield f"expected to be asked by night {night.number}, got {answer['asked']}"
        if not lived.asleep <= datetime.fromisoformat(answer["at"]) <= lived.morning:
            yield f"expected an answer from {lived.asleep} to {lived.morning}, got {answer['at']}"
    if night.fault is Fault.MLFLOW_LATE and "mended: alias champion" not in lived.said:
        yield f"expected `ship up` to let the aliases follow, got {lived.said!r}"


def _moves(month: Month, told: Told) -> Iterator[str]:
    """The channel moved as often as a candidate was better, by that night's run and for its reason, and never else."""
    promoted = [lived for lived in month.lived if told.last(lived).get("decision") == PROMOTED]
    if len(promoted) != len(told.moves):
        yield f"expected {len(promoted)} moves, got {len(told.moves)}"
        return
    before = None
    for generation, (lived, move) in enumerate(zip(promoted, told.moves, strict=True), 1):
        answer = told.last(lived)
        expected = {
            "generation": generation, "release": answer["candidate"], "previous": before, "flow_run": lived.run,
            "mlflow_version": answer["mlflow_version"],
        }  # fmt: skip
        for name, value in expected.items():
            if move[name] != value:
                yield f"generation {generation}: expected {name} {value}, got {move[name]}"
        if not re.fullmatch(r"all \d+ gates passed", move["reason"]):
            yield f"generation {generation}: expected all gates passed and how many, got {move['reason']}"
        if before is not None and move["verdicts"].get("accuracy vs live", "none") not in answer["why"]:
            yield f"generation {generation}: {move['verdicts']} is not the reason of the night: {answer['why']}"
        if not lived.asleep <= datetime.fromisoformat(move["moved_at"]) <= lived.morning:
            yield f"generation {generation}: it moved at {move['moved_at']}, not in night {lived.night.number}"
        before = move["release"]
    if month.served != (order := [move["release"] for move in told.moves]):
        yield f"expected the serving machine to take {order}, got {month.served}"


def _runs(month: Month, told: Told) -> Iterator[str]:
    """Prefect and MLflow have one run a night, none of them still at work, and one version for each candidate."""
    query = {"deployments": {"name": {"any_": [MODEL]}}, "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    runs = {run["id"]: run["state_name"] for run in month.prefect.ask("POST", "/flow_runs/filter", query)}  # type: ignore[index]
    if runs != (expected := {lived.run: lived.state for lived in month.lived}):
        yield f"expected Prefect's runs {expected}, got {runs}"
    limit = month.prefect.ask("GET", f"/v2/concurrency_limits/train-and-ship.{MODEL}")
    if limit["active_slots"]:
        yield f"expected no run to hold the slot of the model, got {limit['active_slots']}"
    for lived in month.lived:
        if lived.night.fault is Fault.KILLED and not _resumed(month, lived):
            yield f"night {lived.night.number}: expected training to go on from a checkpoint"
    client = connect(month.settings.mlflow_url)
    experiment = client.get_experiment_by_name(MODEL)
    assert experiment is not None
    for run in client.search_runs([experiment.experiment_id]):
        if run.info.status not in ("FINISHED", "FAILED", "KILLED"):
            yield f"expected MLflow's run {run.info.run_name} to have ended, got {run.info.status}"
    versions = {version.version: version.tags["release"] for version in client.search_model_versions(f"name='{MODEL}'")}
    made = {
        answer["mlflow_version"]: answer["candidate"]
        for answers in told.answers.values()
        for answer in answers
        if answer["candidate"]
    }
    if versions != made:
        yield f"expected MLflow's versions {made}, got {versions}"


def _resumed(month: Month, lived: Lived) -> bool:
    query = {"logs": {"flow_run_id": {"any_": [lived.run]}}, "limit": 200}
    lines = [line["message"] for line in month.prefect.ask("POST", "/logs/filter", query)]  # type: ignore[index]
    return any(re.search(r"resumed from step \d+ of \d+", line) for line in lines)


def _left_over(month: Month, told: Told) -> Iterator[str]:
    """No half release, no half stage, no answer that nobody recorded, no process of a run that died."""
    if "all well" not in told.doctor:
        yield f"expected `ship doctor` to find all well, got {told.doctor!r}"
    runs = month.settings.runs / MODEL
    for path in (*runs.glob("*/*.work"), *runs.glob(f"*/{WAITING}")):
        yield f"expected nothing half done, got {path}"
    for process in processes_of(month.settings):
        if is_worker(process):
            yield f"expected no worker to outlive its night, got {process}"
