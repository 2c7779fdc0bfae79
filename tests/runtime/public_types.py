"""What an editor and a type checker know of the public names: mypy and pyright check this file, and nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import txrpc
import txrpc.aio


def blocks(manager: txrpc.TransactionManager) -> None:
    with txrpc.transaction() as tx:
        assert_type(tx, txrpc.Transaction)
    with manager.transaction(5, propagation="mandatory") as tx:
        assert_type(tx, txrpc.Transaction)
    with txrpc.transaction(propagation=txrpc.Propagation.SUPPORTS) as perhaps:
        assert_type(perhaps, txrpc.Transaction | None)
    with manager.transaction(propagation="requires_new") as root:
        assert_type(root, txrpc.RootTransaction)
    with txrpc.transaction(propagation=txrpc.Propagation.REQUIRES_NEW) as root:
        assert_type(root, txrpc.RootTransaction)
        assert_type(root.pending, tuple[str, ...])
    assert_type(txrpc.current_transaction(), txrpc.Transaction | None)
    assert_type(manager.status(), txrpc.ManagerStatus)


def begun(manager: txrpc.TransactionManager) -> None:
    assert_type(manager.begin(), txrpc.RootTransaction)
    tx = txrpc.begin(timeout=5)
    assert_type(tx, txrpc.RootTransaction)
    tx.before_commit(lambda event: assert_type(event, txrpc.TransactionEvent))
    assert_type(tx.commit(), None)
    assert_type(manager.outcome(tx.xid), txrpc.Outcome)


@txrpc.transactional
def plain(cents: int) -> str:
    return str(cents)


@txrpc.transactional(timeout=3, retry=True)
def with_arguments(cents: int, *, to: str = "") -> str:
    return f"{cents} {to}"


@txrpc.transactional
def generator(upto: int) -> Iterator[int]:
    yield from range(upto)


class Service:
    @txrpc.transactional
    def method(self, request: bytes, context: object) -> bytes:
        return request

    @classmethod
    @txrpc.transactional
    def on_the_class(cls, number: int) -> int:
        return number


def decorated(service: Service) -> None:
    assert_type(plain(1), str)
    assert_type(with_arguments(1, to="x"), str)
    assert_type(generator(3), Iterator[int])
    assert_type(service.method(b"", None), bytes)
    assert_type(Service.on_the_class(1), int)


async def blocks_aio(manager: txrpc.aio.TransactionManager) -> None:
    async with txrpc.aio.transaction() as tx:
        assert_type(tx, txrpc.aio.Transaction)
    async with manager.transaction(propagation="never") as nothing:
        assert_type(nothing, txrpc.aio.Transaction | None)
    async with txrpc.aio.transaction(propagation="requires_new") as root:
        assert_type(root, txrpc.aio.RootTransaction)
    assert_type(manager.begin(), txrpc.aio.RootTransaction)
    assert_type(await manager.outcome(root.xid), txrpc.aio.Outcome)
    assert_type(txrpc.aio.current_transaction(), txrpc.aio.Transaction | None)


@txrpc.aio.transactional
async def plain_aio(cents: int) -> str:
    return str(cents)


@txrpc.aio.transactional(timeout=3)
async def generator_aio(upto: int) -> AsyncIterator[int]:
    for number in range(upto):
        yield number


async def decorated_aio() -> None:
    assert_type(await plain_aio(1), str)
    async for number in generator_aio(3):
        assert_type(number, int)
