"""A store as the tests of services have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.releases import move, published
from tests.support.store_fixtures import connect, known_traits, object_store, s3_server, store_url, tried_once  # noqa: F401
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.release.manifest import Manifest


@pytest.fixture
def two(object_store: ObjectStore, tmp_path: Path) -> list[Manifest]:
    """Two releases, live one after the other."""
    manifests = [published(object_store, tmp_path / str(seed), seed) for seed in range(2)]
    for manifest in manifests:
        move(object_store, manifest)
    return manifests
