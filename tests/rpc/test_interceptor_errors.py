"""The synchronous interceptors: calls that fail, and what of it reaches the caller and the transaction."""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
import pytest

from txrpc._context import bind
from txrpc.errors import (
    AbortCode,
    CoordinatorUnavailable,
    IllegalState,
    LimitExceeded,
    Reason,
    TransactionAborted,
    TransactionTimedOut,
    TxrpcError,
)

from .interceptor_kit import (
    DEADLOCK,
    SHAPES,
    XID,
    World,
    behaviour,
    trailing_of,
    use,
)
from .recorder import Handle, Recorder


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_exception_stays_what_grpc_makes_of_it(world: World, shape: str) -> None:
    service, root = Recorder(), Handle()

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        raise KeyError("not here")

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call(shape)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert "not here" in str(caught.value.details())
    assert trailing_of(caught.value)["mine"] == "yes"
    assert [type(error) for error in service.handle.errors] == [KeyError]
    assert service.handle.lefts == 1
    call = root.call
    assert (call.end, call.branches) == ("replied", {"stock"})
    assert call.failure is not None
    assert call.failure.code is AbortCode.APPLICATION_ERROR
    assert call.failure.text.startswith(f"/t.T/{shape}: UNKNOWN: ")
    assert isinstance(call.kinds[0], grpc.RpcError)
    assert call.kinds[1] is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("shape", SHAPES)
def test_an_abort_keeps_its_status_and_its_metadata(world: World, shape: str) -> None:
    service, root = Recorder(), Handle()

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call(shape)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert trailing_of(caught.value)["mine"] == "yes"
    assert len(service.handle.errors) == 1
    assert (root.call.end, root.call.branches, root.call.kinds[1]) == ("replied", {"stock"}, grpc.StatusCode.NOT_FOUND)


class StatusFields(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: Any


class RichStatus(StatusFields, grpc.Status):
    """What `grpc_status.rpc_status.to_status` makes."""


@pytest.mark.parametrize("doomed", [False, True])
def test_abort_with_status_keeps_the_users_details(world: World, doomed: bool) -> None:
    service, root = Recorder(), Handle()
    service.doom = DEADLOCK if doomed else None

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        trailing = (("grpc-status-details-bin", b"the user's"), ("mine", "yes"))
        context.abort_with_status(RichStatus(grpc.StatusCode.OUT_OF_RANGE, "too far", trailing))
        raise AssertionError

    stub = world.dial(world.serve(service, unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call("unary_unary")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "too far")
    trailing = trailing_of(caught.value)
    assert (trailing["grpc-status-details-bin"], trailing["mine"]) == (b"the user's", "yes")
    assert root.call.branches == {"stock"}
    assert root.call.report is not None
    assert root.call.report.doomed == service.doom


def test_a_status_without_an_exception_is_a_failure_too(world: World) -> None:
    root = Handle()

    def work(_request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
        context.set_details("not so")
        return b""

    stub = world.dial(world.serve(Recorder(), unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        stub.call("unary_unary")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (root.call.end, root.call.kinds[1]) == ("replied", grpc.StatusCode.FAILED_PRECONDITION)


ERRORS = [
    TransactionAborted(XID, DEADLOCK),
    TransactionTimedOut(XID, Reason(AbortCode.TIMED_OUT, "too slow")),
    IllegalState("it has ended"),
    LimitExceeded("too many of them"),
    CoordinatorUnavailable("no session with node-1"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_our_errors_travel_as_themselves(world: World, shape: str, error: TxrpcError) -> None:
    service, root = Recorder(), Handle()

    def work(_request: bytes, _context: Any) -> bytes:
        use("stock")
        raise error

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(type(error)) as caught:
        stub.call(shape)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert service.handle.errors == [error]
    call = root.call
    assert (call.end, call.branches) == ("replied", {"stock"})
    assert call.kinds[0] is caught.value
    assert call.failure is not None
    if isinstance(error, TransactionAborted):
        assert isinstance(caught.value, TransactionAborted)
        assert (caught.value.xid, caught.value.reason) == (XID, error.reason)
        assert call.failure == error.reason


def test_our_errors_travel_over_two_hops(world: World) -> None:
    root, middle = Handle(), Recorder()
    error = TransactionAborted(XID, DEADLOCK)

    def fail(_request: bytes, _context: Any) -> bytes:
        use("accounts")
        raise error

    to_last = world.dial(world.serve(Recorder(), unary_unary=fail))
    to_middle = world.dial(world.serve(middle, unary_unary=lambda *_: to_last.call("unary_unary")))
    with bind(root), pytest.raises(TransactionAborted) as caught:
        to_middle.call("unary_unary")
    assert caught.value.reason == DEADLOCK
    assert root.call.branches == {"accounts"}


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_doomed_transaction_the_caller_learns_why(
    world: World, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    service, root = Recorder(), Handle()
    service.doom = DEADLOCK

    def work(_request: bytes, _context: Any) -> bytes:
        raise ZeroDivisionError("the consequence")

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(TransactionAborted) as caught:
        stub.call(shape)
    assert (caught.value.reason, caught.value.xid) == (DEADLOCK, root.xid)
    assert "the consequence" in caplog.text, "what the handler raised is logged, since gRPC does not get to see it"


def test_a_doomed_transaction_may_answer(world: World) -> None:
    service, root = Recorder(), Handle()
    service.doom = DEADLOCK
    stub = world.dial(world.serve(service, unary_unary=lambda request, _: request))
    with bind(root):
        assert stub.call("unary_unary") == b"ab"
    assert root.call.report is not None
    assert root.call.report.doomed == DEADLOCK


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_refused_call_does_not_run(world: World, shape: str, error: TxrpcError) -> None:
    service, root, ran = Recorder(), Handle(), []
    service.refuses = error

    def work(request: bytes, _context: Any) -> bytes:
        ran.append(request)
        return request

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(type(error)) as caught:
        stub.call(shape)
    assert str(caught.value) == str(error)
    assert ran == []
    assert (root.call.end, root.call.report) == ("replied", None), "a refusal is a known end"


def test_too_many_branches_fail_the_call_and_say_how_many(world: World) -> None:
    service, root = Recorder(), Handle()

    def work(request: bytes, _context: Any) -> bytes:
        for number in range(300):
            use(f"resource-{number}")
        return request

    stub = world.dial(world.serve(service, unary_unary=work))
    with bind(root), pytest.raises(LimitExceeded, match="300 branches") as caught:
        stub.call("unary_unary")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert caught.value.__cause__.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [type(error) for error in service.handle.errors] == [LimitExceeded]
    assert root.call.report is not None
    assert root.call.report.doomed is not None, "the root must not commit what it does not know of"
    assert root.call.report.doomed.code is AbortCode.LIMIT_EXCEEDED


def test_a_transaction_that_may_not_go_out_sends_nothing(world: World) -> None:
    service, root = Recorder(), Handle()
    root.refuses = TransactionAborted(root.xid, DEADLOCK)
    address = world.serve(service, **{shape: behaviour(shape, lambda request, _: request) for shape in SHAPES})
    stub = world.dial(address)
    with bind(root):
        for shape in SHAPES:
            with pytest.raises(TransactionAborted, match="deadlock"):
                stub.call(shape)
        with pytest.raises(TransactionAborted, match="deadlock"):
            stub.unary_unary.future(b"x").result()
    assert (service.contexts, root.calls) == ([], [])
