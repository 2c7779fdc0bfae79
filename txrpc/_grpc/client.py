"""The client interceptor for synchronous channels: a call made inside a transaction takes it along and brings its branches home.

A blocking call has ended when gRPC hands it to us.  A future or a response stream ends later, perhaps unnoticed: it is wrapped so
that the code that looks at its end tells the transaction, and the transaction can ask (`settle_with`) before it commits.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grpc

from txrpc._context import current
from txrpc._grpc.ports import OutgoingCallPort
from txrpc._grpc.shared import (
    Outside,
    bound,
    conclude,
    has_context,
    lost_reason,
    outgoing_fields,
    refuse_stream,
    replaced,
)
from txrpc.errors import TxrpcError

__all__ = ["ClientInterceptor", "intercept_channel"]


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _CallDetails(_Details, grpc.ClientCallDetails):
    """What gRPC wants of a `grpc.ClientCallDetails`."""


class _Open:
    """A call that has not ended yet, delegating to gRPC's own object."""

    def __init__(self, call: Any, out: OutgoingCallPort, method: str, mapped: TxrpcError | None = None) -> None:
        self._call = call
        self._out = out
        self._method = method
        self._told = mapped is not None
        self._mapped = mapped
        if not self._told:
            out.settle_with(self.poll, call.cancel)
        if not call.done():
            # Weakly, and not by `add_done_callback`, which holds the call: gRPC cancels a call that has no reference any more.
            call.add_callback(functools.partial(_noticed, weakref.ref(self)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See `grpc.Future`."""
        self._call.add_done_callback(lambda _: callback(self))

    def poll(self) -> None:
        """Tell the transaction if the call has ended."""
        if self._call.done():
            self.ended()

    def ended(self) -> TxrpcError | None:
        """The call has ended; returns what to raise in place of gRPC's error."""
        if not self._told:
            self._mapped = _conclude(self._out, self._method, self._call)
            self._told = True
        return self._mapped


def _noticed(open_call: weakref.ref[_Open]) -> None:
    call = open_call()
    if call is not None:
        call.poll()


@grpc.Call.register  # type: ignore[attr-defined]
@grpc.Future.register  # type: ignore[attr-defined]
class _Future(_Open):
    """A unary response that is on its way."""

    def result(self, timeout: float | None = None) -> Any:
        """See `grpc.Future`."""
        try:
            response = self._call.result(timeout)
        except grpc.RpcError as error:
            mapped = self.ended()
            if mapped is None:
                raise
            raise mapped from error
        mapped = self.ended()
        if mapped is not None:
            raise mapped
        return response

    def exception(self, timeout: float | None = None) -> Any:
        """See `grpc.Future`."""
        error = self._call.exception(timeout)
        return self.ended() or error


@grpc.Call.register  # type: ignore[attr-defined]
class _Stream(_Open):
    """A stream of responses."""

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except StopIteration:
            mapped = self.ended()
            if mapped is not None:
                raise mapped from None
            raise
        except grpc.RpcError as error:
            mapped = self.ended()
            if mapped is None:
                raise
            raise mapped from error


class ClientInterceptor(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """For `grpc.intercept_channel`: one object serves any number of channels and threads.

    Give it last, next to the network: an interceptor between it and the call could hide how the call ended.
    """

    def __init__(self, outside: Iterable[str] = ()) -> None:
        """*outside*: see `Outside`."""
        self._outside = Outside(outside)

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryUnaryClientInterceptor`."""
        return _intercept(self._outside, continuation, client_call_details, request, _Future)

    def intercept_stream_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """See `grpc.StreamUnaryClientInterceptor`."""
        return _intercept(self._outside, continuation, client_call_details, _carried(request_iterator), _Future)

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        """See `grpc.UnaryStreamClientInterceptor`."""
        return _intercept(self._outside, continuation, client_call_details, request, _Stream)

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Any],
    ) -> Any:
        """See `grpc.StreamStreamClientInterceptor`."""
        return _intercept(self._outside, continuation, client_call_details, _carried(request_iterator), _Stream)


def intercept_channel(channel: grpc.Channel, outside: Iterable[str] = ()) -> grpc.Channel:
    """*channel* with the interceptor next to the network, below the interceptors of others that are around it already.

    Instrumentation wraps channels as they are made, and may put a generator in the place of a response stream: there a call's
    trailing metadata can only be seen below it.  A wrapper is a `grpc.Channel` that holds one other channel in an attribute; the
    wrappers are copied, so that *channel* itself stays what it was.

    outside: see `Outside`.
    """
    below = [
        (name, value) for name, value in getattr(channel, "__dict__", {}).items() if isinstance(value, grpc.Channel)
    ]
    if len(below) != 1:
        return grpc.intercept_channel(channel, ClientInterceptor(outside))
    [(name, inner)] = below
    wrapper = copy.copy(channel)
    setattr(wrapper, name, intercept_channel(inner, outside))
    return wrapper


def _intercept(
    outside: Outside, continuation: Callable[..., Any], details: grpc.ClientCallDetails, request: Any, wrap: type[_Open]
) -> Any:
    handle = current()
    if handle is None or has_context(details.metadata) or (method := _text(details.method)) in outside:
        return continuation(details, request)
    refuse_stream(wrap is _Stream)
    out: OutgoingCallPort = handle.outgoing()
    timeout, metadata = outgoing_fields(out, details.timeout, details.metadata)
    more = [getattr(details, name, None) for name in ("credentials", "wait_for_ready", "compression")]
    try:
        call = continuation(_CallDetails(details.method, timeout, metadata, *more), request)
    except BaseException as error:
        out.lost(lost_reason(method, error))
        raise
    if not hasattr(call, "trailing_metadata"):
        out.lost(replaced(method))
        return call
    if wrap is _Stream or not call.done():
        return wrap(call, out, method)
    # A blocking call, which is the common case, or a future that was quick.
    mapped = _conclude(out, method, call)
    return call if mapped is None else wrap(call, out, method, mapped)


def _conclude(out: OutgoingCallPort, method: str, call: grpc.Call) -> TxrpcError | None:
    return conclude(out, method, call.code(), call.details(), call.trailing_metadata(), call)


def _carried(request_iterator: Iterator[Any]) -> Any:
    """GRPC pulls requests from a thread of its own; the user's code in there belongs to the transaction all the same."""
    handle = current()
    return request_iterator if handle is None else bound(handle, iter(request_iterator))


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else str(method)
