"""What the tests of MariaDB and MySQL as a resource share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests.mariadb import MariaServer
from tests.sql.kit import gid, insert
from txrpc.ids import Gid
from txrpc.resource import Prepared

__all__ = ["Make", "connections", "prepared", "sessions_of_branches"]

Make = Callable[..., Any]


def prepared(bank: Any, name: str = "a") -> tuple[Gid, str]:
    """A branch with a row, prepared."""
    work, branch = bank.begin(False), gid()
    insert(work, name)
    found = bank.prepare(work, branch)
    assert isinstance(found, Prepared)
    return branch, found.token


def connections(server: MariaServer, url: str) -> int:
    """How many of them the database *url* has."""
    listed = f"SELECT count(*) FROM information_schema.processlist WHERE db = '{sa.make_url(url).database}'"
    return int(server.execute(listed)[0][0])


def sessions_of_branches(url: str) -> set[int]:
    """Where the branches of this database have worked, also those that have not been committed."""
    engine = sa.create_engine(url, poolclass=NullPool, isolation_level="READ UNCOMMITTED")
    with engine.connect() as connection:
        return set(connection.exec_driver_sql("SELECT session FROM txrpc_branch").scalars())
