from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.log.group import RunningGroup
from tests.mariadb import MariaServer, MySqlServer, needs_mariadb, needs_mysql
from txrpc._decision_log.heartbeats import SqlHeartbeats
from txrpc._decision_log.memory import MemoryHeartbeats, MemoryLog, MemoryStore
from txrpc._decision_log.port import DecisionLog, Heartbeats
from txrpc._decision_log.sql import SqlLog
from txrpc._etcd.heartbeats import EtcdHeartbeats
from txrpc._etcd.log import EtcdLog
from txrpc._etcd.url import is_etcd
from txrpc.testing.postgres import PostgresServer

Place = MemoryStore | str | RunningGroup
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.start_new() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaServer]:
    with MariaServer() as server:
        yield server


@pytest.fixture(scope="session")
def mysql() -> Iterator[MariaServer]:
    with MySqlServer() as server:
        yield server


MARIADB = pytest.param("mariadb", marks=needs_mariadb)
MYSQL = pytest.param("mysql", marks=[needs_mysql, pytest.mark.proof])


@pytest.fixture(params=["memory", "sqlite", "postgresql", MARIADB, MYSQL, "etcd", "group"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where a log is: a store in memory, a URL, or the disks of three members."""
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/log.db"
    elif request.param == "postgresql":
        yield request.getfixturevalue("postgres").create_database(f"log{next(_numbers)}")
    elif request.param in ("mariadb", "mysql"):
        yield request.getfixturevalue(request.param).create_database(f"log{next(_numbers)}")
    elif request.param == "etcd":
        yield request.getfixturevalue("etcd").url(f"log{next(_numbers)}")
    else:
        group = RunningGroup(tmp_path)
        try:
            assert all(group.start())
            yield group
        finally:
            group.close()


def keep_at_most(keeps: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has room for so many decisions that are done."""
    if isinstance(place, MemoryStore):
        place.keeps = keeps
    monkeypatch.setattr("txrpc._group.log._KEPT", keeps)
    monkeypatch.setattr("txrpc._etcd.log._KEPT", keeps)


@pytest.fixture
def open_log(place: Place) -> Iterator[Callable[[], DecisionLog]]:
    """``open_log()``: one more program at the same log."""
    logs: list[DecisionLog] = []

    def make() -> DecisionLog:
        if isinstance(place, RunningGroup):
            members = list(place.running.values())
            return members[len(logs) % len(members)].make_log()
        if isinstance(place, str):
            return EtcdLog(place) if is_etcd(place) else SqlLog(place)
        return MemoryLog(place)

    def open_one() -> DecisionLog:
        logs.append(make())
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


@pytest.fixture
def open_beats(place: Place) -> Iterator[Callable[[], Heartbeats]]:
    """``open_beats()``: one more program at the same log's heartbeats."""
    opened: list[Heartbeats] = []

    def open_one() -> Heartbeats:
        assert not isinstance(place, RunningGroup)  # each member has its own: see test_group.py
        if isinstance(place, str):
            opened.append(EtcdHeartbeats(place, 1.0) if is_etcd(place) else SqlHeartbeats(place))
        else:
            opened.append(MemoryHeartbeats(place))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


@pytest.fixture
def sql_log() -> Iterator[Callable[[str], SqlLog]]:
    """``sql_log(url)``: closed at the end."""
    logs: list[SqlLog] = []

    def make(url: str) -> SqlLog:
        logs.append(SqlLog(url))
        return logs[-1]

    yield make
    for log in logs:
        log.close()
