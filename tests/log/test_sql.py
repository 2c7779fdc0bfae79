"""The SQL log: what can be wrong with it is said in one sentence, and what it has said is durable stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.log.test_contract import decision
from tests.waiting import until_a_backend_waits_for
from txrpc._decision_log import database
from txrpc._decision_log.port import LogError, NotRecorded, RecordUncertain
from txrpc._decision_log.schema import pack, unpack
from txrpc._decision_log.sql import SqlLog
from txrpc._protocol.records import Decision
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import Epoch, Xid
from txrpc.testing.postgres import PostgresServer

Make = Callable[[str], SqlLog]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "database URL such as sqlite:///txrpc.db"),
        ("oracle://h/d", "mariadb, mysql, postgresql, sqlite or etcd"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("postgresql+pg8000://h/d", "pip install pg8000"),
        ("sqlite:////nowhere/log.db", "check that the folder exists"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "start the database, or correct the URL"),
        ("postgresql+psycopg://127.0.0.1:1/d?password=secret", "start the database, or correct the URL"),
        ("postgresql+psycopg//u:secret@h/d", "database URL such as sqlite:///txrpc.db"),
        ("postgresql+psycopg://u:secret@h:port/d", "database URL such as sqlite:///txrpc.db"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d?nonsense=1", 'invalid connection option "nonsense"'),
        ("postgresql+asyncpg://u:secret@h/d", "'asyncpg' is for asyncio"),
        ("sqlite+aiosqlite:///log.db", "'aiosqlite' is for asyncio"),
    ],
)
def test_a_bad_url_is_one_clear_sentence_without_the_password(sql_log: Make, url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        sql_log(url).open("c1", 1)
    assert "secret" not in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_database_that_does_not_exist(sql_log: Make, postgres: PostgresServer) -> None:
    with pytest.raises(ConfigurationError, match="create the database"):
        sql_log(postgres.url("absent")).open("c1", 1)


def test_a_wrong_password(sql_log: Make, postgres: PostgresServer) -> None:
    url = postgres.create_database("passwordlog")
    postgres.execute("CREATE ROLE keeper LOGIN PASSWORD 'right'")
    rules = postgres.folder / "data" / "pg_hba.conf"
    trusting = rules.read_text()
    rules.write_text("host all keeper 127.0.0.1/32 scram-sha-256\n" + trusting)
    postgres.execute("SELECT pg_reload_conf()")
    wrong = make_url(url).set(username="keeper", password="hunter2").render_as_string(hide_password=False)
    try:
        with pytest.raises(ConfigurationError, match="correct the user and password in the URL") as caught:
            sql_log(wrong).open("c1", 1)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(ConfigurationError, match=r"permission denied.*grant"):
            sql_log(wrong.replace("hunter2", "right")).open("c1", 1)
    finally:
        rules.write_text(trusting)
        postgres.execute("SELECT pg_reload_conf()")


def test_a_file_that_is_no_database(sql_log: Make, tmp_path: Path) -> None:
    (tmp_path / "log.db").write_text("This is a letter, not a database. " * 100)
    with pytest.raises(ConfigurationError, match="name another file"):
        sql_log(f"sqlite:///{tmp_path}/log.db").open("c1", 1)


def test_a_read_only_log(sql_log: Make, tmp_path: Path, postgres: PostgresServer) -> None:
    sql_log(f"sqlite:///{tmp_path}/log.db").open("c1", 1)
    with pytest.raises(ConfigurationError, match="right to write"):
        sql_log(f"sqlite:///file:{tmp_path}/log.db?mode=ro&uri=true").open("c1", 1)
    url = postgres.create_database("readonlylog")
    postgres.execute("ALTER DATABASE readonlylog SET default_transaction_read_only = on")
    with pytest.raises(ConfigurationError, match="right to write"):
        sql_log(url).open("c1", 1)


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_log_of_schema_version_1_is_brought_up_to_date_and_keeps_its_decisions(
    sql_log: Make, tmp_path: Path, postgres: PostgresServer, backend: str
) -> None:
    url = f"sqlite:///{tmp_path}/log.db" if backend == "sqlite" else postgres.create_database("upgrade")
    engine = create_engine(url)
    binary = "BLOB" if backend == "sqlite" else "BYTEA"
    one = decision(Epoch.make(1, 1))
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE txrpc_schema (id INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
            "INSERT INTO txrpc_schema VALUES (1, 1)",
            "CREATE TABLE txrpc_node (node VARCHAR(24) PRIMARY KEY, epoch BIGINT NOT NULL, forgotten_ms BIGINT NOT NULL)",
            f"INSERT INTO txrpc_node VALUES ('c1', {int(one.epoch)}, 0)",
            "CREATE TABLE txrpc_epoch (node VARCHAR(24), epoch BIGINT, opened_ms BIGINT NOT NULL, PRIMARY KEY (node, epoch))",
            f"INSERT INTO txrpc_epoch VALUES ('c1', {int(one.epoch)}, 1)",
            (
                f"CREATE TABLE txrpc_decision (node VARCHAR(24), xid {binary}, epoch BIGINT NOT NULL, "
                f"decided_ms BIGINT NOT NULL, branches {binary} NOT NULL, done_ms BIGINT, PRIMARY KEY (node, xid))"
            ),
        ):
            connection.execute(text(statement))
        connection.execute(
            text("INSERT INTO txrpc_decision VALUES ('c1', :xid, :epoch, :decided, :branches, NULL)"),
            {
                "xid": bytes(one.xid),
                "epoch": int(one.epoch),
                "decided": one.decided_ms,
                "branches": pack(one.branches),
            },
        )
    engine.dispose()
    log = sql_log(url)
    opened = log.open("c1", 2)
    assert opened.pending == (one,)
    assert (opened.position, opened.lineage) == (0, {one.epoch: 0})
    assert log.record([decision(opened.epoch)]) == 1
    assert sql_log(url).open("c1", 3).position == 1


def test_a_schema_of_a_newer_version(sql_log: Make, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    sql_log(url).open("c1", 1)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE txrpc_schema SET version = 99"))
    engine.dispose()
    with pytest.raises(ConfigurationError, match=r"version 99.*up to 3.*upgrade"):
        sql_log(url).open("c1", 1)


def test_a_full_disk_is_certainly_not_recorded(sql_log: Make, tmp_path: Path) -> None:
    log = sql_log(f"sqlite:///{tmp_path}/log.db")
    epoch = log.open("c1", 1).epoch
    with log._engine.connect() as connection:
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar() or 0)
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    batch = [decision(epoch, branches=50) for _ in range(100)]
    with pytest.raises(NotRecorded, match="free some space"):
        log.record(batch)
    assert list(log.pending()) == []


def test_a_locked_file_is_certainly_not_recorded(sql_log: Make, tmp_path: Path) -> None:
    log = sql_log(f"sqlite:///{tmp_path}/log.db")
    epoch = log.open("c1", 1).epoch
    with log._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 100")
    rival = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotRecorded, match="another program"):
        log.record([decision(epoch)])
    rival.execute("ROLLBACK")
    log.record([decision(epoch)])
    rival.close()


def test_the_sqlite_log_is_synchronous(sql_log: Make, tmp_path: Path) -> None:
    log = sql_log(f"sqlite:///{tmp_path}/log.db")
    log.open("c1", 1)
    with log._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_the_postgresql_log_is_synchronous_whatever_the_default(sql_log: Make, postgres: PostgresServer) -> None:
    url = postgres.create_database("asynclog")
    postgres.execute("ALTER DATABASE asynclog SET synchronous_commit = off")
    log = sql_log(url)
    log.open("c1", 1)
    with log._engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_a_repeat_that_cannot_reach_the_database_does_not_make_an_uncertain_commit_certain(
    sql_log: Make, postgres: PostgresServer
) -> None:
    """The database dies while it holds COMMIT's answer back, waiting for a standby that there is not: the record is there."""
    log = sql_log(postgres.create_database("uncertainlog"))
    epoch = log.open("c1", 1).epoch
    errors: list[BaseException] = []

    def record(one: Decision) -> None:
        try:
            log.record([one])
        except LogError as error:
            errors.append(error)

    def waits(thread: threading.Thread) -> bool:
        """False if it has committed: the server takes its new configuration when it comes to it."""
        while not postgres.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"):
            if not thread.is_alive():
                return False
            time.sleep(0.01)
        return True

    postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    postgres.execute("SELECT pg_reload_conf()")
    try:
        for _ in range(1_000):
            one, two = decision(epoch), decision(epoch)
            thread = threading.Thread(target=record, args=(one,))
            thread.start()
            if waits(thread):
                break
        postgres.kill()
        thread.join(30)
        assert [type(error) for error in errors] == [RecordUncertain]
        with pytest.raises(RecordUncertain, match="yet"):
            log.record([one])
        with pytest.raises(NotRecorded):
            log.record([two])
    finally:
        if postgres.running:
            postgres.kill()
        (postgres.folder / "data" / "postgresql.auto.conf").write_text("")
        postgres.restart()
    assert log.outcome(one.xid) == one
    log.record([one])
    assert [record for record in log.pending() if record.xid == one.xid] == [one], "repeated, and there once"


def test_a_coordinator_that_froze_with_the_fence_in_its_hand_is_replaced(
    sql_log: Make, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [setting.replace("'10s'", "'300ms'") for setting in database._POSTGRESQL_SETTINGS]
    assert settings != list(database._POSTGRESQL_SETTINGS)
    monkeypatch.setattr(database, "_POSTGRESQL_SETTINGS", settings)
    url = postgres.create_database("frozenlog")
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


def test_a_copied_log_continues_under_an_epoch_of_its_own(sql_log: Make, tmp_path: Path) -> None:
    """The copy has the same number and another nonce, by which participants tell them apart."""
    original = sql_log(f"sqlite:///{tmp_path}/log.db")
    first = original.open("c1", 1)
    original.record([decision(first.epoch)])
    original.close()
    shutil.copy(tmp_path / "log.db", tmp_path / "copy.db")
    copy = sql_log(f"sqlite:///{tmp_path}/copy.db")
    here, there = original.open("c1", 7), copy.open("c1", 8)
    assert here.epoch.number == there.epoch.number == 2
    assert here.epoch != there.epoch
    assert here.lineage == there.lineage == {first.epoch: 1}
    assert here.pending == there.pending
    original.record([decision(here.epoch)])
    copy.record([decision(there.epoch)])


def test_a_log_that_is_replaced_by_another_file_under_a_coordinator_fences_it(sql_log: Make, tmp_path: Path) -> None:
    log = sql_log(f"sqlite:///{tmp_path}/log.db")
    log.open("c1", 1)
    log.close()
    shutil.copy(tmp_path / "log.db", tmp_path / "backup.db")
    epoch = log.open("c1", 2).epoch
    log.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "log.db")
    with pytest.raises(Fenced):
        log.record([decision(epoch)])


def test_a_restart_of_the_logs_database_is_survived(sql_log: Make, postgres: PostgresServer) -> None:
    log = sql_log(postgres.create_database("restartlog"))
    epoch = log.open("c1", 1).epoch
    one, two = decision(epoch), decision(epoch)
    log.record([one])
    postgres.kill()
    with pytest.raises(LogError):
        log.record([two])
    with pytest.raises(LogError):
        log.outcome(one.xid)
    postgres.restart()
    log.record([two])
    assert set(log.pending()) == {one, two}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_several_coordinators_may_create_the_tables_at_once(
    sql_log: Make, kind: str, tmp_path: Path, postgres: PostgresServer
) -> None:
    url = f"sqlite:///{tmp_path}/log.db" if kind == "sqlite" else postgres.create_database("racelog")
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def open_it(number: int) -> None:
        log = sql_log(url)
        barrier.wait()
        try:
            log.open(f"c{number}", number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_new_file_that_another_program_is_writing_is_waited_for(sql_log: Make, tmp_path: Path) -> None:
    rival = sqlite3.connect(tmp_path / "log.db", isolation_level=None, check_same_thread=False)
    rival.execute("CREATE TABLE other (x)")
    rival.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, rival.execute, ("COMMIT",))
    timer.start()
    assert sql_log(f"sqlite:///{tmp_path}/log.db").open("c1", 1).epoch.number == 1
    timer.join()
    rival.close()


CHILD = """
import sys
from tests.log.test_contract import decision
from txrpc._decision_log.sql import SqlLog
log = SqlLog(sys.argv[1])
epoch = log.open("c1", 1).epoch
while True:
    batch = [decision(epoch) for _ in range(3)]
    log.record(batch)
    print(*(d.xid for d in batch), flush=True)
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_rule_3_what_record_has_returned_for_survives_kill_9(
    sql_log: Make, kind: str, tmp_path: Path, postgres: PostgresServer
) -> None:
    url = f"sqlite:///{tmp_path}/log.db" if kind == "sqlite" else postgres.create_database("killlog")
    child = subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(20)]
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    lines += child.stdout.readlines()
    child.stdout.close()
    child.wait()
    told = {Xid.parse(word) for line in lines if line.endswith("\n") for word in line.split()}
    assert len(told) >= 60
    log = sql_log(url)
    found = {d.xid for d in log.open("c1", 2).pending}
    assert told <= found
    assert len(found) % 3 == 0


def test_branches_survive_their_packed_form() -> None:
    branches = decision(Epoch.make(1, 1), branches=5).branches
    assert unpack(pack(branches)) == branches
    assert unpack(pack(())) == ()
    with pytest.raises(ConfigurationError, match="unknown format"):
        unpack(b"\x02")


def test_a_damaged_record_is_said_to_be_one() -> None:
    whole = pack(decision(Epoch.make(1, 1), branches=1).branches)
    for length in range(2, len(whole)):
        with pytest.raises(ConfigurationError, match="damaged"):
            unpack(whole[:length])
    with pytest.raises(ConfigurationError, match="damaged"):
        unpack(whole[:-1] + b"\xff")


def test_a_batch_is_one_statement_of_postgresqls(sql_log: Make, postgres: PostgresServer) -> None:
    url = postgres.create_database("shortlog")
    postgres.execute("ALTER DATABASE shortlog SET log_statement = 'all'")
    log = sql_log(url)
    epoch = log.open("c1", 1).epoch
    for batch in ([decision(epoch)], [decision(epoch), decision(epoch)], []):
        begun = len(postgres.log())
        log.record(batch)
        said = re.findall(r"(?:statement|execute [^:]+): (\S+ \S+)", postgres.log()[begun:])
        assert said == ["WITH fence"]


def _trigger_function(name: str, body: str) -> str:
    return f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$"


def test_what_postgresql_refuses_is_certainly_not_recorded(sql_log: Make, postgres: PostgresServer) -> None:
    url = postgres.create_database("fulllog")
    log = sql_log(url)
    opened = log.open("c1", 1)
    for statement in (
        _trigger_function("refuse", "RAISE disk_full USING HINT = 'Check free disk space.';"),
        "CREATE TRIGGER refuse BEFORE INSERT ON txrpc_decision FOR EACH ROW EXECUTE FUNCTION refuse()",
    ):
        postgres.execute(statement, "fulllog")
    one = decision(opened.epoch)
    with pytest.raises(NotRecorded, match="free some space"):
        log.record([one])
    postgres.execute("DROP TRIGGER refuse ON txrpc_decision", "fulllog")
    assert log.outcome(one.xid) is None
    assert log.record([one]) == opened.position + 1, "nothing of the first try has stayed"


def test_a_batch_whose_connection_is_ended_is_uncertain(sql_log: Make, postgres: PostgresServer) -> None:
    """The statement commits by itself: when its backend is ended, only the log can tell how far it had come."""
    url = postgres.create_database("endedlog")
    log = sql_log(url)
    one = decision(log.open("c1", 1).epoch)
    with held_at_inserts(url) as go, ThreadPoolExecutor(1) as pool:
        writer = pool.submit(log.record, [one])
        until_a_backend_waits_for(postgres, "endedlog", "advisory")
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory'")
        with pytest.raises(RecordUncertain):
            writer.result(60)
        go()
    log.record([one])
    assert list(log.pending()) == [one]


@contextmanager
def held_at_inserts(url: str) -> Iterator[Callable[[], None]]:
    """A decision that is being written waits in the database, with the fence in its hand, until what this returns is called."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as holder:
        for statement in (
            "SELECT pg_advisory_lock(1)",
            _trigger_function("hold", "PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW;"),
            "CREATE TRIGGER hold BEFORE INSERT ON txrpc_decision FOR EACH ROW EXECUTE FUNCTION hold()",
        ):
            holder.exec_driver_sql(statement)
        yield holder.invalidate
    engine.dispose()


def test_rule_14_a_takeover_finds_the_decision_that_is_being_committed_at_any_isolation_level(
    postgres: PostgresServer, sql_log: Make
) -> None:
    """F16: under REPEATABLE READ what it read was older than the lock that it had waited for."""
    url = postgres.create_database("repeatable")
    postgres.execute("ALTER DATABASE repeatable SET default_transaction_isolation = 'repeatable read'")
    old = sql_log(url)
    one = decision(old.open("c1", 1).epoch)
    with held_at_inserts(url) as go, ThreadPoolExecutor(2) as pool:
        writer = pool.submit(old.record, [one])
        until_a_backend_waits_for(postgres, "repeatable", "advisory")
        opener = pool.submit(sql_log(url).open, "c1", 2)
        until_a_backend_waits_for(postgres, "repeatable", "transactionid")
        go()
        writer.result(60)
        assert opener.result(60).pending == (one,)
