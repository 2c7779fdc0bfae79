"""The resource managers on a real PostgreSQL: what two-phase commit needs of it, with every driver."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

import txrpc.sql
from tests.postgres import Server
from tests.sql.kit import Make, Row, ended, gid, insert, numbers, rows
from tests.waiting import until_a_backend_waits_for
from txrpc._client.transactional import transaction
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc.errors import AbortCode, ConfigurationError, IllegalState, Reason, ResourceUnavailable, TransactionAborted
from txrpc.resource import Prepared, ReadOnly
from txrpc.testing.postgres import PostgresServer, embedded_binaries, installed_binaries

# ----------------------------------------------------------------------------------------------------------- prepare


def test_prepare_then_commit_from_another_connection(make: Make, driver: str) -> None:
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    assert re.fullmatch(r"\d+-[0-9A-F]{8}", prepared.token)
    assert work.connection.closed
    assert rows(resource) == []
    assert [found for found, _ in resource.in_doubt("default")] == [branch]
    assert resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
    assert rows(resource) == ["a"]
    assert resource.commit_prepared(branch, prepared.token) is FinishResult.ALREADY
    assert resource.in_doubt("default") == []


def test_prepare_then_rollback(make: Make, driver: str) -> None:
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    assert resource.rollback_prepared(branch, prepared.token) is FinishResult.DONE
    assert resource.rollback_prepared(branch, prepared.token) is FinishResult.ALREADY
    assert rows(resource) == []


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])  # the others: test_aio
def test_the_pooled_connection_comes_back_clean(make: Make, driver: str) -> None:
    resource = make(driver, pool_size=1, max_overflow=0)
    for number in range(5):
        work = resource.begin(False)
        insert(work, str(number))
        pid = work.pid
        branch = gid()
        assert isinstance(resource.prepare(work, branch), Prepared)
        resource.commit_prepared(branch, "")
        again = resource.begin(False)
        assert again.pid == pid != 0
        assert "txrpc" not in {
            k for k in again.connection.info if k == "txrpc" and again.connection.info[k] is not again
        }
        resource.rollback(again)
    assert rows(resource) == list("01234")


def test_a_branch_that_wrote_nothing_votes_read_only(make: Make, driver: str) -> None:
    resource = make(driver)
    work = resource.begin(False)
    work.connection.execute(sa.text("SELECT * FROM entry"))
    assert isinstance(resource.prepare(work, gid()), ReadOnly)
    assert resource.in_doubt("default") == []
    locking = resource.begin(False)
    insert(locking)
    branch = gid()
    prepared = resource.prepare(locking, branch)
    assert isinstance(prepared, Prepared)
    resource.rollback_prepared(branch, prepared.token)


def test_a_branch_whose_snapshot_must_last_does_not_vote_early_unless_it_wrote(make: Make, driver: str) -> None:
    """What it has read would no longer be what the transaction sees, while its work elsewhere goes on."""
    for level, kept in (("READ COMMITTED", False), ("REPEATABLE READ", True), ("SERIALIZABLE", True)):
        resource = make(driver, isolation_level=level)
        work = resource.begin(False)
        work.connection.execute(sa.text("SELECT * FROM entry"))
        early = resource.prepare_early(work, gid())
        if not kept:
            assert isinstance(early, ReadOnly)
            continue
        assert early is None
        assert work.connection.execute(sa.text("SELECT count(*) FROM entry")).scalar() == 0, "it goes on"
        assert isinstance(resource.prepare(work, gid()), ReadOnly)
        writing = resource.begin(False)
        insert(writing, level)
        branch = gid()
        prepared = resource.prepare_early(writing, branch)
        assert isinstance(prepared, Prepared)
        resource.rollback_prepared(branch, prepared.token)


def test_read_only_refuses_what_would_write(make: Make, driver: str) -> None:
    resource = make(driver)
    work = resource.begin(True)
    with pytest.raises(DBAPIError) as caught:
        insert(work)
    reason = resource.classify(caught.value)
    assert reason is not None
    assert "25006" in reason.text
    resource.rollback(work)


CANNOT = [
    ("CREATE TEMP TABLE t (n int)", "temporary"),
    ("LISTEN news", "LISTEN"),
    ("NOTIFY news", "NOTIFY"),
    ("SELECT pg_notify('news', 'x')", "NOTIFY"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "WITH HOLD"),
]


@pytest.mark.parametrize(("statement", "says"), CANNOT)
@pytest.mark.parametrize("writes", [True, False])
def test_what_cannot_be_prepared_is_an_abort_with_the_databases_words(
    make: Make, statement: str, says: str, writes: bool
) -> None:
    resource, branch = make(), gid()
    work = resource.begin(False)
    if writes:
        insert(work)
    work.connection.execute(sa.text(statement))
    if "WITH HOLD" in statement and not writes:
        assert isinstance(
            resource.prepare(work, branch), ReadOnly
        )  # such a cursor dies with the branch; nothing is lost
        return
    with pytest.raises(DBAPIError) as caught:
        resource.prepare(work, branch)
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.CANNOT_PREPARE
    assert says in reason.text
    resource.rollback(work)
    assert resource.rollback_prepared(branch, "") is FinishResult.NOT_HERE
    assert rows(resource) == []


def test_after_a_failed_statement_prepare_never_says_prepared(make: Make, driver: str) -> None:
    """PostgreSQL answers PREPARE TRANSACTION in a failed transaction with ROLLBACK, and no error."""
    resource = make(driver)
    work = resource.begin(False)
    insert(work)
    with pytest.raises(DBAPIError):
        work.connection.execute(sa.text("SELECT 1/0"))
    with pytest.raises(DBAPIError) as caught:
        resource.prepare(work, gid())
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    resource.rollback(work)
    assert resource.in_doubt("default") == []


def test_a_deferred_constraint_that_fails_at_prepare(make: Make, driver: str) -> None:
    resource = make(driver)
    with resource.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE entry ADD UNIQUE (value) DEFERRABLE INITIALLY DEFERRED"))
    work = resource.begin(False)
    insert(work, "a")
    insert(work, "b")
    with pytest.raises(DBAPIError) as caught:
        resource.prepare(work, gid())
    reason = resource.classify(caught.value)
    assert reason is not None
    assert reason.code is AbortCode.STATEMENT_FAILED
    assert "(SQLSTATE 23505)" in reason.text
    resource.rollback(work)


def test_a_serialization_failure_may_be_retried(make: Make, driver: str) -> None:
    resource = make(isolation_level="SERIALIZABLE")
    with resource.engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES ('x', 0), ('y', 0)"))
    works = [resource.begin(False), resource.begin(False)]
    for work, name in zip(works, ("x", "y"), strict=True):
        work.connection.execute(sa.text("SELECT sum(value) FROM entry")).all()
        work.connection.execute(sa.text("UPDATE entry SET value = 1 WHERE name = :n"), {"n": name})
    reasons: list[Reason | None] = []
    branches = [gid(), gid()]
    for work, branch in zip(works, branches, strict=True):
        try:
            resource.prepare(work, branch)
        except DBAPIError as error:
            reasons.append(resource.classify(error))
            resource.rollback(work)
    (reason,) = reasons
    assert reason is not None
    assert reason.code is AbortCode.SERIALIZATION_FAILURE
    assert reason.retryable
    for branch in branches:
        resource.rollback_prepared(branch, "")


def test_a_gid_that_is_taken_leaves_the_first_one_prepared(make: Make, driver: str) -> None:
    resource, branch = make(driver), gid()
    first, second = resource.begin(False), resource.begin(False)
    insert(first, "first")
    insert(second, "second")
    assert isinstance(resource.prepare(first, branch), Prepared)
    with pytest.raises(DBAPIError):
        resource.prepare(second, branch)
    resource.rollback(second)
    assert [found for found, _ in resource.in_doubt("default")] == [branch]
    assert resource.commit_prepared(branch, "") is FinishResult.DONE
    assert rows(resource) == ["first"]


# ------------------------------------------------------------------------------------------------------- finishing


def test_four_at_once_finish_one_branch(make: Make, driver: str) -> None:
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    results: list[Any] = []
    barrier = threading.Barrier(4)

    def commit() -> None:
        barrier.wait()
        for _ in range(50):
            try:
                results.append(resource.commit_prepared(branch, prepared.token))
                return
            except (DBAPIError, ResourceUnavailable):
                time.sleep(0.01)  # somebody else is at it

    threads = [threading.Thread(target=commit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [FinishResult.DONE] + [FinishResult.ALREADY] * 3
    assert rows(resource) == ["a"]


def test_a_branch_that_somebody_ended_the_other_way_is_a_heuristic_outcome(make: Make, driver: str) -> None:
    resource = make(driver)
    for commit in (True, False):
        branch = gid()
        work = resource.begin(False)
        insert(work, str(commit))
        prepared = resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        verb = "ROLLBACK" if commit else "COMMIT"
        with resource.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"{verb} PREPARED '{branch}'")
        finish = resource.commit_prepared if commit else resource.rollback_prepared
        assert finish(branch, prepared.token) is FinishResult.HEURISTIC
        assert finish(branch, "") is FinishResult.NOT_HERE


def test_finishing_never_queues_behind_an_exhausted_pool(make: Make) -> None:
    resource, branch = make(pool_size=1, max_overflow=0, pool_timeout=0.3), gid()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    pinned = resource.begin(False)
    with pytest.raises(ResourceUnavailable, match=r"pool_size=1, max_overflow=0"):
        resource.begin(False)
    assert resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
    resource.rollback(pinned)


def test_only_branches_of_this_group_and_resource_are_in_doubt(make: Make, driver: str) -> None:
    resource = make(driver)
    strangers = [
        "txrpc1:default:junk",
        "txrpc1:default",
        "x'y".replace("'", "''"),
        str(gid(group="other")),
        str(gid(resource="b2")),
    ]
    mine = gid()
    for text in (*strangers, str(mine)):
        with resource.engine.connect() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES (:n, 1)"), {"n": text})
            connection.exec_driver_sql(f"PREPARE TRANSACTION '{text}'")
    assert [found for found, age in resource.in_doubt("default") if age >= 0] == [mine]


def test_branches_of_another_database_of_the_server_are_not_in_doubt_here(
    make: Make, driver: str, server: Server
) -> None:
    """pg_prepared_xacts shows the whole cluster; they cannot be finished from here, and asking about them would never end."""
    resource, mine = make(driver), gid()
    server.create_database(elsewhere := f"elsewhere{next(numbers)}")
    server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)", elsewhere)
    other = make(driver, at=sa.make_url(server.url(elsewhere)))
    for each, branch in ((resource, mine), (other, theirs := gid())):
        insert(work := each.begin(False))
        assert isinstance(each.prepare(work, branch), Prepared)
    assert [found for found, _ in resource.in_doubt("default")] == [mine]
    assert [found for found, _ in other.in_doubt("default")] == [theirs]
    assert other.rollback_prepared(theirs, "") is FinishResult.DONE


# ---------------------------------------------------------------------------------------------------- commit at once


def test_commit_in_one_phase_tells_its_token_first(make: Make, driver: str) -> None:
    resource = make(driver)
    tokens: list[str] = []
    work = resource.begin(False)
    insert(work)
    assert resource.commit_one_phase(work, tokens.append) is Outcome.COMMITTED
    assert rows(resource) == ["a"]
    assert resource.one_phase_result(tokens[0]) is Outcome.COMMITTED
    nothing = resource.begin(False)
    nothing.connection.execute(sa.text("SELECT 1"))
    assert resource.commit_one_phase(nothing, tokens.append) is Outcome.COMMITTED
    assert len(tokens) == 1


@pytest.mark.parametrize("when", ["before", "during"])
def test_rule_13_a_connection_that_breaks_at_commit_is_asked_about(
    make: Make, driver: str, server: Server, when: str
) -> None:
    """The backend is terminated while COMMIT waits in a deferred trigger: the transaction id tells that it did not happen."""
    resource = make(driver)
    database = resource.engine.url.database or ""
    server.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(5); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()",
        database,
    )
    work = resource.begin(False)
    insert(work)

    def terminate(_token: str = "") -> None:
        server.execute(f"SELECT pg_terminate_backend({work.pid})")

    def terminate_in_the_trigger() -> None:
        until_a_backend_waits_for(server, database, "PgSleep")
        terminate()

    terminator = threading.Thread(target=terminate_in_the_trigger)
    if when == "during":
        terminator.start()
    result = ended(resource, work, terminate if when == "before" else lambda _token: None)
    assert result is Outcome.ABORTED
    assert rows(resource) == []
    if when == "during":
        terminator.join()


def test_rule_13_the_truth_after_a_kill_of_the_server(make: Make) -> None:
    with PostgresServer.start_new() as server:
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)")
        resource = txrpc.sql.ResourceManager("bank", sa.create_engine(server.url()))
        tokens: list[str] = []
        done, undone = resource.begin(False), resource.begin(False)
        insert(done, "done")
        insert(undone, "undone")
        restart = threading.Timer(0.5, server.restart)
        resource.commit_one_phase(done, tokens.append)
        assert resource.one_phase_result(tokens[0]) is Outcome.COMMITTED

        def crash(token: str) -> None:
            tokens.append(token)
            server.kill()
            restart.start()

        assert ended(resource, undone, crash) is Outcome.ABORTED
        assert resource.one_phase_result(tokens[0]) is Outcome.COMMITTED
        assert resource.one_phase_result("999999999") is Outcome.UNKNOWN
        restart.join()  # it still makes sure that the server serves
        resource.close()
        resource.engine.dispose()


# ------------------------------------------------------------------------------------------- crashes and interruption


@pytest.mark.parametrize("binaries", ["installed", "embedded"])
def test_rule_4_a_prepared_branch_survives_kill_9_and_restart(binaries: str) -> None:
    folder = installed_binaries() if binaries == "installed" else embedded_binaries()
    if folder is None:
        pytest.skip(f"no {binaries} PostgreSQL")
    with PostgresServer.start_new(binaries=folder) as server:
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)")
        resource, branch = txrpc.sql.ResourceManager("bank", sa.create_engine(server.url())), gid()
        identity = resource.start().identity
        work = resource.begin(False)
        insert(work)
        prepared = resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        server.kill()
        with pytest.raises((DBAPIError, ResourceUnavailable)):
            resource.commit_prepared(branch, prepared.token)
        server.restart()
        assert resource.start().identity == identity
        assert [found for found, _ in resource.in_doubt("default")] == [branch]
        assert resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
        assert resource.commit_prepared(branch, prepared.token) is FinishResult.ALREADY
        assert rows(resource) == ["a"]
        resource.close()
        resource.engine.dispose()


def test_rule_11_interrupt_frees_locks_and_connection(make: Make, driver: str, server: Server) -> None:
    resource = make(driver)
    holder = resource.begin(False)
    insert(holder, "x")
    failed: list[BaseException] = []

    def wait_for_the_lock() -> None:
        try:
            insert(waiter, "x")
        except BaseException as error:
            failed.append(error)

    waiter = resource.begin(False)
    thread = threading.Thread(target=wait_for_the_lock)
    thread.start()
    until_a_backend_waits_for(server, resource.engine.url.database or "", "transactionid")
    resource.interrupt(waiter)
    thread.join(10)
    assert not thread.is_alive()
    reason = resource.classify(failed[0])
    assert reason is not None
    assert reason.code is AbortCode.RESOURCE_UNAVAILABLE
    resource.rollback(waiter)
    resource.interrupt(holder)
    insert(fresh := resource.begin(False), "x")
    resource.rollback(fresh)
    resource.rollback(holder)


# -------------------------------------------------------------------------------------- sessions and connections


def test_session_and_connection_share_the_branch_and_are_flushed(bank: txrpc.sql.ResourceManager) -> None:
    with transaction():
        with bank.session() as session:
            session.add(Row(name="a", value=1))
            with bank.connection() as connection:
                assert connection.scalar(sa.text("SELECT count(*) FROM entry")) == 0
        with bank.connection() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM entry")) == 1
        assert rows(bank) == []
    assert rows(bank) == ["a"]


def test_an_exception_undoes_the_session(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(KeyError), transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        session.flush()
        raise KeyError
    assert rows(bank) == []


def test_commit_by_hand_is_refused(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(IllegalState, match="flushed at the end"), transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        session.commit()
    with pytest.raises(IllegalState, match="leave the block"), transaction(), bank.connection() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
        connection.commit()
    assert rows(bank) == []


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_rollback_by_hand_dooms_the_transaction(bank: txrpc.sql.ResourceManager, kind: str) -> None:
    with pytest.raises(TransactionAborted, match="rollback"), transaction(), getattr(bank, kind)() as user:
        user.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        user.rollback()
    assert rows(bank) == []


def test_savepoints_work_and_save_what_failed(bank: txrpc.sql.ResourceManager) -> None:
    with transaction(), bank.session() as session:
        session.add(Row(name="a", value=1))
        session.flush()
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(sa.text("INSERT INTO entry VALUES ('a', 2)"))
        with session.begin_nested():
            session.add(Row(name="b", value=2))
    assert rows(bank) == ["a", "b"]


def test_a_failed_statement_dooms_and_is_the_reason(bank: txrpc.sql.ResourceManager) -> None:
    with pytest.raises(TransactionAborted) as caught, transaction():
        with pytest.raises(DBAPIError), bank.connection() as connection:
            connection.execute(
                sa.text("INSERT INTO entry VALUES (:secret, :v)"), {"secret": "hunter2", "v": "no number"}
            )
    assert caught.value.reason.code is AbortCode.STATEMENT_FAILED
    assert "hunter2" not in str(caught.value)
    assert "no number" not in str(caught.value)


def test_outside_a_transaction_it_is_an_ordinary_one(bank: txrpc.sql.ResourceManager) -> None:
    with bank.session() as session:
        session.add(Row(name="a", value=1))
    with pytest.raises(KeyError), bank.connection() as connection:
        connection.execute(sa.text("INSERT INTO entry VALUES ('b', 1)"))
        raise KeyError
    assert rows(bank) == ["a"]


# -------------------------------------------------------------------------------------------------------- preflight


def test_preflight_says_what_to_change(make: Make, server: Server) -> None:
    assert make().start().identity.count("/") == 1
    with PostgresServer.start_new(max_prepared_transactions=0) as bare:
        resource = txrpc.sql.ResourceManager("bank", sa.create_engine(bare.url()))
        with pytest.raises(ConfigurationError, match=r"set max_prepared_transactions in postgresql\.conf"):
            resource.start()
        resource.close()
        resource.engine.dispose()
    with pytest.raises(ResourceUnavailable, match="out of reach"):
        txrpc.sql.ResourceManager("bank", sa.create_engine("postgresql+psycopg://u:secret@127.0.0.1:1/x")).start()
    foreign = sa.create_engine("sqlite://")
    foreign.dialect.name = "db2"
    with pytest.raises(ConfigurationError, match="postgresql, sqlite; 'db2' is not among them"):
        txrpc.sql.ResourceManager("bank", foreign)
    with pytest.raises(ConfigurationError, match="SQLAlchemy Engine, not str"):
        txrpc.sql.ResourceManager("bank", "postgresql://x")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        make(isolation_level="AUTOCOMMIT").start()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("default_transaction_read_only = on", "is read-only: default_transaction_read_only must be off"),
        ("synchronous_commit = off", "can be lost in a crash"),
    ],
)
def test_preflight_on_a_setting_that_loses_writes(
    make: Make, server: Server, caplog: pytest.LogCaptureFixture, setting: str, says: str
) -> None:
    resource = make()
    server.execute(f"ALTER DATABASE {resource.engine.url.database} SET {setting}")
    if "read_only" in setting:
        with pytest.raises(ConfigurationError, match=says):
            resource.start()
    else:
        resource.start()
        assert says in caplog.text


@pytest.mark.parametrize(
    ("setting", "warns"),
    [
        ("idle_in_transaction_session_timeout = '5s'", "idle_in_transaction_session_timeout is 5000 ms"),
        ("statement_timeout = 29999", "statement_timeout is 29999 ms"),
        ("statement_timeout = '30s'", ""),
        ("statement_timeout = 0", ""),
    ],
)
def test_preflight_warns_of_timeouts_that_are_shorter_than_transactions(
    make: Make, server: Server, url: str, caplog: pytest.LogCaptureFixture, setting: str, warns: str
) -> None:
    """G9: what ends a branch from outside shows as a lost connection."""
    database = sa.make_url(url).database or ""
    server.execute(f"ALTER DATABASE {database} SET {setting}")
    make().start()
    found = [
        record.getMessage()
        for record in caplog.records
        if "_timeout is" in record.getMessage() and record.levelno >= logging.WARNING
    ]
    assert len(found) == bool(warns)
    assert all(warns in text for text in found)


@pytest.mark.parametrize(("setting", "suggested"), [("0", True), ("2s", False)])
def test_preflight_suggests_a_lock_timeout(
    make: Make, caplog: pytest.LogCaptureFixture, setting: str, suggested: bool
) -> None:
    """M3: a deadlock across databases lasts until the deadline without one."""
    caplog.set_level(logging.INFO, "txrpc.sql")
    make(connect_args={"options": f"-c lock_timeout={setting}"}).start()
    assert ("lock_timeout is 0" in caplog.text) is suggested


def test_preflight_warns_of_pools_that_are_too_large(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(pool_size=500).start()
    assert "PREPARE will fail under load" in caplog.text
    assert "connections, and recovery as many again" in caplog.text


def test_preflight_as_an_ordinary_user(server: Server, url: str) -> None:
    name = url.rpartition("/")[2]
    server.execute("DROP ROLE IF EXISTS plain")
    server.execute("CREATE ROLE plain LOGIN")
    server.execute("GRANT ALL ON entry TO plain", name)
    resource = txrpc.sql.ResourceManager("bank", sa.create_engine(url.replace("txrpc@", "plain@")))
    assert resource.start().identity
    branch = gid()
    work = resource.begin(False)
    insert(work)
    prepared = resource.prepare(work, branch)
    assert isinstance(prepared, Prepared)
    assert resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
    resource.close()
    resource.engine.dispose()


# ------------------------------------------------------------------------------------------------------------ asyncio
