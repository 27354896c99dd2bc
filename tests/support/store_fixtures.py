"""A real S3 server and new buckets on it, for the conftest.py of whoever needs them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY
from tests.support.fixture_types import Connect
from tests.support.ports import free_port
from tests.support.stack_servers import S3Server
from train_and_ship.infra import objectstore
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import LOOPBACK, Settings
from train_and_ship.infra.store_probe import StoreTraits, probe

KnownTraits = dict[str, StoreTraits | None]


@pytest.fixture(scope="session")
def known_traits() -> KnownTraits:
    """By address: what local servers promise, None until one of their buckets was tried."""
    return {f"http://{LOOPBACK}:{os.environ['SHIP_S3_PORT']}": None}


@pytest.fixture(autouse=True)
def tried_once(monkeypatch: pytest.MonkeyPatch, known_traits: KnownTraits) -> None:
    """A local server is tried once and not for each bucket: two dozen requests less for each test.

    Any other address, such as a proxy's, is tried as ever.
    """

    def known(store: ObjectStore) -> StoreTraits:
        traits = known_traits.get(store.address) or probe(store)
        if store.address in known_traits:
            known_traits[store.address] = traits
        return traits

    monkeypatch.setattr(objectstore, "probe", known)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, known_traits: KnownTraits) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"), free_port())
    server.start()
    known_traits[server.url] = None
    yield server
    server.kill()


@pytest.fixture(scope="session")
def store_url(s3_server: S3Server) -> str:
    """Address of a running S3 server."""
    return s3_server.url


@pytest.fixture
def connect(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make an ObjectStore from settings as a person would give them: an external store with credentials."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "SHIP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def make(bucket: str, url: str = store_url) -> ObjectStore:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("SHIP_BUCKET", bucket)
        return ObjectStore.from_settings(Settings.load())

    return make


@pytest.fixture
def object_store(connect: Connect) -> ObjectStore:
    """A new, empty bucket."""
    store = connect(f"test-{uuid.uuid4().hex[:12]}")
    store.create_bucket_if_missing()
    return store


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """The name of that bucket."""
    return object_store.bucket
