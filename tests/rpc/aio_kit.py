"""`interceptor_kit` for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import grpc

from txrpc._grpc.client_async import aio_client_interceptors
from txrpc._grpc.server_async import AsyncServerInterceptor

from .interceptor_kit import SHAPES, Stub, use

Work = Callable[[bytes, Any], Awaitable[bytes]]


async def auntil(done: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something that happens elsewhere on the event loop."""
    deadline = time.monotonic() + seconds
    while not (result := done()):
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)
    return result


class AsyncStub(Stub):
    """The four methods of ``t.T``."""

    async def acall(self, shape: str, silent: bool = False, **options: Any) -> bytes:
        """Call a method with ``b"ab"`` and join what it answers.

        *silent*: a stream of requests has none yet.  A server that ends such a call early races with the requests still being
        written, and when they lose grpc.aio reports INTERNAL in place of the status that the server sent.
        """
        request = [iter([b"a", b"b"])] if shape.startswith("stream") else [b"ab"]
        call = getattr(self, shape)(*([] if silent and shape.startswith("stream") else request), **options)
        whole: bytes = b"".join([part async for part in call]) if shape.endswith("stream") else await call
        return whole


class AsyncWorld:
    """Servers and channels that end with the test."""

    def __init__(self) -> None:
        self.ends = AsyncExitStack()

    async def serve(self, joiner: Any = None, before: Any = (), after: Any = (), **behaviours: Any) -> str:
        """A server with one method ``/t.T/shape`` for each behaviour; returns its address."""
        handlers = {
            shape: getattr(grpc, f"{shape}_rpc_method_handler")(behaviour) for shape, behaviour in behaviours.items()
        }
        ours = [] if joiner is None else [AsyncServerInterceptor(joiner)]
        pool = self.ends.enter_context(ThreadPoolExecutor(4))
        server = grpc.aio.server(pool, interceptors=[*before, *ours, *after])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.ends.push_async_callback(server.stop, None)
        return f"127.0.0.1:{port}"

    async def dial(self, address: str, before: Any = (), after: Any = (), outside: Any = ()) -> AsyncStub:
        """Methods of the server, called through the client interceptors."""
        interceptors = [*before, *aio_client_interceptors(outside), *after]
        channel = grpc.aio.insecure_channel(address, interceptors=interceptors)
        return AsyncStub(await self.ends.enter_async_context(channel))

    async def raw(self, address: str) -> AsyncStub:
        """Methods of the server, called without them."""
        return AsyncStub(await self.ends.enter_async_context(grpc.aio.insecure_channel(address)))


async def whole_of(request: Any) -> Any:
    """A request, or all of a stream of them."""
    return request if isinstance(request, bytes) else b"".join([part async for part in request])


def abehaviour(shape: str, work: Work, writes: bool = False) -> Any:
    """A handler of *shape* that does *work*, in two halves if it answers with a stream; with *writes* by writing it."""

    async def unary(request: Any, context: Any) -> bytes:
        return await work(await whole_of(request), context)

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first "
        yield await work(await whole_of(request), context)

    async def writing(request: Any, context: Any) -> None:
        await context.write(b"first ")
        await context.write(await work(await whole_of(request), context))

    if not shape.endswith("stream"):
        return unary
    return writing if writes else stream


def aecho_using(resource: str) -> Work:
    """The request, after work in *resource*."""

    async def work(request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0)
        use(resource)
        return request

    return work


KINDS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES if shape.endswith("stream")]
"""Shapes, and whether the handler writes its responses."""
