"""The synchronous interceptors: ends that nobody knows, and bytes that make no sense."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tests.waiting import eventually
from txrpc._context import bind
from txrpc._grpc.client import ClientInterceptor
from txrpc._wire.metadata import BRANCHES_KEY, CONTEXT_KEY
from txrpc.errors import AbortCode, ConfigurationError, NotJoined, TransactionTimedOut

from .interceptor_kit import (
    CONTEXT,
    SHAPES,
    World,
    answer_of,
    behaviour,
)
from .recorder import Handle, Recorder, until


def test_a_deadline_leaves_the_end_unknown(world: World) -> None:
    service, root, go_on = Recorder(), Handle(), threading.Event()

    def work(request: bytes, _context: Any) -> bytes:
        go_on.wait(10)
        return request

    stub = world.dial(world.serve(service, unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call("unary_unary", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.CALL_END_UNKNOWN
    assert "DEADLINE_EXCEEDED" in root.call.failure.text
    go_on.set()
    until(lambda: service.handle.lefts == 1)  # orphan work ends its part all the same


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("timeout", [None, 20])
def test_f1_the_transactions_own_deadline_is_the_error_that_it_is_elsewhere(
    world: World, shape: str, timeout: float | None
) -> None:
    """It was gRPC's DEADLINE_EXCEEDED during a call, and run again by retry=; between calls it was TransactionTimedOut."""
    root, go_on = Handle(time_left_s=0.3), threading.Event()

    def work(request: bytes, _context: Any) -> bytes:
        go_on.wait(10)
        return request

    stub = world.dial(world.serve(Recorder(), **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(TransactionTimedOut) as caught:
        stub.call(shape, timeout=timeout)
    go_on.set()
    assert caught.value.xid == root.xid
    assert not caught.value.retryable
    assert str(caught.value.reason) == f"timed out: the transaction's deadline passed during /t.T/{shape}"
    assert root.call.end == "lost"
    assert root.call.failure == caught.value.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_a_server_that_is_not_there(world: World, shape: str) -> None:
    root = Handle()
    stub = world.dial("127.0.0.1:1")
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call(shape)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert root.call.end == "lost"


def test_a_method_that_is_not_there(world: World) -> None:
    root = Handle()
    stub = world.dial(world.serve(Recorder(), unary_stream=behaviour("unary_stream", lambda request, _: request)))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call("unary_unary")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert root.call.end == "lost"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_callee_that_takes_no_part(world: World, shape: str) -> None:
    def work(request: bytes, context: Any) -> bytes:
        if request != b"ab":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        return request

    root = Handle()
    stub = world.dial(world.serve(None, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(NotJoined, match=rf"outside=\['/t.T/{shape}'\]"):
        stub.call(shape)
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.NOT_JOINED
    assert not root.call.failure.retryable


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outside", [["/t.T/{}"], ["/t.T/*"], "/t.T/{}"])
def test_rule_19_a_call_that_is_meant_to_be_outside(world: World, shape: str, outside: Any) -> None:
    root = Handle()
    named = outside.format(shape) if isinstance(outside, str) else [each.format(shape) for each in outside]
    address = world.serve(None, **{shape: behaviour(shape, lambda request, _: request)})
    stub = world.dial(address, outside=named)
    with bind(root):
        assert stub.call(shape) == answer_of(shape, b"ab")
    assert root.calls == []


@pytest.mark.parametrize("wrong", [["Method"], [7], "t.T/x", ["/t.T/"], ["/t.T/x/y"]])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"outside= takes methods as '/package\.Service/Method', not"):
        ClientInterceptor(wrong)


def test_a_failing_callee_that_takes_no_part(world: World) -> None:
    root = Handle()
    stub = world.dial(
        world.serve(None, unary_unary=lambda _, context: context.abort(grpc.StatusCode.NOT_FOUND, "no such thing"))
    )
    with bind(root), pytest.raises(grpc.RpcError):
        stub.call("unary_unary")
    assert root.call.end == "lost", "nobody knows whether a proxy or the service said so"


def test_a_cancelled_client_thread_does_not_leave_the_call_open() -> None:
    root = Handle()

    def continuation(_details: Any, _request: Any) -> Any:
        raise KeyboardInterrupt

    details: Any = SimpleNamespace(method="/t.T/x", timeout=None, metadata=None)
    with bind(root), pytest.raises(KeyboardInterrupt):
        ClientInterceptor().intercept_unary_unary(continuation, details, b"")
    assert root.call.end == "lost"


class Breaking(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """A user's interceptor between ours and the network that hides the call."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        if self.error is not None:
            raise self.error
        return continuation(client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return (item for item in continuation(client_call_details, request))


def test_an_interceptor_that_raises_before_the_network(world: World) -> None:
    root = Handle()
    stub = world.dial("127.0.0.1:1", after=[Breaking(ValueError("not today"))])
    with bind(root), pytest.raises(ValueError, match="not today"):
        stub.call("unary_unary")
    assert root.call.end == "lost"


def test_an_interceptor_that_hides_the_call(world: World) -> None:
    root = Handle()
    address = world.serve(Recorder(), unary_stream=behaviour("unary_stream", lambda request, _: request))
    stub = world.dial(address, after=[Breaking()])
    with bind(root):
        assert stub.call("unary_stream") == b"first ab"
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert "txrpc's interceptors must be next to the network" in root.call.failure.text


# ------------------------------------------------------------------------------------------------------------ bad bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "metadata",
    [
        ((CONTEXT_KEY, b""),),
        ((CONTEXT_KEY, b"\xff\xff\xff"),),
        ((CONTEXT_KEY, CONTEXT[:-2]),),
        ((CONTEXT_KEY, CONTEXT), (CONTEXT_KEY, CONTEXT)),
        ((CONTEXT_KEY, CONTEXT.replace(b"shop", b"';--")),),
    ],
    ids=["empty", "garbage", "cut", "twice", "injection"],
)
def test_a_context_that_makes_no_sense_is_refused(world: World, shape: str, metadata: Any) -> None:
    service, ran = Recorder(), []

    def work(request: bytes, _context: Any) -> bytes:
        ran.append(request)
        return request

    address = world.serve(service, **{shape: behaviour(shape, work)})
    with pytest.raises(grpc.RpcError) as caught:
        world.raw(address).call(shape, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (service.contexts, ran) == ([], [])
    root = Handle()
    with bind(root):
        world.dial(address).call(shape)
    assert (root.call.end, len(service.handles)) == ("replied", 1), "the server is none the worse"


def test_metadata_beyond_grpcs_limit_is_refused(world: World) -> None:
    service = Recorder()
    address = world.serve(service, unary_unary=lambda request, _: request)
    with pytest.raises(grpc.RpcError) as caught:
        world.raw(address).call("unary_unary", metadata=((CONTEXT_KEY, CONTEXT * 2000),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.contexts == []

    def goes_on() -> bool:
        with suppress(grpc.RpcError):  # an older gRPC closes the connection, and the call may come just then
            return bool(world.raw(address).call("unary_unary") == b"ab")
        return False

    eventually(goes_on)


@pytest.mark.parametrize("trailing", [((BRANCHES_KEY, b"\xff\xff"),), ((BRANCHES_KEY, b""), (BRANCHES_KEY, b""))])
@pytest.mark.parametrize("fails", [False, True])
def test_a_report_that_makes_no_sense_dooms(world: World, trailing: Any, fails: bool) -> None:
    root = Handle()

    def work(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(trailing)
        if fails:
            context.abort(grpc.StatusCode.NOT_FOUND, "no")
        return request

    stub = world.dial(world.serve(None, unary_unary=work))
    with bind(root):
        if fails:
            with pytest.raises(grpc.RpcError):
                stub.call("unary_unary")
        else:
            assert stub.call("unary_unary") == b"ab"
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.PROTOCOL_VIOLATION


def test_error_details_that_make_no_sense_are_only_an_unknown_end(world: World) -> None:
    root = Handle()

    def work(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.ABORTED, "no")
        raise AssertionError

    stub = world.dial(world.serve(None, unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError):
        stub.call("unary_unary")
    assert root.call.end == "lost"
