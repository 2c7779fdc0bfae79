"""B4: errors that leave a service method keep their status, whether or not the caller has a transaction, or txrpc at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from txrpc._grpc.server_async import AsyncServerInterceptor
from txrpc._wire.status import from_trailing
from txrpc.errors import CoordinatorUnavailable, TransactionAborted, TransactionTimedOut, TxrpcError

from .aio_kit import AsyncWorld, abehaviour
from .interceptor_kit import DEADLOCK, SHAPES, XID, Stub, World, behaviour, trailing_of
from .recorder import AsyncHandle, Recorder

ERRORS = [
    (TransactionAborted(XID, DEADLOCK), grpc.StatusCode.ABORTED),
    (TransactionTimedOut(XID, DEADLOCK), grpc.StatusCode.DEADLINE_EXCEEDED),
    (CoordinatorUnavailable("no coordinator in reach"), grpc.StatusCode.UNAVAILABLE),
]


def check(caught: Any, error: TxrpcError, code: grpc.StatusCode) -> None:
    assert (caught.code(), caught.details()) == (code, str(error))
    told = from_trailing(caught.trailing_metadata())
    assert type(told) is type(error)
    assert str(told) == str(error)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_an_error_of_ours_has_its_status(world: World, shape: str, error: TxrpcError, code: grpc.StatusCode) -> None:
    def work(_request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("mine", "yes"),))
        raise error

    stub = world.raw(world.serve(Recorder(), **{shape: behaviour(shape, work)}))
    with pytest.raises(grpc.RpcError) as caught:
        stub.call(shape)
    check(caught.value, error, code)
    assert trailing_of(caught.value)["mine"] == "yes"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("error", "code"), ERRORS)
async def test_an_error_of_ours_has_its_status_in_asyncio(
    aworld: AsyncWorld, shape: str, error: TxrpcError, code: grpc.StatusCode
) -> None:
    async def work(_request: bytes, _context: Any) -> bytes:
        raise error

    stub = await aworld.raw(await aworld.serve(Recorder(AsyncHandle), **{shape: abehaviour(shape, work)}))
    with pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape)
    check(caught.value, error, code)


def calling(stub: Stub, shape: str) -> Any:
    """A method that calls another one, and lets its error go on."""

    def work(_request: bytes, _context: Any) -> bytes:
        return stub.call(shape)

    return work


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_called_service_answered_goes_on_as_it_came(world: World, shape: str) -> None:
    def last(_request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such account")
        raise AssertionError

    address = world.serve(Recorder(), **{shape: behaviour(shape, last)})
    for _ in range(2):
        address = world.serve(Recorder(), **{shape: behaviour(shape, calling(world.raw(address), shape))})
    with pytest.raises(grpc.RpcError) as caught:
        world.raw(address).call(shape)
    failed: Any = caught.value
    assert (failed.code(), failed.details()) == (grpc.StatusCode.NOT_FOUND, "no such account")


def test_what_the_method_said_itself_stays(world: World) -> None:
    def work(_request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.ALREADY_EXISTS)
        context.set_details("twice")
        raise TransactionAborted(XID, DEADLOCK)

    stub = world.raw(world.serve(Recorder(), unary_unary=behaviour("unary_unary", work)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.call("unary_unary")
    failed: Any = caught.value
    assert failed.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_a_stream_ends_its_method_when_the_client_goes_away(aworld: AsyncWorld) -> None:
    ended = asyncio.Event()

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    stub = await aworld.raw(await aworld.serve(Recorder(AsyncHandle), unary_stream=stream))
    call: Any = stub.unary_stream(b"")
    assert await anext(aiter(call)) == b"more"
    call.cancel()
    async with asyncio.timeout(10):
        await ended.wait()


async def test_the_wrapped_generator_closes_the_methods_own() -> None:
    """Not left to the garbage collector, which may take its time."""
    ended: list[str] = []

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"more"
            yield b"and more"
        finally:
            ended.append("here")

    async def found(_call: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(stream)

    call: Any = SimpleNamespace(method="/t.T/x", invocation_metadata=())
    handler = await AsyncServerInterceptor(Recorder(AsyncHandle)).intercept_service(found, call)
    responses = handler.unary_stream(b"", None)
    assert await anext(responses) == b"more"
    await responses.aclose()
    assert ended == ["here"]
