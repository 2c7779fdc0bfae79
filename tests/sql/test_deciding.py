"""A branch that is committed together with the decision about its transaction: what is said of it is what the register says."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc.sql
from tests.postgres import Server
from tests.sql.kit import Make, Proxy, insert, rows
from tests.waiting import eventually, until_a_backend_waits_for
from txrpc._client.flow import arun, run
from txrpc._protocol.outcomes import Found
from txrpc.ids import RegisterId, Xid
from txrpc.sql.deciding import Decided, Hands, decide, settle
from txrpc.sql.postgresql_register import PostgresqlRegister, open_register
from txrpc.sql.register import Row

LIST = b"two branches"


def xid() -> Xid:
    return Xid.make(1_700_000_000_000, os.urandom(10))


def hands(resource: txrpc.sql.ResourceManager) -> Hands:
    return Hands(
        lambda work, verb, *arguments: verb(work.connection, *arguments),
        resource._let_go,
        resource._aside,
        resource._break_off,
        resource._dialect,
    )


def register_of(resource: txrpc.sql.ResourceManager) -> PostgresqlRegister:
    register: PostgresqlRegister = resource._aside(open_register, "bank")
    return register


def found(resource: txrpc.sql.ResourceManager, register: PostgresqlRegister, which: Xid) -> Row:
    row: Row = resource._aside(register.read, which)
    return row


def decided(resource: txrpc.sql.ResourceManager, register: PostgresqlRegister, work: object, which: Xid) -> Decided:
    """The last word, asked for until it is there."""
    said = [run(decide(hands(resource), register, "bank", work, which, register.id, LIST))]  # type: ignore[arg-type]

    def is_known() -> bool:
        if said[-1] is None:
            said.append(run(settle(hands(resource), register, work, which, register.id)))  # type: ignore[arg-type]
        return said[-1] is not None

    eventually(is_known)
    assert said[-1] is not None
    return said[-1]


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    target = sa.make_url(url)
    with Proxy(target.host or "", target.port or 5432) as proxy:
        yield proxy


def cut_when_lost(proxy: Proxy) -> None:
    """Cut the connections when something was lost on them."""
    proxy.lost.wait(30)
    proxy.cut()


def test_the_work_and_the_decision_are_there_together(make: Make) -> None:
    bank, one = make(), xid()
    register = register_of(bank)
    work = bank.begin(False)
    insert(work)
    assert run(decide(hands(bank), register, "bank", work, one, register.id, LIST)) is Decided.COMMITTED
    assert rows(bank) == ["a"]
    assert found(bank, register, one) == Row(Found.COMMITTED, LIST)
    assert bank.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_branch_that_did_nothing_may_decide(make: Make) -> None:
    bank, one = make(), xid()
    register = register_of(bank)
    assert run(decide(hands(bank), register, "bank", bank.begin(False), one, register.id, LIST)) is Decided.COMMITTED
    assert found(bank, register, one) == Row(Found.COMMITTED, LIST)


def test_what_another_one_has_claimed_is_aborted_and_undone(make: Make) -> None:
    bank, one = make(), xid()
    register = register_of(bank)
    assert bank._aside(register.claim, one) == Row(Found.ABORTED)
    work = bank.begin(False)
    insert(work)
    assert run(decide(hands(bank), register, "bank", work, one, register.id, LIST)) is Decided.ABORTED
    assert rows(bank) == []
    assert bank.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_an_order_that_comes_twice_hears_the_truth_and_works_once(make: Make) -> None:
    bank, one = make(), xid()
    register = register_of(bank)
    for name in ("a", "b"):
        work = bank.begin(False)
        insert(work, name)
        assert run(decide(hands(bank), register, "bank", work, one, register.id, LIST)) is Decided.COMMITTED
    assert rows(bank) == ["a"]


def test_an_order_from_below_the_floor_is_refused_which_is_not_aborted(make: Make) -> None:
    bank, one = make(), xid()
    register = register_of(bank)
    bank._aside(register.forget, 1_000)
    work = bank.begin(False)
    insert(work)
    assert run(decide(hands(bank), register, "bank", work, one, register.id, LIST)) is Decided.REFUSED
    assert rows(bank) == []
    assert found(bank, register, one) == Row(Found.OPEN)


def test_v15_what_was_begun_before_a_fail_over_is_not_decided_after_it(make: Make) -> None:
    """A claim of ABORTED may be among the commits that were lost: others may have heard of it."""
    bank, one = make(), xid()
    register = register_of(bank)
    before = RegisterId(register.id.table + bytes(8))
    work = bank.begin(False)
    insert(work)
    assert run(decide(hands(bank), register, "bank", work, one, before, LIST)) is Decided.REFUSED
    assert rows(bank) == []
    assert found(bank, register, one) == Row(Found.OPEN)
    assert bank.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_v15_after_a_fail_over_a_decision_that_may_be_lost_is_not_called_aborted(make: Make) -> None:
    """COMMIT was not answered, and its database has failed over: others may have heard of the decision."""
    bank, one, two = make(), xid(), xid()
    register = register_of(bank)
    before = RegisterId(register.id.table + bytes(8))
    work = bank.begin(False)
    bank.rollback(work)
    assert run(settle(hands(bank), register, work, one, before)) is Decided.LOST
    assert found(bank, register, one) == Row(Found.OPEN), "nothing is claimed in another incarnation"
    assert run(decide(hands(bank), register, "bank", bank.begin(False), two, register.id, LIST)) is Decided.COMMITTED
    assert run(settle(hands(bank), register, work, two, before)) is Decided.COMMITTED, "a row that is there is true"


def test_v7_what_the_database_refuses_at_commit_is_claimed_before_it_is_called_aborted(
    make: Make, server: Server, url: str
) -> None:
    server.execute(
        "ALTER TABLE entry ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED", sa.make_url(url).database or ""
    )
    bank, one = make(), xid()
    register = register_of(bank)
    work = bank.begin(False)
    insert(work, "a")
    insert(work, "b")
    assert run(decide(hands(bank), register, "bank", work, one, register.id, LIST)) is Decided.ABORTED
    assert found(bank, register, one) == Row(Found.ABORTED)
    assert rows(bank) == []


def test_v11_a_connection_that_was_moved_commits_nothing(make: Make, url: str, proxy: Proxy) -> None:
    bank, moved, one = make(), make(at=proxy.url(url)), xid()
    register = register_of(bank)
    work = moved.begin(False)
    insert(work)
    proxy.move()
    assert decided(moved, register, work, one) is Decided.ABORTED
    assert rows(bank) == []
    assert found(bank, register, one) == Row(Found.ABORTED)


def test_a_commit_whose_answer_was_lost_is_committed(make: Make, url: str, proxy: Proxy) -> None:
    bank, far, one = make(), make(at=proxy.url(url)), xid()
    register = register_of(bank)
    work = far.begin(False)
    insert(work)
    sa.event.listen(far.engine, "commit", lambda _connection: proxy.mute())  # the answer to COMMIT is lost
    breaker = threading.Thread(target=cut_when_lost, args=(proxy,))
    breaker.start()
    assert decided(far, register, work, one) is Decided.COMMITTED
    breaker.join()
    assert rows(bank) == ["a"]


def test_a_commit_that_never_arrived_is_claimed_from_the_backend_that_waits_for_it(
    make: Make, url: str, proxy: Proxy
) -> None:
    """The backend holds the key, and would wait for ever: it does not hear that its client is gone."""
    bank, far, one = make(), make(at=proxy.url(url)), xid()
    register = register_of(bank)
    work = far.begin(False)
    insert(work)
    sa.event.listen(far.engine, "commit", lambda _connection: proxy.deafen())  # the COMMIT is lost
    breaker = threading.Thread(target=cut_when_lost, args=(proxy,))
    breaker.start()
    assert decided(far, register, work, one) is Decided.ABORTED
    breaker.join()
    assert rows(bank) == []
    assert found(bank, register, one) == Row(Found.ABORTED)


def test_while_the_database_is_away_nothing_is_said(make: Make, url: str, proxy: Proxy, server: Server) -> None:
    bank, far, one = make(), make(at=proxy.url(url)), xid()
    register = register_of(bank)
    server.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(2); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()",
        sa.make_url(url).database or "",
    )
    work = far.begin(False)
    insert(work)
    proxy.refusing = 1_000_000

    def break_off() -> None:
        until_a_backend_waits_for(server, sa.make_url(url).database or "", "PgSleep")  # COMMIT is in the trigger
        proxy.cut()

    breaker = threading.Thread(target=break_off)
    breaker.start()
    assert run(decide(hands(far), register, "bank", work, one, register.id, LIST)) is None
    breaker.join()
    assert run(settle(hands(far), register, work, one, register.id)) is None
    eventually(lambda: rows(bank) == ["a"])  # the backend has not noticed anything
    proxy.refusing = 0
    assert run(settle(hands(far), register, work, one, register.id)) is Decided.COMMITTED


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_same_flows_serve_asyncio(url: str, driver: str) -> None:
    engine = create_async_engine(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
    bank, one, two = txrpc.sql.AsyncResourceManager("bank", engine), xid(), xid()
    register: PostgresqlRegister = await bank._aside(open_register, "bank")
    ports = Hands(
        lambda work, verb, *arguments: work.connection.run_sync(verb, *arguments),
        bank._let_go,
        bank._aside,
        bank._break_off,
        bank._dialect,
    )
    await bank._aside(register.claim, two)
    for which, said in ((one, Decided.COMMITTED), (two, Decided.ABORTED)):
        work = await bank.begin(False)
        await work.connection.execute(sa.text("INSERT INTO entry VALUES (:name, 1)"), {"name": str(which)})
        assert await arun(decide(ports, register, "bank", work, which, register.id, LIST)) is said
    async with engine.connect() as connection:
        assert list(await connection.scalars(sa.text("SELECT name FROM entry"))) == [str(one)]
    await bank.close()
    await engine.dispose()
