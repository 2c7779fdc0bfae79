"""One session over several databases, which the transaction holds together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.sql.kit import numbers


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "purchase"
    number: Mapped[int] = mapped_column(primary_key=True)


class Item(Base):
    __tablename__ = "item"
    number: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def urls(server: Server) -> list[str]:
    made = []
    for table in ("purchase", "item"):
        name = f"binds{next(numbers)}"
        made.append(server.create_database(name))
        server.execute(f"CREATE TABLE {table} (number int PRIMARY KEY)", name)
    return made


def counts(server: Server, urls: list[str]) -> list[int]:
    tables = zip(urls, ("purchase", "item"), strict=True)
    return [
        server.execute(f"SELECT count(*) FROM {table}", sa.make_url(url).database or "")[0][0] for url, table in tables
    ]


Resources = tuple[txrpc.sql.ResourceManager, txrpc.sql.ResourceManager]


@pytest.fixture
def resources(urls: list[str], tmp_path: object) -> Iterator[Resources]:
    engines = [sa.create_engine(url) for url in urls]
    orders, stock = (txrpc.sql.ResourceManager(name, engine) for name, engine in zip("ab", engines, strict=True))
    with txrpc.embedded(f"sqlite:///{tmp_path}/log.db", resources=[orders, stock]):
        yield orders, stock
    for engine in engines:
        engine.dispose()


def test_one_session_writes_into_two_databases_and_both_commit_or_neither(
    server: Server, urls: list[str], resources: Resources
) -> None:
    orders, stock = resources
    with txrpc.transaction(), orders.session(binds={Item: stock}) as session:
        session.add_all([Order(number=1), Item(number=1)])
        session.flush()
        assert session.get(Item, 1) is not None
        assert counts(server, urls) == [0, 0]
    assert counts(server, urls) == [1, 1]
    with (
        pytest.raises(sa.exc.IntegrityError),
        txrpc.transaction(),
        orders.session(binds={Item.__table__: stock}) as session,
    ):
        session.add_all([Order(number=2), Item(number=1)])  # there is one already
    assert counts(server, urls) == [1, 1]
    with pytest.raises(ZeroDivisionError), txrpc.transaction(), orders.session(binds={Base: stock}) as session:
        session.add(Item(number=2))
        raise ZeroDivisionError
    assert counts(server, urls) == [1, 1]


@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_it_ends_with_its_transaction_and_not_by_itself(
    server: Server, urls: list[str], resources: Resources, verb: str
) -> None:
    orders, stock = resources
    with (
        pytest.raises((txrpc.IllegalState, txrpc.TransactionAborted)),
        txrpc.transaction(),
        orders.session(binds={Item: stock}) as session,
    ):
        session.add_all([Order(number=1), Item(number=1)])
        session.flush()
        getattr(session, verb)()
    assert counts(server, urls) == [0, 0]


def test_without_a_transaction_nothing_would_hold_them_together(resources: Resources) -> None:
    orders, stock = resources
    with pytest.raises(txrpc.NoTransaction, match="one after the other"), orders.session(binds={Item: stock}):
        raise AssertionError("inside")
    with orders.session() as session:  # one alone may
        session.add(Order(number=7))


def test_binds_that_are_no_resources_are_refused() -> None:
    engine = sa.create_engine("postgresql+psycopg://nowhere/d")
    with pytest.raises(txrpc.ConfigurationError, match=r"session\(binds=\{Class: resource\}\)"):
        txrpc.sql.ResourceManager("orders", engine, binds={Item: engine})


async def test_one_asynchronous_session_writes_into_two_databases(
    server: Server, urls: list[str], tmp_path: object
) -> None:
    engines = [create_async_engine(url) for url in urls]
    orders, stock = (txrpc.sql.AsyncResourceManager(name, engine) for name, engine in zip("ab", engines, strict=True))
    async with await txrpc.aio.embedded(f"sqlite:///{tmp_path}/log.db", resources=[orders, stock]):
        async with txrpc.aio.transaction(), orders.session(binds={Item: stock}) as session:
            session.add_all([Order(number=1), Item(number=1)])
        assert counts(server, urls) == [1, 1]
        with pytest.raises(ZeroDivisionError):
            async with txrpc.aio.transaction(), orders.session(binds={Item: stock}) as session:
                session.add_all([Order(number=2), Item(number=2)])
                raise ZeroDivisionError
    assert counts(server, urls) == [1, 1]
    for engine in engines:
        await engine.dispose()
