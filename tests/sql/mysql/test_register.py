"""The register in MariaDB: what `test_register` shows of PostgreSQL's."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool

import txrpc.sql
from tests.mariadb import MariaServer
from tests.sql.kit import insert, rows
from tests.sql.registers import check_decisions_without_work, check_the_race_for_a_row
from tests.waiting import eventually
from txrpc._protocol.outcomes import Found, Outcome
from txrpc.errors import ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql import mysql
from txrpc.sql.mysql_register import MysqlRegister, open_register
from txrpc.sql.register import Row, Verdict

_numbers = itertools.count(1)
LATER_MS = -1_000_000
"""A horizon behind which everything is that was made until now."""
LIST = b"two branches"
COMMITTED = Row(Found.COMMITTED, LIST)


def xid(unix_ms: int = 1_700_000_000_000) -> Xid:
    return Xid.make(unix_ms, os.urandom(10))


@pytest.fixture
def bank(mariadb: MariaServer) -> Iterator[txrpc.sql.ResourceManager]:
    name = f"register{next(_numbers)}"
    engine = sa.create_engine(mariadb.create_database(name))
    mariadb.execute("CREATE TABLE entry (name varchar(99) PRIMARY KEY, value int)", name)
    resource = txrpc.sql.ResourceManager("ledger", engine, decides=True)
    resource.start()
    yield resource
    resource.close()
    engine.dispose()


@pytest.fixture
def engine(bank: txrpc.sql.ResourceManager) -> Engine:
    return bank.engine


def aside_of(engine: Engine) -> Connection:
    """A connection as a claim or a sweep has it."""
    return engine.connect().execution_options(isolation_level="AUTOCOMMIT")


@pytest.fixture
def aside(engine: Engine) -> Iterator[Connection]:
    with aside_of(engine) as connection:
        yield connection


@pytest.fixture
def register(aside: Connection) -> MysqlRegister:
    return open_register(aside, "ledger")


def commit(bank: txrpc.sql.ResourceManager, register: MysqlRegister, which: Xid) -> Verdict:
    """A branch that works, decides and commits; or is rolled back."""
    work = bank.begin(False)
    try:
        insert(work, f"{which} {os.urandom(4).hex()}")
        work.ours = True
        verdict = register.decide(work.connection, which, LIST, work.pid)
        if verdict is Verdict.DECIDED:
            mysql.commit(work.transaction, work.connection)
        return verdict
    finally:
        bank.rollback(work)


def worked(bank: txrpc.sql.ResourceManager, which: Xid) -> int:
    return sum(name.startswith(str(which)) for name in rows(bank))


def test_a_decision_is_there_with_its_work_and_is_not_written_twice(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection
) -> None:
    one, two = xid(), xid()
    assert register.read(aside, one) == Row(Found.OPEN)
    assert [commit(bank, register, one) for _ in range(2)] == [Verdict.DECIDED, Verdict.TAKEN]
    assert register.read(aside, one) == register.claim(aside, one) == COMMITTED
    assert register.claim(aside, two) == Row(Found.ABORTED)
    assert commit(bank, register, two) is Verdict.TAKEN
    assert register.claim(aside, two) == register.read(aside, two) == Row(Found.ABORTED)
    assert (worked(bank, one), worked(bank, two)) == (1, 0)


@pytest.mark.parametrize("commits", [True, False])
def test_a_claim_waits_for_a_branch_that_is_deciding(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, commits: bool
) -> None:
    one = xid()

    def claim() -> Row:
        with aside_of(bank.engine) as connection:
            return register.claim(connection, one)

    with ThreadPoolExecutor(1) as pool:
        work = bank.begin(False)
        work.ours = True
        assert register.decide(work.connection, one, LIST, work.pid) is Verdict.DECIDED
        claimed = pool.submit(claim)
        eventually(lambda: _claims(bank.engine))
        if commits:
            mysql.commit(work.transaction, work.connection)
        bank.rollback(work)
        assert claimed.result(30) == (COMMITTED if commits else Row(Found.ABORTED))


def _claims(engine: Engine) -> bool:
    """Whether a claim is being executed: InnoDB's own tables of waits are not made anew for those who ask often."""
    with aside_of(engine) as connection:
        claims = (
            "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'INSERT INTO txrpc_decision VALUES%%'"
        )
        return bool(connection.exec_driver_sql(claims).scalar())


def test_a_claim_does_not_wait_for_ever(
    bank: txrpc.sql.ResourceManager,
    register: MysqlRegister,
    aside: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(txrpc.sql.mysql_register, "_CLAIM_S", 1)
    one = xid()
    work = bank.begin(False)
    work.ours = True
    assert register.decide(work.connection, one, LIST, work.pid) is Verdict.DECIDED
    with pytest.raises(ResourceUnavailable, match="being decided"):
        register.claim(aside, one)
    bank.rollback(work)
    assert register.claim(aside, one) == Row(Found.ABORTED)


def test_v1_what_is_not_done_is_never_deleted(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection
) -> None:
    one, two, three = xid(), xid(), xid()
    for each in (one, two):
        assert commit(bank, register, each) is Verdict.DECIDED
    assert register.claim(aside, three) == Row(Found.ABORTED)
    assert register.undone(aside) == sorted([(one, LIST), (two, LIST)])
    register.done(aside, [one])
    assert register.undone(aside) == [(two, LIST)]
    assert register.undone(aside, after=max(one, two)) == []
    assert [register.forget(aside, LATER_MS, limit=1), register.forget(aside, LATER_MS)] == [1, 1]
    assert register.claim(aside, two) == register.read(aside, two) == COMMITTED
    assert register.claim(aside, one) == register.claim(aside, three) == Row(Found.FORGOTTEN)
    assert register.read(aside, one) == Row(Found.OPEN), "a claim has left nothing behind"


@pytest.mark.parametrize("was", ["committed", "aborted"])
def test_v1_v2_v3_what_was_deleted_is_not_written_again(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection, was: str
) -> None:
    one = xid()
    if was == "committed":
        assert commit(bank, register, one) is Verdict.DECIDED
        register.done(aside, [one])
    else:
        assert register.claim(aside, one) == Row(Found.ABORTED)
    assert register.forget(aside, LATER_MS) == 1
    assert commit(bank, register, one) is Verdict.REFUSED
    assert worked(bank, one) == (was == "committed")
    assert register.claim(aside, one) == Row(Found.FORGOTTEN)


def test_v4_a_snapshot_that_is_older_than_the_floor_does_not_decide(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection
) -> None:
    """REPEATABLE READ is the default here."""
    one = xid()
    work = bank.begin(False)
    work.connection.exec_driver_sql("SELECT * FROM txrpc_register")
    register.forget(aside, LATER_MS)
    work.ours = True
    assert register.decide(work.connection, one, LIST, work.pid) is Verdict.REFUSED
    bank.rollback(work)


def test_the_floor_only_rises(bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection) -> None:
    now_ms = int(time.time() * 1000)
    old, young = xid(now_ms - 600_000), xid(now_ms)
    for horizon_ms in (60_000, 3_600_000):
        register.forget(aside, horizon_ms)
        assert register.claim(aside, old) == Row(Found.FORGOTTEN)
    assert commit(bank, register, young) is Verdict.DECIDED
    register.done(aside, [young])
    assert register.forget(aside, 60_000) == 0, "what is above the floor stays, also when it is over"
    assert register.read(aside, young) == COMMITTED


def test_v14_another_register_says_nothing_and_takes_nothing(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection
) -> None:
    one = xid()
    other = replace(register, id=RegisterId(bytes(16) + register.id.incarnation))
    assert other.claim(aside, one) == other.read(aside, one) == Row(Found.ELSEWHERE)
    assert commit(bank, other, one) is Verdict.REFUSED
    assert register.read(aside, one) == Row(Found.OPEN)


def test_v15_on_another_server_a_row_is_true_and_none_proves_nothing(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, mariadb: MariaServer, aside: Connection
) -> None:
    before, after = xid(), xid()
    assert commit(bank, register, before) is Verdict.DECIDED
    aside.invalidate()  # it may be the server that ends
    engine = sa.create_engine(bank.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with mariadb.another_server():
        with engine.connect() as connection:
            promoted = open_register(connection, "ledger")
            assert promoted.id.table == register.id.table
            assert promoted.id != register.id
            answers = [promoted.ask(connection, register.id, each, True).found for each in (before, after)]
            assert answers == [Found.COMMITTED, Found.LOST]
            assert promoted.read(connection, after) == Row(Found.OPEN)


def test_v11_another_session_than_the_one_that_worked_does_not_decide(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, aside: Connection
) -> None:
    one = xid()
    work = bank.begin(False)
    work.ours = True
    assert register.decide(work.connection, one, LIST, work.pid + 1_000) is Verdict.TAKEN
    bank.rollback(work)
    assert register.read(aside, one) == Row(Found.OPEN)


def test_rule_22_a_commit_that_a_crash_may_undo_decides_nothing(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister, mariadb: MariaServer
) -> None:
    mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
    try:
        assert commit(bank, register, xid()) is Verdict.REFUSED
    finally:
        mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")


def test_a_branch_decides_through_its_resource(bank: txrpc.sql.ResourceManager) -> None:
    assert bank.decider is not None
    one = xid()
    work = bank.begin(False)
    insert(work)
    assert bank.decider.decide(work, one, bank.decider.open(), LIST) is Outcome.COMMITTED
    assert rows(bank) == ["a"]
    assert bank.decider.undone() == [(one, LIST)]
    bank.decider.mark_done([one])
    bank.decider.forget()
    assert bank.decider.ask(bank.decider.open(), one, True) == (Found.FORGOTTEN, b"")
    with bank.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM txrpc_register")
    with pytest.raises(ResourceUnavailable, match="start the program again"):
        bank.decider.open()


def test_deciders_claimers_and_forgetting_at_once_never_contradict_each_other(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister
) -> None:
    """Of each transaction one word is heard, over all its history; and its work is there once if it is COMMITTED, else never."""
    xids = [xid(int(time.time() * 1000)) for _ in range(30)]
    heard: list[tuple[Xid, Found]] = []
    dice = random.Random(1)

    def decide(which: Xid) -> None:
        try:
            if commit(bank, register, which) is Verdict.DECIDED:
                heard.append((which, Found.COMMITTED))
        except sa.exc.DBAPIError as error:
            if not mysql.refused(error):  # a deadlock, which has undone it
                raise

    def aside(verb: str, which: Xid) -> None:
        with aside_of(bank.engine) as connection:
            with suppress(ResourceUnavailable):  # it is asked again, elsewhere
                if verb == "claim":
                    heard.append((which, register.claim(connection, which).found))
                else:
                    register.done(connection, [each for each, _ in register.undone(connection)][::2])
                    register.forget(connection, 60_000 if verb == "forget" else LATER_MS)

    work = []
    for number, which in enumerate(xids):
        verbs = ["decide", "decide", "claim", "claim"]
        dice.shuffle(verbs)
        work += [(verb, which) for verb in verbs]
        if number % 5 == 0:
            work.append(("forget" if number < 15 else "forget all", which))
    with ThreadPoolExecutor(4) as pool:
        for each in [
            pool.submit(decide, which) if verb == "decide" else pool.submit(aside, verb, which) for verb, which in work
        ]:
            each.result(60)
    told: dict[Xid, set[Found]] = {}
    for which, found in heard:
        told.setdefault(which, set()).add(found)
    assert not [which for which, words in told.items() if {Found.COMMITTED, Found.ABORTED} <= words]
    assert {which: worked(bank, which) for which in xids} == {
        which: int(Found.COMMITTED in told.get(which, ())) for which in xids
    }


def test_the_row_alone_decides(register: MysqlRegister, aside: Connection) -> None:
    check_decisions_without_work(register, aside, [xid() for _ in range(4)])


def test_deciders_without_work_and_claimers_at_once_hear_one_word(
    bank: txrpc.sql.ResourceManager, register: MysqlRegister
) -> None:
    def ask(which: Xid, branches: bytes | None) -> Found:
        with aside_of(bank.engine) as connection:
            return register.ask(connection, register.id, which, True, branches).found

    check_the_race_for_a_row(ask, [xid() for _ in range(30)])


def test_rule_22_a_decision_without_work_that_a_crash_may_undo_is_not_written(
    register: MysqlRegister, aside: Connection, mariadb: MariaServer
) -> None:
    one = xid()
    mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
    try:
        with pytest.raises(ResourceUnavailable, match="crash"):
            register.ask(aside, register.id, one, True, LIST)
    finally:
        mariadb.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    assert register.read(aside, one) == Row(Found.OPEN)
