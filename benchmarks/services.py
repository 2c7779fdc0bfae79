"""A bank as a service of its own process: one UPDATE and one INSERT a call, in each of the ways that are compared.

python -m benchmarks.services --form txrpc --style sync --listen 127.0.0.1:7501 --database postgresql+psycopg://... [--coordinator ...]
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

import grpc
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

import txrpc
import txrpc.aio
import txrpc.sql
from benchmarks import textbook
from examples.bank import bank_pb2, bank_pb2_grpc

POOL = 40
"""Connections and threads of each process: no form waits for either at 32 clients."""
UPDATE = text("UPDATE account SET cents = cents + :cents WHERE name = :account")
TOTAL = text("SELECT sum(cents)::bigint FROM account")
INSERT = text("INSERT INTO journal (account, cents) VALUES (:account, :cents)")
SCHEMA = (
    "CREATE TABLE account (name text PRIMARY KEY, cents bigint NOT NULL)",
    "CREATE TABLE journal (number bigserial PRIMARY KEY, account text NOT NULL, cents bigint NOT NULL)",
    "INSERT INTO account SELECT 'account-' || i, 1000000000 FROM generate_series(0, 99) i",
)


def add(connection: Connection, account: str, cents: int) -> None:
    """Do one side of a transfer."""
    row = {"account": account, "cents": cents}
    connection.execute(UPDATE, row)
    connection.execute(INSERT, row)


async def add_async(connection: AsyncConnection, account: str, cents: int) -> None:
    """Do one side of a transfer."""
    row = {"account": account, "cents": cents}
    await connection.execute(UPDATE, row)
    await connection.execute(INSERT, row)


def engine_to(url: str) -> Engine:
    """Return an engine whose pool is never short."""
    return create_engine(url, pool_size=POOL, max_overflow=0)


def async_engine_to(url: str) -> AsyncEngine:
    """Return an engine whose pool is never short."""
    return create_async_engine(url, pool_size=POOL, max_overflow=0)


class Bank(bank_pb2_grpc.AccountsServicer):
    """*database*: what makes a block with a connection; its end commits, or the transaction's does."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def Withdraw(self, request: bank_pb2.Amount, context: grpc.ServicerContext) -> bank_pb2.Balance:
        return self._add(request.account, -request.cents)

    def Deposit(self, request: bank_pb2.Amount, context: grpc.ServicerContext) -> bank_pb2.Balance:
        return self._add(request.account, request.cents)

    def Total(self, request: bank_pb2.TotalRequest, context: grpc.ServicerContext) -> bank_pb2.Balance:
        block: AbstractContextManager[Connection] = self._database()
        with block as connection:
            return bank_pb2.Balance(cents=connection.execute(TOTAL).scalar_one())

    def _add(self, account: str, cents: int) -> bank_pb2.Balance:
        block: AbstractContextManager[Connection] = self._database()
        with block as connection:
            add(connection, account, cents)
        return bank_pb2.Balance()


class AsyncBank(bank_pb2_grpc.AccountsServicer):
    """`Bank` for asyncio."""

    def __init__(self, database: Any) -> None:
        self._database = database

    async def Withdraw(self, request: bank_pb2.Amount, context: Any) -> bank_pb2.Balance:
        return await self._add(request.account, -request.cents)

    async def Deposit(self, request: bank_pb2.Amount, context: Any) -> bank_pb2.Balance:
        return await self._add(request.account, request.cents)

    async def Total(self, request: bank_pb2.TotalRequest, context: Any) -> bank_pb2.Balance:
        block: AbstractAsyncContextManager[AsyncConnection] = self._database()
        async with block as connection:
            return bank_pb2.Balance(cents=(await connection.execute(TOTAL)).scalar_one())

    async def _add(self, account: str, cents: int) -> bank_pb2.Balance:
        block: AbstractAsyncContextManager[AsyncConnection] = self._database()
        async with block as connection:
            await add_async(connection, account, cents)
        return bank_pb2.Balance()


def serve(form: str, name: str, listen: str, database: str, coordinator: str) -> None:
    """Serve until SIGTERM, with threads."""
    server = grpc.server(ThreadPoolExecutor(POOL), interceptors=txrpc.server_interceptors() if form == "txrpc" else [])
    if form == "textbook":
        textbook.add_bank(server, name, database)
    elif form == "txrpc":
        resource = txrpc.sql.ResourceManager(name, engine_to(database), decides=True)
        txrpc.connect(coordinator, resources=[resource], process=name)
        bank_pb2_grpc.add_AccountsServicer_to_server(Bank(resource.connection), server)
    else:
        bank_pb2_grpc.add_AccountsServicer_to_server(Bank(engine_to(database).begin), server)
    server.add_insecure_port(listen)
    server.start()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    print("serving", flush=True)
    over.wait()


async def serve_async(form: str, name: str, listen: str, database: str, coordinator: str) -> None:
    """Serve until SIGTERM, on an event loop."""
    block: Any = async_engine_to(database).begin
    if form == "txrpc":
        resource = txrpc.sql.AsyncResourceManager(name, async_engine_to(database), decides=True)
        await txrpc.aio.connect(coordinator, resources=[resource], process=name)
        block = resource.connection
    server = grpc.aio.server(interceptors=txrpc.aio.server_interceptors() if form == "txrpc" else ())
    bank_pb2_grpc.add_AccountsServicer_to_server(AsyncBank(block), server)
    server.add_insecure_port(listen)
    await server.start()
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    print("serving", flush=True)
    await over.wait()


def main() -> None:
    """Serve what the arguments say."""
    parser = argparse.ArgumentParser()
    for name in ("form", "style", "name", "listen", "database"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--coordinator", default="")
    arguments = vars(parser.parse_args())
    if arguments.pop("style") == "asyncio":
        asyncio.run(serve_async(**arguments))
    else:
        serve(**arguments)


if __name__ == "__main__":
    main()
