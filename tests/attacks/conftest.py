"""A store as the tests of services have it."""

from __future__ import annotations

from tests.support.store_fixtures import connect, object_store, s3_server, store_url  # noqa: F401
