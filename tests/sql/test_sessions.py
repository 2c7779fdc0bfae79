"""Sessions in a branch: what they are made of, what an error in a flush means, and what they share."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

import txrpc.sql
from tests.runtime.conftest import NoSession
from tests.sql.kit import Make, Row, gid, insert, rows
from txrpc._client.client import Client
from txrpc._client.scope import set_default_client
from txrpc._client.transactional import transaction, transactional
from txrpc._protocol.messages import FinishResult
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, ResourceUnavailable, TransactionAborted
from txrpc.resource import Prepared


class Own(Session):
    """A user's own session class."""


# --------------------------------------------------------------------------------------------------------- what they are


def test_session_options_and_class_inside_and_outside_a_transaction(make: Make) -> None:
    engine = make().engine
    resource = txrpc.sql.ResourceManager("own", engine, session_class=Own, expire_on_commit=False, autoflush=False)
    manager = Client("default", [resource])
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    with manager:
        with transaction(), resource.session() as inside:
            inside.add(Row(name="a", value=1))
        with resource.session() as outside:
            outside.add(Row(name="b", value=1))
        for session in (inside, outside):
            assert isinstance(session, Own)
            assert session.expire_on_commit is False
            assert session.autoflush is False
    assert rows(resource) == ["a", "b"]


def test_a_session_that_would_prepare_by_itself_is_refused(make: Make) -> None:
    """SQLAlchemy's two-phase sessions prepare and commit without a log: a crash between the two is never resolved."""
    with pytest.raises(ConfigurationError, match="twophase"):
        txrpc.sql.ResourceManager("bank", make().engine, twophase=True)


def got(session: Session, key: str) -> Row:
    """The row; `Session.get_one` is younger than the oldest SQLAlchemy."""
    row = session.get(Row, key)
    assert row is not None
    return row


def test_sessions_of_one_call_share_the_branch(bank: txrpc.sql.ResourceManager) -> None:
    with transaction():
        with bank.session() as outer:
            outer.add(Row(name="a", value=1))
            outer.flush()
            pid = outer.scalar(sa.text("SELECT pg_backend_pid()"))
            with bank.session() as inner:
                assert inner.scalar(sa.text("SELECT pg_backend_pid()")) == pid
                got(inner, "a").value = 2
            outer.expire_all()
            assert got(outer, "a").value == 2
        with bank.session() as later:
            assert later.scalar(sa.text("SELECT pg_backend_pid()")) == pid
    assert rows(bank) == ["a"]


def test_close_in_the_block_loses_only_what_was_not_flushed(bank: txrpc.sql.ResourceManager) -> None:
    with transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        session.flush()
        session.close()
        session.add(Row(name="b", value=1))
    assert rows(bank) == ["a", "b"]


def test_a_context_manager_of_the_sessions_own_is_refused(bank: txrpc.sql.ResourceManager) -> None:
    with (
        pytest.raises(IllegalState, match="flushed at the end"),
        transaction(),
        bank.session() as session,
        session.begin(),
    ):
        session.add(Row(name="a", value=1))
    assert rows(bank) == []


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("swallowed", [True, False])
def test_an_error_in_a_flush_is_the_reason(bank: txrpc.sql.ResourceManager, swallowed: bool) -> None:
    """SQLAlchemy rolls back by itself when a flush fails; that is not what happened."""
    with pytest.raises((TransactionAborted, DBAPIError)), transaction() as tx:
        try:
            with bank.session() as session:
                session.add_all([Row(name="a", value=1), Row(name="a", value=2)])
        except DBAPIError:
            if not swallowed:
                raise
    assert tx.doom is not None
    assert tx.doom.code is AbortCode.STATEMENT_FAILED
    assert "23505" in tx.doom.text
    assert rows(bank) == []


def test_a_serialization_failure_in_a_flush_is_retried(bank: txrpc.sql.ResourceManager) -> None:
    with bank.session() as session:
        session.add(Row(name="x", value=0))
    tries: list[int] = []

    @transactional(retry=3)
    def add_one() -> None:
        tries.append(1)
        with bank.session() as session:
            session.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            row = got(session, "x")
            if len(tries) == 1:
                with bank.engine.begin() as other:
                    other.execute(sa.text("UPDATE entry SET value = value + 10"))
            row.value += 1

    add_one()
    assert len(tries) == 2
    with bank.session() as session:
        assert got(session, "x").value == 11


def test_rollback_by_hand_after_an_error_keeps_its_reason(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(TransactionAborted) as caught, transaction(), bank.session() as session:
        try:
            session.execute(sa.text("SELECT 1/0"))
        except DBAPIError:
            session.rollback()
    assert caught.value.reason.code is AbortCode.STATEMENT_FAILED


def test_a_lost_update_that_the_orm_notices_undoes_everything(bank: txrpc.sql.ResourceManager) -> None:
    with bank.session() as session:
        session.add_all([Row(name="x", value=0), Row(name="y", value=0)])
    with pytest.raises(TransactionAborted), transaction():
        with pytest.raises(StaleDataError), bank.session() as session:
            x, y = got(session, "x"), got(session, "y")
            session.execute(sa.text("DELETE FROM entry WHERE name = 'y'"))
            x.value, y.value = 1, 1
    assert rows(bank) == ["x", "y"]


# ------------------------------------------------------------------------------------------- statements with an end in them


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("SELECT 1; COMMIT", "COMMIT inside a transaction"),
        ("SELECT 1; ROLLBACK", "ROLLBACK inside a transaction"),
        ("SELECT 1; COMMIT; SELECT 2", "COMMIT inside a transaction"),
        ("SELECT ';'; /* ; */ commit and chain", "COMMIT inside a transaction"),
        ("INSERT INTO entry VALUES ('half', 1); COMMIT; BEGIN; INSERT INTO entry VALUES ('more', 1)", "COMMIT inside"),
        ("DO $$ BEGIN COMMIT; END $$", "invalid transaction termination"),
    ],
)
def test_a_script_that_ends_the_transaction_dooms_it(make: Make, driver: str, script: str, says: str) -> None:
    """F18: one that began another transaction at once was not noticed, and half of it stayed."""
    resource = make(driver)
    manager = Client("default", [resource])
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    with manager, pytest.raises(TransactionAborted), transaction():
        with pytest.raises((IllegalState, DBAPIError), match=says), resource.connection() as connection:
            connection.exec_driver_sql(script)
        with resource.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES ('after', 1)"))
    assert rows(resource) == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT '; commit'",
        "SELECT E'\\'; commit'",
        'SELECT 1 AS "; commit"',
        "SELECT $x$; commit$x$",
        "SELECT 1 -- ; commit",
        "SELECT 1; SELECT 2 /* ; commit */",
        "SAVEPOINT s; ROLLBACK TO s",
        "CREATE PROCEDURE p() BEGIN ATOMIC SELECT 1; END",
        "DO $$ BEGIN PERFORM 1; END $$",
    ],
)
def test_words_that_end_nothing_are_no_end(make: Make, statement: str) -> None:
    resource = make()
    work = resource.begin(False)
    work.connection.exec_driver_sql(statement)
    assert work.doom is None
    resource.rollback(work)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])  # the others: test_aio
@pytest.mark.parametrize("verb", ["commit", "rollback"])
@pytest.mark.parametrize("more", [False, True], ids=["and nothing more", "and goes on"])
def test_the_drivers_own_commit_and_rollback_doom_the_transaction(
    make: Make, driver: str, verb: str, more: bool
) -> None:
    """B10: SQLAlchemy does not see them, and the next statement begins another transaction, which passes for the branch's."""
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    insert(work)
    raw: Any = getattr(work.connection, "connection", None)
    if raw is None or "async" in driver or driver == "asyncpg":
        pytest.skip(
            "its own verbs are coroutines: the same guard, by the driver's word for whether a transaction is open"
        )
    getattr(raw.dbapi_connection, verb)()
    if more:
        with pytest.raises(IllegalState, match="ended on the driver's own connection"):
            insert(work, "b")
    with pytest.raises((IllegalState, ResourceUnavailable), match="ended on the driver's own connection"):
        resource.prepare(work, branch)
    resource.rollback(work)
    assert resource.rollback_prepared(branch, "") is FinishResult.NOT_HERE


def test_the_drivers_own_commit_in_a_block_rolls_everything_else_back(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(TransactionAborted, match="ended on the driver's own connection"), transaction() as tx:
        with bank.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
            raw: Any = connection.connection.dbapi_connection
            raw.commit()
    assert tx.doom is not None
    assert tx.doom.code is AbortCode.STATEMENT_FAILED


@pytest.mark.parametrize("before", ["a pending object", "a statement"])
def test_rollback_of_a_session_dooms_the_transaction_whatever_it_had_done(
    bank: txrpc.sql.ResourceManager, before: str
) -> None:
    """B3: before its first statement it went unnoticed, and the rest of the transaction committed."""
    with pytest.raises(TransactionAborted, match="rollback"), transaction() as tx:
        with bank.session() as session:
            if before == "a pending object":
                session.add(Row(name="a", value=1))
            elif before == "a statement":
                session.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
            session.rollback()
    assert tx.doom is not None
    assert tx.doom.code is AbortCode.REQUESTED
    assert rows(bank) == []


def test_rollback_of_a_session_that_has_begun_nothing_dooms_the_transaction(bank: txrpc.sql.ResourceManager) -> None:
    """SQLAlchemy has nothing to roll back there, and tells no listener; what another block wrote would have been committed."""
    with pytest.raises(TransactionAborted, match="rollback"), transaction():
        with bank.session() as session:
            session.add(Row(name="a", value=1))
        with bank.session() as session:
            session.rollback()
    assert rows(bank) == []


def test_rollback_to_a_savepoint_of_a_session_dooms_nothing(bank: txrpc.sql.ResourceManager) -> None:
    with transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        with suppress(DBAPIError), session.begin_nested():
            session.execute(sa.text("INSERT INTO entry VALUES ('a', 2)"))
        nested = session.begin_nested()
        session.add(Row(name="b", value=1))
        nested.rollback()
    assert rows(bank) == ["a"]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_script_that_ends_nothing_is_fine(make: Make, driver: str) -> None:
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    work.connection.exec_driver_sql("SELECT 1; SAVEPOINT s; SELECT 2; RELEASE s")
    streamed = sa.text("SELECT generate_series(1, 2000)").execution_options(stream_results=True)
    assert len(work.connection.execute(streamed).all()) == 2000
    work.connection.execute(sa.insert(Row), [{"name": str(n), "value": n} for n in range(2000)])
    insert(work)
    assert isinstance(resource.prepare(work, branch), Prepared)
    resource.rollback_prepared(branch, "")
