"""SQLite as a resource: it cannot prepare, and everything else holds.  Of both halves of `txrpc.sql`."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import txrpc
import txrpc.sql
from tests.sql.blocking import Blocking
from tests.sql.kit import Row, ended, gid, insert, rows
from tests.waiting import eventually
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc._protocol.outcomes import Found
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, ResourceUnavailable
from txrpc.resource import ReadOnly
from txrpc.sql.sqlite import ends_the_transaction

Make = Callable[..., Any]
SOON = {"connect_args": {"timeout": 0.1}}
"""Others that write are not waited for."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/bank.db"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE entry (name text PRIMARY KEY, value int)")
    engine.dispose()
    return url


@pytest.fixture(params=["sqlite", "aiosqlite"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(url: str, driver: str) -> Iterator[Make]:
    """``make(url, **engine_options)``: a resource that has been started."""
    made: list[Any] = []

    def one(at: str = url, decides: bool = False, start: bool = True, **options: Any) -> Any:
        if driver == "aiosqlite":
            made.append(Blocking(sa.make_url(at), driver, "sqlite", decides, **options))
        else:
            made.append(txrpc.sql.ResourceManager("bank", sa.create_engine(at, **options), decides=decides))
        if start:
            made[-1].start()
        return made[-1]

    yield one
    for resource in made:
        if isinstance(resource, Blocking):
            resource.stop()
        else:
            resource.close()
        resource.engine.dispose()


def tokens() -> tuple[list[str], Callable[[str], None]]:
    told: list[str] = []
    return told, told.append


# -------------------------------------------------------------------------------------------------------- a branch


def test_a_branch_commits_alone_and_its_end_can_be_learnt_by_any_process(make: Make) -> None:
    bank, other = make(), make()
    told, committing = tokens()
    work = bank.begin(False)
    insert(work)
    assert ended(bank, work, committing) is Outcome.COMMITTED
    assert rows(bank) == ["a"]
    assert other.one_phase_result(told[0]) is Outcome.COMMITTED


def test_a_branch_that_went_away_before_its_commit_is_told_as_aborted(make: Make) -> None:
    bank, other = make(), make(**SOON)
    told: list[str] = []

    def crash(token: str) -> None:
        told.append(token)
        assert other.one_phase_result(token) is None, "it may still commit"
        raise RuntimeError("crash")

    work = bank.begin(False)
    insert(work)
    with pytest.raises(RuntimeError, match="crash"):
        bank.commit_one_phase(work, crash)
    bank.rollback(work)
    assert rows(bank) == []
    assert other.one_phase_result(told[0]) is Outcome.ABORTED


def test_a_file_that_is_not_the_one_or_has_forgotten_says_that_it_cannot_tell(
    make: Make, url: str, tmp_path: Path
) -> None:
    bank = make()
    told, committing = tokens()
    shutil.copy(tmp_path / "bank.db", tmp_path / "backup.db")
    work = bank.begin(False)
    insert(work)
    ended(bank, work, committing)
    restored = make(url.replace("bank.db", "backup.db"))
    assert restored.one_phase_result(told[0]) is Outcome.UNKNOWN
    assert bank.one_phase_result("7-00000001") is Outcome.UNKNOWN
    name, file, number = told[0].split("-")
    long_ago = f"{name}-{file}-{1:012x}{number[12:]}"
    assert bank.one_phase_result(long_ago) is Outcome.UNKNOWN


def test_it_cannot_prepare_and_says_what_to_do(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    with pytest.raises(Exception, match="cannot prepare") as caught:
        bank.prepare(work, gid())
    reason = bank.classify(caught.value)
    assert (reason.code, "decide_in" in reason.text) == (AbortCode.CANNOT_PREPARE, True)
    bank.rollback(work)
    assert rows(bank) == []
    assert (bank.in_doubt("default"), bank.rollback_prepared(gid(), "")) == ([], FinishResult.NOT_HERE)


def test_a_branch_that_may_only_read_keeps_no_one_from_writing_and_has_nothing_to_prepare(make: Make) -> None:
    bank, other = make(), make(**SOON)
    work = bank.begin(True)
    with pytest.raises(sa.exc.DBAPIError, match="readonly"):
        insert(work)
    writer = other.begin(False)
    insert(writer, "b")
    assert ended(other, writer, lambda _: None) is Outcome.COMMITTED
    assert bank.prepare_early(work, gid()) is None, "what it has read stays as it was until the transaction ends"
    assert isinstance(bank.prepare(work, gid()), ReadOnly)
    work = bank.begin(False)  # on the same connection of the pool
    insert(work)
    assert ended(bank, work, lambda _: None) is Outcome.COMMITTED
    assert rows(bank) == ["a", "b"]


def test_of_two_that_write_one_waits_and_is_told_to_try_again(make: Make) -> None:
    bank, other = make(), make(**SOON)
    work = bank.begin(False)
    with pytest.raises(sa.exc.DBAPIError) as caught:
        other.begin(False)
    reason = other.classify(caught.value)
    assert reason.code is AbortCode.LOCK_TIMEOUT
    assert reason.code.retryable
    bank.rollback(work)
    other.rollback(other.begin(False))


def test_what_an_error_rolled_back_behind_the_branch_is_not_committed_without_it(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    with pytest.raises(sa.exc.IntegrityError):
        work.connection.execute(sa.text("INSERT OR ROLLBACK INTO entry VALUES ('a', 2)"))
    with pytest.raises((IllegalState, ResourceUnavailable)):
        insert(work, "b")
    with pytest.raises((IllegalState, ResourceUnavailable)):
        bank.commit_one_phase(work, lambda _: None)
    bank.rollback(work)
    assert rows(bank) == []


def test_another_transaction_on_the_drivers_own_connection_is_not_the_branch(url: str) -> None:
    """Nothing but the savepoint tells them apart: the driver says that a transaction is open."""
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
    bank.start()
    work = bank.begin(False)
    insert(work)
    driver: Any = work.connection.connection.driver_connection
    driver.execute("ROLLBACK")
    driver.execute("BEGIN IMMEDIATE")
    driver.execute("INSERT INTO entry VALUES ('b', 1)")
    with pytest.raises(ResourceUnavailable, match="ended before its time"):
        bank.commit_one_phase(work, lambda _: None)
    bank.rollback(work)
    assert rows(bank) == []
    bank.close()
    bank.engine.dispose()


def test_an_interrupt_breaks_off_what_is_being_executed(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    counting = sa.text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000000000) SELECT count(*) FROM n"
    )
    raised: list[BaseException] = []

    def count() -> None:
        try:
            work.connection.execute(counting)
        except sa.exc.DBAPIError as error:
            raised.append(error)

    thread = threading.Thread(target=count)
    thread.start()

    def is_broken_off() -> bool:
        bank.interrupt(work)
        return not thread.is_alive()

    eventually(is_broken_off)
    assert "interrupted" in str(raised[0])
    bank.rollback(work)
    again = bank.begin(False)
    insert(again)
    assert ended(bank, again, lambda _: None) is Outcome.COMMITTED


@pytest.mark.parametrize("statement", ["COMMIT", "end transaction", "/* now */ rollback", "-- now\nCommit"])
def test_statements_that_end_the_transaction_are_known(statement: str) -> None:
    assert ends_the_transaction(statement)
    assert not ends_the_transaction("ROLLBACK TO sa_savepoint_1")
    assert not ends_the_transaction("rollback transaction to sa_savepoint_1")
    assert not ends_the_transaction("SELECT 'COMMIT'")


# --------------------------------------------------------------------------------------------------- with a manager


def test_sessions_join_and_a_block_that_may_only_read_ends_with_itself(url: str, tmp_path: Path) -> None:
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=[bank]):
        with txrpc.transaction():
            with bank.session() as session:
                session.add(Row(name="a", value=1))
                with session.begin_nested():
                    session.add(Row(name="b", value=1))
            with txrpc.transaction(read_only=True), bank.session() as outer:
                with bank.session() as inner:
                    assert inner.scalar(sa.select(sa.func.count()).select_from(Row)) == 2
                with pytest.raises(sa.exc.OperationalError, match="readonly"), outer.begin_nested():
                    outer.execute(sa.text("INSERT INTO entry VALUES ('x', 1)"))
            with bank.session() as session:
                session.add(Row(name="c", value=1))
        assert rows(bank) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="no"), txrpc.transaction(), bank.session() as session:
            session.add(Row(name="d", value=1))
            raise ValueError("no")
        with pytest.raises(IllegalState, match="COMMIT"), txrpc.transaction(), bank.connection() as connection:
            connection.exec_driver_sql("COMMIT")
        assert rows(bank) == ["a", "b", "c"]
    bank.engine.dispose()


# ---------------------------------------------------------------------------------------------------------- its start


class WithoutTransactions(sqlite3.Connection):
    """What Python 3.12 makes with autocommit=True: commit() does nothing."""

    autocommit = True


class AlwaysInTransaction(sqlite3.Connection):
    """What Python 3.12 makes with autocommit=False: there is a transaction at any time."""

    def __init__(self, *arguments: Any, autocommit: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._always = not autocommit
        self._begin()

    def commit(self) -> None:
        super().commit()
        self._begin()

    def rollback(self) -> None:
        super().rollback()
        self._begin()

    def _begin(self) -> None:
        if self._always:
            self.execute("BEGIN")


def test_a_driver_that_is_always_in_a_transaction_can_decide(url: str) -> None:
    def connected(connection: Any, _record: object) -> None:
        if connection.in_transaction:
            connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous = EXTRA")
        connection.rollback()

    engine = sa.create_engine(url, connect_args={"factory": AlwaysInTransaction, "autocommit": False})
    sa.event.listen(engine, "connect", connected)
    bank = txrpc.sql.ResourceManager("bank", engine, decides=True)
    bank.start()
    assert bank.decider is not None
    work, one = bank.begin(False), txrpc.Xid.make(int(time.time() * 1000), bytes(10))
    insert(work)
    assert bank.decider.decide(work, one, bank.decider.open(), b"list") is Outcome.COMMITTED
    assert rows(bank) == ["a"]
    assert bank.decider.ask(bank.decider.open(), one, True) == (Found.COMMITTED, b"list")
    bank.decider.mark_done([one])
    bank.decider.forget()
    bank.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("at", "options", "says"),
    [
        ("sqlite://", {}, "in memory"),
        ("", {"connect_args": {"factory": WithoutTransactions}}, "autocommit=True"),
        ("nothing/bank.db", {}, "out of reach"),
    ],
)
def test_a_file_that_cannot_take_part_is_refused(
    tmp_path: Path, url: str, at: str, options: dict[str, Any], says: str
) -> None:
    where = at if at.startswith("sqlite") else url.replace("bank.db", at) if at else url
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(where, **options))
    with pytest.raises((ConfigurationError, ResourceUnavailable), match=says):
        bank.start()
    bank.close()
    bank.engine.dispose()


def test_a_journal_that_no_crash_survives_is_refused(url: str) -> None:
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA journal_mode = MEMORY"))
    bank = txrpc.sql.ResourceManager("bank", engine)
    with pytest.raises(ConfigurationError, match="journal_mode=memory"):
        bank.start()
    bank.close()
    engine.dispose()


def test_a_program_that_says_begin_itself_must_see_to_it_that_decisions_are_durable(make: Make, url: str) -> None:
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA synchronous = {level}"))
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    bank = txrpc.sql.ResourceManager("bank", engine, decides=True)
    level = "FULL"
    with pytest.raises(ConfigurationError, match="synchronous = EXTRA"):
        bank.start()
    engine.dispose()
    level = "EXTRA"
    identity = bank.start().identity
    work = bank.begin(False)
    insert(work)
    assert ended(bank, work, lambda _: None) is Outcome.COMMITTED
    assert identity.startswith("sqlite/")
    assert make().start().identity == identity, "in every program that opens the file"
    bank.close()
    engine.dispose()


def test_a_file_that_may_lose_commits_or_never_waits_is_warned_of(url: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = sa.create_engine(url, connect_args={"timeout": 0})
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = NORMAL"))
    bank = txrpc.sql.ResourceManager("bank", engine)
    bank.start()
    assert "synchronous is below FULL" in caplog.text
    assert "busy time-out is 0" in caplog.text
    bank.close()
    engine.dispose()
