"""The server interceptor for asyncio servers; `txrpc.rpc.server` has the theory.

Two things differ.  ``await context.abort()`` sends the status at once, so the handler gets a context that ends the call's part
first.  And an asyncio server may have synchronous handlers, which run in threads of its own: they are wrapped by synchronous
functions that let the event loop do what must be awaited.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from txrpc.context import bind
from txrpc.errors import TxrpcError
from txrpc.protocol.messages import TransactionContext
from txrpc.rpc.ports import Handle, Joiner
from txrpc.rpc.server import behaviour_of, close, replaced
from txrpc.rpc.shared import Ending, bound, ending_of, refusal_of, trailing_of
from txrpc.wire.metadata import find_context

__all__ = ["AioServerInterceptor"]


class AioServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For `grpc.aio.server`.

    Give it first: an interceptor before it that sets trailing metadata of its own would throw the report away.
    """

    def __init__(self, joiner: Joiner) -> None:
        self._joiner = joiner

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            transaction = find_context(handler_call_details.invocation_metadata)
        except TxrpcError as error:
            return replaced(handler, _refusing(error))
        if transaction is None:
            return handler
        call = _Call(self._joiner, transaction, behaviour_of(handler))
        return replaced(handler, call.wrapper(handler.response_streaming))


class _Context:
    """The handler's context: gRPC's own, but ending the call goes through us."""

    def __init__(self, context: Any, call: _Call, handle: Handle) -> None:
        self._context = context
        self._call = call
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        """See `grpc.aio.ServicerContext`; the report goes out with the status."""
        users = trailing_metadata or self._context.trailing_metadata()
        ending = await self._call.ending(self._handle, _Aborted(f"{code}: {details}"), users_status=True)
        await self._context.abort(ending.code or code, ending.details or details, trailing_of(users, ending.trailing))

    async def abort_with_status(self, status: Any) -> None:
        """See `grpc.aio.ServicerContext`."""
        await self.abort(status.code, status.details, status.trailing_metadata)


class _SyncContext(_Context):
    """The same for a synchronous handler, in its own thread.  gRPC's own forgets what was set, so it is kept here."""

    def __init__(self, context: Any, call: _Call, handle: Handle) -> None:
        super().__init__(context, call, handle)
        self._code: Any = None
        self._trailing: tuple[Any, ...] = ()

    def set_code(self, code: Any) -> None:
        """See `grpc.ServicerContext`."""
        self._code = code
        self._context.set_code(code)

    def code(self) -> Any:
        """See `grpc.ServicerContext`."""
        return self._code

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """See `grpc.ServicerContext`."""
        self._trailing = tuple(trailing_metadata)
        self._context.set_trailing_metadata(self._trailing)

    def trailing_metadata(self) -> Any:
        """See `grpc.ServicerContext`."""
        return self._trailing

    def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:  # type: ignore[override]
        """See `grpc.ServicerContext`; the report goes out with the status."""
        users = trailing_metadata or self._trailing
        ending = self._call.ending_sync(self._handle, _Aborted(f"{code}: {details}"), users_status=True)
        self._context.abort(ending.code or code, ending.details or details, trailing_of(users, ending.trailing))

    def abort_with_status(self, status: Any) -> None:  # type: ignore[override]
        """See `grpc.ServicerContext`."""
        self.abort(status.code, status.details, status.trailing_metadata)

    def send(self, ending: Ending) -> None:
        """End the call with what is ours to say beside what the handler said."""
        trailing = trailing_of(self._trailing, ending.trailing)
        if ending.code is not None:
            self._context.abort(ending.code, ending.details, trailing)
        self._context.set_trailing_metadata(trailing)


class _Aborted(Exception):
    """The handler aborted its call."""


_GONE = (asyncio.CancelledError, GeneratorExit)
"""How a handler learns that its client is gone: nobody hears how the call ends."""


class _Call:
    """One incoming call of a transaction."""

    def __init__(self, joiner: Joiner, transaction: TransactionContext, behaviour: Any) -> None:
        self._joiner = joiner
        self._transaction = transaction
        self._behaviour = behaviour
        self._loop = asyncio.get_running_loop()
        self._left = False

    def wrapper(self, response_streaming: bool) -> Any:
        """A function of the same kind as the behaviour: gRPC looks at that."""
        if inspect.isasyncgenfunction(self._behaviour):
            return self._wrap_generator()
        if inspect.iscoroutinefunction(self._behaviour):
            return self._wrap_coroutine()
        return self._wrap_sync_generator() if response_streaming else self._wrap_sync()

    async def ending(self, handle: Handle, error: BaseException | None, users_status: bool) -> Ending:
        """End the call's part."""
        if error is not None:
            handle.failed(error)
        report = await handle.leave()
        self._left = True
        return ending_of(handle, report, error, users_status)

    # ----------------------------------------------------------------------------------------------- asynchronous

    def _wrap_coroutine(self) -> Any:
        async def call(request: Any, context: Any) -> Any:
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
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
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

    async def _join(self, context: Any) -> Handle:
        try:
            return self._joiner.join(self._transaction)
        except TxrpcError as error:
            await _abort(context, refusal_of(error))
            raise

    async def _end(self, handle: Handle, context: Any, error: BaseException | None) -> None:
        if self._left:
            return  # it was aborted, and everything has been said
        ending = await asyncio.shield(self.ending(handle, error, users_status=bool(context.code())))
        if isinstance(error, _GONE):
            return
        if ending.code is not None:
            await _abort(context, ending)
        context.set_trailing_metadata(trailing_of(context.trailing_metadata(), ending.trailing))

    # ------------------------------------------------------------------------- synchronous handlers, in their threads

    def _wrap_sync(self) -> Any:
        def call(request: Any, context: Any) -> Any:
            handle = self._join_sync(context)
            ours = _SyncContext(context, self, handle)
            try:
                with bind(handle):
                    response = self._behaviour(request, ours)
            except BaseException as error:
                self._end_sync(handle, ours, error)
                raise
            self._end_sync(handle, ours, None)
            return response

        return call

    def _wrap_sync_generator(self) -> Any:
        def call(request: Any, context: Any) -> Iterator[Any]:
            handle = self._join_sync(context)
            ours = _SyncContext(context, self, handle)
            responses: Any = None
            try:
                with bind(handle):
                    responses = iter(self._behaviour(request, ours))
                yield from bound(handle, responses)
            except BaseException as error:
                try:
                    close(handle, responses)
                finally:
                    self._end_sync(handle, ours, error)
                raise
            self._end_sync(handle, ours, None)

        return call

    def _join_sync(self, context: Any) -> Handle:
        async def join() -> Handle:
            return self._joiner.join(self._transaction)

        try:
            return asyncio.run_coroutine_threadsafe(join(), self._loop).result()
        except TxrpcError as error:
            refusal = refusal_of(error)
            context.abort(refusal.code, refusal.details, tuple(refusal.trailing))
            raise

    def ending_sync(self, handle: Handle, error: BaseException | None, users_status: bool) -> Ending:
        """`ending`, from a thread that is not the event loop's."""
        return asyncio.run_coroutine_threadsafe(self.ending(handle, error, users_status), self._loop).result()

    def _end_sync(self, handle: Handle, context: _SyncContext, error: BaseException | None) -> None:
        if self._left:
            return
        if isinstance(error, GeneratorExit):
            # Perhaps in the event loop's own thread, which must not wait for itself.
            asyncio.run_coroutine_threadsafe(self.ending(handle, error, users_status=False), self._loop)
            return
        ending = self.ending_sync(handle, error, users_status=bool(context.code()))
        context.send(ending)


async def _abort(context: Any, ending: Ending) -> None:
    await context.abort(ending.code, ending.details, trailing_of(context.trailing_metadata(), ending.trailing))


def _refusing(error: TxrpcError) -> Any:
    async def refuse(_request: Any, context: Any) -> None:
        await _abort(context, refusal_of(error))

    return refuse
