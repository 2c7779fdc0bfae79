"""Real servers and channels for the tests of the interceptors: methods of all shapes on bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc

from txrpc._context import current
from txrpc._grpc.client import ClientInterceptor
from txrpc._grpc.server import ServerInterceptor
from txrpc._protocol.messages import TransactionContext
from txrpc._wire.metadata import encode_context
from txrpc.errors import (
    AbortCode,
    Reason,
)
from txrpc.ids import Xid

from .recorder import OWNER

SHAPES = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
XID = Xid.make(1, bytes(10))
CONTEXT = encode_context(TransactionContext("shop", XID, OWNER, 5000))
DEADLOCK = Reason(AbortCode.DEADLOCK, "two of them waited for each other")


class World:
    """Servers and channels that end with the test."""

    def __init__(self) -> None:
        self.ends = ExitStack()

    def serve(
        self, joiner: Any = None, before: Any = (), after: Any = (), serializer: Any = None, **behaviours: Any
    ) -> str:
        """A server with one method ``/t.T/shape`` for each behaviour; returns its address."""
        handlers = {
            shape: getattr(grpc, f"{shape}_rpc_method_handler")(behaviour, None, serializer)
            for shape, behaviour in behaviours.items()
        }
        ours = [] if joiner is None else [ServerInterceptor(joiner)]
        pool = self.ends.enter_context(ThreadPoolExecutor(8))
        server = grpc.server(pool, interceptors=[*before, *ours, *after])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.ends.callback(lambda: server.stop(None).wait())
        return f"127.0.0.1:{port}"

    def dial(self, address: str, before: Any = (), after: Any = (), outside: Any = ()) -> Stub:
        """Methods of the server, called through the client interceptor."""
        plain = self.ends.enter_context(grpc.insecure_channel(address))
        return Stub(grpc.intercept_channel(plain, *before, ClientInterceptor(outside), *after))

    def raw(self, address: str) -> Stub:
        """Methods of the server, called without it."""
        return Stub(self.ends.enter_context(grpc.insecure_channel(address)))


class Stub:
    """The four methods of ``t.T``."""

    unary_unary: Any
    unary_stream: Any
    stream_unary: Any
    stream_stream: Any

    def __init__(self, channel: Any) -> None:
        for shape in SHAPES:
            setattr(self, shape, getattr(channel, shape)(f"/t.T/{shape}"))

    def call(self, shape: str, **options: Any) -> bytes:
        """Call a method with ``b"ab"`` and join what it answers."""
        request = iter([b"a", b"b"]) if shape.startswith("stream") else b"ab"
        answer = getattr(self, shape)(request, **options)
        whole: bytes = b"".join(answer) if shape.endswith("stream") else answer
        return whole


def behaviour(shape: str, work: Callable[[bytes, Any], bytes]) -> Any:
    """A handler of *shape* that does *work*, in two halves if it answers with a stream."""

    def whole(request: Any) -> Any:
        return b"".join(request) if shape.startswith("stream") else request

    def unary(request: Any, context: Any) -> bytes:
        return work(whole(request), context)

    def stream(request: Any, context: Any) -> Iterator[bytes]:
        yield b"first "
        yield work(whole(request), context)

    return stream if shape.endswith("stream") else unary


def answer_of(shape: str, answer: bytes) -> bytes:
    return b"first " + answer if shape.endswith("stream") else answer


def trailing_of(call: Any) -> dict[str, Any]:
    """The trailing metadata of a call, or of the error that it ended with.  (gRPC's own mapping has lists of values.)"""
    return dict(iter(call.trailing_metadata()))


def use(resource: str) -> None:
    """Work in a database, in the transaction if there is one."""
    if current() is not None:
        current().use(resource)


def echo_using(resource: str) -> Callable[[bytes, Any], bytes]:
    def work(request: bytes, _context: Any) -> bytes:
        use(resource)
        return request

    return work
