"""Rollback and promotion as flows on the worker, with a person's approval through Prefect's API."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import httpx
import pytest

from tests.support.fault_proxy import DropRequest, FaultProxy, Rule
from tests.support.fixture_types import Command, Ship
from tests.support.flow_runs import report_in_mlflow, reports_in_prefect
from tests.support.html_pages import checked
from tests.support.prefect_api import Api
from tests.support.processes import eventually
from tests.support.projects import write_project
from tests.support.releases import move
from tests.support.runnable_releases import runnable
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.keys import reports_prefix
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import ROLLBACK, Pointer, read_pointer
from train_and_ship.registry.channels.rules import Approval, set_rules
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.tracking.rest import RestRegistry


@pytest.fixture
def releases(store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Two releases of a model of its own on staging, the first of them on prod."""
    model = f"moves-{uuid.uuid4().hex[:8]}"
    made = []
    for number, accuracy in enumerate((0.97, 0.98)):
        made.append(runnable(store, tmp_path / str(number), accuracy, seed=number, model=model))
        move(store, made[-1], model=model, channel="staging", mlflow_version="")
    move(store, made[0], model=model, mlflow_version="")
    return made


def live(store: ObjectStore, model: str) -> Pointer:
    pointer = read_pointer(Channel(store, model, "prod"))
    assert pointer is not None
    return pointer


@pytest.fixture
def api(stack: Settings) -> Api:
    return Api(stack)


def test_the_rollback_deployment_puts_back_what_was_live(
    releases: list[Manifest], api: Api, store: ObjectStore
) -> None:
    first, second = releases
    move(store, second, model=first.model, mlflow_version="")
    api.wait(api.start("rollback", model=first.model, why="errors since 14:00", by="ada"), "Completed")
    pointer = live(store, first.model)
    assert (pointer.release, pointer.kind, pointer.generation) == (first.release, ROLLBACK, 3)
    assert (pointer.moved_by, pointer.reason) == ("ada", "errors since 14:00")
    assert len(pointer.flow_run) == 36
    (shown,) = reports_in_prefect(api, pointer.flow_run)
    (kept,) = store.list_keys(reports_prefix(first.model, first.release))
    document = store.get(kept)
    assert document is not None
    for said in ("errors since 14:00", "read back and hashed", "-0.01 (-1.0%)"):
        assert said in shown and said in checked(document[0].decode()).text


@pytest.mark.parametrize("flow", ["rollback", "promote"])
@pytest.mark.parametrize(("given", "missing"), [("model", "why"), ("why", "model")])
def test_a_move_without_a_model_or_a_reason_is_not_started(api: Api, flow: str, given: str, missing: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        api.start(flow, **{given: "digits"})
    assert refused.value.response.status_code == 409
    assert f"'{missing}' is a required property" in refused.value.response.text


def test_an_approved_promotion_goes_live_with_the_name_of_who_approved(
    releases: list[Manifest], api: Api, store: ObjectStore
) -> None:
    first, second = releases
    run = api.start("promote", model=first.model, why="a quiet week", approve=True)
    paused = api.wait(run, "Paused")
    schema = paused["state"]["state_details"]["run_input_keyset"]
    assert schema is not None and live(store, first.model).release == first.release
    (asked,) = reports_in_prefect(api, run)
    assert f"shall release {second.release} go live on prod?" in asked and "0.01 (+1.0%)" in asked
    api.answer(run, approve=True, by="grace", comment="looks good")
    api.wait(run, "Promoted")
    pointer = live(store, first.model)
    assert (pointer.release, pointer.previous, pointer.flow_run) == (second.release, first.release, run)
    assert pointer.verdicts["approved"] == "by someone said to be grace: looks good"
    assert pointer.verdicts["vs_live"] == (
        f"accuracy 0.98 against 0.97, as recorded when each was made (live {first.release})"
    )
    assert pointer.verdicts["rehearsal"] == "3 checks passed: onnx"


def test_a_rejected_promotion_changes_nothing_and_says_who_said_no(
    releases: list[Manifest], api: Api, store: ObjectStore
) -> None:
    first, second = releases
    # Nobody asked for a question here: the channel does.
    set_rules(Channel(store, first.model, "prod"), Approval.REQUIRED, "ada", "customers see it")
    run = api.start("promote", model=first.model, why="a quiet week")
    api.wait(run, "Paused")
    api.answer(run, approve=False, by="grace", comment="not on a Friday")
    failed = api.wait(run, "Refused")
    assert (
        f"release {second.release} was not approved by someone said to be grace: not on a Friday"
        in failed["state"]["message"]
    )
    eventually(lambda: "not on a Friday" in reports_in_prefect(api, run)[-1], "the report says who said no")
    assert live(store, first.model).release == first.release


# Without a flow: attacks/test_approval.py.
@pytest.mark.soak
def test_a_rollback_asks_about_a_release_that_is_named_and_not_about_what_was_live_before(
    releases: list[Manifest], api: Api, store: ObjectStore, ship: Ship
) -> None:
    first, second = releases
    move(store, second, model=first.model, mlflow_version="")
    set_rules(Channel(store, first.model, "prod"), Approval.REQUIRED, "ada", "customers see it")
    named = api.start("rollback", model=first.model, why="errors since 14:00", to=first.release)
    api.wait(named, "Paused")
    assert live(store, first.model).release == second.release
    assert ship("approve", named, "--by", "grace", "--comment", "go").status == 0
    api.wait(named, "Completed")
    pointer = live(store, first.model)
    assert (pointer.release, pointer.kind, pointer.generation) == (first.release, ROLLBACK, 3)
    assert pointer.verdicts["approved"] == "by someone said to be grace: go"
    assert pointer.verdicts["approved from"] == who()
    assert pointer.verdicts["approval"].startswith("required by the channel (ada, ")
    # Further back was staging's; forward again, then at once back to what was before.
    move(store, second, model=first.model, mlflow_version="")
    api.wait(api.start("rollback", model=first.model, why="errors since 15:00"), "Completed")
    assert live(store, first.model).verdicts["approval"] == "not asked: back to what was live before"


# That a move names the generation that it replaces is asked of the bucket alone (services/test_promotion.py).
@pytest.mark.soak
def test_an_approval_is_for_what_was_live_when_it_was_asked(
    releases: list[Manifest], api: Api, store: ObjectStore, tmp_path: Path
) -> None:
    first, _ = releases
    run = api.start("promote", model=first.model, why="a quiet week", approve=True)
    api.wait(run, "Paused")
    other = runnable(store, tmp_path / "other", 0.975, seed=2, model=first.model)
    move(store, other, model=first.model, mlflow_version="")
    api.answer(run, approve=True, by="grace")
    failed = api.wait(run, "Failed")
    assert f"somebody else moved it meanwhile: release {other.release} is live" in failed["state"]["message"]
    assert live(store, first.model).release == other.release


def test_a_flow_moves_the_channel_while_mlflow_is_down(
    releases: list[Manifest], store: ObjectStore, stack: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.releases import NOWHERE
    from train_and_ship.flows.promote import promote

    first, second = releases
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    moved = asyncio.run(promote(first.model, "a quiet week"))
    assert moved.release == second.release == live(store, first.model).release


# The move alone, without MLflow, is asked above.
@pytest.mark.soak
def test_a_release_is_promoted_although_mlflow_went_away_after_it_was_registered(
    stack: Settings, command: Command, ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    quick = {"train": {"epochs": 1, "processes": 1, "batch_size": 32}, "export": {"formats": ["torchscript"]}}
    job = write_project(tmp_path, **quick, name="mirrorless")
    with FaultProxy(stack.mlflow_url) as proxy:
        # All that is asked once the version is made: it is registered, and then nobody is there.
        proxy.add(Rule(DropRequest(), path="registered-models/(get|alias)"))
        # In a process of its own: MLflow remembers the address that an artifact was at.
        ended = command("ship", "run", str(job), MLFLOW_TRACKING_URI=proxy.url)
    assert ended.status == 0, ended.text
    assert "the MLflow alias champion follows later, with the next move or `ship doctor`" in ended.text
    pointer = live(store, "mirrorless")
    assert RestRegistry(stack.mlflow_url).aliases("mirrorless") == {}
    before, after = ship("doctor", "mirrorless", "--dry-run"), ship("doctor", "mirrorless")
    assert "the report of mirrorless version 1 is not in MLflow" in before.output
    assert after.status == 0 and "the report of mirrorless version 1 is in MLflow" in after.output
    assert pointer.release in report_in_mlflow(stack, "mirrorless", "1")
    assert RestRegistry(stack.mlflow_url).aliases("mirrorless") == {"champion": pointer.mlflow_version}
