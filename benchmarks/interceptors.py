"""What a call outside of transactions costs with txrpc's interceptors: python -m benchmarks.interceptors.

Beside it the same call with interceptors that do nothing, because gRPC itself works more where there are any.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

import txrpc
import txrpc.aio
from benchmarks.report import machine

_CALLS, _ROUNDS = 2_000, 7
_METHOD = "/benchmarks.Echo/Call"


class _IdleClient(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details, request)


class _IdleServer(grpc.ServerInterceptor):  # type: ignore[type-arg]
    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return continuation(handler_call_details)


class _IdleAioClient(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(client_call_details, request)


class _IdleAioServer(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return await continuation(handler_call_details)


def _handlers(method: Any) -> tuple[Any]:
    handler = grpc.unary_unary_rpc_method_handler(method)
    return (grpc.method_handlers_generic_handler("benchmarks.Echo", {"Call": handler}),)


class _Sync:
    """A server and a channel, with these interceptors."""

    def __init__(self, servers: Sequence[Any], clients: Sequence[Any]) -> None:
        self._server: Any = grpc.server(ThreadPoolExecutor(4), interceptors=list(servers))
        self._server.add_generic_rpc_handlers(_handlers(lambda request, _context: request))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        channel: Any = grpc.intercept_channel(grpc.insecure_channel(f"127.0.0.1:{port}"), *clients)
        self._channel, self._call = channel, channel.unary_unary(_METHOD)

    async def calls(self, number: int) -> None:
        for _ in range(number):
            self._call(b"")

    async def close(self) -> None:
        self._channel.close()
        self._server.stop(None).wait()


class _Aio:
    """The same with asyncio."""

    def __init__(self, servers: Sequence[Any], clients: Sequence[Any]) -> None:
        self._server: Any = grpc.aio.server(interceptors=list(servers))

        async def echo(request: bytes, _context: Any) -> bytes:
            return request

        self._server.add_generic_rpc_handlers(_handlers(echo))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._starting: Any = self._server.start()
        channel: Any = grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=list(clients))
        self._channel, self._call = channel, channel.unary_unary(_METHOD)

    async def calls(self, number: int) -> None:
        if self._starting is not None:
            await self._starting
            self._starting = None
        for _ in range(number):
            await self._call(b"")

    async def close(self) -> None:
        await self._channel.close()
        await self._server.stop(None)


async def _measure(worlds: dict[str, _Sync | _Aio], table: Table, style: str) -> None:
    spent: dict[str, list[float]] = {name: [] for name in worlds}
    for _ in range(_ROUNDS):
        for name, world in worlds.items():
            await world.calls(_CALLS // 10)
            began_s = time.process_time()
            await world.calls(_CALLS)
            spent[name].append((time.process_time() - began_s) / _CALLS)
    for world in worlds.values():
        await world.close()
    for name, each_s in spent.items():
        ratios = [mine / base for mine, base in zip(each_s, spent["none"], strict=True)]
        text = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row(style, name, f"{statistics.median(each_s) * 1e6:.0f}", "" if name == "none" else text)


async def _run(table: Table) -> None:
    ours = txrpc.server_interceptors(), txrpc.client_interceptors()
    idle = [_IdleServer()], [_IdleClient()]
    await _measure({"none": _Sync((), ()), "idle": _Sync(*idle), "txrpc": _Sync(*ours)}, table, "sync")
    ours = txrpc.aio.server_interceptors(), txrpc.aio.client_interceptors()
    aio_idle = [_IdleAioServer()], [_IdleAioClient()]
    await _measure({"none": _Aio((), ()), "idle": _Aio(*aio_idle), "txrpc": _Aio(*ours)}, table, "asyncio")


def main() -> None:
    """Measure and print."""
    console = Console()
    console.print(machine())
    table = Table("", "interceptors", "processor us a call, both ends", f"ratio, median of {_ROUNDS} rounds and range")
    asyncio.run(_run(table))
    console.print(table)


if __name__ == "__main__":
    main()
