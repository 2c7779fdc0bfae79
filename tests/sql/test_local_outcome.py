"""Rule 21, F1: how a commit of the root's own database ended is learnt from its own process and from that database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.runtime.conftest import AsyncNoSession, NoSession
from tests.sql.kit import Make, Proxy, rows
from tests.waiting import eventually, until_a_backend_waits_for
from txrpc._client import effects
from txrpc._client.client import Client
from txrpc._client.client_async import AsyncClient
from txrpc._client.manager import TransactionManager
from txrpc._client.manager_async import AsyncTransactionManager
from txrpc._protocol.participant import phase_two

SLOW = (
    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(3); RETURN NULL; END$$;"
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
)
INSERT = sa.text("INSERT INTO entry VALUES ('a', 1)")


@asynccontextmanager
async def cancelled_commit(url: str, server: Server, driver: str) -> AsyncIterator[tuple[AsyncClient, txrpc.Xid]]:
    """A commit of one row that is cancelled while the database is at it."""
    database = sa.make_url(url).database or ""
    server.execute(SLOW, database)
    engine = create_async_engine(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
    bank = txrpc.sql.AsyncResourceManager("bank", engine)
    manager = AsyncClient("default", [bank])
    await manager.start(AsyncNoSession())
    tx = AsyncTransactionManager(manager).begin(timeout=30)
    async with bank.connection() as connection:
        await connection.execute(INSERT)
    committing = asyncio.create_task(tx.commit())
    await asyncio.to_thread(until_a_backend_waits_for, server, database, "PgSleep")
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert tx.status is txrpc.Status.UNKNOWN
    assert await AsyncTransactionManager(manager).outcome(tx.xid, timeout=0) is txrpc.Outcome.UNKNOWN, (
        "it is still under way"
    )
    yield manager, tx.xid
    await manager.close()
    await engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_rule_21_a_local_commit_that_was_cancelled_is_not_called_aborted(
    url: str, server: Server, driver: str
) -> None:
    async with cancelled_commit(url, server, driver) as (manager, xid):
        assert await AsyncTransactionManager(manager).outcome(xid, timeout=30) is txrpc.Outcome.COMMITTED
    assert server.execute("SELECT name FROM entry", sa.make_url(url).database or "") == [("a",)]


async def test_rule_21_a_local_commit_that_the_database_rolled_back_is_aborted(url: str, server: Server) -> None:
    database = sa.make_url(url).database or ""
    sleeping = f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND wait_event = 'PgSleep'"
    async with cancelled_commit(url, server, "asyncpg") as (manager, xid):
        server.execute(f"SELECT pg_terminate_backend(pid) FROM ({sleeping}) AS at_it")
        assert await AsyncTransactionManager(manager).outcome(xid, timeout=30) is txrpc.Outcome.ABORTED
    assert server.execute("SELECT name FROM entry", database) == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away for longer than half a minute, in less time."""
    monkeypatch.setattr(effects, "_ASK_AFTER_S", (0.0, 0.1, 0.1))


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    target = sa.make_url(url)
    with Proxy(target.host or "", target.port or 5432) as proxy:
        yield proxy


@pytest.mark.usefixtures("impatient")
def test_rule_21_a_local_commit_whose_database_went_away_is_learnt_when_it_is_back(
    make: Make, url: str, proxy: Proxy
) -> None:
    looking, bank = make(), make(at=proxy.url(url))
    manager = Client("default", [bank])
    manager.start(NoSession())
    try:
        tx = TransactionManager(manager).begin(timeout=30)
        with bank.connection() as connection:
            connection.execute(INSERT)

        def break_off() -> None:
            eventually(lambda: rows(looking) == ["a"])
            proxy.refusing = 1_000_000
            proxy.lost.wait(30)  # the answer to COMMIT
            proxy.cut()

        # COMMIT gets through, its answer does not, and no question after it.
        sa.event.listen(bank.engine, "commit", lambda _connection: proxy.mute())
        breaker = threading.Thread(target=break_off)
        breaker.start()
        with pytest.raises(txrpc.OutcomeUnknown):
            tx.commit()
        breaker.join()
        assert TransactionManager(manager).outcome(tx.xid, timeout=0.3) is txrpc.Outcome.UNKNOWN
        proxy.refusing = 0
        assert TransactionManager(manager).outcome(tx.xid) is txrpc.Outcome.COMMITTED
        assert TransactionManager(manager).outcome(tx.xid, timeout=0) is txrpc.Outcome.COMMITTED, (
            "what is known stays known"
        )
    finally:
        manager.close()


def test_a_local_commit_is_carried_out_in_the_thread_of_its_root(make: Make) -> None:
    """A hop to a worker and back takes longer than the commit."""
    bank = make()
    threads: list[int] = []
    sa.event.listen(bank.engine, "commit", lambda _connection: threads.append(threading.get_ident()))
    manager = Client("default", [bank])
    manager.start(NoSession())
    try:
        tx = TransactionManager(manager).begin()
        with bank.connection() as connection:
            connection.execute(INSERT)
        tx.commit()
        assert threads == [threading.get_ident()]
        assert rows(bank) == ["a"]
    finally:
        manager.close()


@pytest.mark.parametrize("reachable", [True, False])
def test_rule_11_a_local_commit_does_not_wait_for_ever_for_an_answer_that_was_lost(
    make: Make, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    """Its root waits in the very thread that waits for the database, whose end of the connection has gone without a word."""
    monkeypatch.setattr(phase_two, "_OVERDUE_MS", 300)
    looking, bank = make(), make(at=proxy.url(url))
    manager = Client("default", [bank])
    manager.state.commit_timeout_ms = 0
    manager.start(NoSession())

    def lose_the_answer(_connection: object) -> None:
        proxy.mute()
        proxy.refusing = 0 if reachable else 1_000_000

    try:
        tx = TransactionManager(manager).begin(timeout=1)
        with bank.connection() as connection:
            connection.execute(INSERT)
        sa.event.listen(bank.engine, "commit", lose_the_answer)
        try:
            tx.commit()
            assert reachable, "a worker may have asked in time, if there was a way"
        except txrpc.OutcomeUnknown:
            proxy.refusing = 0
            assert TransactionManager(manager).outcome(tx.xid, timeout=60) is txrpc.Outcome.COMMITTED
        assert rows(looking) == ["a"]
    finally:
        manager.close()


def test_a_local_commit_that_is_broken_off_by_the_user_keeps_no_locks(make: Make) -> None:
    bank = make()

    def interrupt(_connection: object) -> None:
        raise KeyboardInterrupt

    manager = Client("default", [bank])
    manager.start(NoSession())
    try:
        tx = TransactionManager(manager).begin()
        with bank.connection() as connection:
            connection.execute(INSERT)
        sa.event.listen(bank.engine, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tx.commit()
        sa.event.remove(bank.engine, "commit", interrupt)
        assert tx.status is txrpc.Status.UNKNOWN
        assert TransactionManager(manager).outcome(tx.xid, timeout=30) is txrpc.Outcome.ABORTED
        assert not manager.state.branches
        assert rows(bank) == []
    finally:
        manager.close()
