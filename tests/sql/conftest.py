from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

import txrpc.sql
from tests.postgres import ExistingServer, Server, start_servers
from tests.runtime.conftest import NoSession
from tests.sql.blocking import ASYNC_DRIVERS, Blocking
from tests.sql.kit import Make, numbers
from txrpc._client.client import Client
from txrpc._client.scope import set_default_client


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    (server,) = start_servers(1)
    yield server
    server.stop()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    name = f"verbs{next(numbers)}"
    url = server.create_database(name)
    server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)", name)
    yield url
    for (gid,) in server.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{name}'"):
        quoted = gid.replace("'", "''")
        server.execute(f"ROLLBACK PREPARED '{quoted}'", name)
    if isinstance(server, ExistingServer):  # a private one goes as a whole
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["psycopg", "psycopg2", *ASYNC_DRIVERS])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(url: str) -> Iterator[Make]:
    """``make(driver, **engine_options)``: a resource manager on the fresh database, of either half."""
    made: list[Any] = []

    def one(driver: str = "psycopg", at: Any = url, **options: Any) -> Any:
        if driver in ASYNC_DRIVERS:
            made.append(Blocking(sa.make_url(at), ASYNC_DRIVERS[driver], **options))
        else:
            engine = sa.create_engine(sa.make_url(at).set(drivername=f"postgresql+{driver}"), **options)
            made.append(txrpc.sql.ResourceManager("bank", engine))
        return made[-1]

    yield one
    for resource in made:
        if isinstance(resource, Blocking):
            resource.stop()
        else:
            resource.close()
            resource.engine.dispose()


@pytest.fixture
def bank(make: Make) -> Iterator[txrpc.sql.ResourceManager]:
    """A resource with a manager around it, so that transactions work; no coordinator."""
    resource = make()
    manager = Client("default", [resource])
    manager.start(NoSession())
    set_default_client("txrpc", manager, on=True)
    yield resource
    manager.close()
