"""What users, drivers and networks do to a branch, and what must not come of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

import txrpc.sql
from tests.postgres import Server, needs_own_server
from tests.sql.kit import Make, Proxy, ended, gid, insert, rows
from tests.waiting import eventually, until_a_backend_waits_for
from txrpc._client.transactional import transaction
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import AbortCode, IllegalState, ResourceUnavailable, TransactionAborted
from txrpc.resource import Prepared
from txrpc.testing.postgres import PostgresServer


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    target = sa.make_url(url)
    with Proxy(target.host or "", target.port or 5432) as proxy:
        yield proxy


# ------------------------------------------------------------------------------------------------ a connection that breaks


@pytest.mark.parametrize("verb", ["prepare", "commit"])
def test_rule_8_what_follows_a_lost_connection_is_not_taken_for_the_branch(
    make: Make, driver: str, server: Server, verb: str
) -> None:
    """SQLAlchemy reconnects after rollback(); that is another transaction, without what was done before."""
    resource = make(driver)
    work = resource.begin(False)
    insert(work, "lost")
    server.execute(f"SELECT pg_terminate_backend({work.pid})")
    with pytest.raises(DBAPIError):
        insert(work, "x")
    work.connection.rollback()
    insert(work, "kept")
    with pytest.raises(ResourceUnavailable, match="lost"):
        if verb == "prepare":
            resource.prepare(work, gid())
        else:
            resource.commit_one_phase(work, lambda _token: None)
    resource.rollback(work)
    assert rows(resource) == []
    assert resource.in_doubt("default") == []


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_a_lost_connection_whose_error_was_swallowed_dooms_the_transaction(
    bank: txrpc.sql.ResourceManager, server: Server, kind: str
) -> None:
    with pytest.raises(TransactionAborted) as caught, transaction():
        with getattr(bank, kind)() as user:
            user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
            pid = user.scalar(sa.text("SELECT pg_backend_pid()"))
            server.execute(f"SELECT pg_terminate_backend({pid})")
            with pytest.raises(DBAPIError):
                user.execute(sa.text("SELECT 1"))
            user.rollback()
            user.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
    assert caught.value.reason.code is AbortCode.RESOURCE_UNAVAILABLE
    assert caught.value.reason.retryable
    assert rows(bank) == []


def test_rule_13_a_commit_that_the_network_swallowed_is_ended_and_its_locks_are_free(
    make: Make, driver: str, url: str, proxy: Proxy
) -> None:
    """The server never hears of the COMMIT, nor that its client has gone: left alone, it would hold its locks for hours."""
    resource, direct = make(driver), make(driver, at=proxy.url(url))
    work = direct.begin(False)
    insert(work)

    def cut(_token: str) -> None:
        proxy.deafen()
        threading.Thread(target=break_off).start()

    def break_off() -> None:
        proxy.lost.wait(30)  # the COMMIT
        proxy.cut()

    assert ended(direct, work, cut) is Outcome.ABORTED
    insert(again := resource.begin(False))
    resource.rollback(again)


def test_rule_13_a_commit_whose_answer_the_network_swallowed_is_committed(
    make: Make, driver: str, url: str, proxy: Proxy
) -> None:
    resource, direct = make(driver), make(driver, at=proxy.url(url))
    work = direct.begin(False)
    insert(work)

    def cut(_token: str) -> None:
        proxy.mute()
        threading.Thread(target=break_off).start()

    def break_off() -> None:
        proxy.lost.wait(30)  # the answer to COMMIT
        proxy.cut()

    assert ended(direct, work, cut) is Outcome.COMMITTED
    assert rows(resource) == ["a"]


@pytest.mark.parametrize("refusing", [0, 2])
def test_a_prepare_that_the_network_swallowed_never_happens_later(
    make: Make, driver: str, url: str, proxy: Proxy, server: Server, refusing: int
) -> None:
    resource, direct, branch = make(driver), make(driver, at=proxy.url(url)), gid()
    server.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(2); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()",
        resource.engine.url.database or "",
    )
    work = direct.begin(False)
    insert(work)
    proxy.refusing = refusing
    database = resource.engine.url.database or ""

    def cut() -> None:
        until_a_backend_waits_for(server, database, "PgSleep")  # PREPARE is in the trigger
        proxy.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(DBAPIError):
        direct.prepare(work, branch)
    cutter.join()
    direct.rollback(work)
    eventually(lambda: direct.terminate(work))
    assert direct.rollback_prepared(branch, "") is FinishResult.NOT_HERE
    gone = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {work.pid}"
    eventually(lambda: server.execute(gone) == [(0,)])
    assert resource.in_doubt("default") == []


@pytest.mark.parametrize("verb", ["prepare", "commit"])
def test_rule_2_a_connection_that_was_moved_to_another_backend_is_not_the_branch(
    make: Make, driver: str, url: str, proxy: Proxy, verb: str
) -> None:
    """G1: the other backend has no transaction, so it has written nothing; that was taken for a branch that only read."""
    resource, moved = make(driver), make(driver, at=proxy.url(url))
    work = moved.begin(False)
    insert(work)
    proxy.move()
    with pytest.raises(ResourceUnavailable, match="moved from backend"):
        if verb == "prepare":
            moved.prepare(work, gid())
        else:
            moved.commit_one_phase(work, lambda _token: None)
    moved.rollback(work)
    assert rows(resource) == []
    assert resource.in_doubt("default") == []


@pytest.fixture
def foreign_table(url: str, server: Server) -> str:
    """The database that the table ``elsewhere`` of this one is in."""
    database = sa.make_url(url).database or ""
    remote = f"{database}_remote"
    server.create_database(remote)
    server.execute("CREATE TABLE elsewhere (name text)", remote)
    try:
        server.execute("CREATE EXTENSION postgres_fdw", database)
    except psycopg.Error:
        pytest.skip("no postgres_fdw on this PostgreSQL")
    options = f"host '{sa.make_url(url).host}', port '{sa.make_url(url).port}', dbname '{remote}'"
    for statement in (
        f"CREATE SERVER other FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({options})",
        f"CREATE USER MAPPING FOR PUBLIC SERVER other OPTIONS (user '{sa.make_url(url).username}')",
        "CREATE FOREIGN TABLE elsewhere (name text) SERVER other",
    ):
        server.execute(statement, database)
    return remote


def test_rule_2_what_a_foreign_data_wrapper_wrote_is_not_taken_for_nothing(
    make: Make, driver: str, server: Server, foreign_table: str
) -> None:
    """F3: PostgreSQL gives such a transaction no identifier, so it voted READ_ONLY, and its work was rolled back."""
    resource = make(driver)
    statement = sa.text("INSERT INTO elsewhere VALUES ('a')")
    (work := resource.begin(False)).connection.execute(statement)
    with pytest.raises(DBAPIError, match="postgres_fdw") as caught:
        resource.prepare(work, gid())
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.CANNOT_PREPARE
    resource.rollback(work)
    assert server.execute("SELECT name FROM elsewhere", foreign_table) == []
    tokens: list[str] = []
    (alone := resource.begin(False)).connection.execute(statement)
    assert resource.commit_one_phase(alone, tokens.append) is Outcome.COMMITTED
    assert len(tokens) == 1
    assert server.execute("SELECT name FROM elsewhere", foreign_table) == [("a",)]


def test_always_prepare_sees_what_a_function_does_behind_the_transaction(url: str, server: Server) -> None:
    """F4: NOTIFY in a function is not in the text of the statement."""
    database = sa.make_url(url).database or ""
    server.execute("CREATE FUNCTION tell() RETURNS void LANGUAGE sql AS $$SELECT pg_notify('c', 'x')$$", database)
    resource = txrpc.sql.ResourceManager("bank", sa.create_engine(url), always_prepare=True)
    (work := resource.begin(False)).connection.execute(sa.text("SELECT tell()"))
    with pytest.raises(DBAPIError) as caught:
        resource.prepare(work, gid())
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.CANNOT_PREPARE
    resource.rollback(work)
    assert isinstance(resource.prepare(resource.begin(False), branch := gid()), Prepared)
    assert resource.rollback_prepared(branch, "") is FinishResult.DONE
    resource.close()
    resource.engine.dispose()


def test_behind_a_pooler_that_hides_backends_a_branch_can_still_be_broken_off(
    make: Make, driver: str, url: str, server: Server
) -> None:
    target = sa.make_url(url)
    with Proxy(target.host or "", target.port or 5432, pid=2**31 - 1) as pooler:
        resource = make(driver, at=pooler.url(url))
        resource.start()
        work = resource.begin(False)
        assert server.execute(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {work.pid}") == [(1,)]
        insert(work)
        resource.interrupt(work)
        eventually(lambda: server.execute(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {work.pid}") == [(0,)])
        resource.rollback(work)


def test_why_the_server_closed_a_connection_is_named_alike_with_every_driver(
    make: Make, driver: str, server: Server
) -> None:
    """G9: asyncpg said "connection is closed" and no more; it and psycopg2 do not keep the server's last words."""
    resource = make(driver)
    work = resource.begin(False)
    work.connection.execute(sa.text("SET idle_in_transaction_session_timeout = 50"))
    eventually(lambda: server.execute(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {work.pid}") == [(0,)])
    with pytest.raises(DBAPIError) as caught:
        insert(work)
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.RESOURCE_UNAVAILABLE
    assert reason.retryable
    assert "25P03" in reason.text or "idle_in_transaction_session_timeout" in reason.text
    resource.rollback(work)


def test_interrupting_a_branch_that_has_ended_hurts_nobody(make: Make, driver: str) -> None:
    """Its connection may be another branch's by now."""
    resource = make(driver, pool_size=1, max_overflow=0)
    ended = resource.begin(False)
    insert(ended, "ended")
    resource.rollback(ended)
    innocent = resource.begin(False)
    assert innocent.pid == ended.pid
    resource.interrupt(ended)
    insert(innocent, "innocent")
    assert resource.commit_one_phase(innocent, lambda _token: None) is Outcome.COMMITTED
    assert rows(resource) == ["innocent"]


def test_a_commit_that_the_database_refuses_is_not_done_and_costs_no_connection(make: Make, driver: str) -> None:
    resource = make(driver, pool_size=1, max_overflow=0)
    with resource.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE entry ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED"))
    work = resource.begin(False)
    insert(work, "a")
    insert(work, "b")
    with pytest.raises(DBAPIError) as caught:
        resource.commit_one_phase(work, lambda _token: None)
    reason = resource.classify(caught.value)
    assert reason is not None
    assert (reason.code, reason.retryable) == (AbortCode.STATEMENT_FAILED, False)
    resource.rollback(work)
    insert(again := resource.begin(False), "c")
    assert again.pid == work.pid
    assert resource.commit_one_phase(again, lambda _token: None) is Outcome.COMMITTED
    assert rows(resource) == ["c"]


def test_rule_13_an_error_of_the_drivers_own_at_commit_is_no_answer(
    make: Make, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg's own state machine, for one, may break off after the server has committed."""
    resource = make(driver)
    work = resource.begin(False)
    insert(work)

    def commit_and_break(_dialect: object, connection: Any) -> None:
        connection.commit()
        raise RuntimeError("cannot switch to state 15")

    dialect = type(work.connection.engine.dialect)
    monkeypatch.setattr(dialect, "do_commit", commit_and_break)
    try:
        assert ended(resource, work, lambda _token: None) is Outcome.COMMITTED
    finally:
        monkeypatch.undo()
    assert rows(resource) == ["a"]


def test_a_failed_prepare_costs_no_connection(make: Make, driver: str) -> None:
    resource = make(driver, pool_size=1, max_overflow=0)
    work = resource.begin(False)
    work.connection.execute(sa.text("CREATE TEMP TABLE t (n int)"))
    with pytest.raises(DBAPIError):
        resource.prepare(work, gid())
    resource.rollback(work)
    insert(again := resource.begin(False))
    assert again.pid == work.pid
    resource.rollback(again)


# ------------------------------------------------------------------------------------------------------------ SQL by hand


ENDING = [
    "COMMIT",
    "commit and chain",
    " /* really */ END",
    "-- now\nROLLBACK",
    "ABORT WORK",
    "PREPARE TRANSACTION 'mine'",
    "ROLLBACK PREPARED 'mine'",
]


@pytest.mark.parametrize("statement", ENDING)
@pytest.mark.parametrize("kind", ["session", "connection"])
def test_the_end_of_the_transaction_as_sql_is_refused(
    bank: txrpc.sql.ResourceManager, kind: str, statement: str
) -> None:
    with pytest.raises(TransactionAborted), transaction():
        with pytest.raises(IllegalState, match="inside a transaction"), getattr(bank, kind)() as user:
            user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
            user.execute(sa.text(statement))
    assert rows(bank) == []


def test_savepoints_as_sql_are_fine(bank: txrpc.sql.ResourceManager) -> None:
    with transaction(), bank.connection() as connection:
        connection.execute(sa.text("SAVEPOINT s"))
        connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        connection.execute(sa.text("ROLLBACK TO SAVEPOINT s"))
        connection.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
        connection.execute(sa.text("ROLLBACK WORK TO s"))
        connection.execute(sa.text("INSERT INTO entry VALUES ('c', 1)"))
        connection.execute(sa.text("RELEASE SAVEPOINT s"))
        connection.execute(sa.text("PREPARE commit_it AS SELECT 1"))
    assert rows(bank) == ["c"]


def test_outside_a_transaction_it_is_nobodys_business(bank: txrpc.sql.ResourceManager) -> None:
    with bank.engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        connection.execute(sa.text("COMMIT"))
        connection.rollback()
    assert rows(bank) == ["a"]


# ------------------------------------------------------------------------------------------------------------ the reasons


def test_a_mistake_that_the_driver_finds_is_the_statements(make: Make) -> None:
    """No SQLSTATE, and the connection is fine: running it again will not help."""
    resource = make()
    work = resource.begin(False)
    with pytest.raises(DBAPIError) as caught:
        work.connection.exec_driver_sql("SELECT %s", ("hunter2", "more"))
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    assert "hunter2" not in reason.text
    resource.rollback(work)


def test_an_unsupported_feature_is_not_a_refusal_to_prepare(make: Make, driver: str) -> None:
    resource = make(driver)
    work = resource.begin(False)
    with pytest.raises(DBAPIError) as caught:
        work.connection.exec_driver_sql("ALTER TABLE entry ALTER name TYPE text USING (name IN (SELECT 'a'))")
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    assert "0A000" in reason.text
    resource.rollback(work)


@needs_own_server
def test_no_room_for_one_more_prepared_transaction_may_be_retried() -> None:
    with PostgresServer.start_new(max_prepared_transactions=1) as server:
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)")
        resource, branch = txrpc.sql.ResourceManager("bank", sa.create_engine(server.url())), gid()
        first, second = resource.begin(False), resource.begin(False)
        insert(first, "1")
        insert(second, "2")
        assert isinstance(resource.prepare(first, branch), Prepared)
        with pytest.raises(DBAPIError) as caught:
            resource.prepare(second, gid())
        reason = resource.classify(caught.value)
        assert reason is not None
        assert reason.code is AbortCode.RESOURCE_UNAVAILABLE
        assert "maximum number of prepared transactions" in reason.text
        resource.rollback(second)
        assert resource.rollback_prepared(branch, "") is FinishResult.DONE
        resource.close()
        resource.engine.dispose()


def test_a_statement_that_took_too_long_is_the_statements(make: Make, driver: str) -> None:
    resource = make(connect_args={"options": "-c statement_timeout=100"})
    work = resource.begin(False)
    with pytest.raises(DBAPIError) as caught:
        work.connection.exec_driver_sql("SELECT pg_sleep(5)")
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    assert "statement timeout" in reason.text
    resource.rollback(work)
