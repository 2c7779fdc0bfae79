"""A database of MariaDB's or MySQL's for each test, and resources of it with each driver."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa

import txrpc.sql
from tests.mariadb import BOTH, MariaServer
from tests.sql.blocking import Blocking
from tests.sql.mysql.kit import Make

_numbers = itertools.count(1)


@pytest.fixture(scope="session", params=BOTH)
def mariadb(request: pytest.FixtureRequest) -> Iterator[MariaServer]:
    with request.param(innodb_lock_wait_timeout=1) as server:
        yield server


@pytest.fixture
def url(mariadb: MariaServer) -> Iterator[str]:
    name = f"bank{next(_numbers)}"
    url = mariadb.create_database(name)
    mariadb.execute("CREATE TABLE entry (name varchar(99) PRIMARY KEY, value int)", name)
    yield url
    for form, *name_of in mariadb.branches():
        first, second = (each.hex() for each in name_of)
        mariadb.execute(f"XA ROLLBACK X'{first}',X'{second}',{form}")
    for (session,) in mariadb.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
        with contextlib.suppress(pymysql.err.OperationalError):  # a test that failed has left it, with its locks
            mariadb.execute(f"KILL {session}")
    mariadb.execute(f"DROP DATABASE {name}")


needs_mysqlclient = pytest.mark.skipif(importlib.util.find_spec("MySQLdb") is None, reason="no mysqlclient here")


@pytest.fixture(
    params=[
        "pymysql",
        "aiomysql",
        "asyncmy",
        pytest.param("mysqldb", marks=[needs_mysqlclient, pytest.mark.proof, pytest.mark.long]),
    ]
)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(url: str, driver: str) -> Iterator[Make]:
    """``make(url, **engine_options)``: a resource that has been started."""
    made: list[Any] = []

    def one(at: str = url, decides: bool = False, start: bool = True, **options: Any) -> Any:
        if driver in ("pymysql", "mysqldb"):
            product = sa.make_url(at).get_backend_name()
            engine = sa.create_engine(sa.make_url(at).set(drivername=f"{product}+{driver}"), **options)
            made.append(txrpc.sql.ResourceManager("bank", engine, decides=decides))
        else:
            made.append(Blocking(sa.make_url(at), driver, sa.make_url(at).drivername, decides, **options))
        if start:
            made[-1].start()
        return made[-1]

    yield one
    for resource in made:
        if isinstance(resource, Blocking):
            resource.stop()
        else:
            resource.close()
        resource.engine.dispose()


@pytest.fixture
def bound(mariadb: MariaServer) -> Iterator[None]:
    """A prepared branch keeps its connection from other work: in MariaDB always."""
    if mariadb.product == "mysql":
        mariadb.execute("SET GLOBAL xa_detach_on_prepare = OFF")
    yield
    if mariadb.product == "mysql":
        mariadb.execute("SET GLOBAL xa_detach_on_prepare = ON")
