"""What the local stack changes of Prefect's server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.exc import OperationalError

from train_and_ship.infra.doors.prefect_server import write_at_once


async def both_count(database: Path) -> int:
    """Two requests at once read a number and write one more; the number afterwards."""
    prefect = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{database}", timeout=5)
    engine = await prefect.engine()
    async with engine.begin() as connection:
        await connection.execute(sqlalchemy.text("CREATE TABLE count (n INTEGER)"))
        await connection.execute(sqlalchemy.text("INSERT INTO count VALUES (0)"))

    async def count() -> None:
        async with await prefect.session(engine) as session, prefect.begin_transaction(session):
            n = (await session.execute(sqlalchemy.text("SELECT n FROM count"))).scalar_one()
            # Both have read before one of them writes, where both may read.
            await asyncio.sleep(0.05)
            await session.execute(sqlalchemy.text("UPDATE count SET n = :n"), {"n": n + 1})

    await asyncio.gather(count(), count())
    async with engine.connect() as connection:
        return int((await connection.execute(sqlalchemy.text("SELECT n FROM count"))).scalar_one())


@pytest.fixture
def prefect_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes back after the test."""
    monkeypatch.setattr(AioSqliteConfiguration, "begin_transaction", AioSqliteConfiguration.begin_transaction)


@pytest.mark.usefixtures("prefect_as_it_is")
def test_requests_that_read_and_then_write_wait_for_each_other(tmp_path: Path) -> None:
    # Once this does not fail any more, Prefect waits by itself.
    with pytest.raises(OperationalError, match="database is locked"):
        asyncio.run(both_count(tmp_path / "prefect.db"))
    write_at_once()
    assert asyncio.run(both_count(tmp_path / "ours.db")) == 2
