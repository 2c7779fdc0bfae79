"""The register: one word about each transaction, which the first to write gives, also after rows were deleted."""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from tests.postgres import Server
from tests.sql.registers import check_decisions_without_work, check_the_race_for_a_row
from tests.waiting import until_a_backend_waits_for
from txrpc._protocol.outcomes import Found
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql import postgresql_register as module
from txrpc.sql.backend import backend_pid
from txrpc.sql.markers import prepare_table
from txrpc.sql.postgresql_register import PostgresqlRegister, open_register
from txrpc.sql.register import Row, Verdict

LATER_MS = -1_000_000
"""A horizon behind which everything is that was made until now."""
LIST = b"two branches"
COMMITTED = Row(Found.COMMITTED, LIST)


def xid(unix_ms: int = 1_700_000_000_000) -> Xid:
    return Xid.make(unix_ms, os.urandom(10))


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    made = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    yield made
    made.dispose()


@pytest.fixture
def aside(engine: Engine) -> Iterator[Connection]:
    """A connection as a claim or a sweep has it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@pytest.fixture
def register(aside: Connection) -> PostgresqlRegister:
    return open_register(aside, "ledger")


def commit(engine: Engine, register: PostgresqlRegister, which: Xid) -> Verdict:
    """A branch that works, decides and commits; or is rolled back."""
    with engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES (:name, 1)"), {"name": str(which)})
        verdict = register.decide(connection, which, LIST, backend_pid(connection))
        if verdict is Verdict.DECIDED:
            connection.commit()
        return verdict


def worked(engine: Engine, which: Xid) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(sa.text("SELECT count(*) FROM entry WHERE name = :name"), {"name": str(which)}))


# ------------------------------------------------------------------------------------------------------ the first word


def test_a_decision_is_there_with_its_work_and_says_so_to_all(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    one = xid()
    assert register.read(aside, one) == Row(Found.OPEN)
    assert commit(engine, register, one) is Verdict.DECIDED
    assert worked(engine, one)
    assert register.read(aside, one) == register.claim(aside, one) == COMMITTED
    assert commit(engine, register, xid()) is Verdict.DECIDED


def test_v9_who_only_reads_changes_nothing(engine: Engine, register: PostgresqlRegister, aside: Connection) -> None:
    one = xid()
    assert register.read(aside, one) == Row(Found.OPEN)
    assert commit(engine, register, one) is Verdict.DECIDED


def test_a_claim_comes_first_and_the_decision_after_it_is_rolled_back(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    one = xid()
    assert register.claim(aside, one) == Row(Found.ABORTED)
    assert commit(engine, register, one) is Verdict.TAKEN
    assert not worked(engine, one)
    assert register.claim(aside, one) == register.read(aside, one) == Row(Found.ABORTED)


def test_a_decision_that_is_repeated_does_not_work_twice(engine: Engine, register: PostgresqlRegister) -> None:
    one = xid()
    assert commit(engine, register, one) is Verdict.DECIDED
    with engine.connect() as connection:
        assert register.decide(connection, one, b"another list", backend_pid(connection)) is Verdict.TAKEN


def test_v11_a_connection_that_was_moved_to_another_backend_does_not_decide(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    """There is no transaction there, so that the statement would commit by itself: COMMITTED, without the work."""
    one = xid()
    with engine.connect() as connection:
        assert register.decide(connection, one, LIST, backend_pid(connection) + 1) is Verdict.TAKEN
        connection.commit()
    assert register.decide(aside, one, LIST, backend_pid(aside)) is Verdict.TAKEN, "it is in no transaction"
    assert register.read(aside, one) == Row(Found.OPEN)


def claiming(engine: Engine, register: PostgresqlRegister, which: Xid, pool: ThreadPoolExecutor) -> Future[Row]:
    def claim() -> Row:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return register.claim(connection, which)

    return pool.submit(claim)


@pytest.mark.parametrize("commits", [True, False])
def test_a_claim_waits_for_a_branch_that_has_decided_and_not_committed(
    engine: Engine, register: PostgresqlRegister, server: Server, url: str, commits: bool
) -> None:
    one = xid()
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.DECIDED
        claim = claiming(engine, register, one, pool)
        until_a_backend_waits_for(server, sa.make_url(url).database or "", "transactionid")
        assert not claim.done()
        connection.commit() if commits else connection.rollback()
        assert claim.result(30) == (COMMITTED if commits else Row(Found.ABORTED))


def test_a_claim_does_not_wait_for_ever(
    engine: Engine, register: PostgresqlRegister, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLAIM_MS", 100)
    one = xid()
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.DECIDED
        with pytest.raises(ResourceUnavailable, match="is being decided at this moment"):
            claiming(engine, register, one, pool).result(30)
        connection.commit()
        assert claiming(engine, register, one, pool).result(30) == COMMITTED


# ---------------------------------------------------------------------------------------------------------- forgetting


def test_v1_what_is_not_done_is_never_deleted(engine: Engine, register: PostgresqlRegister, aside: Connection) -> None:
    one, two, three = xid(), xid(), xid()
    for each in (one, two):
        assert commit(engine, register, each) is Verdict.DECIDED
    assert register.claim(aside, three) == Row(Found.ABORTED)
    assert sorted(each for each, branches in register.undone(aside) if branches == LIST) == sorted([one, two])
    register.done(aside, [one])
    assert register.undone(aside) == [(two, LIST)]
    assert register.undone(aside, after=max(one, two)) == []
    assert register.forget(aside, LATER_MS, limit=1) == 1
    assert register.forget(aside, LATER_MS) == 1
    assert register.forget(aside, LATER_MS) == 0
    assert register.claim(aside, two) == register.read(aside, two) == COMMITTED
    assert register.claim(aside, one) == register.claim(aside, three) == Row(Found.FORGOTTEN)
    assert register.read(aside, one) == Row(Found.OPEN), "a claim has left nothing behind"


@pytest.mark.parametrize("was", ["committed", "aborted"])
def test_v1_v2_v3_what_was_deleted_is_not_written_again(
    engine: Engine, register: PostgresqlRegister, aside: Connection, was: str
) -> None:
    one = xid()
    if was == "committed":
        assert commit(engine, register, one) is Verdict.DECIDED
        register.done(aside, [one])
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM entry"))
    else:
        assert register.claim(aside, one) == Row(Found.ABORTED)
    assert register.forget(aside, LATER_MS) == 1
    assert commit(engine, register, one) is Verdict.REFUSED
    assert not worked(engine, one)
    assert register.claim(aside, one) == Row(Found.FORGOTTEN)


def test_the_floor_only_rises_and_follows_the_databases_own_clock(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    now_ms: int = aside.scalar(sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")) or 0
    young, old = xid(now_ms - 1_000), xid(now_ms - 600_000)
    for horizon_ms in (60_000, 3_600_000):
        register.forget(aside, horizon_ms)
        assert commit(engine, register, xid(now_ms)) is Verdict.DECIDED
        assert register.claim(aside, old) == Row(Found.FORGOTTEN)
    assert commit(engine, register, young) is Verdict.DECIDED
    refused = xid(now_ms)
    assert register.claim(aside, refused) == Row(Found.ABORTED)
    register.done(aside, [young])
    assert register.forget(aside, 60_000) == 0, "what is above the floor stays, also when it is over"
    assert register.read(aside, refused) == Row(Found.ABORTED)
    assert register.read(aside, young) == COMMITTED


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_v4_a_snapshot_that_is_older_than_the_floor_does_not_decide(
    engine: Engine, register: PostgresqlRegister, aside: Connection, level: Any
) -> None:
    one = xid()
    with engine.connect().execution_options(isolation_level=level) as connection:
        connection.execute(sa.text("SELECT 1 FROM entry"))
        register.forget(aside, LATER_MS)
        with pytest.raises(DBAPIError, match="could not serialize"):
            register.decide(connection, one, LIST, backend_pid(connection))
    with engine.connect().execution_options(isolation_level=level) as connection:
        assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.REFUSED


def test_v6_a_question_from_below_the_floor_waits_for_what_is_being_decided(
    engine: Engine, register: PostgresqlRegister, aside: Connection, server: Server, url: str
) -> None:
    """Else a branch would be told to roll back whose transaction commits a moment later."""
    one = xid()
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.DECIDED
        register.forget(aside, LATER_MS)
        claim = claiming(engine, register, one, pool)
        until_a_backend_waits_for(server, sa.make_url(url).database or "", "transactionid")
        connection.commit()
        assert claim.result(30) == COMMITTED


def test_a_claim_reads_the_floor_after_its_wait(
    engine: Engine, register: PostgresqlRegister, aside: Connection, server: Server, url: str
) -> None:
    """One conditional INSERT reads it before: it said ABORTED of what had committed and was forgotten meanwhile."""
    one = xid()
    assert commit(engine, register, one) is Verdict.DECIDED
    register.done(aside, [one])
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        # What `forget` does, held open between its two statements and its COMMIT.
        connection.exec_driver_sql(f"UPDATE {register.table} SET floor = '\\x{'ff' * 16}'::bytea")
        connection.exec_driver_sql(f"DELETE FROM {register.decisions}")
        claim = claiming(engine, register, one, pool)
        until_a_backend_waits_for(server, sa.make_url(url).database or "", "transactionid")
        connection.commit()
        assert claim.result(30) == Row(Found.FORGOTTEN)


def test_rule_22_a_decision_is_durable_where_commits_need_not_be(engine: Engine, register: PostgresqlRegister) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("SET synchronous_commit = off")
        assert register.decide(connection, xid(), LIST, backend_pid(connection)) is Verdict.DECIDED
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        connection.commit()
    with engine.connect() as connection:
        connection.exec_driver_sql("SET synchronous_commit = local")
        assert register.decide(connection, xid(), LIST, backend_pid(connection)) is Verdict.DECIDED
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "local"


# ------------------------------------------------------------------------------------------------ another register


def test_v14_another_register_says_nothing_and_takes_nothing(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    one = xid()
    other = replace(register, id=RegisterId(bytes(16) + register.id.incarnation))
    assert other.claim(aside, one) == other.read(aside, one) == Row(Found.ELSEWHERE)
    assert commit(engine, other, one) is Verdict.REFUSED
    assert register.read(aside, one) == Row(Found.OPEN)


def test_v15_in_another_incarnation_a_row_is_true_and_none_proves_nothing(
    engine: Engine, register: PostgresqlRegister, aside: Connection
) -> None:
    one, two = xid(), xid()
    assert commit(engine, register, one) is Verdict.DECIDED
    before = replace(register, id=RegisterId(register.id.table + bytes(8)))
    assert before.claim(aside, one) == before.read(aside, one) == COMMITTED
    assert before.claim(aside, two) == before.read(aside, two) == Row(Found.LOST)
    assert commit(engine, before, two) is Verdict.REFUSED
    assert register.read(aside, two) == Row(Found.OPEN)


def test_a_register_that_is_opened_again_is_the_same(aside: Connection, register: PostgresqlRegister) -> None:
    assert open_register(aside, "ledger") == register
    assert len(register.id.table) == 16
    aside.exec_driver_sql(f"DROP TABLE {register.table}")
    assert open_register(aside, "ledger").id != register.id


@pytest.mark.parametrize("open_", [open_register, prepare_table])
def test_many_programs_make_the_tables_at_once(engine: Engine, open_: Callable[[Connection, str], object]) -> None:
    """IF NOT EXISTS is no help: one of them got a unique violation, and did not start."""
    start = threading.Barrier(4)

    def opened() -> object:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            start.wait()
            return open_(connection, "ledger")

    with ThreadPoolExecutor(4) as pool:
        assert len({each.result(30) for each in [pool.submit(opened) for _ in range(4)]}) == 1


def test_tables_that_cannot_be_had_are_one_sentence(server: Server, engine: Engine, aside: Connection) -> None:
    database = engine.url.database or ""
    role = f"clerk_{database}"
    server.execute(f"CREATE ROLE {role}; REVOKE CREATE ON SCHEMA public FROM public", database)
    aside.exec_driver_sql(f"SET ROLE {role}")
    with pytest.raises(ConfigurationError, match="resource 'ledger' is to decide transactions, which needs the tables"):
        open_register(aside, "ledger")
    aside.exec_driver_sql("RESET ROLE")
    open_register(aside, "ledger")
    aside.exec_driver_sql(f"GRANT SELECT, INSERT ON txrpc_decision, txrpc_register TO {role}")
    aside.exec_driver_sql(f"SET ROLE {role}")
    with pytest.raises(ConfigurationError, match="this role may not write them"):
        open_register(aside, "ledger")


# ---------------------------------------------------------------------------------------------------------- drivers


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_every_driver(url: str, driver: str) -> None:
    made = sa.create_engine(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
    with made.connect().execution_options(isolation_level="AUTOCOMMIT") as aside, made.connect() as connection:
        _every_verb(aside, connection)
        connection.commit()
    made.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_every_asynchronous_driver(url: str, driver: str) -> None:
    made = create_async_engine(sa.make_url(url).set(drivername=f"postgresql+{driver}"))
    async with made.connect() as first, made.connect() as connection:
        aside = await first.execution_options(isolation_level="AUTOCOMMIT")

        def verbs(one: Connection) -> None:
            assert connection.sync_connection is not None
            _every_verb(one, connection.sync_connection)

        await aside.run_sync(verbs)
        await connection.commit()
    await made.dispose()


def _every_verb(aside: Connection, connection: Connection) -> None:
    register = open_register(aside, "ledger")
    one, two = xid(), xid()
    assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.DECIDED
    connection.commit()
    assert register.claim(aside, one) == register.read(aside, one) == COMMITTED
    assert register.claim(aside, two) == Row(Found.ABORTED)
    assert register.undone(aside) == [(one, LIST)]
    register.done(aside, [one])
    assert register.forget(aside, LATER_MS) == 2
    assert register.claim(aside, one) == Row(Found.FORGOTTEN)
    assert register.decide(connection, one, LIST, backend_pid(connection)) is Verdict.REFUSED
    connection.rollback()


# ------------------------------------------------------------------------------------------------------------ at random


def test_deciders_claimers_and_forgetting_at_once_never_contradict_each_other(engine: Engine) -> None:
    """Of each transaction one word is heard, over all its history; and its work is there once if it is COMMITTED, else never."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as aside:
        register = open_register(aside, "ledger")
        now_ms: int = aside.scalar(sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")) or 0
    xids = [xid(now_ms) for _ in range(30)]
    heard: list[tuple[Xid, Found]] = []
    dice = random.Random(1)
    levels = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

    def decide(which: Xid, level: Any) -> None:
        with engine.connect().execution_options(isolation_level=level) as connection:
            try:
                connection.execute(sa.text("SELECT count(*) FROM entry"))
                name = f"{which} {os.urandom(4).hex()}"
                connection.execute(sa.text("INSERT INTO entry VALUES (:name, 1)"), {"name": name})
                if register.decide(connection, which, LIST, backend_pid(connection)) is Verdict.DECIDED:
                    connection.commit()
                    heard.append((which, Found.COMMITTED))
            except DBAPIError:
                return  # serialization failures

    def on_the_side(verb: Callable[[Connection], None]) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            verb(connection)

    def claim(which: Xid) -> None:
        on_the_side(lambda connection: heard.append((which, register.claim(connection, which).found)))

    def forget(horizon_ms: int) -> None:
        def over(connection: Connection) -> None:
            register.done(connection, [each for each, _ in register.undone(connection)][::2])
            register.forget(connection, horizon_ms)

        on_the_side(over)

    work: list[Callable[[], None]] = []
    for number, which in enumerate(xids):
        deciding = [functools.partial(decide, which, level) for level in levels]
        work += sorted([*deciding, *[functools.partial(claim, which)] * 2], key=lambda _: dice.random())
        if number % 5 == 0:
            # At last everything is below the floor.
            work.append(functools.partial(forget, 60_000 if number < 15 else LATER_MS))
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(one) for one in work]:
            each.result(60)
    told: dict[Xid, set[Found]] = {}
    for which, found in heard:
        told.setdefault(which, set()).add(found)
    assert not [which for which, words in told.items() if {Found.COMMITTED, Found.ABORTED} <= words]
    with engine.connect() as connection:
        names = [name.split()[0] for name in connection.scalars(sa.text("SELECT name FROM entry"))]
    assert sorted(names) == sorted(str(which) for which, words in told.items() if Found.COMMITTED in words)
    assert {Found.COMMITTED, Found.ABORTED} <= {found for _, found in heard}


def test_the_row_alone_decides(register: PostgresqlRegister, aside: Connection) -> None:
    check_decisions_without_work(register, aside, [xid() for _ in range(4)])


def test_deciders_without_work_and_claimers_at_once_hear_one_word(engine: Engine, register: PostgresqlRegister) -> None:
    def ask(which: Xid, branches: bytes | None) -> Found:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return register.ask(connection, register.id, which, True, branches).found

    check_the_race_for_a_row(ask, [xid() for _ in range(30)])
