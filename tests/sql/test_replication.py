"""Rule 22 on a real PostgreSQL: a wait for a synchronous standby is never broken off, and a cancelled one is not believed (F8)."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

import txrpc
from tests.log.test_contract import decision
from tests.postgres import Server
from tests.runtime.conftest import NoSession
from tests.sql.kit import Make, gid, insert
from tests.waiting import eventually
from txrpc import _replication
from txrpc._client.client import Client
from txrpc._client.manager import TransactionManager
from txrpc._client.transactional import transaction
from txrpc._decision_log.port import RecordUncertain
from txrpc._decision_log.sql import SqlLog
from txrpc._protocol.messages import FinishResult, Outcome
from txrpc._replication import deaf
from txrpc.errors import ResourceUnavailable
from txrpc.testing.postgres import PostgresServer

WAITS = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


def _standby(server: Server, name: str) -> None:
    """From now on commits wait for this standby, which there is not; "" for none."""
    server.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    server.execute("SELECT pg_reload_conf()")
    eventually(lambda: server.execute("SHOW synchronous_standby_names") == [(name,)])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with PostgresServer.start_new() as private:
        yield private


def _until_commits_wait(server: Server) -> None:
    """PostgreSQL's checkpointer must have heard of the setting as well, and SHOW does not say whether it has."""

    def commit_waited() -> bool:
        with ThreadPoolExecutor(1) as pool:
            commit = pool.submit(server.execute, "SELECT pg_logical_emit_message(true, 'txrpc', 'a commit')")
            while not commit.done():
                if server.execute(f"SELECT pg_cancel_backend(pid) {WAITS}"):
                    return True
        return False

    eventually(commit_waited)


@pytest.fixture
def waiting(server: Server) -> Iterator[Server]:
    _standby(server, "nobody")
    _until_commits_wait(server)
    yield server
    server.execute(f"SELECT pg_terminate_backend(pid) {WAITS}")
    _standby(server, "")


def _cancel_when_it_waits(server: Server) -> threading.Thread:
    def cancel() -> None:
        eventually(lambda: server.execute(f"SELECT pg_cancel_backend(pid) {WAITS}"))

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def test_rule_22_a_prepare_whose_wait_was_cancelled_is_no_vote(make: Make, driver: str, waiting: Server) -> None:
    resource, branch = make(driver), gid()
    work = resource.begin(False)
    insert(work)
    cancel = _cancel_when_it_waits(waiting)
    with pytest.raises(ResourceUnavailable, match="a fail-over may lose it"):
        resource.prepare(work, branch)
    cancel.join()
    resource.rollback(work)
    _standby(waiting, "")
    assert resource.rollback_prepared(branch, "") is FinishResult.DONE


def test_rule_22_a_commit_whose_wait_was_cancelled_is_unknown(make: Make, driver: str, waiting: Server) -> None:
    resource = make(driver)
    work = resource.begin(False)
    insert(work)
    cancel = _cancel_when_it_waits(waiting)
    assert resource.commit_one_phase(work, lambda _token: None) is Outcome.UNKNOWN
    cancel.join()


def test_rule_22_a_commit_that_waits_is_not_broken_off_at_its_deadline(make: Make, waiting: Server) -> None:
    """F8: it was, five seconds after the deadline, and then called committed."""
    resource = make()
    work = resource.begin(False)
    insert(work)
    with ThreadPoolExecutor(1) as pool:
        committed = pool.submit(resource.commit_one_phase, work, lambda _token: None)
        eventually(lambda: waiting.execute(f"SELECT 1 {WAITS}"))
        resource.interrupt(work)
        assert waiting.execute(f"SELECT 1 {WAITS}") == [(1,)]
        assert not committed.done()
        _standby(waiting, "")  # the owner says that the primary is enough
        assert committed.result(30) is Outcome.COMMITTED


@pytest.mark.proof
def test_rule_22_the_client_of_a_commit_that_waits_is_told_that_nobody_knows_yet(make: Make, waiting: Server) -> None:
    resource = make()
    manager = Client("default", [resource])
    manager.state.commit_timeout_ms = 500
    manager.start(NoSession())
    with pytest.raises(txrpc.OutcomeUnknown), transaction(timeout=0.5, manager=TransactionManager(manager)) as tx:
        with resource.connection() as connection:
            connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
    assert TransactionManager(manager).outcome(tx.xid, timeout=0.3) is txrpc.Outcome.UNKNOWN
    _standby(waiting, "")
    eventually(lambda: TransactionManager(manager).outcome(tx.xid, timeout=5) is txrpc.Outcome.COMMITTED)
    manager.close()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_rule_22_a_decision_whose_wait_was_cancelled_is_uncertain_and_waits_again(waiting: Server, driver: str) -> None:
    _standby(waiting, "")
    waiting.execute("DROP DATABASE IF EXISTS log")
    log = SqlLog(waiting.create_database("log").replace("psycopg", driver))
    one = decision(log.open("c1", 1).epoch)
    _standby(waiting, "nobody")
    cancel = _cancel_when_it_waits(waiting)
    with pytest.raises(RecordUncertain, match="a fail-over may lose it"):
        log.record([one])
    cancel.join()
    answers: list[Any] = []
    again = threading.Thread(target=lambda: answers.append(log.record([one])))
    again.start()
    eventually(lambda: waiting.execute(f"SELECT 1 {WAITS}"))
    assert answers == []
    _standby(waiting, "")
    again.join(30)
    assert len(answers) == 1
    log.close()
    waiting.execute("DROP DATABASE log WITH (FORCE)")


def test_a_log_with_standbys_of_which_none_is_synchronous_draws_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """F2: what such a standby has not received is lost in a fail-over."""
    assert isinstance(server, PostgresServer)
    url = server.create_database("warned")
    log = SqlLog(url)
    log.open("c1", 1)
    assert "none is synchronous" not in caplog.text
    receiver = subprocess.Popen(
        [
            str(server.binaries / "pg_receivewal"),
            "-D",
            str(server._data.parent),
            "-d",
            server.url().replace("+psycopg", ""),
        ],
        stderr=subprocess.PIPE,
    )
    try:
        eventually(lambda: server.execute("SELECT count(*) FROM pg_stat_replication") == [(1,)])
        log.open("c1", 2)
        assert "none is synchronous" in caplog.text
    finally:
        log.close()
        receiver.kill()
        receiver.communicate()


@pytest.mark.parametrize(
    "language", ["C", "POSIX", "C.UTF-8", "en_US.UTF-8", "en_GB", "English_United States.1252", ""]
)
def test_rule_22_every_driver_hears_an_english_server(language: str) -> None:
    assert deaf("psycopg2", language) == ""


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every language counts as one that is not English."""
    monkeypatch.setattr(_replication, "_ENGLISH", re.compile("Klingon"))


@pytest.mark.usefixtures("foreign")
def test_rule_22_a_driver_that_would_not_understand_the_server_is_warned_of(
    make: Make, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """psycopg2 passes on a warning as words alone, in the server's language."""
    make(driver).start()
    assert caplog.text.count("let an administrator ALTER ROLE") == (driver == "psycopg2")
    assert deaf("psycopg", "de_DE.UTF-8") == deaf("asyncpg", "de_DE.UTF-8") == ""


@pytest.mark.usefixtures("foreign")
def test_rule_22_a_driver_of_the_log_that_would_not_understand_the_server_is_warned_of(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    log = SqlLog(server.create_database("foreign").replace("psycopg", "psycopg2"))
    log.open("c1", 1)
    log.close()
    assert "the log's driver: psycopg2" in caplog.text
