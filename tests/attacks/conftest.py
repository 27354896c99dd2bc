"""A store as the tests of services have it, tried once and not for each of their buckets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.releases import move, published
from tests.support.store_fixtures import connect, object_store, s3_server, store_url  # noqa: F401
from train_and_ship.infra import objectstore
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.store_probe import StoreTraits, probe
from train_and_ship.registry.release.manifest import Manifest


@pytest.fixture(scope="session")
def known_traits() -> dict[str, StoreTraits]:
    """By address."""
    return {}


@pytest.fixture(autouse=True)
def tried_once(monkeypatch: pytest.MonkeyPatch, known_traits: dict[str, StoreTraits]) -> None:
    """Two dozen requests less for each test."""

    def known(store: objectstore.ObjectStore) -> StoreTraits:
        if store.address not in known_traits:
            known_traits[store.address] = probe(store)
        return known_traits[store.address]

    monkeypatch.setattr(objectstore, "probe", known)


@pytest.fixture
def two(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Two releases, live one after the other."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(2)]
    for manifest in manifests:
        move(object_store, manifest)
    return manifests
