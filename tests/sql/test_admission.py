"""Who waits for connections: a transaction that says what it needs waits before its first branch, and none waits for itself."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from tests.postgres import Server
from tests.waiting import eventually
from txrpc.errors import UsageError

numbers = itertools.count(1)
ONE = {"pool_size": 1, "max_overflow": 0}
INSERT = sa.text("INSERT INTO entry VALUES (:name, 1)")
Bank = txrpc.sql.ResourceManager


@pytest.fixture
def urls(server: Server) -> list[str]:
    made = []
    for _ in range(2):
        name = f"admission{next(numbers)}"
        made.append(server.create_database(name))
        server.execute("CREATE TABLE entry (name text PRIMARY KEY, value int)", name)
    return made


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def banks(urls: list[str], log: str) -> Iterator[tuple[Bank, Bank]]:
    """Two databases with one connection each, in one program."""
    engines = [sa.create_engine(url, **ONE) for url in urls]
    a, b = (Bank(name, engine) for name, engine in zip("ab", engines, strict=True))
    with txrpc.embedded(log, resources=[a, b]):
        yield a, b
    for engine in engines:
        engine.dispose()


def put(bank: Bank, name: str) -> None:
    with bank.connection() as connection:
        connection.execute(INSERT, {"name": name})


def cross(banks: tuple[Bank, Bank], *, named: bool = False, needed: bool = False) -> list[str]:
    """Two transactions that use the two resources in opposite order, each at the same time as the other; how they end."""
    both = threading.Barrier(2)

    def meet(_connection: Any) -> None:
        with suppress(threading.BrokenBarrierError):  # the other one has nothing yet, and waits for what we have
            both.wait(1)

    def work(name: str, order: tuple[Bank, Bank]) -> str:
        needs = [bank.name for bank in order] if named else order
        try:
            with txrpc.transaction(timeout=5, needs=needs if needed else ()):
                put(order[0], name)
                put(order[1], name)
        except txrpc.TransactionTimedOut:
            return "timed out"
        return "committed"

    for bank in banks:
        sa.event.listen(bank.engine, "begin", meet)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, "xy", (banks, banks[::-1])))


def test_two_transactions_wait_for_each_others_connections(banks: tuple[Bank, Bank]) -> None:
    """What the next test is about: it can be so, without `needs`."""
    assert "timed out" in cross(banks)


@pytest.mark.parametrize("named", [True, False])
def test_transactions_that_say_what_they_need_wait_in_one_order(banks: tuple[Bank, Bank], named: bool) -> None:
    assert cross(banks, named=named, needed=True) == ["committed"] * 2


def test_it_waits_before_its_block_begins_and_takes_what_it_needs(banks: tuple[Bank, Bank]) -> None:
    inside = threading.Event()

    @txrpc.transactional(needs=banks)
    def work() -> None:
        inside.set()

    with ThreadPoolExecutor(1) as pool:
        with txrpc.transaction():
            put(banks[1], "x")
            later = pool.submit(work)
            eventually(lambda: banks[1]._places._free._cond._waiters)  # type: ignore[attr-defined]
            assert not inside.is_set()
        later.result(30)
    assert inside.is_set()
    with txrpc.transaction():  # its connections are free
        put(banks[0], "y")


def test_a_wait_that_is_in_vain_ends_at_the_deadline_and_leaves_nothing(banks: tuple[Bank, Bank]) -> None:
    a, b = banks
    with txrpc.transaction() as tx:
        put(b, "x")
        with (
            pytest.raises(txrpc.TransactionTimedOut, match="every connection of resource 'b' is in use"),
            ThreadPoolExecutor(1) as pool,
        ):
            pool.submit(_never_inside, banks).result(30)
        assert txrpc.current_transaction() is tx
        put(a, "x")  # which that one had
    assert txrpc.current_transaction() is None


def _never_inside(needs: Any) -> None:
    try:
        with txrpc.transaction(timeout=0.3, needs=needs):
            raise AssertionError("inside")
    finally:
        assert txrpc.current_transaction() is None


def test_what_is_needed_is_a_resource_of_this_process(banks: tuple[Bank, Bank]) -> None:
    with pytest.raises(UsageError, match="no such resource; it has a, b"), txrpc.transaction(needs="c"):
        pass
    assert txrpc.current_transaction() is None
    with pytest.raises(UsageError, match="needs takes resources, or their names, not 5"):
        txrpc.transaction(needs=[5])  # type: ignore[list-item]
    with txrpc.transaction(propagation="not_supported", needs="c"):
        pass


def test_a_generator_waits_as_well(banks: tuple[Bank, Bank]) -> None:
    @txrpc.transactional(needs=banks)
    def work() -> Iterator[int]:
        yield banks[0]._places._free._value

    assert list(work()) == [0]
    assert banks[0]._places._free._value == 1


# ------------------------------------------------------------------------------------------- a transaction inside another one


def test_a_transaction_that_would_wait_for_the_one_around_it_is_refused_at_once(banks: tuple[Bank, Bank]) -> None:
    a, b = banks
    with txrpc.transaction(timeout=60):
        put(a, "outer")
        with (
            pytest.raises(
                UsageError, match=r"every connection of resource 'a' \(1\) is held by the transaction around it"
            ),
            txrpc.transaction(propagation="requires_new"),
        ):
            put(b, "inner")
            put(a, "inner")
        with txrpc.transaction(propagation="requires_new"):
            put(b, "inner")
    with txrpc.transaction(), b.connection() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM entry")) == 1


def test_as_many_transactions_inside_each_other_as_the_pool_has_connections(urls: list[str], log: str) -> None:
    engine = sa.create_engine(urls[0], pool_size=1, max_overflow=1)
    bank = Bank("bank", engine)

    def nest(depth: int) -> None:
        with txrpc.transaction(60, propagation="requires_new"):
            put(bank, str(depth))
            if depth < 2:
                nest(depth + 1)
            else:
                nest_once_more()

    def nest_once_more() -> None:
        with pytest.raises(UsageError, match="would wait for itself"), txrpc.transaction(propagation="requires_new"):
            put(bank, "too many")

    with txrpc.embedded(log, resources=[bank]):
        nest(1)
        with txrpc.transaction(), bank.connection() as connection:
            connection.execute(sa.text("DELETE FROM entry"))
        nest(1)  # the connections are free again
    engine.dispose()


def test_one_beside_it_is_waited_for(banks: tuple[Bank, Bank]) -> None:
    """Another thread's transaction does not wait for ours."""
    a, b = banks
    waits = threading.Event()

    def beside() -> None:
        with txrpc.transaction(timeout=60):
            put(b, "beside")
            with txrpc.transaction(propagation="requires_new"):
                waits.set()
                put(a, "inside")

    with ThreadPoolExecutor(1) as pool:
        with txrpc.transaction(timeout=60):
            put(a, "outer")
            other = pool.submit(beside)
            assert waits.wait(30)
        other.result(60)


async def test_the_same_in_asyncio(urls: list[str], log: str) -> None:
    engines = [create_async_engine(url, **ONE) for url in urls]
    a, b = (txrpc.sql.AsyncResourceManager(name, engine) for name, engine in zip("ab", engines, strict=True))

    async def put_in(bank: txrpc.sql.AsyncResourceManager, name: str) -> None:
        async with bank.connection() as connection:
            await connection.execute(INSERT, {"name": name})

    @txrpc.aio.transactional(needs=[b, a])
    async def work(name: str, order: tuple[Any, Any]) -> None:
        await put_in(order[0], name)
        await asyncio.sleep(0)
        await put_in(order[1], name)

    async with await txrpc.aio.embedded(log, resources=[a, b]):
        await asyncio.gather(*(work(str(number), (a, b) if number % 2 else (b, a)) for number in range(10)))
        async with txrpc.aio.transaction(timeout=60):
            await put_in(a, "outer")
            with pytest.raises(UsageError, match="would wait for itself"):
                async with txrpc.aio.transaction(propagation="requires_new"):
                    await put_in(a, "inner")
            with pytest.raises(txrpc.TransactionTimedOut):
                await asyncio.create_task(needs_a(a))
    for engine in engines:
        await engine.dispose()


async def needs_a(a: Any) -> None:
    """In a task of its own, for which the transaction around it need not wait."""
    async with txrpc.aio.transaction(timeout=0.2, propagation="requires_new", needs="a"):
        raise AssertionError("inside")
