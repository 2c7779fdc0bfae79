"""Fixtures for tests of services that use txrpc: pytest loads this by itself where txrpc is installed.

`txrpc_coordinator`  a real coordinator process, new for each test
`txrpc_postgres`     a real, private PostgreSQL server, one for the whole run
`txrpc_database`     the URL of a new database on it
`txrpc_process`      starts your services, and kills them when the test ends
`txrpc_manager`      the test itself as a client of that coordinator
`txrpc_at_rest`      waits until nothing is in doubt and no transaction holds locks

docs/testing-your-services.md shows them at work.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this before anything else: what it needs is imported by who uses it
    import txrpc
    from txrpc.testing.postgres import PostgresServer
    from txrpc.testing.processes import Child, CoordinatorProcess

__all__ = [
    "txrpc_at_rest",
    "txrpc_coordinator",
    "txrpc_database",
    "txrpc_manager",
    "txrpc_postgres",
    "txrpc_process",
]

_numbers = itertools.count(1)

_BUSY = """
    SELECT count(*) FROM pg_prepared_xacts
    UNION ALL
    SELECT count(*) FROM pg_stat_activity
    WHERE state LIKE 'idle in transaction%' AND backend_type = 'client backend'
"""


@pytest.fixture(scope="session")
def txrpc_postgres() -> Iterator[PostgresServer]:
    """A private PostgreSQL server with prepared transactions; `kill` and `restart` it at will."""
    from txrpc.testing.postgres import NoPostgres, PostgresServer

    try:
        server = PostgresServer.start_new()
    except NoPostgres as error:
        pytest.fail(str(error))
    with server:
        yield server


@pytest.fixture
def txrpc_database(txrpc_postgres: PostgresServer) -> Callable[[], str]:
    """``txrpc_database()``: the SQLAlchemy URL (driver psycopg) of a new, empty database."""
    return lambda: txrpc_postgres.create_database(f"test_{next(_numbers)}")


@pytest.fixture
def txrpc_coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    """A running coordinator, its log in the test's folder: `address`, `kill`, `start`, `suspend`, `resume`, `text`."""
    from txrpc.testing.processes import CoordinatorProcess

    with CoordinatorProcess(tmp_path) as coordinator:
        yield coordinator


@pytest.fixture
def txrpc_process(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """``txrpc_process([sys.executable, "-m", "shop.orders"], name="orders", ready="serving")``: one of your services, started.

    *ready* is what it writes when it is; *env* is added to its environment.
    """
    from txrpc.testing.processes import Child

    with ExitStack() as started:

        def start(
            arguments: Sequence[str], *, name: str, ready: str = "", env: Mapping[str, str] | None = None
        ) -> Child:
            child = Child(arguments, name=name, env=env, output=tmp_path / f"{name}.log", ready=ready)
            return started.enter_context(child)

        yield start


@pytest.fixture
def txrpc_manager(txrpc_coordinator: CoordinatorProcess) -> Iterator[txrpc.TransactionManager]:
    """The test as a client: `txrpc.transaction` works in it."""
    import txrpc

    with txrpc.connect(txrpc_coordinator.address, process="pytest") as manager:
        yield manager


@pytest.fixture
def txrpc_at_rest(txrpc_postgres: PostgresServer) -> Callable[..., None]:
    """``txrpc_at_rest()``: wait until the server holds nothing prepared and no open transaction; after *timeout_s*, fail."""

    def wait(timeout_s: float = 30.0) -> None:
        until = time.monotonic() + timeout_s
        while (counts := [count for (count,) in txrpc_postgres.execute(_BUSY)]) != [0, 0]:
            if time.monotonic() > until:
                pytest.fail(f"after {timeout_s} s there are {counts[0]} prepared and {counts[1]} open transactions")
            time.sleep(0.05)

    return wait
