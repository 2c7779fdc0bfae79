"""The register in a SQLite file: what `test_register` shows of PostgreSQL's, and that a restored file is another incarnation."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

import txrpc.sql
from tests.sql.kit import insert, rows
from tests.sql.registers import check_decisions_without_work, check_the_race_for_a_row
from txrpc._client.flow import run
from txrpc._protocol.outcomes import Found, Outcome
from txrpc.errors import ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql import deciding, sqlite
from txrpc.sql.register import Row, Verdict
from txrpc.sql.sqlite_file import in_writing
from txrpc.sql.sqlite_register import SqliteRegister, open_register

LATER_MS = -1_000_000
"""A horizon behind which everything is that was made until now."""
LIST = b"two branches"
COMMITTED = Row(Found.COMMITTED, LIST)


def xid(unix_ms: int = 1_700_000_000_000) -> Xid:
    return Xid.make(unix_ms, os.urandom(10))


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[txrpc.sql.ResourceManager]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db", connect_args={"timeout": 30})
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE entry (name text PRIMARY KEY, value int)")
    resource = txrpc.sql.ResourceManager("ledger", engine, decides=True)
    resource.start()
    yield resource
    resource.close()
    engine.dispose()


@pytest.fixture
def engine(bank: txrpc.sql.ResourceManager) -> Engine:
    return bank.engine


@pytest.fixture
def aside(engine: Engine) -> Iterator[Connection]:
    """A connection as a claim or a sweep has it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@pytest.fixture
def register(aside: Connection) -> SqliteRegister:
    return open_register(aside, "ledger")


def commit(engine: Engine, register: SqliteRegister, which: Xid) -> Verdict:
    """A branch that works, decides and commits; or is rolled back."""
    with engine.connect() as connection:
        sqlite.begin(connection, False, False, True)
        connection.execute(sa.text("INSERT INTO entry VALUES (:name, 1)"), {"name": f"{which} {os.urandom(4).hex()}"})
        verdict = register.decide(connection, which, LIST, 0)
        if verdict is Verdict.DECIDED:
            connection.commit()
        return verdict


def worked(engine: Engine, which: Xid) -> int:
    with engine.connect() as connection:
        query = sa.text("SELECT count(*) FROM entry WHERE name LIKE :name")
        return connection.scalar(query, {"name": f"{which} %"}) or 0


def test_a_decision_is_there_with_its_work_and_is_not_written_twice(
    engine: Engine, register: SqliteRegister, aside: Connection
) -> None:
    one, two = xid(), xid()
    assert register.read(aside, one) == Row(Found.OPEN)
    assert [commit(engine, register, one) for _ in range(2)] == [Verdict.DECIDED, Verdict.TAKEN]
    assert register.read(aside, one) == register.claim(aside, one) == COMMITTED
    assert register.claim(aside, two) == Row(Found.ABORTED)
    assert commit(engine, register, two) is Verdict.TAKEN
    assert register.claim(aside, two) == register.read(aside, two) == Row(Found.ABORTED)
    assert (worked(engine, one), worked(engine, two)) == (1, 0)


def test_a_claim_waits_for_a_branch_that_is_deciding(engine: Engine, register: SqliteRegister) -> None:
    one, began = xid(), threading.Event()

    def claim() -> Row:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            began.set()
            return register.claim(connection, one)

    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        sqlite.begin(connection, False, False, True)
        claimed = pool.submit(claim)
        began.wait(30)
        assert register.decide(connection, one, LIST, 0) is Verdict.DECIDED
        connection.commit()
        assert claimed.result(30) == COMMITTED


def test_a_claim_does_not_wait_for_ever(engine: Engine, register: SqliteRegister, aside: Connection) -> None:
    one = xid()
    aside.exec_driver_sql("PRAGMA busy_timeout = 100")
    with engine.connect() as connection:
        sqlite.begin(connection, False, False, True)
        for verb in (
            lambda: register.claim(aside, one),
            lambda: register.done(aside, [one]),
            lambda: register.forget(aside, LATER_MS),
        ):
            with pytest.raises(ResourceUnavailable, match="another program writes"):
                verb()
    assert register.claim(aside, one) == Row(Found.ABORTED)


def test_v1_what_is_not_done_is_never_deleted(engine: Engine, register: SqliteRegister, aside: Connection) -> None:
    one, two, three = xid(), xid(), xid()
    for each in (one, two):
        assert commit(engine, register, each) is Verdict.DECIDED
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
    engine: Engine, register: SqliteRegister, aside: Connection, was: str
) -> None:
    one = xid()
    if was == "committed":
        assert commit(engine, register, one) is Verdict.DECIDED
        register.done(aside, [one])
    else:
        assert register.claim(aside, one) == Row(Found.ABORTED)
    assert register.forget(aside, LATER_MS) == 1
    assert commit(engine, register, one) is Verdict.REFUSED
    assert worked(engine, one) == (was == "committed")
    assert register.claim(aside, one) == Row(Found.FORGOTTEN)


def test_the_floor_only_rises(engine: Engine, register: SqliteRegister, aside: Connection) -> None:
    now_ms = int(time.time() * 1000)
    old, young = xid(now_ms - 600_000), xid(now_ms)
    for horizon_ms in (60_000, 3_600_000):
        register.forget(aside, horizon_ms)
        assert register.claim(aside, old) == Row(Found.FORGOTTEN)
    assert commit(engine, register, young) is Verdict.DECIDED
    register.done(aside, [young])
    assert register.forget(aside, 60_000) == 0, "what is above the floor stays, also when it is over"
    assert register.read(aside, young) == COMMITTED


def test_v14_another_register_says_nothing_and_takes_nothing(
    engine: Engine, register: SqliteRegister, aside: Connection
) -> None:
    one = xid()
    other = replace(register, id=RegisterId(bytes(16) + register.id.incarnation))
    assert other.claim(aside, one) == other.read(aside, one) == Row(Found.ELSEWHERE)
    assert commit(engine, other, one) is Verdict.REFUSED
    assert register.read(aside, one) == Row(Found.OPEN)


def test_v15_in_a_file_that_was_restored_a_row_is_true_and_none_proves_nothing(engine: Engine, tmp_path: Path) -> None:
    before, after = xid(), xid()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as aside:
        register = open_register(aside, "ledger")
    assert commit(engine, register, before) is Verdict.DECIDED
    with engine.connect() as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{tmp_path}/backup.db'")
    assert commit(engine, register, after) is Verdict.DECIDED
    engine.dispose()
    (tmp_path / "backup.db").replace(tmp_path / "ledger.db")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as aside:
        restored = open_register(aside, "ledger")
        assert restored.id.table == register.id.table
        assert restored.id != register.id
        assert [restored.ask(aside, register.id, each, True).found for each in (before, after)] == [
            Found.COMMITTED,
            Found.LOST,
        ]
        assert commit(engine, register, after) is Verdict.REFUSED
        assert restored.read(aside, after) == Row(Found.OPEN)


def test_rule_22_a_commit_that_a_power_failure_may_undo_decides_nothing(
    engine: Engine, register: SqliteRegister
) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous = FULL")  # and the folder may forget that the journal is gone
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        sqlite.begin(connection, False, False, True)
        assert register.decide(connection, xid(), LIST, 0) is Verdict.REFUSED
        connection.rollback()
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        connection.rollback()
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        sqlite.begin(connection, False, False, True)
        assert register.decide(connection, xid(), LIST, 0) is Verdict.DECIDED
        connection.rollback()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as aside, in_writing(aside):
        assert aside.exec_driver_sql("PRAGMA synchronous").scalar() == 3


def test_v11_another_transaction_than_the_one_that_worked_does_not_decide(
    bank: txrpc.sql.ResourceManager, register: SqliteRegister, aside: Connection
) -> None:
    one = xid()
    hands = deciding.Hands(
        lambda work, verb, *arguments: verb(work.connection, *arguments),
        bank._let_go,
        bank._aside,
        bank._break_off,
        sqlite,
    )
    work = bank.begin(False)
    insert(work)
    driver = work.connection.connection.driver_connection
    for statement in ("ROLLBACK", "BEGIN IMMEDIATE"):
        driver.execute(statement)
    assert run(deciding.decide(hands, register, "ledger", work, one, register.id, LIST)) is deciding.Decided.ABORTED
    assert rows(bank) == []
    assert register.read(aside, one) == Row(Found.ABORTED), "it was claimed"


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
    engine: Engine, register: SqliteRegister
) -> None:
    """Of each transaction one word is heard, over all its history; and its work is there once if it is COMMITTED, else never."""
    xids = [xid(int(time.time() * 1000)) for _ in range(30)]
    heard: list[tuple[Xid, Found]] = []
    dice = random.Random(1)

    def decide(which: Xid) -> None:
        if commit(engine, register, which) is Verdict.DECIDED:
            heard.append((which, Found.COMMITTED))

    def aside(verb: str, which: Xid) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
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
    assert {which: worked(engine, which) for which in xids} == {
        which: int(Found.COMMITTED in told.get(which, ())) for which in xids
    }


def test_the_row_alone_decides(register: SqliteRegister, aside: Connection) -> None:
    check_decisions_without_work(register, aside, [xid() for _ in range(4)])


def test_deciders_without_work_and_claimers_at_once_hear_one_word(engine: Engine, register: SqliteRegister) -> None:
    def ask(which: Xid, branches: bytes | None) -> Found:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return register.ask(connection, register.id, which, True, branches).found

    check_the_race_for_a_row(ask, [xid() for _ in range(30)])
