"""The customers of a bank, in one process: each transfers a cent, again and again, in one of the ways that are compared.

Prints what came of it as JSON: transfers in the window, their latencies, and the processor time of each watched process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from sqlalchemy import text

import txrpc
import txrpc.aio
import txrpc.sql
from benchmarks import textbook
from benchmarks.services import add, add_async, async_engine_to, engine_to
from benchmarks.watch import Watch
from examples.bank import bank_pb2, bank_pb2_grpc

__all__ = ["ASYNC_FORMS", "FORMS"]

Transfer = Callable[[str], object]
"""Transfer a cent of that account of one bank to the same account of the other one."""
AsyncTransfer = Callable[[str], Awaitable[object]]


@dataclass(frozen=True)
class Place:
    """Where everything is."""

    services: Sequence[str]
    databases: Sequence[str]
    coordinator: str


def _amount(account: str) -> bank_pb2.Amount:
    return bank_pb2.Amount(account=account, cents=1)


# --------------------------------------------------------------------------------------------------------- with threads


@contextlib.contextmanager
def plain(place: Place) -> Iterator[Transfer]:
    """Two services that commit by themselves: if the second one fails, what the first one did stays."""
    bank_a, bank_b = (bank_pb2_grpc.AccountsStub(grpc.insecure_channel(each)) for each in place.services)

    def transfer(account: str) -> None:
        bank_a.Withdraw(_amount(account))
        bank_b.Deposit(_amount(account))

    yield transfer


@contextlib.contextmanager
def two_branches(
    place: Place, final: bool = False, decide_in: str | None = None, last: bool = False
) -> Iterator[Transfer]:
    """The same calls in a transaction of txrpc's.

    *final*: each service is told that it is called no more.  *decide_in*: its database decides, with the *last* call or at the end.
    """
    with txrpc.connect(place.coordinator, process="customers"):
        bank_a, bank_b = (bank_pb2_grpc.AccountsStub(_in_transactions(each)) for each in place.services)

        def transfer(account: str) -> None:
            with txrpc.transaction(decide_in=decide_in), txrpc.final_call() if final else contextlib.nullcontext():
                bank_a.Withdraw(_amount(account))
                bank_b.Deposit(_amount(account))

        def decided(account: str) -> None:
            with txrpc.transaction(decide_in=decide_in):
                with txrpc.final_call():
                    bank_a.Withdraw(_amount(account))
                with txrpc.final_call(decides=True):
                    bank_b.Deposit(_amount(account))

        yield decided if last else transfer


@contextlib.contextmanager
def plain_own(place: Place) -> Iterator[Transfer]:
    """A transaction in the own database, and meanwhile a call to a service that commits by itself."""
    engine = engine_to(place.databases[0])
    bank = bank_pb2_grpc.AccountsStub(grpc.insecure_channel(place.services[1]))

    def transfer(account: str) -> None:
        with engine.begin() as connection:
            add(connection, account, -1)
            bank.Deposit(_amount(account))

    yield transfer


@contextlib.contextmanager
def own_branch(place: Place, final: bool = False, decides: bool = False) -> Iterator[Transfer]:
    """The same in a transaction; *decides*: the own database has the decision."""
    database = txrpc.sql.ResourceManager("bank-a", engine_to(place.databases[0]), decides=decides)
    with txrpc.connect(place.coordinator, resources=[database], process="customers"):
        bank = bank_pb2_grpc.AccountsStub(_in_transactions(place.services[1]))
        decide_in = "bank-a" if decides else None

        def transfer(account: str) -> None:
            with txrpc.transaction(decide_in=decide_in):
                with database.connection() as connection:
                    add(connection, account, -1)
                with txrpc.final_call() if final else contextlib.nullcontext():
                    bank.Deposit(_amount(account))

        yield transfer


@contextlib.contextmanager
def plain_one(place: Place) -> Iterator[Transfer]:
    """One call to one service that commits by itself."""
    bank = bank_pb2_grpc.AccountsStub(grpc.insecure_channel(place.services[0]))
    yield lambda account: bank.Withdraw(_amount(account))


@contextlib.contextmanager
def one_branch(place: Place, decides: bool = False) -> Iterator[Transfer]:
    """One call in a transaction; *decides*: which it commits before it returns."""
    decide_in = "bank-a" if decides else None
    with txrpc.connect(place.coordinator, process="customers"):
        bank = bank_pb2_grpc.AccountsStub(_in_transactions(place.services[0]))

        def transfer(account: str) -> None:
            with (
                txrpc.transaction(decide_in=decide_in),
                txrpc.final_call(decides=True) if decides else contextlib.nullcontext(),
            ):
                bank.Withdraw(_amount(account))

        yield transfer


def _in_transactions(address: str) -> grpc.Channel:
    return grpc.intercept_channel(grpc.insecure_channel(address), *txrpc.client_interceptors())


@contextlib.contextmanager
def bare_local(place: Place) -> Iterator[Transfer]:
    """One transaction of SQLAlchemy's own."""
    engine = engine_to(place.databases[0])

    def transfer(account: str) -> None:
        with engine.begin() as connection:
            add(connection, account, 1)

    yield transfer


@contextlib.contextmanager
def local(place: Place) -> Iterator[Transfer]:
    """A transaction of txrpc's with one resource of this process."""
    database = txrpc.sql.ResourceManager("bank-a", engine_to(place.databases[0]))
    with txrpc.connect(place.coordinator, resources=[database], process="customers"):

        def transfer(account: str) -> None:
            with txrpc.transaction(), database.connection() as connection:
                add(connection, account, 1)

        yield transfer


@contextlib.contextmanager
def by_hand(place: Place) -> Iterator[Transfer]:
    """Two-phase commit written by hand in one process, without a log: a crash leaves branches that no program ends."""
    engines = [engine_to(url) for url in place.databases]
    numbers = itertools.count()

    def transfer(account: str) -> None:
        gid = f"hand-{os.getpid()}-{next(numbers)}"
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(engine.connect()) for engine in engines]
            for sign, connection in zip((-1, 1), connections, strict=True):
                add(connection, account, sign)
            for connection in connections:
                connection.execute(text(f"PREPARE TRANSACTION '{gid}'"))
                connection.rollback()
            for connection in connections:
                connection.connection.driver_connection.autocommit = True  # type: ignore[union-attr]
                connection.exec_driver_sql(f"COMMIT PREPARED '{gid}'")
                connection.rollback()
                connection.connection.driver_connection.autocommit = False  # type: ignore[union-attr]

    yield transfer


@contextlib.contextmanager
def embedded(place: Place, decides: bool = False) -> Iterator[Transfer]:
    """Two databases in one process, with txrpc's coordinator in it, and a log of decisions in a SQLite file.

    *decides*: the first of them decides.
    """
    banks = [
        txrpc.sql.ResourceManager(f"embedded-{number}", engine_to(url), decides=decides)
        for number, url in enumerate(place.databases)
    ]
    decide_in = banks[0] if decides else None
    with (
        tempfile.TemporaryDirectory() as folder,
        txrpc.embedded(f"sqlite:///{folder}/log.db", group="embedded", resources=banks),
    ):

        def transfer(account: str) -> None:
            with txrpc.transaction(decide_in=decide_in):
                for sign, bank in zip((-1, 1), banks, strict=True):
                    with bank.connection() as connection:
                        add(connection, account, sign)

        yield transfer


@contextlib.contextmanager
def with_textbook(place: Place) -> Iterator[Transfer]:
    """A textbook's coordinator, with one call for each of its steps."""
    coordinator = grpc.insecure_channel(place.coordinator)
    begin, enlist, commit = (textbook.call(coordinator, method) for method in ("begin", "enlist", "commit"))
    adds = [textbook.call(grpc.insecure_channel(each), "add") for each in place.services]

    def transfer(account: str) -> None:
        xid = begin({})["xid"]
        for sign, address, add_there in zip((-1, 1), place.services, adds, strict=True):
            enlist({"xid": xid, "address": address})
            add_there({"xid": xid, "account": account, "cents": sign})
        commit({"xid": xid})

    yield transfer


@contextlib.contextmanager
def zope(place: Place) -> Iterator[Transfer]:
    """Zope's transaction manager over two-phase sessions of SQLAlchemy's, in one process, without a log of decisions."""
    import transaction
    from sqlalchemy.orm import Session
    from zope.sqlalchemy import mark_changed, register

    engines = [engine_to(url) for url in place.databases]

    def transfer(account: str) -> None:
        manager = transaction.TransactionManager(explicit=True)
        manager.begin()
        for sign, engine in zip((-1, 1), engines, strict=True):
            session = Session(engine, twophase=True)
            register(session, transaction_manager=manager)
            add(session.connection(), account, sign)
            mark_changed(session)
        manager.commit()

    yield transfer


@contextlib.contextmanager
def dbos(place: Place) -> Iterator[Transfer]:
    """A workflow of DBOS Transact's with a step for each bank: it ends in the end, and others see it half done until then."""
    from dbos import DBOS

    plain_url = place.databases[0].replace("postgresql+psycopg", "postgresql")
    DBOS(config={"name": "bench", "system_database_url": plain_url.replace("/bench", "/dbos"), "log_level": "ERROR"})
    engines = [engine_to(url) for url in place.databases]

    @DBOS.step()  # type: ignore[untyped-decorator, unused-ignore]
    def add_in(number: int, account: str, cents: int) -> None:
        with engines[number].begin() as connection:
            add(connection, account, cents)

    @DBOS.workflow()  # type: ignore[untyped-decorator, unused-ignore]
    def transfer(account: str) -> None:
        add_in(0, account, -1)
        add_in(1, account, 1)

    DBOS.launch()
    yield transfer
    DBOS.destroy()


FORMS: dict[str, Callable[[Place], contextlib.AbstractContextManager[Transfer]]] = {
    "plain": plain,
    "two": two_branches,
    "two-final": functools.partial(two_branches, final=True),
    "two-elsewhere": functools.partial(two_branches, decide_in="bank-b"),
    "two-decides": functools.partial(two_branches, decide_in="bank-b", last=True),
    "plain-own": plain_own,
    "own": own_branch,
    "own-final": functools.partial(own_branch, final=True),
    "own-decides": functools.partial(own_branch, final=True, decides=True),
    "plain-one": plain_one,
    "one": one_branch,
    "one-decides": functools.partial(one_branch, decides=True),
    "bare-local": bare_local,
    "local": local,
    "by-hand": by_hand,
    "embedded": embedded,
    "embedded-decides": functools.partial(embedded, decides=True),
    "textbook": with_textbook,
    "zope": zope,
    "dbos": dbos,
}


# --------------------------------------------------------------------------------------------------------- with asyncio


@contextlib.asynccontextmanager
async def plain_async(place: Place) -> AsyncIterator[AsyncTransfer]:
    bank_a, bank_b = (bank_pb2_grpc.AccountsStub(grpc.aio.insecure_channel(each)) for each in place.services)

    async def transfer(account: str) -> None:
        await bank_a.Withdraw(_amount(account))
        await bank_b.Deposit(_amount(account))

    yield transfer


@contextlib.asynccontextmanager
async def two_branches_async(
    place: Place, final: bool = False, decide_in: str | None = None, last: bool = False
) -> AsyncIterator[AsyncTransfer]:
    async with await txrpc.aio.connect(place.coordinator, process="customers"):
        bank_a, bank_b = (bank_pb2_grpc.AccountsStub(_in_transactions_async(each)) for each in place.services)

        async def transfer(account: str) -> None:
            async with txrpc.aio.transaction(decide_in=decide_in):
                with txrpc.aio.final_call() if final else contextlib.nullcontext():
                    await bank_a.Withdraw(_amount(account))
                    await bank_b.Deposit(_amount(account))

        async def decided(account: str) -> None:
            async with txrpc.aio.transaction(decide_in=decide_in):
                with txrpc.aio.final_call():
                    await bank_a.Withdraw(_amount(account))
                with txrpc.aio.final_call(decides=True):
                    await bank_b.Deposit(_amount(account))

        yield decided if last else transfer


@contextlib.asynccontextmanager
async def plain_own_async(place: Place) -> AsyncIterator[AsyncTransfer]:
    engine = async_engine_to(place.databases[0])
    bank = bank_pb2_grpc.AccountsStub(grpc.aio.insecure_channel(place.services[1]))

    async def transfer(account: str) -> None:
        async with engine.begin() as connection:
            await add_async(connection, account, -1)
            await bank.Deposit(_amount(account))

    yield transfer


@contextlib.asynccontextmanager
async def own_branch_async(place: Place, final: bool = False, decides: bool = False) -> AsyncIterator[AsyncTransfer]:
    database = txrpc.sql.AsyncResourceManager("bank-a", async_engine_to(place.databases[0]), decides=decides)
    async with await txrpc.aio.connect(place.coordinator, resources=[database], process="customers"):
        bank = bank_pb2_grpc.AccountsStub(_in_transactions_async(place.services[1]))
        decide_in = "bank-a" if decides else None

        async def transfer(account: str) -> None:
            async with txrpc.aio.transaction(decide_in=decide_in):
                async with database.connection() as connection:
                    await add_async(connection, account, -1)
                with txrpc.aio.final_call() if final else contextlib.nullcontext():
                    await bank.Deposit(_amount(account))

        yield transfer


@contextlib.asynccontextmanager
async def plain_one_async(place: Place) -> AsyncIterator[AsyncTransfer]:
    bank = bank_pb2_grpc.AccountsStub(grpc.aio.insecure_channel(place.services[0]))

    async def transfer(account: str) -> None:
        await bank.Withdraw(_amount(account))

    yield transfer


@contextlib.asynccontextmanager
async def one_branch_async(place: Place, decides: bool = False) -> AsyncIterator[AsyncTransfer]:
    decide_in = "bank-a" if decides else None
    async with await txrpc.aio.connect(place.coordinator, process="customers"):
        bank = bank_pb2_grpc.AccountsStub(_in_transactions_async(place.services[0]))

        async def transfer(account: str) -> None:
            async with txrpc.aio.transaction(decide_in=decide_in):
                with txrpc.aio.final_call(decides=True) if decides else contextlib.nullcontext():
                    await bank.Withdraw(_amount(account))

        yield transfer


def _in_transactions_async(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, interceptors=txrpc.aio.client_interceptors())


@contextlib.asynccontextmanager
async def bare_local_async(place: Place) -> AsyncIterator[AsyncTransfer]:
    engine = async_engine_to(place.databases[0])

    async def transfer(account: str) -> None:
        async with engine.begin() as connection:
            await add_async(connection, account, 1)

    yield transfer


@contextlib.asynccontextmanager
async def local_async(place: Place) -> AsyncIterator[AsyncTransfer]:
    database = txrpc.sql.AsyncResourceManager("bank-a", async_engine_to(place.databases[0]))
    async with await txrpc.aio.connect(place.coordinator, resources=[database], process="customers"):

        async def transfer(account: str) -> None:
            async with txrpc.aio.transaction(), database.connection() as connection:
                await add_async(connection, account, 1)

        yield transfer


ASYNC_FORMS: dict[str, Callable[[Place], contextlib.AbstractAsyncContextManager[AsyncTransfer]]] = {
    "plain": plain_async,
    "two": two_branches_async,
    "two-final": functools.partial(two_branches_async, final=True),
    "two-elsewhere": functools.partial(two_branches_async, decide_in="bank-b"),
    "two-decides": functools.partial(two_branches_async, decide_in="bank-b", last=True),
    "plain-own": plain_own_async,
    "own": own_branch_async,
    "own-final": functools.partial(own_branch_async, final=True),
    "own-decides": functools.partial(own_branch_async, final=True, decides=True),
    "plain-one": plain_one_async,
    "one": one_branch_async,
    "one-decides": functools.partial(one_branch_async, decides=True),
    "bare-local": bare_local_async,
    "local": local_async,
}


# -------------------------------------------------------------------------------------------------------- the measuring


class Window:
    """The latencies of what ended while it was open."""

    def __init__(self) -> None:
        self.is_open = False
        self.over = False
        self.took_s: list[float] = []

    def took(self, began_s: float) -> None:
        if self.is_open:
            self.took_s.append(time.perf_counter() - began_s)


def _accounts(customer: int) -> Iterator[str]:
    """A customer's own accounts, in turn: a transfer need not wait for what still commits of the one before."""
    return itertools.cycle([f"account-{customer + 32 * number}" for number in range(3)])


def measure(form: str, place: Place, clients: int, seconds: float, watch: Watch) -> Window:
    """Let as many threads transfer, for a while unwatched and then for so many seconds."""
    window = Window()

    def customer(number: int) -> None:
        for account in _accounts(number):
            if window.over:
                break
            began_s = time.perf_counter()
            transfer(account)
            window.took(began_s)

    with FORMS[form](place) as transfer:
        threads = [threading.Thread(target=customer, args=(number,), daemon=True) for number in range(clients)]
        for thread in threads:
            thread.start()
        _watched(window, watch, seconds)
        for thread in threads:
            thread.join(30)
    return window


def _watched(window: Window, watch: Watch, seconds: float) -> None:
    time.sleep(min(2.0, seconds / 2))
    watch.begin()
    window.is_open = True
    time.sleep(seconds)
    window.is_open = False
    watch.end()
    window.over = True


async def measure_async(form: str, place: Place, clients: int, seconds: float, watch: Watch) -> Window:
    """`measure`, with tasks."""
    window = Window()

    async def customer(number: int) -> None:
        for account in _accounts(number):
            if window.over:
                break
            began_s = time.perf_counter()
            await transfer(account)
            window.took(began_s)

    async with ASYNC_FORMS[form](place) as transfer, asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(customer(number))
        await asyncio.to_thread(_watched, window, watch, seconds)
    return window


def main() -> None:
    """Measure what the arguments say, and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--style", required=True, choices=("sync", "asyncio"))
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--service", action="append", default=[])
    parser.add_argument("--database", action="append", default=[])
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--watch", action="append", default=[], help="NAME=PID")
    parser.add_argument("--counting", default="", help="the coordinator whose messages are counted")
    parser.add_argument("--log", action="append", default=[], type=Path, help="of a database that logs its statements")
    given = parser.parse_args()
    place = Place(given.service, given.database, given.coordinator)
    watch = Watch([*given.watch, f"customers={os.getpid()}"], given.database, given.counting, given.log)
    if given.style == "sync":
        window = measure(given.form, place, given.clients, given.seconds, watch)
    else:
        window = asyncio.run(measure_async(given.form, place, given.clients, given.seconds, watch))
    spent = {name: getattr(watch, name) for name in Watch.COUNTED}
    print(json.dumps({"took_s": window.took_s, **spent}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what a form leaves running is not measured any more


if __name__ == "__main__":
    main()
