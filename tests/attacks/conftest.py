"""A store as the tests of services have it, tried once and not for each of their buckets."""

from __future__ import annotations

import pytest

from tests.support.store_fixtures import connect, object_store, s3_server, store_url  # noqa: F401
from train_and_ship.infra import objectstore
from train_and_ship.infra.store_probe import StoreTraits, probe


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
