"""The synchronous interceptors on real servers and channels, with a recorder in place of the transaction: the normal way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import txrpc
from txrpc._context import bind, current
from txrpc._grpc.client import ClientInterceptor
from txrpc._grpc.server import ServerInterceptor
from txrpc._wire.metadata import BRANCHES_KEY, CONTEXT_KEY
from txrpc.errors import NotJoined

from .interceptor_kit import (
    CONTEXT,
    SHAPES,
    World,
    answer_of,
    behaviour,
    echo_using,
    trailing_of,
    use,
)
from .recorder import OWNER, Handle, Recorder, until


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_takes_the_transaction_along_and_brings_its_branches_home(world: World, shape: str) -> None:
    service, root = Recorder(), Handle(time_left_s=20)
    stub = world.dial(world.serve(service, **{shape: behaviour(shape, echo_using("stock"))}))
    with bind(root):
        assert stub.call(shape) == answer_of(shape, b"ab")
        assert current() is root
    (context,) = service.contexts
    assert (context.group, context.xid, context.owner, context.read_only) == ("shop", root.xid, OWNER, True)
    assert context.time_left_ms == 20_000
    assert service.handle.lefts == 1
    assert service.handle.errors == []
    assert (root.call.end, root.call.failure, root.call.branches) == ("replied", None, {"stock"})


@pytest.mark.parametrize("shape", SHAPES)
def test_outside_a_transaction_nothing_is_added(world: World, shape: str) -> None:
    service, seen = Recorder(), []

    def work(request: bytes, context: Any) -> bytes:
        seen.append([key for key, _ in context.invocation_metadata()])
        assert current() is None
        return request

    stub = world.dial(world.serve(service, **{shape: behaviour(shape, work)}))
    assert stub.call(shape) == answer_of(shape, b"ab")
    assert service.contexts == []
    assert [key for keys in seen for key in keys if key.startswith("txrpc")] == []


def test_outside_a_transaction_the_objects_are_grpcs_own() -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: (request, context))
    call: Any = SimpleNamespace(method="/t.T/x", invocation_metadata=(("x", "y"),))
    wrapped: Any = ServerInterceptor(Recorder()).intercept_service(lambda _: handler, call)
    given = object(), object()
    assert wrapped.unary_unary(*given) == given
    assert ServerInterceptor(Recorder()).intercept_service(lambda _: None, call) is None
    passed: list[Any] = []
    details, request, answer = object(), object(), object()

    def continuation(*arguments: Any) -> Any:
        passed.extend(arguments)
        return answer

    for shape in SHAPES:
        passed.clear()
        intercept = getattr(ClientInterceptor(), f"intercept_{shape}")
        assert intercept(continuation, details, request) is answer
        assert passed == [details, request]


def test_outside_a_transaction_a_method_is_wrapped_once_and_not_at_each_call() -> None:
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    unhashable: Any = SimpleNamespace(**handler._asdict())
    call: Any = SimpleNamespace(method="/t.T/x", invocation_metadata=())
    interceptor = ServerInterceptor(Recorder())
    first, second = (interceptor.intercept_service(lambda _: handler, call) for _ in range(2))
    assert first is second
    assert first is not handler
    again: Any = interceptor.intercept_service(lambda _: unhashable, call)
    assert again.unary_unary(b"x", None) == b"x"


def test_a_suspended_transaction_does_not_travel(world: World) -> None:
    service, root = Recorder(), Handle()
    stub = world.dial(world.serve(service, unary_unary=lambda request, _: request))
    with bind(root), bind(None):
        stub.call("unary_unary")
    assert (service.contexts, root.calls) == ([], [])


def test_the_handlers_thread_is_clean_afterwards(world: World) -> None:
    service, seen = Recorder(), []

    def work(request: bytes, _context: Any) -> bytes:
        seen.append(current())
        return request

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, interceptors=[ServerInterceptor(service)])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("t.T", {"unary_unary": grpc.unary_unary_rpc_method_handler(work)}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        stub = world.dial(f"127.0.0.1:{port}")
        with bind(Handle()):
            stub.call("unary_unary")
        stub.call("unary_unary")
        server.stop(None).wait()
    assert seen == [service.handle, None]


@pytest.mark.parametrize("shape", ["stream_unary", "stream_stream"])
def test_the_callers_request_iterator_belongs_to_the_transaction(world: World, shape: str) -> None:
    root, seen = Handle(), []
    stub = world.dial(world.serve(Recorder(), **{shape: behaviour(shape, lambda request, _: request)}))

    def requests() -> Iterator[bytes]:
        for letter in (b"a", b"b"):
            seen.append((current(), threading.get_ident()))
            yield letter

    with bind(root):
        answer = getattr(stub, shape)(requests())
        assert (answer if shape == "stream_unary" else b"".join(answer)) == answer_of(shape, b"ab")
    assert [handle for handle, _ in seen] == [root, root]
    assert threading.get_ident() not in {thread for _, thread in seen}, "gRPC pulls requests in a thread of its own"


def test_two_hops_bring_all_branches_home(world: World) -> None:
    bank, shop, root = Recorder(), Recorder(), Handle()
    to_bank = world.dial(world.serve(bank, unary_unary=behaviour("unary_unary", echo_using("accounts"))))

    def order(request: bytes, _context: Any) -> bytes:
        use("orders")
        return to_bank.call("unary_unary") + request

    to_shop = world.dial(world.serve(shop, unary_unary=order))
    with bind(root):
        assert to_shop.call("unary_unary") == b"abab"
    assert bank.handle.xid == shop.handle.xid == root.xid
    assert shop.handle.call.branches == {"accounts"}
    assert root.call.branches == {"orders", "accounts"}


def test_threads_take_part_when_they_are_carried(world: World) -> None:
    service, root = Recorder(), Handle()
    stub = world.dial(world.serve(service, unary_unary=behaviour("unary_unary", echo_using("stock"))))
    with bind(root), ThreadPoolExecutor(8) as pool:
        carried = [pool.submit(txrpc.carry(stub.call), "unary_unary") for _ in range(40)]
        assert [future.result() for future in carried] == [b"ab"] * 40
        assert pool.submit(stub.call, "unary_unary").result() == b"ab"  # of its own
    assert len(root.calls) == len(service.handles) == 40
    assert all(call.end == "replied" and call.branches == {"stock"} for call in root.calls)


# ----------------------------------------------------------------------------------- what the user gave stays the user's


class Watching(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """A user's client interceptor: adds metadata and remembers what went by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.details: list[Any] = []
        self.codes: list[Any] = []

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        self.details.append(client_call_details)
        metadata = [*(client_call_details.metadata or ()), (self.name, "was here")]
        call = continuation(client_call_details._replace(metadata=metadata), request)
        self.codes.append(call.code())
        return call

    intercept_unary_stream = intercept_unary_unary


class Stamping(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """A user's server interceptor: sets trailing metadata before, or after, the handler."""

    def __init__(self, key: str, after: bool) -> None:
        self.key = key
        self.after = after

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        inner = continuation(handler_call_details).unary_unary

        def call(request: bytes, context: Any) -> bytes:
            mine = (*(context.trailing_metadata() or ()), (self.key, "1"))
            if not self.after:
                context.set_trailing_metadata(mine)
            response: bytes = inner(request, context)
            if self.after:
                context.set_trailing_metadata((*(context.trailing_metadata() or ()), (self.key, "1")))
            return response

        return grpc.unary_unary_rpc_method_handler(call)


def test_users_interceptors_and_metadata_are_kept(world: World) -> None:
    service, root, seen = Recorder(), Handle(), {}
    outer, inner = Watching("outer"), Watching("inner")

    def work(request: bytes, context: Any) -> bytes:
        seen.update(context.invocation_metadata())
        use("stock")
        context.set_trailing_metadata((*context.trailing_metadata(), ("mine", "yes")))
        return request

    address = world.serve(
        service,
        before=[Stamping("first", after=False)],
        after=[Stamping("second", after=False), Stamping("third", after=True)],
        unary_unary=work,
    )
    stub = world.dial(address, before=[outer], after=[inner])
    with bind(root):
        response, call = stub.unary_unary.with_call(b"x", metadata=(("mine", "too"), ("blob-bin", b"\x00")))
    assert response == b"x"
    assert {key: seen.get(key) for key in ("mine", "blob-bin", "outer", "inner")} == {
        "mine": "too",
        "blob-bin": b"\x00",
        "outer": "was here",
        "inner": "was here",
    }
    trailing = trailing_of(call)
    assert {trailing.get(key) for key in ("mine", "first", "second", "third")} == {"yes", "1"}
    assert BRANCHES_KEY in trailing
    assert (outer.codes, inner.codes) == ([grpc.StatusCode.OK], [grpc.StatusCode.OK])
    assert root.call.branches == {"stock"}


class Careless(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """A user's server interceptor that replaces what was there."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        inner = continuation(handler_call_details).unary_unary

        def call(request: bytes, context: Any) -> bytes:
            response: bytes = inner(request, context)
            context.set_trailing_metadata((("mine", "only"),))
            return response

        return grpc.unary_unary_rpc_method_handler(call)


@pytest.mark.parametrize("first", [False, True])
def test_an_interceptor_that_throws_the_report_away_is_complained_of(
    world: World, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """F13: a good reply that had lost its trailing metadata counted as one of a service that takes no part."""
    root = Handle()
    careless = [Careless()]
    address = world.serve(
        Recorder(),
        before=careless if first else [],
        after=[] if first else careless,
        unary_unary=behaviour("unary_unary", echo_using("stock")),
    )
    stub = world.dial(address)
    with bind(root):
        if first:
            with pytest.raises(NotJoined):
                stub.unary_unary(b"x")
            until(lambda: "give txrpc's server interceptors first" in caplog.text)
            return
        _, call = stub.unary_unary.with_call(b"x")
    assert trailing_of(call)["mine"] == "only"
    if not first:
        assert root.call.branches == {"stock"}
        assert caplog.text == ""


def test_the_calls_other_options_are_kept(world: World) -> None:
    inner = Watching("inner")
    stub = world.dial(world.serve(Recorder(), unary_unary=lambda request, _: request), after=[inner])
    with bind(Handle(time_left_s=30)):
        options: dict[str, Any] = {"wait_for_ready": True, "compression": grpc.Compression.Gzip}
        stub.unary_unary(b"x", timeout=7, **options)
        stub.unary_unary(b"x", timeout=700)
        stub.unary_unary(b"x")
    first, second, third = inner.details
    assert (first.timeout, first.wait_for_ready, first.compression) == (7, True, grpc.Compression.Gzip)
    assert (second.timeout, third.timeout, third.wait_for_ready) == (30, 30, None)


def test_the_server_sees_the_smaller_deadline(world: World) -> None:
    left: list[float] = []

    def work(request: bytes, context: Any) -> bytes:
        left.append(context.time_remaining())
        return request

    stub = world.dial(world.serve(Recorder(), unary_unary=work))
    with bind(Handle(time_left_s=8)):
        stub.unary_unary(b"x")
        stub.unary_unary(b"x", timeout=3)
        stub.unary_unary(b"x", timeout=100)
    assert 6 < left[0] < 8.5
    assert 1 < left[1] < 3.5
    assert 6 < left[2] < 8.5


def test_forwarded_metadata_does_not_make_a_second_context(world: World) -> None:
    """A proxy that passes on all metadata of an incoming call passes on a context as well."""
    service, root = Recorder(), Handle()
    stub = world.dial(world.serve(service, unary_unary=lambda request, _: request))
    with bind(root):
        stub.unary_unary(b"x", metadata=((CONTEXT_KEY, CONTEXT), ("other", "kept")))
    assert [context.xid for context in service.contexts] == [root.xid]
