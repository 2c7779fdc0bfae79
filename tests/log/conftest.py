from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from txrpc._decision_log.heartbeats import SqlHeartbeats
from txrpc._decision_log.memory import MemoryHeartbeats, MemoryLog, MemoryStore
from txrpc._decision_log.port import DecisionLog, Heartbeats
from txrpc._decision_log.sql import SqlLog
from txrpc.testing.postgres import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.start_new() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore | str:
    """Where a log is: a store in memory, or a URL."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    url: str = request.getfixturevalue("postgres").create_database(f"log{next(_numbers)}")
    return url


@pytest.fixture
def open_log(place: MemoryStore | str) -> Iterator[Callable[[], DecisionLog]]:
    """``open_log()``: one more program at the same log."""
    logs: list[DecisionLog] = []

    def open_one() -> DecisionLog:
        logs.append(SqlLog(place) if isinstance(place, str) else MemoryLog(place))
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


@pytest.fixture
def open_beats(place: MemoryStore | str) -> Iterator[Callable[[], Heartbeats]]:
    """``open_beats()``: one more program at the same log's heartbeats."""
    opened: list[Heartbeats] = []

    def open_one() -> Heartbeats:
        opened.append(SqlHeartbeats(place) if isinstance(place, str) else MemoryHeartbeats(place))
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
