"""The asynchronous resource manager on a real PostgreSQL, with both asyncio drivers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.runtime.conftest import AsyncNoSession
from tests.sql.kit import Proxy, Row, gid
from tests.versions import asyncpg_is_before
from tests.waiting import until_a_backend_waits_for
from txrpc._client import transactional
from txrpc._client import transactional_async as transactional_aio
from txrpc._client.client_async import AsyncClient
from txrpc._client.scope import set_default_client
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, ResourceUnavailable, TransactionAborted
from txrpc.resource import Prepared

transaction = transactional_aio.transaction
AioMake = Callable[..., txrpc.sql.AsyncResourceManager]
IDLE = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state LIKE 'idle in transaction%%'"
SLOW = (
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(1); RETURN NULL; END$$;"
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def make(url: str, driver: str) -> AsyncIterator[AioMake]:
    """``make(**engine_options)``: a resource manager on the fresh database."""
    made: list[txrpc.sql.AsyncResourceManager] = []

    def one(at: Any = url, **options: Any) -> txrpc.sql.AsyncResourceManager:
        engine = create_async_engine(sa.make_url(at).set(drivername=f"postgresql+{driver}"), **options)
        made.append(txrpc.sql.AsyncResourceManager("bank", engine))
        return made[-1]

    yield one
    for resource in made:
        await resource.close()
        await resource.engine.dispose()


@pytest.fixture
async def bank(make: AioMake) -> AsyncIterator[txrpc.sql.AsyncResourceManager]:
    """A resource with a manager around it, so that transactions work; no coordinator."""
    resource = make()
    manager = AsyncClient("default", [resource])
    await manager.start(AsyncNoSession())
    set_default_client("txrpc.aio", manager, on=True)
    yield resource
    await manager.close()


async def insert(work: Any, name: str = "a") -> None:
    await work.connection.execute(sa.text("INSERT INTO entry VALUES (:n, 1)"), {"n": name})


async def rows(resource: txrpc.sql.AsyncResourceManager) -> list[str]:
    async with resource.engine.connect() as connection:
        return list(await connection.scalars(sa.text("SELECT name FROM entry ORDER BY name")))


async def nothing(_token: str) -> None:
    pass


async def a_backend_waits_for(event: str, server: Server, resource: txrpc.sql.AsyncResourceManager) -> None:
    await asyncio.to_thread(until_a_backend_waits_for, server, resource.engine.url.database or "", event)


# -------------------------------------------------------------------------------------------------------------- the verbs


async def test_every_verb_leaves_the_pools_clean(make: AioMake, server: Server) -> None:
    resource, branch = make(pool_size=1, max_overflow=0), gid()
    assert (await resource.start()).kind == "postgresql"
    for number in range(3):
        work = await resource.begin(False)
        await insert(work, str(number))
        branch = gid()
        prepared = await resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        assert [found for found, _ in await resource.in_doubt("default")] == [branch]
        assert await resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
        assert await resource.commit_prepared(branch, prepared.token) is FinishResult.ALREADY
        assert await resource.rollback_prepared(branch, prepared.token) is FinishResult.HEURISTIC
        assert await resource.one_phase_result(prepared.token) is Outcome.COMMITTED
    assert server.execute(IDLE, parameters=(resource.engine.url.database,)) == [(0,)]
    assert await rows(resource) == ["0", "1", "2"]


async def test_reasons_hold_no_values(make: AioMake) -> None:
    resource = make()
    work = await resource.begin(False)
    with pytest.raises(DBAPIError) as caught:
        await work.connection.execute(sa.text("INSERT INTO entry VALUES ('a', :v)"), {"v": "hunter2"})
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    assert "hunter2" not in reason.text
    await resource.rollback(work)


async def test_out_of_reach(driver: str) -> None:
    engine = create_async_engine(f"postgresql+{driver}://u:secret@127.0.0.1:1/x")
    resource = txrpc.sql.AsyncResourceManager("bank", engine)
    with pytest.raises(ResourceUnavailable, match="'bank' is out of reach") as caught:
        await resource.start()
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="AsyncEngine, not Engine"):
        txrpc.sql.AsyncResourceManager("bank", engine.sync_engine)  # type: ignore[arg-type]


async def test_an_exhausted_pool_says_what_to_change(make: AioMake) -> None:
    resource = make(pool_size=1, max_overflow=0, pool_timeout=0.2)
    work = await resource.begin(False)
    with pytest.raises(ResourceUnavailable, match="pool_size=1, max_overflow=0"):
        await resource.begin(False)
    await resource.rollback(work)


# ------------------------------------------------------------------------------------------------ a connection that breaks


async def test_a_cancelled_statement_takes_its_branch_with_it(
    bank: txrpc.sql.AsyncResourceManager, server: Server
) -> None:
    """The block goes on after a time-out of its own, and would commit what is left."""
    with pytest.raises(TransactionAborted, match="cancelled"):
        async with transaction(), bank.connection() as connection:
            await connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
            sleeping = asyncio.create_task(connection.execute(sa.text("SELECT pg_sleep(30)")))
            await a_backend_waits_for("PgSleep", server, bank)
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping
            with pytest.raises(PendingRollbackError):
                await connection.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
    assert await rows(bank) == []
    assert server.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30)%'") == [(0,)]


async def test_rule_13_a_commit_whose_answer_never_came_is_committed(make: AioMake, driver: str, url: str) -> None:
    """Here the driver itself gives up (asyncpg's ``command_timeout``) or the network does."""
    if driver == "asyncpg" and asyncpg_is_before(32):
        pytest.skip("asyncpg before 0.32: closing a connection whose server says nothing never ends")
    target = sa.make_url(url)
    with Proxy(target.host or "", target.port or 5432) as proxy:
        options = {"connect_args": {"command_timeout": 1.5}} if driver == "asyncpg" else {}
        resource, direct = make(), make(at=proxy.url(url), **options)
        work = await direct.begin(False)
        await insert(work)

        async def mute(_token: str) -> None:
            proxy.mute()
            if driver != "asyncpg":
                threading.Thread(target=break_off).start()

        def break_off() -> None:
            proxy.lost.wait(30)  # the answer to COMMIT
            proxy.cut()

        outcome = await direct.commit_one_phase(work, mute)
        while outcome is None:
            await asyncio.sleep(0.05)
            outcome = await direct.how_it_ended(work)
        assert outcome is Outcome.COMMITTED
        assert await rows(resource) == ["a"]


# --------------------------------------------------------------------------------------------------- sessions, connections


async def test_session_and_connection_share_the_branch_and_are_flushed(bank: txrpc.sql.AsyncResourceManager) -> None:
    async with transaction():
        async with bank.session() as session:
            session.add(Row(name="a", value=1))
        async with bank.connection() as connection:
            assert await connection.scalar(sa.text("SELECT count(*) FROM entry")) == 1
        assert await rows(bank) == []
    assert await rows(bank) == ["a"]
    async with bank.session() as session:  # outside, an ordinary one
        session.add(Row(name="b", value=1))
    with pytest.raises(KeyError):
        async with bank.connection() as connection:
            await connection.execute(sa.text("INSERT INTO entry VALUES ('c', 1)"))
            raise KeyError
    assert await rows(bank) == ["a", "b"]


async def test_ending_it_by_hand(bank: txrpc.sql.AsyncResourceManager) -> None:
    for kind, match in (("session", "flushed at the end"), ("connection", "leave the block")):
        with pytest.raises(IllegalState, match=match):
            async with transaction(), getattr(bank, kind)() as user:
                await user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
                await user.commit()
        with pytest.raises(IllegalState, match="COMMIT inside"):
            async with transaction(), getattr(bank, kind)() as user:
                await user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
                await user.execute(sa.text("COMMIT"))
        with pytest.raises(TransactionAborted, match="rollback"):
            async with transaction(), getattr(bank, kind)() as user:
                await user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
                await user.rollback()
    assert await rows(bank) == []


async def test_savepoints_save_what_failed(bank: txrpc.sql.AsyncResourceManager) -> None:
    async with transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        await session.flush()
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(sa.text("INSERT INTO entry VALUES ('a', 2)"))
        async with session.begin_nested():
            session.add(Row(name="b", value=2))
    assert await rows(bank) == ["a", "b"]


async def test_an_error_in_a_flush_is_the_reason(bank: txrpc.sql.AsyncResourceManager) -> None:
    """SQLAlchemy rolls back by itself when a flush fails; that is not what happened."""
    with pytest.raises(TransactionAborted) as caught:
        async with transaction():
            with pytest.raises(DBAPIError):
                async with bank.session() as session:
                    session.add_all([Row(name="a", value=1), Row(name="a", value=2)])
    assert caught.value.reason.code is AbortCode.STATEMENT_FAILED
    assert "23505" in caught.value.reason.text


async def test_streams_and_many_rows_are_fine(make: AioMake) -> None:
    resource, branch = make(), gid()
    work = await resource.begin(False)
    result = await work.connection.stream(sa.text("SELECT generate_series(1, 2000)"))
    assert (await result.first())[0] == 1
    await work.connection.execute(sa.insert(Row), [{"name": str(n), "value": n} for n in range(2000)])
    await work.connection.execute(sa.text("INSERT INTO entry VALUES (:n, 1)"), [{"n": "x"}, {"n": "y"}])
    await work.connection.execute(sa.text("SAVEPOINT s"))
    await work.connection.execute(sa.text("RELEASE SAVEPOINT s"))
    assert isinstance(await resource.prepare(work, branch), Prepared)
    assert await resource.rollback_prepared(branch, "") is FinishResult.DONE


async def test_a_script_that_ends_the_transaction_dooms_it(bank: txrpc.sql.AsyncResourceManager, driver: str) -> None:
    """Psycopg would run several statements at once."""
    with pytest.raises(TransactionAborted):
        async with transaction():
            with pytest.raises(IllegalState):
                async with bank.connection() as connection:
                    await connection.exec_driver_sql("SELECT 1; COMMIT")
            async with bank.connection() as connection:
                await connection.execute(sa.text("INSERT INTO entry VALUES ('after', 1)"))
    assert await rows(bank) == []


async def test_the_two_colours_do_not_mix(bank: txrpc.sql.AsyncResourceManager, url: str) -> None:
    """A synchronous handler on an asyncio server may try."""
    other = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
    with pytest.raises(IllegalState, match=r"asyncio program: use txrpc\.sql\.AsyncResourceManager"):
        async with transaction():
            with other.session():
                pass
    other.close()
    other.engine.dispose()


async def test_nor_the_other_way_round(bank: txrpc.sql.AsyncResourceManager, url: str) -> None:
    from tests.runtime.conftest import NoSession
    from txrpc._client.client import Client

    other = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
    manager = Client("default", [other])
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    try:
        with pytest.raises(IllegalState, match=r"synchronous program: use txrpc\.sql\.ResourceManager"):
            with transactional.transaction():
                async with bank.connection():
                    pass
    finally:
        manager.close()
        other.engine.dispose()


@pytest.mark.parametrize("before", ["a pending object", "a statement"])
async def test_rollback_of_a_session_dooms_the_transaction_whatever_it_had_done(
    bank: txrpc.sql.AsyncResourceManager, before: str
) -> None:
    """B3, as in `test_sessions`."""
    with pytest.raises(TransactionAborted, match="rollback"):
        async with transaction():
            async with bank.session() as session:
                if before == "a pending object":
                    session.add(Row(name="a", value=1))
                elif before == "a statement":
                    await session.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
                await session.rollback()
    assert await rows(bank) == []


async def test_the_drivers_own_commit_dooms_the_transaction(bank: txrpc.sql.AsyncResourceManager) -> None:
    """B10."""
    with pytest.raises(TransactionAborted, match="ended on the driver's own connection"):
        async with transaction():
            async with bank.connection() as connection:
                await connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
                raw = await connection.get_raw_connection()
                await connection.run_sync(lambda _: raw.dbapi_connection.commit())  # type: ignore[union-attr]


async def test_b8_a_read_only_block_inside_a_writing_transaction_cannot_write(
    bank: txrpc.sql.AsyncResourceManager,
) -> None:
    async with txrpc.aio.transaction():
        async with bank.connection() as connection:
            await connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        async with txrpc.aio.transaction(read_only=True), bank.session() as session:
            assert await session.scalar(sa.text("SELECT count(*) FROM entry")) == 1
        async with bank.connection() as connection:
            await connection.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
    assert await rows(bank) == ["a", "b"]
    with pytest.raises(txrpc.TransactionAborted):
        async with txrpc.aio.transaction():
            with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
                async with txrpc.aio.transaction(read_only=True), bank.connection() as connection:
                    await connection.execute(sa.text("INSERT INTO entry VALUES ('c', 1)"))
    assert await rows(bank) == ["a", "b"]


async def test_rollback_of_a_session_that_has_begun_nothing_dooms_the_transaction(
    bank: txrpc.sql.AsyncResourceManager,
) -> None:
    with pytest.raises(txrpc.TransactionAborted, match="rollback"):
        async with txrpc.aio.transaction():
            async with bank.session() as session:
                session.add(Row(name="a", value=1))
            async with bank.session() as session:
                await session.rollback()
    assert await rows(bank) == []
