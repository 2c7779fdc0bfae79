"""For all tests.  In CI a skipped test is a failure unless its reason begins with one that is known to be true."""

from __future__ import annotations

import logging
import os

# The tests start processes while gRPC threads run; gRPC's own handlers of fork would get in the way.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from collections.abc import Generator, Iterator

import pytest

from tests.etcd import EtcdCluster, programs
from tests.postgres import Server, start_servers
from tests.system.world import BANKS
from tests.versions import GRPC

TRUE_REASONS = (
    "TXRPC_TEST_POSTGRES_URLS is set",
    "no embedded PostgreSQL",
    "no installed PostgreSQL",
    "needs root",
    "no atheris",
    "no Python 3.",
    "no postgres_fdw",
    "no PgBouncer",
    "no etcd",
    "no MySQL",
    "no mysqlclient",
    "gRPC before 1.",
    "asyncpg before 0.",
)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether it is not gRPC's poller, which is one for all event loops, telling the closed loop of an earlier test."""
    error = record.exc_info[1] if record.exc_info else None
    return not (
        "PollerCompletionQueue._handle_events" in record.getMessage() and isinstance(error, (RuntimeError, OSError))
    )


logging.getLogger("asyncio").addFilter(_is_ours)


_OF_MYSQL = ("aiomysql", "asyncmy", "-stays]")
"""What MariaDB shows in CI, and MySQL as well where time is no matter: asyncio's drivers, a program that is killed alone."""
_APART = ("tests/install/", "tests/simulation/")
"""Where the tests are that take longest, and need nothing of each other."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave to `make proof` what differs from MariaDB's least."""
    if "[MySQL-" in item.name and any(part in item.name for part in _OF_MYSQL):
        item.add_marker(pytest.mark.long)


@pytest.hookimpl(trylast=True)  # when those that are not wanted are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each worker its part of the longest tests to begin with: one that got them all would be the last by minutes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    apart = [item for item in items if item.nodeid.startswith(_APART)]
    others = [item for item in items if not item.nodeid.startswith(_APART)]
    parts: list[pytest.Item] = []
    for worker in range(workers):
        mine = slice(worker * len(others) // workers, (worker + 1) * len(others) // workers)
        parts += [*apart[worker::workers], *others[mine]]
    items[:] = parts


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """One PostgreSQL server a bank."""
    servers = dict(zip(BANKS, start_servers(len(BANKS), log_statement="all", fsync="off"), strict=True))
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    """Three members that the tests of a module share, each under a prefix of its own; idle ones would cost the others time."""
    if not programs():
        pytest.skip("no etcd")
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def own_etcd() -> Iterator[EtcdCluster]:
    """Three members to break."""
    if not programs():
        pytest.skip("no etcd")
    with EtcdCluster() as cluster:
        yield cluster


def pytest_configure(config: pytest.Config) -> None:
    # What is meant for another PostgreSQL of this machine would reach the private ones too: PGSSLMODE, PGOPTIONS, ...
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    if GRPC < (1, 83):  # its calls raise what they ended with when collected
        noise = r"ignore:(?s).*InterceptedCall\.__del__:pytest.PytestUnraisableExceptionWarning"
        config.addinivalue_line("filterwarnings", noise)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_if_skipped_without_reason(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped_without_reason(report)  # a whole module
    return report


def _fail_if_skipped_without_reason(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not os.environ.get("CI") or not report.skipped:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(TRUE_REASONS):
        report.outcome = "failed"
        report.longrepr = f"skipped without a reason that CI accepts: {reason}"
