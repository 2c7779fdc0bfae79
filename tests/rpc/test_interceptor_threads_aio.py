"""Synchronous handlers on an asyncio server: they run in threads, and join their transaction all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from txrpc._context import bind, current
from txrpc.errors import LimitExceeded, TransactionAborted

from .aio_kit import AsyncWorld, auntil
from .interceptor_kit import DEADLOCK, SHAPES, XID, answer_of, behaviour, echo_using, trailing_of, use
from .recorder import AsyncHandle, Recorder


def service() -> Recorder:
    return Recorder(AsyncHandle)


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_call_takes_the_transaction_along_and_brings_its_branches_home(aworld: AsyncWorld, shape: str) -> None:
    called, root, threads = service(), AsyncHandle(), set()

    def work(request: bytes, context: Any) -> bytes:
        threads.add(threading.get_ident())
        context.set_trailing_metadata((("mine", "yes"),))
        return echo_using("stock")(request, context)

    stub = await aworld.dial(await aworld.serve(called, **{shape: behaviour(shape, work)}))
    with bind(root):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
    assert (root.call.end, root.call.branches, called.handle.lefts) == ("replied", {"stock"}, 1)
    assert threading.get_ident() not in threads
    assert called.threads == [threading.get_ident()], "joining is the event loop's work"


async def test_users_trailing_metadata_is_kept(aworld: AsyncWorld) -> None:
    root = AsyncHandle()

    def work(request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        return request

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(root):
        call = stub.unary_unary(b"x")
        await call
    assert dict(iter(await call.trailing_metadata()))["mine"] == "yes"
    assert root.call.branches == {"stock"}


async def test_the_pools_threads_are_clean_afterwards(aworld: AsyncWorld) -> None:
    seen: list[Any] = []

    def work(request: bytes, _context: Any) -> bytes:
        seen.append(current())
        return request

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(AsyncHandle()):
        await asyncio.gather(*(stub.unary_unary(b"x") for _ in range(20)))
    await asyncio.gather(*(stub.unary_unary(b"x") for _ in range(20)))
    assert None not in seen[:20]
    assert seen[20:] == [None] * 20


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_plain_exception_stays_what_grpc_makes_of_it(aworld: AsyncWorld, shape: str) -> None:
    called, root = service(), AsyncHandle()

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)
        raise KeyError("not here")

    stub = await aworld.dial(await aworld.serve(called, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape)
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert [type(error) for error in called.handle.errors] == [KeyError]
    assert (root.call.end, root.call.branches, called.handle.lefts) == ("replied", {"stock"}, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rich", [False, True])
async def test_an_abort_keeps_its_status_and_its_metadata(aworld: AsyncWorld, shape: str, rich: bool) -> None:
    called, root = service(), AsyncHandle()

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        mine = (("mine", "yes"),)
        if rich:
            status = SimpleNamespace(code=grpc.StatusCode.NOT_FOUND, details="no such thing", trailing_metadata=mine)
            context.abort_with_status(status)
        context.set_trailing_metadata(mine)
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError

    stub = await aworld.dial(await aworld.serve(called, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert trailing_of(caught.value)["mine"] == "yes"
    assert (root.call.end, root.call.branches, called.handle.lefts) == ("replied", {"stock"}, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("raised", [TransactionAborted(XID, DEADLOCK), LimitExceeded("too many"), KeyError("doomed")])
async def test_our_errors_travel_as_themselves(aworld: AsyncWorld, shape: str, raised: Exception) -> None:
    called, root = service(), AsyncHandle()
    if isinstance(raised, KeyError):
        called.doom = DEADLOCK

    def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        raise raised

    stub = await aworld.dial(await aworld.serve(called, **{shape: behaviour(shape, work)}))
    expected = TransactionAborted if isinstance(raised, KeyError) else type(raised)
    with bind(root), pytest.raises(expected) as caught:
        await stub.acall(shape)
    assert trailing_of(caught.value.__cause__)["mine"] == "yes"
    assert (root.call.end, root.call.branches, called.handle.lefts) == ("replied", {"stock"}, 1)


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_refused_call_does_not_run(aworld: AsyncWorld, shape: str) -> None:
    called, root = service(), AsyncHandle()
    called.refuses = LimitExceeded("too many of them")
    ran: list[bytes] = []

    def work(request: bytes, _context: Any) -> bytes:
        ran.append(request)
        return request

    stub = await aworld.dial(await aworld.serve(called, **{shape: behaviour(shape, work)}))
    with bind(root), pytest.raises(LimitExceeded, match="too many of them"):
        await stub.acall(shape, silent=True)
    assert (ran, root.call.end, root.call.report) == ([], "replied", None)


@pytest.mark.parametrize("where", ["writing", "working"])
async def test_a_client_that_vanishes(aworld: AsyncWorld, where: str) -> None:
    called, root, is_at_work, go_on = service(), AsyncHandle(), threading.Event(), threading.Event()
    ended_in: list[Any] = []

    def work(_request: bytes, _context: Any) -> Iterator[bytes]:
        use("stock")
        try:
            yield b"more"
            while True:
                if where == "working":
                    is_at_work.set()
                    go_on.wait(10)
                yield b"more"
        finally:
            ended_in.append(current())

    stub = await aworld.dial(await aworld.serve(called, unary_stream=work))
    with bind(root):
        call = stub.unary_stream(b"")
        assert await call.read() == b"more"
        if where == "working":
            await auntil(is_at_work.is_set)
        call.cancel()
    await root.asettle()
    assert root.call.end == "lost"
    if where == "working":
        await asyncio.sleep(0.1)
        assert called.handle.lefts == 0, "what a thread still does belongs to the call"
        go_on.set()
    await auntil(lambda: called.handle.lefts == 1)
    assert ended_in == [called.handle]


async def test_the_context_is_that_of_a_synchronous_server(aworld: AsyncWorld) -> None:
    seen: dict[str, Any] = {}
    ended = threading.Event()

    def work(request: bytes, context: Any) -> bytes:
        context.send_initial_metadata((("early", "1"),))
        seen.update(context.invocation_metadata())
        seen["peer"] = context.peer()
        seen["left"] = context.time_remaining()
        seen["active"] = context.is_active()
        context.add_callback(ended.set)
        return request

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(AsyncHandle()):
        call = stub.unary_unary(b"x", metadata=(("mine", "too"),))
        assert dict(iter(await call.initial_metadata()))["early"] == "1"
        await call
    assert (seen["mine"], seen["active"]) == ("too", True)
    assert 0 < seen["left"] < 31
    assert seen["peer"].startswith("ipv4:127.0.0.1:")
    await auntil(ended.is_set)
