"""The three services; one program, run once for each.

python -m examples.shop.services payments --listen 127.0.0.1:7603 --database postgresql+asyncpg://... --coordinator ...
python -m examples.shop.services stock    --listen 127.0.0.1:7602 --next 127.0.0.1:7603 ...
python -m examples.shop.services orders   --listen 127.0.0.1:7601 --next 127.0.0.1:7602 ...
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from sqlalchemy import BigInteger, String, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import txrpc.aio
import txrpc.sql
from examples.shop import shop_pb2, shop_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Database = txrpc.sql.AsyncResourceManager


class Base(DeclarativeBase):
    pass


class OrderLine(Base):
    __tablename__ = "order_line"
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    customer: Mapped[str] = mapped_column(String(40))
    item: Mapped[str] = mapped_column(String(40))
    count: Mapped[int]


class Shelf(Base):
    __tablename__ = "shelf"
    item: Mapped[str] = mapped_column(String(40), primary_key=True)
    count: Mapped[int]
    cents_each: Mapped[int]


class Purse(Base):
    __tablename__ = "purse"
    customer: Mapped[str] = mapped_column(String(40), primary_key=True)
    cents: Mapped[int] = mapped_column(BigInteger)


class Orders(shop_pb2_grpc.OrdersServicer):
    def __init__(self, database: Database, stock: grpc.aio.Channel) -> None:
        self.database = database
        self.stock = shop_pb2_grpc.StockStub(stock)

    @txrpc.aio.transactional
    async def Place(self, request: shop_pb2.Order, context: Context) -> shop_pb2.Placed:
        async with self.database.session() as session:
            line = OrderLine(customer=request.customer, item=request.item, count=request.count)
            session.add(line)
            await session.flush()
            number = line.number
        sold = await self.stock.Sell(request)
        return shop_pb2.Placed(number=number, cents=sold.cents)

    @txrpc.aio.transactional(read_only=True)
    async def History(self, request: shop_pb2.Customer, context: Context) -> AsyncIterator[shop_pb2.Order]:
        async with self.database.session() as session:
            query = select(OrderLine).where(OrderLine.customer == request.customer).order_by(OrderLine.number)
            for line in await session.scalars(query):
                yield shop_pb2.Order(customer=line.customer, item=line.item, count=line.count)


class Stock(shop_pb2_grpc.StockServicer):
    def __init__(self, database: Database, payments: grpc.aio.Channel) -> None:
        self.database = database
        self.payments = shop_pb2_grpc.PaymentsStub(payments)

    @txrpc.aio.transactional
    async def Sell(self, request: shop_pb2.Order, context: Context) -> shop_pb2.Sold:
        async with self.database.session() as session:
            shelf = await session.get(Shelf, request.item, with_for_update=True)
            if shelf is None or shelf.count < request.count:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.item} is sold out")
            shelf.count -= request.count
            cents = shelf.cents_each * request.count
        await self.payments.Charge(shop_pb2.Payment(customer=request.customer, cents=cents))
        return shop_pb2.Sold(cents=cents)


class Payments(shop_pb2_grpc.PaymentsServicer):
    def __init__(self, database: Database) -> None:
        self.database = database

    @txrpc.aio.transactional
    async def Charge(self, request: shop_pb2.Payment, context: Context) -> shop_pb2.Paid:
        async with self.database.session() as session:
            purse = await session.get(Purse, request.customer, with_for_update=True)
            if purse is None or purse.cents < request.cents:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"{request.customer} cannot pay {request.cents} cents"
                )
            purse.cents -= request.cents
            return shop_pb2.Paid(cents_left=purse.cents)


async def serve(arguments: argparse.Namespace) -> None:
    engine = create_async_engine(arguments.database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    database = Database(arguments.role, engine)
    manager = await txrpc.aio.connect(arguments.coordinator, resources=[database], process=f"shop {arguments.role}")
    server = grpc.aio.server(interceptors=txrpc.aio.server_interceptors())
    channel: Any = None
    if arguments.next:
        channel = grpc.aio.insecure_channel(arguments.next, interceptors=txrpc.aio.client_interceptors())
    if arguments.role == "orders":
        shop_pb2_grpc.add_OrdersServicer_to_server(Orders(database, channel), server)
    elif arguments.role == "stock":
        shop_pb2_grpc.add_StockServicer_to_server(Stock(database, channel), server)
    else:
        shop_pb2_grpc.add_PaymentsServicer_to_server(Payments(database), server)
    server.add_insecure_port(arguments.listen)
    await server.start()
    print("serving", arguments.listen, flush=True)

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(grace=5)
    if channel is not None:
        await channel.close()
    await manager.close()
    await engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["orders", "stock", "payments"])
    parser.add_argument("--listen", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--next", default="", help="the service that this one calls")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
