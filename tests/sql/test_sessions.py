"""Sessions in a branch: what they are made of, what an error in a flush means, and what they share."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

import txrpc.sql
from tests.runtime.conftest import NoSession
from tests.sql.kit import Make, Row, gid, insert, rows
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, TransactionAborted
from txrpc.resource import Prepared
from txrpc.runtime.manager import Manager
from txrpc.runtime.scope import set_default_manager
from txrpc.runtime.transactional import transaction, transactional


class Own(Session):
    """A user's own session class."""


# --------------------------------------------------------------------------------------------------------- what they are


def test_session_options_and_class_inside_and_outside_a_transaction(make: Make) -> None:
    engine = make().engine
    resource = txrpc.sql.ResourceManager("own", engine, session_class=Own, expire_on_commit=False, autoflush=False)
    manager = Manager("default", [resource])
    manager.start(NoSession())
    set_default_manager("txrpc", manager, on=True)
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
                    other.execute(sa.text("UPDATE row SET value = value + 10"))
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
            session.execute(sa.text("DELETE FROM row WHERE name = 'y'"))
            x.value, y.value = 1, 1
    assert rows(bank) == ["x", "y"]


# ------------------------------------------------------------------------------------------- statements with an end in them


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("script", ["SELECT 1; COMMIT", "SELECT 1; ROLLBACK", "SELECT 1; COMMIT; SELECT 2"])
def test_a_script_that_ends_the_transaction_dooms_it(make: Make, driver: str, script: str) -> None:
    """What it committed stays; but nothing after it may pass for the branch."""
    resource = make(driver)
    manager = Manager("default", [resource])
    manager.start(NoSession())
    set_default_manager("txrpc", manager, on=True)
    with manager, pytest.raises(TransactionAborted), transaction():
        with pytest.raises(IllegalState, match="ended the transaction"), resource.connection() as connection:
            connection.exec_driver_sql(script)
        with resource.connection() as connection:
            connection.execute(sa.text("INSERT INTO row VALUES ('after', 1)"))
    assert rows(resource) == []


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
