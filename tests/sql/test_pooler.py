"""Through a real PgBouncer, in each of its modes, with each driver (G8)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from tests.postgres import Server
from tests.sql.kit import Make, gid
from tests.sql.pgbouncer import PgBouncer, installed
from txrpc._protocol.messages import FinishResult
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.resource import Prepared

pytestmark = pytest.mark.skipif(installed() is None, reason="no PgBouncer on this machine")

SWITCHED_OFF: dict[str, dict[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "psycopg async": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0},
}
"""What the refusal says, and the guide."""


def test_by_statement_is_refused_in_one_sentence(make: Make, driver: str, url: str) -> None:
    """G8: it was the driver's own error."""
    with PgBouncer(url, "statement") as pooler:
        resource = make(driver, at=pooler.url("psycopg"))
        # psycopg2 does not hand on what the pooler says, only that the connection is gone.
        expected = ResourceUnavailable if driver == "psycopg2" else ConfigurationError
        with pytest.raises(expected, match="pools by statement and refuses transactions"):
            resource.start()


@pytest.mark.parametrize("driver", list(SWITCHED_OFF))
def test_by_transaction_prepared_statements_are_refused_with_what_to_set(make: Make, driver: str, url: str) -> None:
    """G8: one transfer in five failed with a gRPC status of UNKNOWN."""
    (option,) = SWITCHED_OFF[driver]
    with PgBouncer(url, "transaction") as pooler:
        resource = make(driver, at=pooler.url("psycopg"))
        with pytest.raises(ConfigurationError, match=rf"prepared statements are lost: switch them off: .*'{option}'"):
            resource.start()


@pytest.mark.parametrize("pool_size", [1, 10])
def test_by_transaction_without_them_every_transfer_commits(
    make: Make, driver: str, url: str, server: Server, pool_size: int
) -> None:
    """Five connections of clients share what backends there are: statements of one transaction stay together."""
    threads, each = 5, 8
    with PgBouncer(url, "transaction") as pooler:
        options = {"connect_args": SWITCHED_OFF.get(driver, {})}
        resource = make(driver, at=pooler.url("psycopg"), pool_size=pool_size, max_overflow=0, **options)
        resource.start()
        errors: list[BaseException] = []

        def transfer(number: int) -> None:
            try:
                for count in range(each):
                    work = resource.begin(False)
                    work.connection.execute(sa.text(f"INSERT INTO entry VALUES ('{number}-{count}', 1)"))
                    branch = gid()
                    assert isinstance(prepared := resource.prepare(work, branch), Prepared)
                    assert resource.commit_prepared(branch, prepared.token) is FinishResult.DONE
            except BaseException as error:
                errors.append(error)

        running = [threading.Thread(target=transfer, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
    assert errors == []
    assert server.execute("SELECT count(*) FROM entry", sa.make_url(url).database or "") == [(threads * each,)]


def test_by_session_nothing_has_to_be_set(make: Make, driver: str, url: str) -> None:
    with PgBouncer(url, "session") as pooler:
        resource = make(driver, at=pooler.url("psycopg"))
        resource.start()
        work = resource.begin(False)
        work.connection.execute(sa.text("INSERT INTO entry VALUES ('a', 1)"))
        branch = gid()
        prepared = resource.prepare(work, branch)
        assert isinstance(prepared, Prepared)
        assert resource.rollback_prepared(branch, prepared.token) is FinishResult.DONE
