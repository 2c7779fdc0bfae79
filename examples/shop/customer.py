"""The customer buys a whole cart, or nothing: several orders at once, in one transaction.

python -m examples.shop.customer ada tea:2 cup:1 --orders 127.0.0.1:7601 --coordinator 127.0.0.1:7400
"""

from __future__ import annotations

import argparse
import asyncio

import grpc

import txrpc.aio
from examples.shop import shop_pb2, shop_pb2_grpc


@txrpc.aio.transactional(timeout=10, retry=True)
async def buy(orders: shop_pb2_grpc.OrdersAsyncStub, customer: str, cart: dict[str, int]) -> int:
    """Place one order an item, all at the same time; returns what they cost together, in cents."""
    calls = (orders.Place(shop_pb2.Order(customer=customer, item=item, count=count)) for item, count in cart.items())
    placed = await asyncio.gather(*calls)
    return sum(order.cents for order in placed)


async def run(arguments: argparse.Namespace) -> None:
    cart = {item: int(count or 1) for item, _, count in (word.partition(":") for word in arguments.cart)}
    async with (
        await txrpc.aio.connect(arguments.coordinator, process="customer"),
        grpc.aio.insecure_channel(arguments.orders, interceptors=txrpc.aio.client_interceptors()) as channel,
    ):
        orders: shop_pb2_grpc.OrdersAsyncStub = shop_pb2_grpc.OrdersStub(channel)
        try:
            cents = await buy(orders, arguments.customer, cart)
            print(f"{arguments.customer} has paid {cents / 100:,.2f}")
        except (grpc.RpcError, txrpc.TxrpcError) as error:
            print(f"nothing was bought: {error.details() if isinstance(error, grpc.aio.AioRpcError) else error}")
        async for line in orders.History(shop_pb2.Customer(customer=arguments.customer)):
            print(f"  {line.count} x {line.item}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("customer")
    parser.add_argument("cart", nargs="+", help="ITEM:COUNT")
    parser.add_argument("--orders", required=True)
    parser.add_argument("--coordinator", required=True)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
