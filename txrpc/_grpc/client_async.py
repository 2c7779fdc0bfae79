"""The client interceptors for asyncio channels; `txrpc._grpc.client` has the theory.

grpc.aio wants one object a call shape, and hands an interceptor a call that has not ended.  So every call of a transaction is
wrapped: awaiting its response, or iterating to the end of its stream, tells the transaction; and the transaction can ask.
Nothing is awaited in the interceptor itself, because a call whose requests are written one by one could then never go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable
from typing import Any

import grpc

from txrpc._context import current
from txrpc._grpc.ports import OutgoingCallPort
from txrpc._grpc.shared import Outside, conclude, lost_reason, outgoing_fields, refuse_stream, replaced
from txrpc.errors import TxrpcError

__all__ = ["aio_client_interceptors"]


class _Open:
    """A call that has not ended yet, delegating to grpc.aio's own object."""

    def __init__(self, call: Any, out: OutgoingCallPort, method: str) -> None:
        self._call = call
        self._out = out
        self._method = method
        out.settle_with(self.poll, call.cancel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def poll(self) -> None:
        """Tell the transaction if the call has ended."""
        if self._call.done():
            await self.ended()

    async def ended(self, error: grpc.RpcError | None = None) -> TxrpcError | None:
        """The call has ended, with *error* if it has been seen; returns what to raise in its place."""
        call = self._call
        code, details, trailing = await call.code(), await call.details(), await call.trailing_metadata()
        if error is None and code is not grpc.StatusCode.OK:
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing or grpc.aio.Metadata(), details, "")
        return conclude(self._out, self._method, code, details, trailing, error)

    async def failed(self, error: grpc.RpcError) -> BaseException:
        """*error* came out of the call; returns what to raise."""
        return await self.ended(error) or error

    def given_up(self, error: BaseException) -> None:
        """The waiter was cancelled, or something that is not gRPC's went wrong."""
        self._call.cancel()  # which grpc.aio forgets if the wait was for the request to be sent
        self._out.lost(lost_reason(self._method, error))

    # What grpc.aio's abstract classes ask for.

    def cancel(self) -> bool:
        cancelled: bool = self._call.cancel()
        return cancelled

    def cancelled(self) -> bool:
        was: bool = self._call.cancelled()
        return was

    def done(self) -> bool:
        is_done: bool = self._call.done()
        return is_done

    def add_done_callback(self, callback: Any) -> None:
        self._call.add_done_callback(callback)

    def time_remaining(self) -> Any:
        return self._call.time_remaining()

    async def initial_metadata(self) -> Any:
        return await self._call.initial_metadata()

    async def trailing_metadata(self) -> Any:
        return await self._call.trailing_metadata()

    async def code(self) -> Any:
        return await self._call.code()

    async def details(self) -> Any:
        return await self._call.details()

    async def wait_for_connection(self) -> None:
        await self._call.wait_for_connection()


class _UnaryResponse(_Open):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._response().__await__()

    async def _response(self) -> Any:
        try:
            response = await self._call
        except grpc.RpcError as error:
            instead = await self.failed(error)
            if instead is error:
                raise
            raise instead from error
        except BaseException as error:
            self.given_up(error)
            raise
        refused = await self.ended()
        if refused is not None:
            raise refused
        return response


class _StreamResponse(_Open):
    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for response in self._call:
                yield response
        except asyncio.CancelledError as error:
            self.given_up(error)
            raise
        except grpc.RpcError as error:
            instead = await self.failed(error)
            if instead is error:
                raise
            raise instead from error
        refused = await self.ended()
        if refused is not None:
            raise refused

    async def read(self) -> Any:
        try:
            response = await self._call.read()
        except asyncio.CancelledError as error:
            self.given_up(error)
            raise
        except grpc.RpcError as error:
            instead = await self.failed(error)
            if instead is error:
                raise
            raise instead from error
        if response is grpc.aio.EOF:  # type: ignore[attr-defined]
            refused = await self.ended()
            if refused is not None:
                raise refused
        return response


class _Writes(_Open):
    async def write(self, request: Any) -> None:
        await self._call.write(request)

    async def done_writing(self) -> None:
        await self._call.done_writing()


class _UnaryUnary(_UnaryResponse, grpc.aio.UnaryUnaryCall):  # type: ignore[type-arg]
    pass


class _UnaryStream(_StreamResponse, grpc.aio.UnaryStreamCall):  # type: ignore[type-arg]
    pass


class _StreamUnary(_Writes, _UnaryResponse, grpc.aio.StreamUnaryCall):  # type: ignore[type-arg]
    pass


class _StreamStream(_Writes, _StreamResponse, grpc.aio.StreamStreamCall):  # type: ignore[type-arg]
    pass


class _CallDetails(grpc.aio.ClientCallDetails):
    """What an interceptor of ours has filled in."""


class _Interceptor:
    def __init__(self, outside: Outside) -> None:
        self._outside = outside


class UnaryUnaryInterceptor(_Interceptor, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Unary requests, unary responses."""

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.aio.UnaryUnaryClientInterceptor`."""
        return await _intercept(self._outside, continuation, client_call_details, request, _UnaryUnary)


class UnaryStreamInterceptor(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Unary requests, streams of responses."""

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.aio.UnaryStreamClientInterceptor`."""
        return await _intercept(self._outside, continuation, client_call_details, request, _UnaryStream)


class StreamUnaryInterceptor(_Interceptor, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    """Streams of requests, unary responses."""

    async def intercept_stream_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: AsyncIterable[Any] | Iterable[Any],
    ) -> Any:
        """See `grpc.aio.StreamUnaryClientInterceptor`."""
        return await _intercept(self._outside, continuation, client_call_details, request_iterator, _StreamUnary)


class StreamStreamInterceptor(_Interceptor, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    """Streams both ways."""

    async def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: AsyncIterable[Any] | Iterable[Any],
    ) -> Any:
        """See `grpc.aio.StreamStreamClientInterceptor`."""
        return await _intercept(self._outside, continuation, client_call_details, request_iterator, _StreamStream)


def aio_client_interceptors(outside: Iterable[str] = ()) -> list[Any]:
    """One interceptor a call shape, for `grpc.aio.insecure_channel` and `grpc.aio.secure_channel`; *outside*: see `Outside`.

    Give them last, next to the network: an interceptor between them and the call could hide how the call ended.
    """
    methods = Outside(outside)
    kinds = (UnaryUnaryInterceptor, UnaryStreamInterceptor, StreamUnaryInterceptor, StreamStreamInterceptor)
    return [kind(methods) for kind in kinds]


async def _intercept(
    outside: Outside,
    continuation: Callable[..., Any],
    details: grpc.aio.ClientCallDetails,
    request: Any,
    wrap: Callable[..., _Open],
) -> Any:
    handle = current()
    given_twice = isinstance(details, _CallDetails)  # the outer one of the two does the work
    if handle is None or given_twice or (method := _text(details.method)) in outside:
        return await continuation(details, request)
    refuse_stream(issubclass(wrap, _StreamResponse) if isinstance(wrap, type) else False)
    out: OutgoingCallPort = handle.outgoing()
    timeout, metadata = outgoing_fields(out, details.timeout, details.metadata)
    ours = _CallDetails(
        details.method, timeout, grpc.aio.Metadata(*metadata), details.credentials, details.wait_for_ready
    )
    try:
        call = await continuation(ours, request)
    except BaseException as error:
        out.lost(lost_reason(method, error))
        raise
    if not hasattr(call, "trailing_metadata"):
        out.lost(replaced(method))
        return call
    return wrap(call, out, method)


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else str(method)
