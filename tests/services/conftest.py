from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shipreader.reader import Reader
from tests.support.ceph_rgw import NotAvailable, RgwServer
from tests.support.fault_proxy import FaultProxy
from tests.support.fixture_types import Connect, MakeReader, Ship, Versioned
from tests.support.ports import free_port
from tests.support.processes import Ended
from tests.support.releases import CHANNEL, MODEL, move, published
from tests.support.ship_here import ship_here
from tests.support.stack_servers import MlflowServer
from tests.support.store_fixtures import (  # noqa: F401
    KnownTraits,
    bucket,
    connect,
    known_traits,
    object_store,
    s3_server,
    store_url,
    tried_once,
)
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.release.manifest import Manifest


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def versioned(mlflow_server: MlflowServer) -> Iterator[Versioned]:
    """Make an MLflow version of the model `digits` that holds a release; afterwards the model is gone."""
    from mlflow import MlflowClient, MlflowException

    client = MlflowClient(mlflow_server.url)
    # The server is shared, and another file's tests may have left a model of this name.
    with contextlib.suppress(MlflowException):
        client.delete_registered_model("digits")
    client.create_registered_model("digits")
    run = client.create_run("0").info

    def make(release: str) -> str:
        source = f"{run.artifact_uri}/model"
        made = client.create_model_version("digits", source=source, run_id=run.run_id, tags={"release": release})
        return str(made.version)

    yield make
    client.delete_registered_model("digits")


@pytest.fixture(scope="session")
def rgw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RgwServer]:
    """Ceph RGW; the tests that need it are skipped where Debian's packages are not to be had."""
    server = RgwServer(tmp_path_factory.mktemp("rgw"), free_port())
    try:
        server.start()
        yield server
    except NotAvailable as error:
        pytest.skip(str(error))
    finally:
        server.kill()


@pytest.fixture(scope="session", params=["ministack", pytest.param("rgw", marks=pytest.mark.soak)])
def each_store_url(request: pytest.FixtureRequest) -> str:
    """Addresses of both kinds of server. A module whose `store_url` is this one runs its tests against each."""
    server = request.getfixturevalue("s3_server" if request.param == "ministack" else "rgw_server")
    return str(server.url)


@pytest.fixture
def proxy(store_url: str) -> Iterator[FaultProxy]:
    """Between the test and the store; passes everything on until it is told otherwise."""
    with FaultProxy(store_url) as started:
        yield started


@pytest.fixture
def ship(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Ship:
    """The `ship` command in this process. mlflow: its address; by default the stack's, nobody's where there is none."""
    default = (
        os.environ["MLFLOW_TRACKING_URI"] if "stack" in request.fixturenames else f"http://127.0.0.1:{free_port()}"
    )

    def run(*words: str, mlflow: str = default, **variables: str) -> Ended:
        return ship_here(capsys, *words, MLFLOW_TRACKING_URI=mlflow, **variables)

    return run


@pytest.fixture
def faulty(object_store: ObjectStore, connect: Connect, proxy: FaultProxy, known_traits: KnownTraits) -> ObjectStore:
    """The same bucket as `object_store`, reached through the proxy and found trustworthy before any fault."""
    traits, store = object_store.probe(), connect(object_store.bucket, proxy.url)
    # As long as it passes everything on. What is tried later is tried through it.
    known_traits[proxy.url] = traits
    store.probe()
    del known_traits[proxy.url]
    return store


@pytest.fixture
def make_reader(
    object_store: ObjectStore, connect: Connect, proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> MakeReader:
    """A reader of the same bucket as `object_store`, through the proxy; its log is kept."""
    caplog.set_level(logging.INFO, logger="shipreader")
    connect(object_store.bucket, proxy.url)
    client = s3_client(Settings.load())

    def make(folder: Path = tmp_path / "served", **options: Any) -> Reader:
        chosen = {"interval": 0.05, **options}
        return Reader(MODEL, bucket=object_store.bucket, folder=folder, channel=CHANNEL, client=client, **chosen)

    return make


@pytest.fixture
def abc(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Three releases, promoted to prod one after the other."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(3)]
    for number, manifest in enumerate(manifests, 1):
        move(object_store, manifest, mlflow_version=str(number))
    return manifests
