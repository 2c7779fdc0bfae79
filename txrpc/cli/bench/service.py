"""One bank of a benchmark, as a process of its own: ``python -m txrpc.cli.bench.service``.

Reads what to do as one line of JSON, because a URL may hold a password, which an argument would show to all users of the machine;
prints one line of JSON with its addresses; and ends when its input does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import grpc
import sqlalchemy as sa

import txrpc
from txrpc.cli.bench.work import GROUP, add, engine_to, use_schema
from txrpc.sql import ResourceManager

__all__ = ["DECIDES", "METHOD"]

SERVICE = "txrpc.bench.Bank"
METHOD = f"/{SERVICE}/Add"
DECIDES = "bank-1"
"""The resource in whose database transactions may be decided."""


def _handler(block: Callable[[], AbstractContextManager[Any]]) -> grpc.GenericRpcHandler[Any, Any]:
    def handle(request: bytes, _context: grpc.ServicerContext) -> bytes:
        account, cents = json.loads(request)
        with block() as connection:
            add(connection, account, cents)
        return b""

    return grpc.method_handlers_generic_handler(SERVICE, {"Add": grpc.unary_unary_rpc_method_handler(handle)})


def _serve(threads: int, handler: grpc.GenericRpcHandler[Any, Any], interceptors: Any) -> tuple[grpc.Server, str]:
    server = grpc.server(ThreadPoolExecutor(threads), interceptors=interceptors)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def main() -> None:
    """Serve until the input ends."""
    asked = json.loads(sys.stdin.readline())
    customers = asked["customers"]
    alone = engine_to(asked["url"], customers)
    engine = engine_to(asked["url"], customers)
    sa.event.listen(engine, "connect", use_schema)
    resource = ResourceManager(asked["name"], engine, decides=asked["name"] == DECIDES)
    with txrpc.connect(asked["coordinator"], resources=[resource], group=GROUP, process=asked["name"]):
        servers = [
            _serve(customers, _handler(alone.begin), ()),
            _serve(customers, _handler(resource.connection), txrpc.server_interceptors()),
        ]
        sys.stdout.write(json.dumps([address for _, address in servers]) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
        for server, _ in servers:
            server.stop(None).wait()


if __name__ == "__main__":
    main()
