"""The asyncio interceptors: ends that nobody knows, clients that vanish, streams."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from tests.versions import needs_grpc
from txrpc._context import bind, current
from txrpc._wire.metadata import BRANCHES_KEY
from txrpc.errors import AbortCode, NotJoined, TransactionAborted, TransactionTimedOut

from .aio_kit import AsyncWorld, abehaviour, auntil
from .interceptor_kit import DEADLOCK, SHAPES, XID, answer_of, use
from .recorder import AsyncHandle, Recorder


async def echo(request: bytes, _context: Any) -> bytes:
    await asyncio.sleep(0)
    return request


def service() -> Recorder:
    return Recorder(AsyncHandle)


class Waiting:
    """A handler that waits for somebody to say go."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, request: bytes, _context: Any) -> bytes:
        use("stock")
        await self.go_on.wait()
        return request


class Endless:
    """A stream that goes on until somebody lets it go."""

    def __init__(self) -> None:
        self.ended_in: list[Any] = []

    async def stream(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        use("stock")
        try:
            while True:
                await asyncio.sleep(0)
                assert current() is not None
                yield b"more"
        finally:
            await asyncio.sleep(0)
            self.ended_in.append(current())


# ------------------------------------------------------------------------------------------------- ends that are unknown


async def test_a_deadline_leaves_the_end_unknown(aworld: AsyncWorld) -> None:
    called, root, waiting = service(), AsyncHandle(), Waiting()
    stub = await aworld.dial(await aworld.serve(called, unary_unary=abehaviour("unary_unary", waiting)))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall("unary_unary", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.CALL_END_UNKNOWN
    await auntil(lambda: called.handle.lefts == 1)
    assert [type(error) for error in called.handle.errors] == [asyncio.CancelledError]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("timeout", [None, 20])
async def test_f1_the_transactions_own_deadline_is_the_error_that_it_is_elsewhere(
    aworld: AsyncWorld, shape: str, timeout: float | None
) -> None:
    """As for synchronous calls."""
    called, root, waiting = service(), AsyncHandle(time_left_s=0.3), Waiting()
    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, waiting)}))
    with bind(root), pytest.raises(TransactionTimedOut) as caught:
        await stub.acall(shape, timeout=timeout)
    assert str(caught.value.reason) == f"timed out: the transaction's deadline passed during /t.T/{shape}"
    assert root.call.end == "lost"
    assert root.call.failure == caught.value.reason


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("doomed", [False, True])
async def test_a_client_that_vanishes(
    aworld: AsyncWorld, shape: str, doomed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    called, root, waiting = service(), AsyncHandle(), Waiting()
    called.doom = DEADLOCK if doomed else None
    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, waiting)}))
    with bind(root):
        task = asyncio.create_task(stub.acall(shape))
        await auntil(lambda: called.handles and called.handle.own)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await root.asettle()
    assert root.call.end == "lost"
    await auntil(lambda: called.handle.lefts == 1)
    assert [type(error) for error in called.handle.errors] == [asyncio.CancelledError]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_server_that_is_not_there(aworld: AsyncWorld, shape: str) -> None:
    root = AsyncHandle()
    stub = await aworld.dial("127.0.0.1:1")
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape, silent=True)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert root.call.end == "lost"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_callee_that_takes_no_part(aworld: AsyncWorld, shape: str) -> None:
    root = AsyncHandle()
    stub = await aworld.dial(await aworld.serve(None, **{shape: abehaviour(shape, echo)}))
    with bind(root), pytest.raises(NotJoined, match=rf"outside=\['/t.T/{shape}'\]"):
        await stub.acall(shape)
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.NOT_JOINED


@pytest.mark.parametrize("shape", SHAPES)
async def test_rule_19_a_call_that_is_meant_to_be_outside(aworld: AsyncWorld, shape: str) -> None:
    root = AsyncHandle()
    address = await aworld.serve(None, **{shape: abehaviour(shape, echo)})
    stub = await aworld.dial(address, outside=[f"/t.T/{shape}"])
    with bind(root):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
    assert root.calls == []


async def test_a_failing_callee_that_takes_no_part(aworld: AsyncWorld) -> None:
    root = AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError

    stub = await aworld.dial(await aworld.serve(None, unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError):
        await stub.acall("unary_unary")
    assert root.call.end == "lost"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_report_that_makes_no_sense_dooms(aworld: AsyncWorld, shape: str) -> None:
    root = AsyncHandle()

    async def work(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(((BRANCHES_KEY, b"\xff\xff"),))
        return request

    stub = await aworld.dial(await aworld.serve(None, **{shape: abehaviour(shape, work)}))
    with bind(root):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
    assert root.call.end == "lost"
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.PROTOCOL_VIOLATION


class Hiding(
    grpc.aio.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.aio.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
):
    """A user's interceptor between ours and the network that hides the call, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        if self.error is not None:
            raise self.error
        return await (await continuation(client_call_details, request))

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        call = await continuation(client_call_details, request)
        return (part async for part in call)


class HidingStreams(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    """The same for a shape that grpc.aio does not wrap again."""

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        call = await continuation(client_call_details, request_iterator)

        class Bare:
            def __await__(self) -> Any:
                return call.__await__()

            def cancel(self) -> bool:
                return False

        return Bare()


async def test_an_interceptor_that_hides_the_call(aworld: AsyncWorld) -> None:
    root = AsyncHandle()
    shapes = ["unary_unary", "unary_stream", "stream_unary"]
    address = await aworld.serve(service(), **{shape: abehaviour(shape, echo) for shape in shapes})
    stub = await aworld.dial(address, after=[Hiding(), HidingStreams()])
    with bind(root):
        for shape in shapes:
            with suppress(NotJoined):
                assert await stub.acall(shape) == answer_of(shape, b"ab")
    unary, stream, bare = root.calls
    assert (unary.end, bare.end) == ("lost", "lost")
    for call in (unary, bare):
        assert call.failure is not None
        assert "txrpc's interceptors must be next to the network" in call.failure.text
    assert (stream.end, stream.report) != ("replied", None), "grpc.aio keeps the call beside the responses"


async def test_an_interceptor_that_raises_before_the_network(aworld: AsyncWorld) -> None:
    root = AsyncHandle()
    stub = await aworld.dial("127.0.0.1:1", after=[Hiding(ValueError("not today"))])
    with bind(root), pytest.raises(ValueError, match="not today"):
        await stub.acall("unary_unary")
    assert root.call.end == "lost"


# ------------------------------------------------------------------------------------------- calls that nobody waits for


async def test_a_call_that_nobody_awaits_is_found_out_by_settling(aworld: AsyncWorld) -> None:
    root, called, waiting = AsyncHandle(), service(), Waiting()
    stub = await aworld.dial(await aworld.serve(called, unary_unary=abehaviour("unary_unary", waiting)))
    with bind(root):
        call = stub.unary_unary(b"x")
    await auntil(lambda: called.handles)
    await root.asettle()
    assert not root.call.ended
    waiting.go_on.set()
    await auntil(call.done)
    await root.asettle()
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})
    assert await call == b"x"
    assert await call == b"x"


async def test_a_failed_call_that_nobody_awaits_is_known_by_its_error(aworld: AsyncWorld) -> None:
    """So that a rule that names `grpc.RpcError` holds for it as well."""
    root = AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(root):
        call = stub.unary_unary(b"x")
    await auntil(call.done)
    await root.asettle()
    assert root.call.end == "replied"
    error, code = root.call.kinds
    assert isinstance(error, grpc.RpcError)
    assert code is grpc.StatusCode.NOT_FOUND


@needs_grpc(83, "a call that is collected is cancelled")
async def test_a_call_that_is_dropped_runs_on_and_stays_open(aworld: AsyncWorld) -> None:
    """As with any interceptor: grpc.aio itself holds a call that has a callback.  A commit finds it in flight."""
    root, called, waiting = AsyncHandle(), service(), Waiting()
    stub = await aworld.dial(await aworld.serve(called, unary_unary=abehaviour("unary_unary", waiting)))
    with bind(root):
        stub.unary_unary(b"x")
    await auntil(lambda: called.handles)
    gc.collect()
    await root.asettle()
    assert not root.call.ended
    waiting.go_on.set()
    await auntil(lambda: called.handle.lefts == 1)


async def test_callbacks_see_the_call_that_the_user_holds(aworld: AsyncWorld) -> None:
    seen: list[Any] = []
    stub = await aworld.dial(await aworld.serve(service(), unary_unary=echo))
    with bind(AsyncHandle()):
        call = stub.unary_unary(b"x")
        call.add_done_callback(seen.append)
        await call
    await auntil(lambda: seen)
    assert seen == [call]


# ------------------------------------------------------------------------------------------------- streams of responses


async def test_a_stream_is_still_a_call(aworld: AsyncWorld) -> None:
    root = AsyncHandle()

    async def work(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata((("early", "1"),))
        yield b"1"
        context.set_trailing_metadata((("late", "2"),))
        yield b"2"

    stub = await aworld.dial(await aworld.serve(service(), unary_stream=work))
    with bind(root):
        call = stub.unary_stream(b"")
        assert dict(iter(await call.initial_metadata()))["early"] == "1"
        assert await call.read() == b"1"
        await root.asettle()
        assert not root.call.ended
        assert [part async for part in call] == [b"2"]
    assert root.call.end == "replied"
    assert (await call.code(), await call.details()) == (grpc.StatusCode.OK, "")
    assert dict(iter(await call.trailing_metadata()))["late"] == "2"
    assert call.done()
    assert not call.cancelled()


async def test_a_stream_that_fails_half_way(aworld: AsyncWorld) -> None:
    root = AsyncHandle()

    async def work(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        use("stock")
        yield b"1"
        raise TransactionAborted(XID, DEADLOCK)

    stub = await aworld.dial(await aworld.serve(service(), unary_stream=work))
    with bind(root):
        call = stub.unary_stream(b"")
        assert await call.read() == b"1"
        with pytest.raises(TransactionAborted, match="deadlock"):
            await call.read()
    assert (root.call.end, root.call.branches, root.call.failure) == ("replied", {"stock"}, DEADLOCK)


@pytest.mark.parametrize("doomed", [False, True])
async def test_an_abandoned_stream_stays_open_until_it_is_cancelled(
    aworld: AsyncWorld, doomed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    called, root, endless = service(), AsyncHandle(), Endless()
    called.doom = DEADLOCK if doomed else None
    stub = await aworld.dial(await aworld.serve(called, unary_stream=endless.stream))
    with bind(root):
        call = stub.unary_stream(b"")
        async for _ in call:
            break
        await root.asettle()
        assert not root.call.ended, "half read is not ended"
        call.cancel()
        await auntil(lambda: called.handle.lefts == 1)
        await root.asettle()
    assert root.call.end == "lost"
    assert endless.ended_in == [called.handle], "the end of the user's generator runs in its transaction"
    assert len(called.handle.errors) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_cancellations_at_any_moment_leave_nothing_behind(aworld: AsyncWorld) -> None:
    called, chance = service(), random.Random(7)

    async def work(request: bytes, context: Any) -> bytes:
        use("stock")
        await asyncio.sleep(0.002)
        context.set_trailing_metadata((("mine", "yes"),))
        return request

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work) for shape in SHAPES}))

    async def once(number: int, patience_s: float | None) -> AsyncHandle:
        root = AsyncHandle()
        with bind(root):
            task = asyncio.create_task(stub.acall(SHAPES[number % 4]))
            done, _ = await asyncio.wait([task], timeout=patience_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if done:
                assert task.result() == answer_of(SHAPES[number % 4], b"ab")
            await root.asettle()
        return root

    begun = time.monotonic()
    roots = await asyncio.gather(*(once(number, None) for number in range(8)))
    whole_s = time.monotonic() - begun
    for _ in range(20):
        roots += await asyncio.gather(*(once(number, chance.random() * whole_s) for number in range(8)))
    await auntil(lambda: all(handle.lefts == 1 for handle in called.handles))
    calls = [call for root in roots for call in root.calls]
    # None: grpc.aio lets a call run on if its caller is cancelled in the moment that it is made.  A commit finds it in flight.
    assert {"lost", "replied"} <= {call.end for call in calls} <= {"lost", "replied", None}
    for call in calls:
        assert call.branches == ({"stock"} if call.end == "replied" else set())
