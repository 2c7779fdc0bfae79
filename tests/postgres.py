"""The PostgreSQL servers of the tests: private ones, or those that ``TXRPC_TEST_POSTGRES_URLS`` names."""

from __future__ import annotations

import os
import unittest
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from txrpc.testing.postgres import PostgresServer

URLS = [url.strip() for url in os.environ.get("TXRPC_TEST_POSTGRES_URLS", "").split(",") if url.strip()]
REASON = "TXRPC_TEST_POSTGRES_URLS is set, and this test needs a server of its own"


class ExistingServer:
    """Somebody else's server, by a role that may create databases.  What would stop it skips the test."""

    running = True

    def __init__(self, url: str) -> None:
        self._url = make_url(url)

    def url(self, database: str = "postgres", driver: str = "psycopg") -> str:
        return self._url.set(drivername=f"postgresql+{driver}", database=database).render_as_string(hide_password=False)

    def create_database(self, name: str) -> str:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, sql: str, database: str = "", parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        url = self._url.set(drivername="postgresql", database=database or self._url.database)
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            cursor = connection.execute(sql.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def _refuse(self) -> Any:
        raise unittest.SkipTest(REASON)

    def log(self) -> str:
        text: str = self._refuse()
        return text

    def kill(self) -> None:
        self._refuse()

    def restart(self) -> None:
        self._refuse()

    def stop(self) -> None:
        """It is not ours."""


Server = PostgresServer | ExistingServer


def start_servers(count: int, **options: Any) -> list[Server]:
    """*count* servers: private and new, or the given ones, again from the first if they are fewer."""
    if URLS:
        return [ExistingServer(URLS[number % len(URLS)]) for number in range(count)]
    return [PostgresServer.start_new(**options) for _ in range(count)]


needs_own_server = pytest.mark.skipif(bool(URLS), reason=REASON)
"""For tests that kill a server in the background."""
