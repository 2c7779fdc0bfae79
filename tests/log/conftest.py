from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from txrpc._decision_log.memory import MemoryLog, MemoryStore
from txrpc._decision_log.port import DecisionLog
from txrpc._decision_log.sql import SqlLog
from txrpc.testing.postgres import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer.start_new() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def open_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], DecisionLog]]:
    """``open_log()``: one more program at the same log."""
    logs: list[DecisionLog] = []
    make: Callable[[], DecisionLog]
    if request.param == "memory":
        store = MemoryStore()
        make = lambda: MemoryLog(store)  # noqa: E731
    else:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path}/log.db"
        else:
            url = request.getfixturevalue("postgres").create_database(f"log{next(_numbers)}")
        make = lambda: SqlLog(url)  # noqa: E731

    def open_one() -> DecisionLog:
        logs.append(make())
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


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
