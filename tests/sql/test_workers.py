"""Who waits for whom in one process: finishing never for work, one resource never for another, nobody for himself (F9, G2, G3)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.runtime.conftest import AsyncNoSession, NoSession
from tests.sql.kit import Make, gid, insert
from tests.waiting import aeventually, eventually, until_a_backend_waits_for
from txrpc._client.client import Client
from txrpc._client.client_async import AsyncClient
from txrpc._client.manager import TransactionManager
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc._client.scope import set_default_client
from txrpc._protocol.messages import Commit, Owner, Prepare, Welcome
from txrpc.resource import Prepared
from txrpc.sql import common, postgresql
from txrpc.sql.common import interrupt

UNIQUE = "ALTER TABLE entry ADD CONSTRAINT one_value UNIQUE (value) DEFERRABLE INITIALLY DEFERRED"
INSERT = sa.text("INSERT INTO entry VALUES (:name, 1)")


class _Silent(NoSession):
    """Drops what it is given."""

    def send(self, node: str, *messages: object) -> None: ...


def _welcome(order: Commit) -> Welcome:
    return Welcome(Owner(order.gid.node, order.gid.epoch), 5, 60_000, 100, 100_000)


def _prepared(resource: txrpc.sql.ResourceManager) -> Commit:
    """A prepared branch that holds value 1, and the order to commit it."""
    work, branch = resource.begin(False), gid()
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    return Commit(branch, prepared.token)


def _ends(server: Server, url: str, order: Commit) -> object:
    return not server.execute(f"SELECT 1 FROM pg_prepared_xacts WHERE gid = '{order.gid}'")


def test_f9_commit_prepared_never_queues_behind_the_prepares_that_wait_for_it(
    make: Make, url: str, server: Server
) -> None:
    """It did, until their deadline and five seconds: one worker here stood for sixteen."""
    database = sa.make_url(url).database or ""
    server.execute(UNIQUE, database)
    resource = make()
    order = _prepared(resource)
    manager = Client("default", [resource], workers=1)
    session = _Silent()
    manager.start(session)
    manager.core.on_welcome(session, _welcome(order))
    tx = TransactionManager(manager).begin(60)
    with resource.connection() as connection:
        connection.execute(INSERT, {"name": "b"})
    (ref,) = tx._part.refs
    manager.core.on_message(session, order.gid.node, Prepare(tx.xid, ref.branch, ref.calls))
    until_a_backend_waits_for(server, database, "transactionid")
    manager.core.on_message(session, order.gid.node, order)
    eventually(lambda: _ends(server, url, order))
    tx.rollback()
    manager.close()


async def test_f9_commit_prepared_never_queues_behind_the_prepares_that_wait_for_it_aio(
    make: Make, url: str, server: Server
) -> None:
    database = sa.make_url(url).database or ""
    server.execute(UNIQUE, database)
    order = _prepared(make())
    engine = create_async_engine(sa.make_url(url).set(drivername="postgresql+asyncpg"))
    resource = txrpc.sql.AsyncResourceManager("bank", engine)
    manager = AsyncClient("default", [resource], workers=1)
    session = _AsyncSilent()
    await manager.start(session)
    manager.core.on_welcome(session, _welcome(order))
    tx = AsyncTransactionManager(manager).begin(60)
    async with resource.connection() as connection:
        await connection.execute(INSERT, {"name": "b"})
    (ref,) = tx._part.refs
    manager.core.on_message(session, order.gid.node, Prepare(tx.xid, ref.branch, ref.calls))
    waits = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' AND wait_event = 'transactionid'"
    await aeventually(lambda: server.execute(waits))
    manager.core.on_message(session, order.gid.node, order)
    await aeventually(lambda: _ends(server, url, order))
    await tx.rollback()
    await manager.close()
    await engine.dispose()


class _AsyncSilent(AsyncNoSession):
    """Drops what it is given."""

    def send(self, node: str, *messages: object) -> None: ...


@pytest.fixture
def alone(make: Make) -> Iterator[txrpc.sql.ResourceManager]:
    """A resource with one connection, and a manager with all the patience in the world."""
    resource = make(pool_size=1, max_overflow=0)
    manager = Client("default", [resource])
    manager.state.commit_timeout_ms = 600_000
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    yield resource
    manager.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_g3_ending_inside_an_open_block_is_answered_at_once_and_hits_nobody_else(
    alone: txrpc.sql.ResourceManager, end: str
) -> None:
    """It hung for half a minute; and G2: the interrupt reached whoever had the connection next."""
    for number in range(20):
        tx = txrpc.begin(timeout=300)
        began = time.monotonic()
        # Whether the rest of the block notices depends on who is faster; that nothing of it stays does not.
        with suppress(txrpc.TransactionAborted), alone.session() as session:
            session.execute(INSERT, {"name": str(number)})
            if end == "rollback":
                tx.rollback()
            else:
                with pytest.raises(txrpc.TransactionAborted, match="still running: leave it before the end"):
                    tx.commit()
            session.execute(INSERT, {"name": "too late"})
        assert time.monotonic() - began < 60
        with txrpc.transaction(), alone.connection() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM entry")) == 0


def test_g2_an_interrupt_that_comes_too_late_hits_nobody(make: Make, driver: str) -> None:
    """The branch has ended, and its connection, the only one of the pool, is another's by now."""
    resource = make(driver, pool_size=1, max_overflow=0) if "psycopg" in driver else make(driver)
    for number in range(5):
        work = resource.begin(False)
        insert(work, str(number))
        resource.rollback(work)
        innocent = resource.begin(False)
        resource.interrupt(work)
        insert(innocent, str(number))
        resource.rollback(innocent)


def test_g2_a_connection_is_not_pooled_while_its_interrupt_is_on_its_way(make: Make) -> None:
    """The branch ends after the interrupt has begun, and before it has reached the server."""
    resource = make(pool_size=1, max_overflow=0)
    work = resource.begin(False)
    insert(work)
    begun, may_act = threading.Event(), threading.Event()

    class Slow:
        @staticmethod
        def interrupt(connection: Any, backend: Any) -> None:
            begun.set()
            assert may_act.wait(60)
            postgresql.interrupt(connection, backend)

    breaker = threading.Thread(target=resource._aside, args=(interrupt, Slow, work))
    breaker.start()
    assert begun.wait(60)
    resource.rollback(work)
    innocent = resource.begin(False)
    may_act.set()
    breaker.join()
    insert(innocent)
    resource.rollback(innocent)


def test_g2_another_backend_with_the_same_process_id_is_not_ended(make: Make) -> None:
    """Process ids are used again, at once in a container that restarts."""
    resource = make()
    work: Any = resource.begin(False)
    insert(work)
    old = type(work.backend)(work.pid, work.backend.seen_s - 86_400)  # seen a day before this backend was started
    assert resource._gone(old)
    resource._break_off(old)
    insert(work, "after")  # a signal that was sent is there before what the backend is asked next
    resource._break_off(work.backend)
    eventually(lambda: resource._gone(work.backend))
    resource.rollback(work)


@pytest.mark.parametrize("pool", [{"pool_size": 1, "max_overflow": 0}, {"pool_size": 1, "max_overflow": 1}])
def test_g4_the_deadline_bounds_the_wait_for_a_connection(make: Make, pool: dict[str, int]) -> None:
    """It was the pool's own time-out, half a minute, whatever the transaction's was; and nothing named the pool."""
    resource = make(pool_timeout=600, **pool)
    manager = Client("default", [resource])
    manager.start(NoSession())
    held = [resource.begin(False) for _ in range(sum(pool.values()))]
    with pytest.raises(txrpc.TransactionTimedOut, match=r"every connection of resource 'bank' is in use .* had left"):
        with txrpc.transaction(timeout=0.5, manager=TransactionManager(manager)), resource.connection():
            pass
    for work in held:
        resource.rollback(work)
        resource.rollback(work)  # a place is given back once
    for _ in range(3):
        with txrpc.transaction(manager=TransactionManager(manager)), resource.connection() as connection:
            connection.execute(sa.text("SELECT 1"))
    assert resource._places._free._value == sum(pool.values())
    manager.close()


async def test_g4_the_deadline_bounds_the_wait_for_a_connection_aio(url: str) -> None:
    engine = create_async_engine(
        sa.make_url(url).set(drivername="postgresql+asyncpg"), pool_size=1, max_overflow=0, pool_timeout=600
    )
    resource = txrpc.sql.AsyncResourceManager("bank", engine)
    manager = AsyncClient("default", [resource])
    await manager.start(_AsyncSilent())
    held = await resource.begin(False)
    with pytest.raises(txrpc.TransactionTimedOut, match=r"every connection of resource 'bank' is in use .* had left"):
        async with txrpc.aio.transaction(timeout=0.5, manager=AsyncTransactionManager(manager)):
            async with resource.connection():
                pass
    await resource.rollback(held)
    async with txrpc.aio.transaction(manager=AsyncTransactionManager(manager)):
        async with resource.connection() as connection:
            await connection.execute(sa.text("SELECT 1"))
    await manager.close()
    await engine.dispose()


# ------------------------------------------------------------------------------------- hosts that do not answer at all


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_host_that_does_not_answer_does_not_keep_those_that_finish(
    monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """The drivers' own patience is minutes, or for ever; a resource has four workers that finish its branches."""
    monkeypatch.setattr(common, "CONNECT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as dead:
        engine = sa.create_engine(f"postgresql+{driver}://user@127.0.0.1:{dead.getsockname()[1]}/nothing")
        resource = txrpc.sql.ResourceManager("bank", engine)
        with pytest.raises(txrpc.ResourceUnavailable):
            resource.in_doubt("default")
        resource.close()


async def test_a_host_that_does_not_answer_does_not_keep_those_that_finish_aio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CONNECT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as dead:
        url = f"postgresql+asyncpg://user@127.0.0.1:{dead.getsockname()[1]}/nothing"
        resource = txrpc.sql.AsyncResourceManager("bank", create_async_engine(url))
        async with asyncio.timeout(40):  # asyncpg's own patience is a minute
            with pytest.raises(txrpc.ResourceUnavailable):
                await resource.in_doubt("default")
        await resource.close()


@pytest.mark.parametrize("own", [None, 7])
def test_only_the_side_engines_attempts_are_bounded_and_only_where_the_user_has_not(url: str, own: int | None) -> None:
    given: list[Any] = []
    options = {} if own is None else {"connect_timeout": own}
    engine = sa.create_engine(url, connect_args=options)
    resource = txrpc.sql.ResourceManager("bank", engine)

    def note(_dialect: object, _record: object, _cargs: object, cparams: dict[str, Any]) -> None:
        given.append(cparams.get("connect_timeout"))

    sa.event.listen(engine, "do_connect", note)
    assert resource.in_doubt("default") == []
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    assert given == [own or common.CONNECT_TIMEOUT_S, own]
    resource.close()
    engine.dispose()


def test_what_outlasts_the_close_leaves_no_connection_behind(
    make: Make, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went back to a pool that had been disposed of, and stayed open there until it was collected."""
    resource: Any = make(driver)
    side = getattr(resource._side, "sync_engine", resource._side)
    used: list[Any] = []

    def ask(connection: sa.Connection, *_: str) -> None:
        used.append(connection.connection.driver_connection)
        side.dispose()  # as `close` does, while this is going on

    monkeypatch.setattr(postgresql, "one_phase_result", ask)
    resource.one_phase_result("")
    assert used[0].is_closed() if driver == "asyncpg" else used[0].closed


def test_what_begins_after_the_close_leaves_no_connection_behind(
    make: Make, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt that was on its way had its connection from the pool that `close` had just emptied."""
    resource: Any = make(driver)
    used: list[Any] = []
    monkeypatch.setattr(
        postgresql, "one_phase_result", lambda connection, *_: used.append(connection.connection.driver_connection)
    )
    resource.close()
    resource.one_phase_result("")
    assert used[0].is_closed() if driver == "asyncpg" else used[0].closed
