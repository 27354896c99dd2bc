"""Rollouts by a real Prefect: a run begins one, the deployment `watch` ends it, and what is newer waits meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.prefect_api import Api
from tests.support.processes import PATIENCE, eventually
from tests.support.projects import CODE
from tests.support.releases import move
from tests.support.retraining import POOR, Project
from tests.support.runnable_releases import runnable
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.watching import watch_rollouts
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.rollouts.moves import running
from train_and_ship.registry.rollouts.record import Outcome
from train_and_ship.registry.rollouts.versions import read_versions

pytestmark = pytest.mark.soak
MODEL = "rolled-out"
RELEASE = {"policy": "always", "rollout": {"steps": [1, 100], "every": "1s"}}


def is_watched(api: Api) -> bool:
    (schedule,) = api.ask("GET", "/deployments/name/watch/watch")["schedules"]
    return bool(schedule["active"])


def test_a_candidate_goes_from_one_percent_to_live_and_a_newer_one_waits_until_then(
    store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    api, project, channel = Api(stack), Project(tmp_path, store, MODEL), Channel(store, MODEL)
    given: dict[str, Any] = {"release": RELEASE}
    # Nothing is live that the first one could be tried beside.
    assert project.retrain(train=POOR, **given).name == "Promoted"
    first = project.live
    assert not is_watched(api)

    began = project.retrain(train={**POOR, "seed": 1}, **given)
    assert began.name == "Rolling out", began.message
    rollout = running(channel)
    assert rollout is not None and (rollout.share, rollout.key) == (100, "user_id")
    assert project.decisions()[-1].decision == "rolling out"
    assert project.live == first
    assert is_watched(api)
    again = project.retrain(train={**POOR, "seed": 1}, **given)
    assert again.name == "Skipped" and "is being rolled out: 1 % of the requests" in (again.message or "")
    newer = project.retrain(train={**POOR, "seed": 2}, **given)
    assert newer.name == "Staged", newer.message
    assert "waits for the end of another rollout on prod" in (newer.message or "")
    assert running(channel) == rollout

    # Nobody asks the deployment: its schedule does, once a minute.
    eventually(lambda: not is_watched(api), "the last look ends the rollout, and rests", 2 * PATIENCE, every=2)
    live = project.live
    assert (live.generation, live.release) == (2, rollout.release)
    assert live.verdicts["rollout"].startswith("1 %, 100 % of the requests since ")
    assert live.mlflow_version == "2" and len(live.flow_run) == 36
    assert [one.outcome for one in read_versions(channel)] == [Outcome.PROMOTED, *[Outcome.NONE] * 2]
    # A night on which the code is new again: the one that waited is trained anew beside what is live now.
    assert project.retrain(train={**POOR, "seed": 2}, code=CODE + "\n# new\n", **given).name == "Rolling out"
    watch_rollouts(stack, False)


def test_the_promote_deployment_asks_a_person_and_then_begins_a_rollout(
    store: ObjectStore, stack: Settings, tmp_path: Path
) -> None:
    api, model = Api(stack), "asked-about"
    live, candidate = (runnable(store, tmp_path / str(seed), 0.97, seed=seed, model=model) for seed in range(2))
    move(store, live, model=model, mlflow_version="")
    run = api.start("promote", model=model, source=candidate.release, why="new scans", approve=True, rollout=True)
    api.wait(run, "Paused")
    assert running(Channel(store, model)) is None
    api.answer(run, approve=True, by="grace")
    assert f"release {candidate.release} at 1 %" in api.wait(run, "Rolling out")["state"]["message"]
    rollout = running(Channel(store, model))
    assert rollout is not None and rollout.verdicts["approved"] == "by someone said to be grace"
    assert (rollout.flow_run, rollout.why) == (run, "new scans")
    watch_rollouts(stack, False)
