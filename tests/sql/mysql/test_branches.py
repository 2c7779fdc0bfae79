"""MariaDB and MySQL as resources, through XA.  Of both halves of `txrpc.sql`."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

import txrpc
import txrpc.sql
from tests.mariadb import MariaServer
from tests.sql.blocking import Blocking
from tests.sql.kit import Row, ended, gid, insert, rows
from tests.sql.mysql.kit import Make, prepared
from tests.waiting import eventually
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, ResourceUnavailable
from txrpc.resource import ReadOnly
from txrpc.sql import mysql_preflight
from txrpc.sql.mysql import ends_the_transaction, writes
from txrpc.sql.mysql_preflight import number_of
from txrpc.sql.mysql_sessions import Session, interrupt, is_gone
from txrpc.testing.processes import free_port

# -------------------------------------------------------------------------------------------------------- two phases


def test_a_prepared_branch_is_finished_by_any_process(make: Make, mariadb: MariaServer) -> None:
    bank, other = make(), make()
    branch, token = prepared(bank)
    assert rows(bank) == []
    assert [found for found, _age in other.in_doubt("default")] == [branch]
    assert other.commit_prepared(branch, token) is FinishResult.DONE
    assert rows(bank) == ["a"]
    assert (other.in_doubt("default"), mariadb.prepared()) == ([], 0)
    assert bank.commit_prepared(branch, token) is FinishResult.ALREADY
    assert bank.rollback_prepared(branch, token) is FinishResult.HEURISTIC


def test_a_prepared_branch_is_rolled_back_by_any_process(make: Make) -> None:
    bank, other = make(), make()
    branch, token = prepared(bank)
    assert other.rollback_prepared(branch, token) is FinishResult.DONE
    assert rows(bank) == []
    assert bank.rollback_prepared(branch, token) is FinishResult.ALREADY
    assert bank.commit_prepared(branch, token) is FinishResult.LOST


def test_a_branch_is_found_by_what_the_coordinator_calls_it(make: Make) -> None:
    """A process that heard no answer to PREPARE has no token."""
    bank = make()
    branch, _token = prepared(bank)
    assert bank.rollback_prepared(gid(), "") is FinishResult.NOT_HERE
    assert bank.rollback_prepared(branch, "") is FinishResult.DONE
    assert bank.rollback_prepared(branch, "") is FinishResult.NOT_HERE


def test_rule_4_a_promise_outlives_the_server(make: Make, mariadb: MariaServer) -> None:
    bank = make(poolclass=NullPool)
    branch, token = prepared(bank)
    mariadb.kill()
    mariadb.start()
    assert [found for found, _age in bank.in_doubt("default")] == [branch]
    work = bank.begin(False)
    with pytest.raises(sa.exc.DBAPIError) as caught:  # its lock is there as well
        insert(work)
    assert bank.classify(caught.value).code is AbortCode.LOCK_TIMEOUT
    bank.rollback(work)
    assert bank.commit_prepared(branch, token) is FinishResult.DONE
    assert rows(bank) == ["a"]


def test_the_branches_of_other_groups_databases_and_programs_are_left_alone(
    make: Make, mariadb: MariaServer, url: str
) -> None:
    bank = make()
    prepared(bank)
    elsewhere = mariadb.create_database("elsewhere")
    mariadb.execute("CREATE TABLE entry (name varchar(99) PRIMARY KEY, value int)", "elsewhere")
    assert bank.in_doubt("another") == []
    assert make(elsewhere).in_doubt("default") == []
    engine = sa.create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("XA START 'theirs'")
        connection.exec_driver_sql("INSERT INTO entry VALUES ('b', 1)")
        connection.exec_driver_sql("XA END 'theirs'")
        connection.exec_driver_sql("XA PREPARE 'theirs'")
        connection.invalidate()
    assert len(bank.in_doubt("default")) == 1


def test_a_branch_that_may_only_read_has_nothing_to_prepare(make: Make, mariadb: MariaServer, url: str) -> None:
    bank = make()
    put = "CREATE FUNCTION put() RETURNS INT DETERMINISTIC BEGIN INSERT INTO entry VALUES ('f', 1); RETURN 1; END"
    mariadb.execute(put, sa.make_url(url).database)
    work = bank.begin(True)
    with pytest.raises(IllegalState, match="only read"):
        insert(work)
    with pytest.raises(sa.exc.DBAPIError, match="READ ONLY"):  # the server sees also what looks as if it only read
        work.connection.exec_driver_sql("SELECT put()")
    assert bank.prepare_early(work, gid()) is None, "what it has read stays as it was until the transaction ends"
    assert isinstance(bank.prepare(work, gid()), ReadOnly)
    assert mariadb.prepared() == 0
    work = bank.begin(False)  # on the same connection of the pool
    insert(work)
    assert ended(bank, work, lambda _: None) is Outcome.COMMITTED


def test_a_branch_that_wrote_nothing_can_be_prepared(make: Make) -> None:
    """Without its marker it would be lost with its connection (1402)."""
    bank = make()
    work, branch = bank.begin(False), gid()
    found = bank.prepare(work, branch)
    assert bank.commit_prepared(branch, found.token) is FinishResult.DONE


# ----------------------------------------------------------------------------------------------------- in one phase


def test_the_end_of_a_branch_can_be_learnt_by_any_process(make: Make) -> None:
    bank, other = make(), make()
    told: list[str] = []
    work = bank.begin(False)
    insert(work)
    assert ended(bank, work, told.append) is Outcome.COMMITTED
    assert rows(bank) == ["a"]
    assert other.one_phase_result(told[0]) is Outcome.COMMITTED
    assert other.one_phase_result("7-00000001") is Outcome.UNKNOWN
    long_ago = f"xa-{1:012x}{told[0][-16:]}"
    assert bank.one_phase_result(long_ago) is Outcome.UNKNOWN


def test_a_branch_that_went_away_before_its_commit_is_told_as_aborted(make: Make) -> None:
    bank, other = make(), make()
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


# ------------------------------------------------------------------------------------------------------- a branch


def test_a_branch_that_is_undone_gives_a_good_connection_back(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    bank = make(pool_size=1, max_overflow=0)
    for _ in range(3):
        work = bank.begin(False)
        insert(work)
        bank.rollback(work)
    assert rows(bank) == []
    assert not caplog.records
    session = _session(bank)
    work = bank.begin(False)
    bank.rollback(work)
    assert _session(bank) == session


def _session(bank: Any) -> int:
    work = bank.begin(False)
    bank.rollback(work)
    return int(work.pid)


def test_after_a_deadlock_nothing_is_prepared_or_committed(make: Make) -> None:
    bank = make()
    for name in ("a", "b"):
        work = bank.begin(False)
        insert(work, name)
        ended(bank, work, lambda _: None)
    first, second = bank.begin(False), bank.begin(False)
    update = sa.text("UPDATE entry SET value = 5 WHERE name = :name")
    first.connection.execute(update, {"name": "a"})
    second.connection.execute(update, {"name": "b"})
    errors: list[Any] = []

    def cross(work: Any, name: str) -> None:
        try:
            work.connection.execute(update, {"name": name})
        except sa.exc.DBAPIError as error:
            errors.append((work, error))

    other = threading.Thread(target=cross, args=(first, "b"))
    other.start()
    cross(second, "a")
    other.join(60)
    ((victim, error),) = errors
    assert bank.classify(error).code in (AbortCode.DEADLOCK, AbortCode.LOCK_TIMEOUT)
    if bank.classify(error).code is AbortCode.DEADLOCK:
        with pytest.raises((sa.exc.DBAPIError, ResourceUnavailable)):
            bank.prepare(victim, gid())
    bank.rollback(victim)
    bank.rollback(second if victim is first else first)
    assert bank.in_doubt("default") == []


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN", "LOCK TABLES entry READ"])
def test_a_statement_that_would_end_the_transaction_is_refused(make: Make, statement: str) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    with pytest.raises(IllegalState, match=statement.split(" ", maxsplit=1)[0]):
        work.connection.exec_driver_sql(statement)
    bank.rollback(work)
    assert rows(bank) == []


def test_what_would_commit_as_a_side_effect_is_refused_by_the_server(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    with pytest.raises(sa.exc.DBAPIError, match="XAER_RMFAIL") as caught:
        work.connection.exec_driver_sql("CREATE TABLE another (number int)")
    assert bank.classify(caught.value).code is AbortCode.STATEMENT_FAILED
    if not isinstance(bank, Blocking):
        refusal = bank.engine.dialect.loaded_dbapi.OperationalError
        with pytest.raises(refusal, match="XAER_RMFAIL"):  # behind SQLAlchemy's back
            work.connection.connection.driver_connection.commit()
    bank.rollback(work)
    assert rows(bank) == []


def test_what_went_wrong_in_a_session_is_told_and_not_that_it_cannot_roll_back(url: str, tmp_path: Path) -> None:
    """A session rolls back by itself when its flush fails; the server refuses ROLLBACK in a branch."""
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url))
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=[bank]):
        with pytest.raises(sa.exc.IntegrityError), txrpc.transaction(), bank.session() as session:
            session.add(Row(name="a", value=1))
            session.flush()
            session.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
            session.add(Row(name="b", value=1))
            session.flush()
        for verb in ("session", "connection"):
            with pytest.raises(txrpc.TransactionAborted, match="rollback"), txrpc.transaction():
                with getattr(bank, verb)() as block:
                    block.execute(sa.text("INSERT INTO entry VALUES ('c', 1)"))
                    block.rollback()
        with txrpc.transaction(), bank.session() as session:
            session.add(Row(name="d", value=1))
            session.flush()
            with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
                session.execute(sa.text("INSERT INTO entry VALUES ('d', 2)"))
    assert rows(bank) == ["d"]
    bank.engine.dispose()


def test_savepoints_work(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    work.connection.exec_driver_sql("SAVEPOINT one")
    insert(work, "b")
    work.connection.exec_driver_sql("ROLLBACK TO SAVEPOINT one")
    insert(work, "c")
    ended(bank, work, lambda _: None)
    assert rows(bank) == ["a", "c"]


def test_a_program_may_ask_something_whenever_it_is_given_a_connection(url: str) -> None:
    """XA START is refused where something has been asked in the transaction."""
    engine = sa.create_engine(url)
    sa.event.listen(engine, "checkout", lambda driver, *_: driver.cursor().execute("SELECT 1 FROM entry"))
    bank = txrpc.sql.ResourceManager("bank", engine)
    bank.start()
    work = bank.begin(False)
    insert(work)
    assert ended(bank, work, lambda _: None) is Outcome.COMMITTED
    bank.close()
    engine.dispose()


def test_a_branch_whose_connection_was_moved_is_not_committed(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    plain = getattr(work, "_wrapped", work)
    plain.backend = Session(plain.pid + 1_000, plain.backend.seen_s)
    with pytest.raises(ResourceUnavailable, match="proxy"):
        bank.commit_one_phase(work, lambda _: None)
    with pytest.raises(ResourceUnavailable, match="proxy"):
        bank.prepare(work, gid())
    bank.rollback(work)
    assert rows(bank) == []


def test_an_interrupt_ends_what_is_being_executed(make: Make) -> None:
    bank = make()
    work = bank.begin(False)
    insert(work)
    raised: list[BaseException] = []

    def sleep() -> None:
        try:
            work.connection.exec_driver_sql("SELECT SLEEP(60)")
        except Exception as error:
            raised.append(error)

    sleeping = threading.Thread(target=sleep)
    sleeping.start()
    eventually(lambda: _sleeps(bank))
    bank.interrupt(work)
    sleeping.join(60)
    assert bank.classify(raised[0]).code is AbortCode.RESOURCE_UNAVAILABLE
    bank.rollback(work)
    eventually(lambda: bank.terminate(work))  # the server takes its time to let go of it
    assert rows(bank) == []


def _sleeps(bank: Any) -> bool:
    with bank.engine.connect() as connection:
        listed = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'SELECT SLEEP%%'"
        return bool(connection.exec_driver_sql(listed).scalar())


def test_a_session_of_an_earlier_run_of_the_server_is_not_ended(make: Make, mariadb: MariaServer) -> None:
    """A server that was started again counts its sessions from the beginning."""
    bank = make()
    work = bank.begin(False)
    long_ago = Session(work.pid, time.monotonic() - 1_000_000)
    with bank.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        interrupt(connection, long_ago)
        assert is_gone(connection, long_ago)
        assert not is_gone(connection, work.backend)
    insert(work)
    assert ended(bank, work, lambda _: None) is Outcome.COMMITTED
    mariadb.prepared()


# ------------------------------------------------------------------------------------------------------ statements


@pytest.mark.parametrize(
    ("statement", "verb"),
    [
        ("COMMIT", "COMMIT"),
        (" /* so */ rollback work", "ROLLBACK"),
        ("ROLLBACK TO SAVEPOINT one", ""),
        ("rollback work to one", ""),
        ("START  TRANSACTION READ ONLY", "START  TRANSACTION"),
        ("# so\nXA END 'x'", "XA"),
        ("unlock tables", "UNLOCK TABLES"),
        ("BEGIN NOT ATOMIC SELECT 1; END", ""),
        ("SELECT 'commit'", ""),
        ("INSERT INTO commits VALUES (1)", ""),
    ],
)
def test_statements_that_end_the_transaction_are_known(statement: str, verb: str) -> None:
    assert ends_the_transaction(statement) == verb


@pytest.mark.parametrize(
    ("statement", "may"),
    [
        ("SELECT 1", False),
        ("(SELECT 1) UNION (SELECT 2)", False),
        ("-- so\nshow tables", False),
        ("SAVEPOINT one", False),
        ("WITH gone AS (SELECT 1) DELETE FROM entry", True),
        ("INSERT INTO entry VALUES ('a', 1)", True),
        ("CALL something()", True),
    ],
)
def test_statements_that_may_write_are_known(statement: str, may: bool) -> None:
    assert writes(statement) is may


def test_mysql_and_mariadb_tell_what_is_prepared_in_different_ways() -> None:
    """MySQL in hexadecimal digits, which it must be asked for: raw bytes would come as text."""
    number = "0102030405060708090a0b0c0d0e"
    assert number_of(bytes.fromhex(number) + b"\x01") == number_of(f"0x{number}01") == number
    assert number_of(b"theirs") is number_of("0x01") is None


def test_code_that_may_only_read_in_a_transaction_that_writes(url: str, tmp_path: Path) -> None:
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url))

    @txrpc.transactional(read_only=True)
    def read(statement: str) -> None:
        with bank.connection() as connection:
            connection.exec_driver_sql(statement)

    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=[bank]):
        with txrpc.transaction(), bank.session() as session:
            session.add(Row(name="a", value=1))
            session.flush()
            read("SELECT * FROM entry")
        with pytest.raises(IllegalState, match="only read"), txrpc.transaction():
            with bank.session() as session:
                session.add(Row(name="b", value=1))
            read("DELETE FROM entry")
    assert rows(bank) == ["a"]
    bank.engine.dispose()


# ------------------------------------------------------------------------------------------------------- preflight


def test_a_server_that_may_lose_commits_is_warned_of_and_does_not_decide(
    make: Make, mariadb: MariaServer, caplog: pytest.LogCaptureFixture
) -> None:
    mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        make()
        assert "innodb_flush_log_at_trx_commit" in caplog.text
        with pytest.raises(ConfigurationError, match="innodb_flush_log_at_trx_commit"):
            make(decides=True)
    finally:
        mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")


def test_a_server_that_may_not_be_written_is_refused(make: Make, mariadb: MariaServer) -> None:
    mariadb.execute("SET GLOBAL read_only = 1")
    try:
        with pytest.raises(ConfigurationError, match="read-only"):
            make()
    finally:
        mariadb.execute("SET GLOBAL read_only = 0")


def test_a_server_that_is_too_old_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mysql_preflight, "_OLDEST", {"MariaDB": (99, 1), "MySQL": (99, 1)})
    bank = txrpc.sql.ResourceManager("bank", sa.create_engine(url, poolclass=NullPool))
    with pytest.raises(ConfigurationError, match=r"may lose a prepared branch; txrpc needs 99\.1 or later"):
        bank.start()


def test_tables_that_cannot_be_had_are_one_sentence(mariadb: MariaServer, url: str) -> None:
    database = sa.make_url(url).database
    mariadb.execute("DROP USER IF EXISTS teller")
    mariadb.execute("CREATE USER teller")
    mariadb.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {database}.* TO teller")
    as_teller = sa.create_engine(sa.make_url(url).set(username="teller"), poolclass=NullPool)
    for privilege in mariadb.privileges:
        with pytest.raises(ConfigurationError, match=f"GRANT {privilege} ON"):
            txrpc.sql.ResourceManager("bank", as_teller).start()
        mariadb.execute(f"GRANT {privilege} ON *.* TO teller")
    with pytest.raises(ConfigurationError, match="CREATE TABLE txrpc_branch"):
        txrpc.sql.ResourceManager("bank", as_teller).start()
    txrpc.sql.ResourceManager("bank", sa.create_engine(url, poolclass=NullPool)).start()
    bank = txrpc.sql.ResourceManager("bank", as_teller)
    bank.start()
    branch, token = prepared(bank)
    assert bank.commit_prepared(branch, token) is FinishResult.DONE


def test_a_url_without_a_database_and_a_database_that_is_away(make: Make, mariadb: MariaServer, url: str) -> None:
    with pytest.raises(ConfigurationError, match="names no database"):
        make(url.rsplit("/", 1)[0])
    with pytest.raises(ResourceUnavailable, match="out of reach"):
        make(url.replace(str(mariadb.port), str(free_port())))


def test_many_programs_make_the_tables_at_once(url: str) -> None:
    banks = [
        txrpc.sql.ResourceManager("bank", sa.create_engine(url, poolclass=NullPool), decides=True) for _ in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(lambda bank: bank.start(), banks))
    assert len({info.identity for info in infos}) == 1
    assert len({info.register for info in infos}) == 1
    for bank in banks:
        bank.close()


def test_markers_are_forgotten_after_a_week(make: Make, mariadb: MariaServer, url: str) -> None:
    bank, database = make(), sa.make_url(url).database
    mariadb.execute(f"INSERT INTO txrpc_branch VALUES (X'{'00' * 14}', '', 1)", database)
    branch, token = prepared(bank)
    bank.commit_prepared(branch, token)
    kept, work = f"{0:012x}{1:016x}", bank.begin(False)  # as old, and still prepared
    work.connection.exec_driver_sql(f"INSERT INTO txrpc_branch VALUES (X'{kept}', '', 1)")
    bank.in_doubt("default")  # which waits for no lock, and is not kept from the others by one
    bank.rollback(work)
    assert [bytes(row[0]).hex() for row in mariadb.execute("SELECT branch FROM txrpc_branch", database)] == [token[3:]]
