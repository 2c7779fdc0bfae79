"""The server interceptor for synchronous servers: a call that comes with a transaction joins it.

Calls without a transaction get their own handler back, untouched.  For the others the handler is wrapped: the handle is current
while the user's code runs (for a generator: only while it runs), and the reply carries the branches home in its trailing
metadata, whatever the user put there kept, whether the handler returned, raised or aborted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from txrpc._context import bind
from txrpc._grpc.handlers import behaviour_of, remembered, replaced
from txrpc._grpc.ports import Behaviour, Handle, Joiner, ServerContext
from txrpc._grpc.shared import (
    Ending,
    Failed,
    bound,
    check_sent,
    ending_of,
    has_failed,
    has_joined,
    plain_ending_of,
    refusal_of,
    trailing_of,
)
from txrpc._protocol.messages import TransactionContext
from txrpc._wire.metadata import find_context
from txrpc.errors import TxrpcError

__all__ = ["ServerInterceptor", "plain"]


class ServerInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """For `grpc.server`.  Safe for any number of threads.

    Give it first: an interceptor before it that sets trailing metadata of its own would throw the report away.
    """

    def __init__(self, joiner: Joiner) -> None:
        self._joiner = joiner
        self._outside: Callable[[Any], grpc.RpcMethodHandler[Any, Any]] = remembered(_outside)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See `grpc.ServerInterceptor`."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        try:
            context = find_context(handler_call_details.invocation_metadata)
        except TxrpcError as error:
            return replaced(handler, _refusing(error, handler.response_streaming))
        if context is None:
            return self._outside(handler)
        wrap = _streaming if handler.response_streaming else _unary
        return replaced(handler, wrap(behaviour_of(handler), self._joiner, context))


def _outside(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    return replaced(handler, plain(behaviour_of(handler), handler.response_streaming))


def _unary(behaviour: Behaviour, joiner: Joiner, transaction: TransactionContext) -> Behaviour:
    def call(request: Any, context: ServerContext) -> Any:
        if has_joined(transaction):
            return behaviour(request, context)
        handle = _join(joiner, transaction, context)
        try:
            with bind(handle):
                response = behaviour(request, context)
        except BaseException as error:
            _end(handle, context, error)
            raise
        _end(handle, context, None)
        return response

    return call


def _streaming(behaviour: Behaviour, joiner: Joiner, transaction: TransactionContext) -> Behaviour:
    def call(request: Any, context: ServerContext) -> Iterator[Any]:
        if has_joined(transaction):
            yield from behaviour(request, context)
            return
        handle = _join(joiner, transaction, context)
        responses: Any = None
        try:
            with bind(handle):
                responses = iter(behaviour(request, context))
            yield from bound(handle, responses)
        except BaseException as error:
            try:
                _close(handle, responses)
            finally:
                _end(handle, context, error)
            raise
        _end(handle, context, None)

    return call


def plain(behaviour: Behaviour, streams: bool) -> Any:
    """*behaviour* of a call without a transaction, whose errors get the status that they would have in one."""
    if hasattr(behaviour, "experimental_non_blocking"):
        return behaviour  # of another signature

    @functools.wraps(behaviour)
    def call(request: Any, context: ServerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:
            _fail(context, error)
            raise

    @functools.wraps(behaviour)
    def stream(request: Any, context: ServerContext) -> Iterator[Any]:
        try:
            yield from behaviour(request, context)
        except Exception as error:
            _fail(context, error)
            raise

    return stream if streams else call


def _fail(context: ServerContext, error: Exception) -> None:
    """Raises if the status is ours to say."""
    ending = plain_ending_of(error, users_status=context.code() is not None)
    if ending is not None:
        _finish(context, ending)


def _join(joiner: Joiner, transaction: TransactionContext, context: ServerContext) -> Handle:
    try:
        return joiner.join(transaction)
    except TxrpcError as error:
        _finish(context, refusal_of(error))
        raise


def _end(handle: Handle, context: ServerContext, error: BaseException | None) -> None:
    """End the call's part and put the report into the reply; raises if the status is ours to say."""
    if error is not None or has_failed(context.code()):
        handle.failed(error or Failed(f"the handler has set the status {context.code()}"))
    report = handle.leave()
    if isinstance(error, GeneratorExit):
        return  # the client is gone, and the end is not reported
    users_status = context.code() is not None
    context.add_callback(functools.partial(check_sent, context))
    _finish(context, ending_of(handle, report, error, users_status))


def _finish(context: ServerContext, ending: Ending) -> None:
    context.set_trailing_metadata(trailing_of(context.trailing_metadata(), ending.trailing))
    if ending.code is not None:
        context.abort(ending.code, ending.details)


def _close(handle: Handle, responses: Iterator[Any] | None) -> None:
    """Let an abandoned generator of the user's run its end, in its transaction; what is no generator has none."""
    if responses is not None and hasattr(responses, "close"):
        with bind(handle):
            responses.close()


def _refusing(error: TxrpcError, streaming: bool) -> Any:
    def refuse(_request: Any, context: ServerContext) -> Any:
        _finish(context, refusal_of(error))

    def refuse_stream(_request: Any, context: ServerContext) -> Iterator[Any]:
        _finish(context, refusal_of(error))
        yield  # never reached: it makes this a generator, as the method's shape wants

    return refuse_stream if streaming else refuse
