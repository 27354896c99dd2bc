"""MLflow's aliases follow the channels, with a real S3 server and a real MLflow that is slow, or down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from tests.support.fault_proxy import FaultProxy, PassOn, Rule
from tests.support.fixture_types import Versioned
from tests.support.releases import CHANNEL, MODEL, NOWHERE, aliases, move, rolled_back
from tests.support.stack_servers import MlflowServer, S3Server
from train_and_ship.infra.errors import RequestError, ServiceError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.keys import pointer_key
from train_and_ship.registry.channels.aliases import sync_after_move, sync_aliases, sync_all_aliases
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.registry.channels.targets import choose_promotion, choose_rollback
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.tracking.rest import ClientRegistry, ModelRegistry, RestRegistry


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    return s3_server.url


@pytest.fixture
def mlflow(mlflow_server: MlflowServer) -> MlflowServer:
    return mlflow_server


@pytest.fixture
def abc(abc: list[Manifest], versioned: Versioned) -> list[Manifest]:
    """The three releases of that name, held by versions 1 to 3 in MLflow."""
    for manifest in abc:
        versioned(manifest.release)
    return abc


def test_the_aliases_follow_the_pointers(object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer) -> None:
    move(object_store, abc[0], channel="staging", mlflow_version="1")
    sync_all_aliases(object_store, mlflow.url)
    assert aliases(mlflow) == {"champion": 3, "previous": 2, "staging": 1}
    rolled_back(object_store, uri=mlflow.url)
    assert sync_after_move(Channel(object_store, MODEL, CHANNEL, mlflow.url)) == []
    assert aliases(mlflow) == {"champion": 2, "previous": 3, "staging": 1}
    # Nothing is left to do.
    assert sync_all_aliases(object_store, mlflow.url).changed == ()
    move(object_store, abc[2], channel="staging", mlflow_version="3")
    assert sync_after_move(Channel(object_store, MODEL, "staging", mlflow.url)) == []
    assert aliases(mlflow) == {"champion": 2, "previous": 3, "staging": 3, "staging-previous": 1}


def test_mlflow_may_be_down_while_channels_move_and_is_told_later(
    object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer
) -> None:
    sync_all_aliases(object_store, mlflow.url)
    mlflow.kill()
    try:
        pointer = rolled_back(object_store, abc[0].release, mlflow.url)
        assert pointer.generation == 4 and pointer.mlflow_version == ""
        (warning,) = sync_after_move(Channel(object_store, MODEL, CHANNEL, mlflow.url))
        assert "the MLflow alias champion follows later, with the next move or `ship doctor`" in warning
        assert "does not answer" in warning
    finally:
        mlflow.start()
    assert aliases(mlflow) == {"champion": 3, "previous": 2}
    done = sync_aliases(Channel(object_store, MODEL, CHANNEL, mlflow.url), dry_run=True)
    assert len(done.changed) == 2 and aliases(mlflow) == {"champion": 3, "previous": 2}
    sync_aliases(Channel(object_store, MODEL, CHANNEL, mlflow.url))
    assert aliases(mlflow) == {"champion": 1, "previous": 3}


def test_a_channel_that_cannot_have_an_alias_keeps_no_other_from_its_own(
    object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer
) -> None:
    # A name that could be given before; it sorts before prod.
    move(object_store, abc[0], channel="eu.west", mlflow_version="1")
    move(object_store, abc[1], channel="eu.west", mlflow_version="2")
    object_store.put_new(pointer_key(MODEL, "halved"), b'{"format": 1')
    done = sync_all_aliases(object_store, mlflow.url)
    assert aliases(mlflow) == {"champion": 3, "previous": 2}
    assert done.missing == (
        f"{MODEL} eu.west: MLflow has no alias with a dot in its name, so none follows this channel",
    )
    (failed,) = done.failed
    assert failed.startswith(f"the aliases of {MODEL} halved were not set: ")
    # It is read and rolled back as before, and no second one is made.
    target = choose_rollback(Channel(object_store, MODEL, "eu.west"), "")
    assert target.release == abc[0].release
    with pytest.raises(RequestError, match=r"expected a name without dots.* got 'eu.north'; eu-north can be one"):
        choose_promotion(Channel(object_store, MODEL, "eu.north"), abc[0].release)
    assert rolled_back(object_store, uri=mlflow.url, channel="eu.west").release == abc[0].release
    # Emptied, nothing is to be said of it, and it is not made again.
    object_store.delete(pointer_key(MODEL, "eu.west"))
    assert sync_all_aliases(object_store, mlflow.url).missing == ()
    with pytest.raises(RequestError, match=r"got 'eu.west'; eu-west can be one"):
        choose_promotion(Channel(object_store, MODEL, "eu.west"), abc[0].release)
    with pytest.raises(RequestError, match=r"got 'eu.west'; eu-west can be one"):
        choose_rollback(Channel(object_store, MODEL, "eu.west"), "")


def test_a_slow_mirror_does_not_undo_a_newer_one(
    object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer
) -> None:
    with FaultProxy(mlflow.url) as proxy:

        def overtaken() -> None:
            """While the first mirror is about to set what it has read, the channel moves and the newer one is done."""
            rolled_back(object_store, abc[0].release)
            sync_aliases(Channel(object_store, MODEL, CHANNEL, mlflow.url))
            assert aliases(mlflow)["champion"] == 1

        proxy.add(Rule(PassOn(), "POST", "alias", times=1, before=overtaken))
        sync_aliases(Channel(object_store, MODEL, CHANNEL, proxy.url))
    assert aliases(mlflow) == {"champion": 1, "previous": 3}


def test_a_version_that_is_gone_is_replaced_by_another_of_the_same_release_or_named(
    object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer, versioned: Versioned
) -> None:
    MlflowClient(mlflow.url).delete_model_version(MODEL, "3")
    done = sync_aliases(Channel(object_store, MODEL, CHANNEL, mlflow.url))
    assert done.missing == (f"alias champion of {MODEL}: MLflow has no version of release {abc[2].release}",)
    versioned(abc[2].release)
    sync_aliases(Channel(object_store, MODEL, CHANNEL, mlflow.url))
    assert aliases(mlflow) == {"champion": 4, "previous": 2}
    assert named_release(Channel(object_store, MODEL, tracking_uri=mlflow.url), "v4").release == abc[2].release


def test_the_alias_is_there_at_every_moment(
    object_store: ObjectStore, abc: list[Manifest], mlflow: MlflowServer
) -> None:
    with FaultProxy(mlflow.url) as proxy:
        for release in (None, abc[2].release, abc[0].release):
            rolled_back(object_store, release)
            sync_aliases(Channel(object_store, MODEL, CHANNEL, proxy.url))
        assert {request.method for request in proxy.requests} == {"GET", "POST"}
        assert not [request for request in proxy.requests if "DELETE" in request.method]


@pytest.mark.parametrize("kind", [RestRegistry, ClientRegistry])
def test_the_short_way_to_mlflow_answers_as_its_own_client_does(
    mlflow: MlflowServer, versioned: Versioned, kind: Callable[[str], ModelRegistry]
) -> None:
    registry = kind(mlflow.url)
    release = "a" * 20
    first, second = versioned(release), versioned(release)
    assert registry.versions(MODEL, release) == [second, first]
    assert registry.versions(MODEL, "b" * 20) == registry.versions("nobody", release) == []
    assert registry.release(MODEL, first) == release and registry.release(MODEL, "99") is None
    registry.set_alias(MODEL, "champion", first)
    assert registry.aliases(MODEL) == {"champion": first} and registry.aliases("nobody") == {}
    registry.set_tag(MODEL, first, "note", "hello")
    assert MlflowClient(mlflow.url).get_model_version(MODEL, first).tags["note"] == "hello"
    registry.delete_version(MODEL, first)
    registry.delete_version(MODEL, first)
    assert registry.release(MODEL, first) is None
    with pytest.raises(ServiceError):
        registry.set_alias(MODEL, "champion", "99")
    with pytest.raises(ServiceError, match="does not answer"):
        kind(NOWHERE).aliases(MODEL)
