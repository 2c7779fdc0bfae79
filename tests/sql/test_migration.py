"""What docs/migrating.md says about code that was there before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import txrpc
import txrpc.sql
from tests.runtime.conftest import NoSession
from tests.sql.kit import Make, Row, rows
from txrpc._client.client import Client
from txrpc._client.scope import set_default_client


@pytest.fixture
def lenient(make: Make) -> Iterator[txrpc.sql.ResourceManager]:
    """A resource whose sessions flush where they are told to commit."""
    resource = txrpc.sql.ResourceManager("bank", make().engine, session_commit="flush")
    client = Client("default", [resource])
    client.start(NoSession())
    set_default_client("txrpc", client, on=True)
    yield resource
    client.close()


def old_code(session: Session, name: str) -> None:
    """It has always committed by itself."""
    session.add(Row(name=name, value=1))
    session.commit()


def test_commit_is_a_flush_where_that_was_chosen(
    lenient: txrpc.sql.ResourceManager, caplog: pytest.LogCaptureFixture
) -> None:
    with txrpc.transaction(), lenient.session() as session:
        old_code(session, "a")
        assert rows(lenient) == []  # no other connection sees it yet
        old_code(session, "b")
        assert session.scalar(sa.select(sa.func.count()).select_from(Row)) == 2
        session.add(Row(name="c", value=1))
    assert rows(lenient) == ["a", "b", "c"]
    warnings = [record.getMessage() for record in caplog.records if "was a flush" in record.msg]
    assert len(warnings) == 2
    line = old_code.__code__.co_firstlineno + 3
    assert warnings[0] == f"Session.commit() inside a transaction was a flush: {__file__}, line {line}"


def test_what_was_flushed_so_rolls_back_with_the_transaction(lenient: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(KeyError), txrpc.transaction(), lenient.session() as session:
        old_code(session, "a")
        raise KeyError
    assert rows(lenient) == []


def test_a_rollback_of_such_a_session_is_still_the_transactions(lenient: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(txrpc.TransactionAborted), txrpc.transaction(), lenient.session() as session:
        old_code(session, "a")
        session.add(Row(name="b", value=1))
        session.rollback()
    assert rows(lenient) == []


def test_a_rollback_with_nothing_since_the_commit_undoes_nothing_as_ever(lenient: txrpc.sql.ResourceManager) -> None:
    with txrpc.transaction(), lenient.session() as session:
        old_code(session, "a")
        session.rollback()
    assert rows(lenient) == ["a"]


def test_commit_on_the_connection_is_refused_all_the_same(lenient: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(txrpc.IllegalState), txrpc.transaction(), lenient.connection() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        connection.commit()
    assert rows(lenient) == []


def test_a_context_manager_of_the_sessions_own_ends_in_a_flush(lenient: txrpc.sql.ResourceManager) -> None:
    with txrpc.transaction(), lenient.session() as session:
        with session.begin():
            session.add(Row(name="a", value=1))
        with session.begin_nested():
            session.add(Row(name="b", value=1))
        assert rows(lenient) == []
    assert rows(lenient) == ["a", "b"]


def test_outside_a_transaction_commit_commits(lenient: txrpc.sql.ResourceManager) -> None:
    with sessionmaker(lenient.engine)() as session:
        old_code(session, "a")
    assert rows(lenient) == ["a"]


def test_the_word_is_checked(make: Make) -> None:
    with pytest.raises(txrpc.ConfigurationError, match="session_commit is 'refuse' or 'flush', not 'ignore'"):
        txrpc.sql.ResourceManager("bank", make().engine, session_commit="ignore")  # type: ignore[arg-type]


def test_a_dependency_that_yields_the_session(lenient: txrpc.sql.ResourceManager) -> None:
    """FastAPI's ``get_db``: the route's session is the branch's."""

    def get_db() -> Iterator[Session]:
        with lenient.session() as session:
            yield session

    def route(db: Session) -> None:
        old_code(db, "a")

    with txrpc.transaction():
        dependency = get_db()
        route(next(dependency))
        assert next(dependency, None) is None
        assert rows(lenient) == []
    assert rows(lenient) == ["a"]


def test_a_scoped_session_that_old_code_imports(lenient: txrpc.sql.ResourceManager) -> None:
    """The registry is given the branch's session for the length of the block."""
    db = scoped_session(sessionmaker(lenient.engine))

    def deep_down() -> None:
        db.add(Row(name="a", value=1))
        db.commit()

    with txrpc.transaction(), lenient.session() as session:
        db.registry.set(session)
        try:
            deep_down()
        finally:
            db.registry.clear()
        assert rows(lenient) == []
    assert rows(lenient) == ["a"]
    deep_down_again = db()
    assert deep_down_again.get_bind() is lenient.engine
    db.remove()
