"""The log in MariaDB and MySQL, beside the contract that every log keeps: its connections' settings, and what breaks them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event

from tests.log.conftest import MARIADB, MYSQL
from tests.log.test_contract import decision
from tests.mariadb import MariaServer
from tests.waiting import eventually
from txrpc._decision_log import database
from txrpc._decision_log.port import LogError, NotRecorded, RecordUncertain
from txrpc._decision_log.schema import pack
from txrpc._decision_log.sql import SqlLog
from txrpc.errors import ConfigurationError, Fenced


@pytest.fixture(params=[MARIADB, MYSQL])
def server(request: pytest.FixtureRequest) -> MariaServer:
    found: MariaServer = request.getfixturevalue(request.param)
    return found


Make = Callable[[str], SqlLog]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"/log": "/absent"}, "create the database"),
        ({"root@": "teller:secret@"}, "correct the user and password"),
        ({"pymysql": "asyncmy"}, "'asyncmy' is for asyncio"),
    ],
)
def test_what_is_wrong_is_one_sentence_without_the_password(
    sql_log: Make, server: MariaServer, change: dict[str, str], says: str
) -> None:
    server.execute("CREATE USER IF NOT EXISTS teller IDENTIFIED BY 'another'")
    url = server.create_database("log")
    for old, new in change.items():
        url = url.replace(old, new)
    with pytest.raises(ConfigurationError, match=says) as caught:
        sql_log(url).open("c1", 1)
    assert "secret" not in str(caught.value)


def test_a_server_that_may_lose_decisions_is_warned_of(
    sql_log: Make, server: MariaServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.create_database("careless")
    sql_log(url).open("c1", 1)
    assert not caplog.records
    server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        sql_log(url).open("c1", 2)
        assert "innodb_flush_log_at_trx_commit = 1" in caplog.text
    finally:
        server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")


def test_a_coordinator_that_froze_with_the_fence_in_its_hand_is_replaced(
    sql_log: Make, server: MariaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {True: "SESSION idle_transaction_timeout = 1", False: "SESSION wait_timeout = 1"}
    monkeypatch.setattr(database, "_MYSQL_PATIENCE", soon)
    url = server.create_database("frozenlog")
    frozen, successor = sql_log(url), sql_log(url)
    epoch = frozen.open("c1", 1).epoch
    with frozen._engine.connect() as connection:
        frozen._fence.lock(connection)
        began = time.monotonic()
        assert successor.open("c1", 2).epoch.number == 2
        assert time.monotonic() - began < 10
        connection.invalidate()
    with pytest.raises(Fenced):
        frozen.record([decision(epoch)])


def test_a_restart_of_the_logs_database_is_survived(sql_log: Make, server: MariaServer) -> None:
    log = sql_log(server.create_database("restartlog"))
    epoch = log.open("c1", 1).epoch
    one, two = decision(epoch), decision(epoch)
    log.record([one])
    server.kill()
    with pytest.raises(NotRecorded):
        log.record([two])
    with pytest.raises(LogError):
        log.outcome(one.xid)
    server.start()
    log.record([two])
    assert set(log.pending()) == {one, two}


def test_a_commit_without_an_answer_is_uncertain_until_a_repeat_succeeds(sql_log: Make, server: MariaServer) -> None:
    log = sql_log(server.create_database("uncertainlog"))
    epoch = log.open("c1", 1).epoch
    one, two = decision(epoch), decision(epoch)
    event.listen(log._engine, "commit", lambda _: server.kill(), once=True)
    with pytest.raises(RecordUncertain):
        log.record([one])
    with pytest.raises(RecordUncertain, match="yet"):
        log.record([one])
    with pytest.raises(NotRecorded):
        log.record([two])
    server.start()
    log.record([one])
    assert log.pending() == (one,)


def test_several_coordinators_may_create_the_tables_at_once(sql_log: Make, server: MariaServer) -> None:
    url = server.create_database("racelog")
    barrier = threading.Barrier(4)

    def open_it(number: int) -> None:
        log = sql_log(url)
        barrier.wait(60)
        log.open(f"c{number}", number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_it, range(4)))


def test_rule_14_a_takeover_finds_the_decision_that_is_being_committed(sql_log: Make, server: MariaServer) -> None:
    """Under REPEATABLE READ, the default here, what it read would be older than the lock that it had waited for."""
    url = server.create_database("repeatable")
    old = sql_log(url)
    one = decision(old.open("c1", 1).epoch)
    there, go = threading.Event(), threading.Event()

    @event.listens_for(old._engine, "commit")
    def hold(_connection: object) -> None:
        there.set()
        assert go.wait(60)

    waiting = "SELECT 1 FROM information_schema.processlist WHERE db = 'repeatable' AND info LIKE 'SELECT%FOR UPDATE'"
    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(old.record, [one])
        assert there.wait(60)
        opener = pool.submit(sql_log(url).open, "c1", 2)
        eventually(lambda: server.execute(waiting))
        go.set()
        writer.result(60)
        assert opener.result(60).pending == (one,)


def test_a_decision_about_many_branches_is_not_cut_off(sql_log: Make, server: MariaServer) -> None:
    """A BLOB holds 64 KiB here."""
    log = sql_log(server.create_database("longlog"))
    one = decision(log.open("c1", 1).epoch, branches=3_000)
    assert len(pack(one.branches)) > 1 << 16
    log.record([one])
    assert log.pending() == (one,)


def test_nodes_whose_names_differ_in_their_case_are_two(sql_log: Make, server: MariaServer) -> None:
    url = server.create_database("caselog")
    small, great = sql_log(url), sql_log(url)
    one = decision(small.open("c1", 1).epoch)
    great.open("C1", 1)
    small.record([one])
    assert (len(small.pending()), great.pending()) == (1, ())
