"""The server interceptor for asyncio servers; `txrpc._grpc.server` has the theory.

What differs: ``await context.abort()`` sends the status at once, so the handler gets a context that ends the call's part first.
An asyncio server may have synchronous handlers; `txrpc._grpc.threads` makes asynchronous ones of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from txrpc._context import bind
from txrpc._grpc.handlers import behaviour_of, remembered, replaced
from txrpc._grpc.ports import AsyncServerContext, Behaviour, Handle, Joiner, Metadata
from txrpc._grpc.server import plain
from txrpc._grpc.shared import (
    Ending,
    Failed,
    check_sent,
    ending_of,
    has_failed,
    has_joined,
    plain_ending_of,
    refusal_of,
    trailing_of,
)
from txrpc._grpc.threads import in_threads
from txrpc._protocol.messages import TransactionContext
from txrpc._wire.metadata import find_context
from txrpc.errors import TxrpcError

__all__ = ["AsyncServerInterceptor"]


class AsyncServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For `grpc.aio.server`.

    Give it first: an interceptor before it that sets trailing metadata of its own would throw the report away.
    """

    def __init__(self, joiner: Joiner) -> None:
        self._joiner = joiner
        self._outside = remembered(_outside)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            transaction = find_context(handler_call_details.invocation_metadata)
        except TxrpcError as error:
            return replaced(handler, _refusing(error))
        if transaction is None:
            return self._outside(handler)
        behaviour = behaviour_of(handler)
        if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
            behaviour = in_threads(behaviour, handler.request_streaming, handler.response_streaming)
        return replaced(handler, _Call(self._joiner, transaction, behaviour).wrapper())


def _outside(handler: Any) -> Any:
    return replaced(handler, _plain(behaviour_of(handler), handler.response_streaming))


def _plain(behaviour: Behaviour, streams: bool) -> Any:
    """*behaviour* of a call without a transaction, whose errors get the status that they would have in one."""
    if inspect.isasyncgenfunction(behaviour):

        async def stream(request: Any, context: AsyncServerContext) -> AsyncIterator[Any]:
            try:
                # A client that goes away closes this generator, and the method's must end with it.
                async with contextlib.aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await _fail(context, error)
                raise

        return stream
    if not inspect.iscoroutinefunction(behaviour):
        return plain(behaviour, streams)  # in a thread of gRPC's

    async def call(request: Any, context: AsyncServerContext) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:
            await _fail(context, error)
            raise

    return call


async def _fail(context: AsyncServerContext, error: Exception) -> None:
    """Raises if the status is ours to say."""
    ending = plain_ending_of(error, users_status=bool(context.code()))
    if ending is not None:
        await _abort(context, ending)


class _Context:
    """The handler's context: gRPC's own, but ending the call goes through us."""

    def __init__(self, context: AsyncServerContext, call: _Call, handle: Handle) -> None:
        self._context = context
        self._call = call
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """See `grpc.aio.ServicerContext`; the report goes out with the status."""
        users = trailing_metadata or self._context.trailing_metadata()
        ending = await self._call.ending(self._handle, _Aborted(f"{code}: {details}"), users_status=True)
        await self._context.abort(ending.code or code, ending.details or details, trailing_of(users, ending.trailing))

    async def abort_with_status(self, status: grpc.Status) -> None:
        """See `grpc.aio.ServicerContext`."""
        await self.abort(status.code, status.details, status.trailing_metadata)


class _Aborted(Exception):
    """The handler aborted its call."""


_GONE = (asyncio.CancelledError, GeneratorExit)
"""How a handler learns that its client is gone: the end of the call is not reported."""


class _Call:
    """One incoming call of a transaction."""

    def __init__(self, joiner: Joiner, transaction: TransactionContext, behaviour: Behaviour) -> None:
        self._joiner = joiner
        self._transaction = transaction
        self._behaviour = behaviour
        self._left = False

    def wrapper(self) -> Any:
        """A function of the same kind as the behaviour: gRPC looks at that."""
        return self._wrap_generator() if inspect.isasyncgenfunction(self._behaviour) else self._wrap_coroutine()

    async def ending(self, handle: Handle, error: BaseException | None, users_status: bool) -> Ending:
        """End the call's part."""
        if error is not None:
            handle.failed(error)
        report = await handle.leave()
        self._left = True
        return ending_of(handle, report, error, users_status)

    def _wrap_coroutine(self) -> Any:
        async def call(request: Any, context: AsyncServerContext) -> Any:
            if has_joined(self._transaction):
                return await self._behaviour(request, context)
            handle = await self._join(context)
            try:
                with bind(handle):
                    response = await self._behaviour(request, _Context(context, self, handle))
            except BaseException as error:
                await self._end(handle, context, error)
                raise
            await self._end(handle, context, None)
            return response

        return call

    def _wrap_generator(self) -> Any:
        async def call(request: Any, context: AsyncServerContext) -> AsyncIterator[Any]:
            if has_joined(self._transaction):
                async with contextlib.aclosing(self._behaviour(request, context)) as joined:
                    async for response in joined:
                        yield response
                return
            handle = await self._join(context)
            responses = self._behaviour(request, _Context(context, self, handle))
            try:
                while True:
                    with bind(handle):
                        try:
                            response = await anext(responses)
                        except StopAsyncIteration:
                            break
                    yield response
            except BaseException as error:
                try:
                    with bind(handle):
                        await responses.aclose()
                finally:
                    await self._end(handle, context, error)
                raise
            await self._end(handle, context, None)

        return call

    async def _join(self, context: AsyncServerContext) -> Handle:
        try:
            return self._joiner.join(self._transaction)
        except TxrpcError as error:
            await _abort(context, refusal_of(error))
            raise

    async def _end(self, handle: Handle, context: AsyncServerContext, error: BaseException | None) -> None:
        if self._left:
            return  # it was aborted, and everything has been said
        if error is None and has_failed(context.code()):
            handle.failed(Failed(f"the handler has set the status {context.code()}"))
        ending = await asyncio.shield(self.ending(handle, error, users_status=bool(context.code())))
        if isinstance(error, _GONE):
            return
        if ending.code is not None:
            await _abort(context, ending)
        context.set_trailing_metadata(trailing_of(context.trailing_metadata(), ending.trailing))
        context.add_done_callback(check_sent)


async def _abort(context: AsyncServerContext, ending: Ending) -> None:
    await context.abort(ending.code, ending.details, trailing_of(context.trailing_metadata(), ending.trailing))


def _refusing(error: TxrpcError) -> Any:
    async def refuse(_request: Any, context: AsyncServerContext) -> None:
        await _abort(context, refusal_of(error))

    return refuse
