"""The synchronous interceptors: futures and streams, whose end comes later or never."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.experimental
import pytest

from txrpc._context import bind, current
from txrpc._grpc.client import ClientInterceptor
from txrpc._wire.metadata import BRANCHES_KEY
from txrpc.errors import (
    TransactionAborted,
)

from .interceptor_kit import (
    DEADLOCK,
    XID,
    Stub,
    World,
    behaviour,
    echo_using,
    trailing_of,
    use,
)
from .recorder import Handle, Recorder, until


@pytest.mark.parametrize("shape", ["unary_unary", "stream_unary"])
def test_a_future_ends_when_it_has_ended(world: World, shape: str) -> None:
    root, go_on = Handle(), threading.Event()

    def work(request: bytes, _context: Any) -> bytes:
        use("stock")
        go_on.wait(10)
        return request

    stub = world.dial(world.serve(Recorder(), **{shape: behaviour(shape, work)}))
    with bind(root):
        future = getattr(stub, shape).future(iter([b"ab"]) if shape == "stream_unary" else b"ab")
        root.settle()
        assert (root.call.ended, future.done()) == (False, False)
        with pytest.raises(grpc.FutureTimeoutError):
            future.result(timeout=0.05)
        assert not root.call.ended, "to wait no longer is not to know"
        go_on.set()
        assert future.result(timeout=10) == b"ab"
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})
    assert future.exception() is None
    assert issubclass(type(future), grpc.Future)
    assert issubclass(type(future), grpc.Call)


def test_a_future_that_nobody_asks_is_found_out_by_settling(world: World) -> None:
    root, service = Handle(), Recorder()
    stub = world.dial(world.serve(service, unary_unary=behaviour("unary_unary", echo_using("stock"))))
    with bind(root):
        future = stub.unary_unary.future(b"x")
    until(future.done)
    root.settle()
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})


class Patient(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Lets a future come back finished."""

    def __init__(self, go_on: threading.Event) -> None:
        self.go_on = go_on

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        call = continuation(client_call_details, request)
        self.go_on.set()
        until(call.done)
        return call


@pytest.mark.parametrize("quick", [False, True])
def test_a_failed_future_gives_our_error(world: World, quick: bool) -> None:
    root, go_on, seen = Handle(), threading.Event(), []

    def work(_request: bytes, _context: Any) -> bytes:
        go_on.wait(10)
        raise TransactionAborted(XID, DEADLOCK)

    stub = world.dial(world.serve(Recorder(), unary_unary=work), after=[Patient(go_on)] if quick else [])
    with bind(root):
        future = stub.unary_unary.future(b"x")
        future.add_done_callback(lambda done: seen.append(done.exception()))
        go_on.set()
        with pytest.raises(TransactionAborted, match="deadlock"):
            future.result(timeout=10)
        assert isinstance(future.exception(), TransactionAborted)
        assert future.code() is grpc.StatusCode.ABORTED
        assert BRANCHES_KEY in trailing_of(future)
    until(lambda: len(seen) == 1)
    assert isinstance(seen[0], TransactionAborted), "a callback is given what `future` returned"
    assert (root.call.end, root.call.failure) == ("replied", DEADLOCK)


def test_a_cancelled_future_is_lost(world: World) -> None:
    root, go_on, service = Handle(), threading.Event(), Recorder()

    def work(request: bytes, _context: Any) -> bytes:
        go_on.wait(10)
        return request

    stub = world.dial(world.serve(service, unary_unary=work))
    with bind(root):
        future = stub.unary_unary.future(b"x")
        until(lambda: service.handles)
        assert future.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            future.result(timeout=10)
    root.settle()
    assert root.call.end == "lost"
    go_on.set()
    until(lambda: service.handle.lefts == 1)


# ------------------------------------------------------------------------------------------------- streams of responses


class Endless:
    """A stream that goes on until somebody lets it go."""

    def __init__(self) -> None:
        self.ended_in: list[Any] = []

    def __call__(self, _request: bytes, _context: Any) -> Iterator[bytes]:
        use("stock")
        try:
            while True:
                assert current() is not None
                yield b"more"
        finally:
            self.ended_in.append(current())


def test_a_stream_is_still_a_call(world: World) -> None:
    root = Handle()

    def work(_request: bytes, context: Any) -> Iterator[bytes]:
        context.send_initial_metadata((("early", "1"),))
        yield b"1"
        context.set_trailing_metadata((("late", "2"),))
        yield b"2"

    stub = world.dial(world.serve(Recorder(), unary_stream=work))
    with bind(root):
        call = stub.unary_stream(b"")
        assert issubclass(type(call), grpc.Call)
        assert dict(iter(call.initial_metadata()))["early"] == "1"
        assert next(call) == b"1"
        assert call.is_active()
        assert 0 < call.time_remaining() <= 30
        root.settle()
        assert not root.call.ended
        assert list(call) == [b"2"]
    assert root.call.end == "replied"
    assert (call.code(), call.details(), trailing_of(call)["late"]) == (grpc.StatusCode.OK, "", "2")


def test_a_stream_that_fails_half_way(world: World) -> None:
    service, root = Recorder(), Handle()

    def work(_request: bytes, _context: Any) -> Iterator[bytes]:
        use("stock")
        yield b"1"
        raise TransactionAborted(XID, DEADLOCK)

    stub = world.dial(world.serve(service, unary_stream=work))
    with bind(root):
        call = stub.unary_stream(b"")
        assert next(call) == b"1"
        with pytest.raises(TransactionAborted, match="deadlock"):
            next(call)
    assert (root.call.end, root.call.branches, root.call.failure) == ("replied", {"stock"}, DEADLOCK)


def test_a_cancelled_stream_is_lost_and_its_handler_ends(world: World, caplog: pytest.LogCaptureFixture) -> None:
    service, root, endless = Recorder(), Handle(), Endless()
    service.doom = DEADLOCK  # with nobody there to hear it
    stub = world.dial(world.serve(service, unary_stream=endless))
    with bind(root):
        call = stub.unary_stream(b"")
        assert next(call) == b"more"
        root.settle()
        assert not root.call.ended, "half read is not ended"
        call.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert root.call.end == "lost"
    until(lambda: service.handle.lefts == 1)
    assert endless.ended_in == [service.handle], "the end of the user's generator runs in its transaction"
    assert [type(error) for error in service.handle.errors] == [GeneratorExit]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_stream_that_nobody_holds_any_more_is_cancelled(world: World) -> None:
    """The transaction keeps a half-read stream alive, to learn its end; after the transaction nobody does."""
    service, root = Recorder(), Handle()
    stub = world.dial(world.serve(service, unary_stream=Endless()))
    with bind(root):
        for _ in stub.unary_stream(b""):
            break
    gc.collect()
    root.settle()
    assert not root.call.ended
    assert service.handle.lefts == 0
    root.calls.clear()
    gc.collect()
    until(lambda: service.handle.lefts == 1)


def test_single_threaded_streams(world: World) -> None:
    root, service = Handle(), Recorder()
    address = world.serve(service, unary_stream=behaviour("unary_stream", echo_using("stock")))
    option = (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
    with grpc.insecure_channel(address, options=[option]) as plain, bind(root):
        stub = Stub(grpc.intercept_channel(plain, ClientInterceptor()))
        assert stub.call("unary_stream") == b"first ab"
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})


def test_a_handler_may_return_any_iterable(world: World) -> None:
    root = Handle()

    def work(request: bytes, _context: Any) -> Any:
        use("stock")
        return [request, request]

    stub = world.dial(world.serve(Recorder(), unary_stream=work))
    with bind(root):
        assert stub.call("unary_stream") == b"abab"
    assert root.call.branches == {"stock"}


class Spiteful:
    """Responses whose end fails once more."""

    def __iter__(self) -> Spiteful:
        return self

    def __next__(self) -> bytes:
        raise KeyError("first")

    def close(self) -> None:
        raise ValueError("and last")


def test_a_handler_whose_end_raises_still_leaves(world: World) -> None:
    service, root = Recorder(), Handle()
    stub = world.dial(world.serve(service, unary_stream=lambda *_: Spiteful()))
    with bind(root), pytest.raises(grpc.RpcError):
        stub.call("unary_stream")
    assert service.handle.lefts == 1
    assert root.call.end == "replied"


def test_a_response_that_cannot_be_sent_is_a_known_failure(world: World) -> None:
    root = Handle()

    def unable(_response: bytes) -> bytes:
        raise ValueError("cannot be written")

    stub = world.dial(world.serve(Recorder(), serializer=unable, unary_unary=lambda request, _: request))
    with bind(root), pytest.raises(grpc.RpcError):
        stub.call("unary_unary")
    assert (root.call.end, root.call.kinds[1]) == ("replied", grpc.StatusCode.INTERNAL)
