"""Synchronous handlers of an asyncio server, as asynchronous ones, for calls that belong to a transaction.

gRPC has such an adapter of its own, which calls outside a transaction go through.  It does not tell what a handler has set (status,
trailing metadata), and the thread of a generator whose client is gone waits for ever, its branches with it.  Here handlers run
in the event loop's default executor, and the server's interceptor sees nothing but coroutines and asynchronous generators.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import grpc

from txrpc._grpc.ports import AsyncServerContext, Behaviour, Metadata

__all__ = ["in_threads"]

_END = object()


def in_threads(behaviour: Behaviour, request_streaming: bool, response_streaming: bool) -> Behaviour:
    """*behaviour*, which blocks, as a coroutine function or an asynchronous generator function."""
    loop = asyncio.get_running_loop()

    async def begin(request: Any, context: AsyncServerContext) -> Any:
        requests = _requests(request, loop) if request_streaming else request
        return await _in_thread(behaviour, requests, _SyncContext(context, loop))

    async def stream(request: Any, context: AsyncServerContext) -> AsyncIterator[Any]:
        responses = iter(await begin(request, context))
        try:
            while (response := await _in_thread(next, responses, _END)) is not _END:
                yield response
        finally:
            if hasattr(responses, "close"):
                await _in_thread(responses.close)

    return stream if response_streaming else begin


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # A thread cannot be stopped, and what it still does belongs to the call.
        await asyncio.gather(work, return_exceptions=True)
        raise


def _requests(receiver: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    async def receive() -> Any:
        return await anext(receiver, _END)

    while (request := asyncio.run_coroutine_threadsafe(receive(), loop).result()) is not _END:
        yield request


class _SyncContext:
    """The context of a call as a handler in a thread sees it; see `grpc.ServicerContext`."""

    def __init__(self, context: AsyncServerContext, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """See `grpc.ServicerContext`."""
        self._run(self._context.abort(code, details, trailing_metadata))

    def abort_with_status(self, status: grpc.Status) -> None:
        """See `grpc.ServicerContext`."""
        self._run(self._context.abort_with_status(status))

    def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """See `grpc.ServicerContext`."""
        self._run(self._context.send_initial_metadata(initial_metadata))

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """See `grpc.RpcContext`."""
        self._context.add_done_callback(lambda _: callback())
        return True

    def is_active(self) -> bool:
        """See `grpc.RpcContext`."""
        return not self._context.done()
