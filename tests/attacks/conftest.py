"""A store and readers as the tests of services have them."""

from __future__ import annotations

from tests.services.conftest import (  # noqa: F401
    bucket,
    connect,
    make_reader,
    object_store,
    proxy,
    s3_server,
    ship,
    store_url,
)
