"""The asyncio interceptors on real servers and channels: the normal way, and calls that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tests.versions import needs_grpc
from txrpc._context import bind, current
from txrpc._grpc.client_async import aio_client_interceptors
from txrpc._grpc.server_async import AsyncServerInterceptor
from txrpc._wire.metadata import BRANCHES_KEY, CONTEXT_KEY
from txrpc.errors import (
    AbortCode,
    LimitExceeded,
    NotJoined,
    Reason,
    TransactionAborted,
    TransactionTimedOut,
    TxrpcError,
)

from .aio_kit import KINDS, AsyncWorld, abehaviour, aecho_using, auntil
from .interceptor_kit import CONTEXT, DEADLOCK, SHAPES, XID, answer_of, trailing_of, use
from .recorder import OWNER, AsyncHandle, Recorder


async def echo(request: bytes, _context: Any) -> bytes:
    await asyncio.sleep(0)
    return request


def service() -> Recorder:
    return Recorder(AsyncHandle)


# ------------------------------------------------------------------------------------------------------ the normal way


@pytest.mark.parametrize(("shape", "writes"), KINDS)
async def test_a_call_takes_the_transaction_along_and_brings_its_branches_home(
    aworld: AsyncWorld, shape: str, writes: bool
) -> None:
    called, root = service(), AsyncHandle(time_left_s=20)
    handler = abehaviour(shape, aecho_using("stock"), writes)
    stub = await aworld.dial(await aworld.serve(called, **{shape: handler}))
    with bind(root):
        assert await stub.acall(shape) == answer_of(shape, b"ab")
        assert current() is root
    (context,) = called.contexts
    assert (context.group, context.xid, context.owner, context.read_only) == ("shop", root.xid, OWNER, True)
    assert context.time_left_ms == 20_000
    assert (called.handle.lefts, called.handle.errors) == (1, [])
    assert (root.call.end, root.call.failure, root.call.branches) == ("replied", None, {"stock"})


@pytest.mark.parametrize("shape", SHAPES)
async def test_outside_a_transaction_nothing_is_added(aworld: AsyncWorld, shape: str) -> None:
    called = service()
    seen: list[str] = []

    async def work(request: bytes, context: Any) -> bytes:
        seen.extend(key for key, _ in context.invocation_metadata())
        assert current() is None
        return request

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work)}))
    assert await stub.acall(shape) == answer_of(shape, b"ab")
    assert called.contexts == []
    assert [key for key in seen if key.startswith("txrpc")] == []


async def test_outside_a_transaction_the_objects_are_grpcs_own() -> None:
    handler = grpc.unary_unary_rpc_method_handler(echo)
    call: Any = SimpleNamespace(method="/t.T/x", invocation_metadata=(("x", "y"),))

    async def found(_call: Any) -> Any:
        return handler

    async def nothing(_call: Any) -> Any:
        return None

    wrapped = await AsyncServerInterceptor(service()).intercept_service(found, call)
    given = object()
    assert await wrapped.unary_unary(given, None) is given
    assert await AsyncServerInterceptor(service()).intercept_service(nothing, call) is None
    passed: list[Any] = []
    details, request, answer = object(), object(), object()

    async def continuation(*arguments: Any) -> Any:
        passed.extend(arguments)
        return answer

    for shape, interceptor in zip(SHAPES, aio_client_interceptors(), strict=True):
        passed.clear()
        assert await getattr(interceptor, f"intercept_{shape}")(continuation, details, request) is answer
        assert passed == [details, request]


@needs_grpc(68, "read() at the end of an intercepted stream raises StopAsyncIteration")
@pytest.mark.parametrize("shape", ["stream_unary", "stream_stream"])
async def test_requests_written_one_by_one(aworld: AsyncWorld, shape: str) -> None:
    root = AsyncHandle()
    stub = await aworld.dial(await aworld.serve(service(), **{shape: abehaviour(shape, aecho_using("stock"))}))
    with bind(root):
        call = getattr(stub, shape)()
        await call.write(b"a")
        await call.write(b"b")
        await call.done_writing()
        if shape == "stream_unary":
            assert await call == b"ab"
        else:
            assert [await call.read() for _ in range(3)] == [b"first ", b"ab", grpc.aio.EOF]  # type: ignore[attr-defined]
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})


@pytest.mark.parametrize("shape", ["stream_unary", "stream_stream"])
async def test_the_callers_request_iterator_belongs_to_the_transaction(aworld: AsyncWorld, shape: str) -> None:
    root, seen = AsyncHandle(), []
    stub = await aworld.dial(await aworld.serve(service(), **{shape: abehaviour(shape, echo)}))

    async def requests() -> AsyncIterator[bytes]:
        for letter in (b"a", b"b"):
            seen.append(current())
            await asyncio.sleep(0)
            yield letter

    with bind(root):
        call = getattr(stub, shape)(requests())
        answer = await call if shape == "stream_unary" else b"".join([part async for part in call])
    assert answer == answer_of(shape, b"ab")
    assert seen == [root, root]


async def test_two_hops_bring_all_branches_home(aworld: AsyncWorld) -> None:
    bank, shop, root = service(), service(), AsyncHandle()
    to_bank = await aworld.dial(
        await aworld.serve(bank, unary_unary=abehaviour("unary_unary", aecho_using("accounts")))
    )

    async def order(request: bytes, _context: Any) -> bytes:
        use("orders")
        return await to_bank.acall("unary_unary") + request

    to_shop = await aworld.dial(await aworld.serve(shop, unary_unary=order))
    with bind(root):
        assert await to_shop.acall("unary_unary") == b"abab"
    assert bank.handle.xid == shop.handle.xid == root.xid
    assert shop.handle.call.branches == {"accounts"}
    assert root.call.branches == {"orders", "accounts"}


async def test_gathered_calls_are_all_counted(aworld: AsyncWorld) -> None:
    called, root, other = service(), AsyncHandle(), AsyncHandle()
    stub = await aworld.dial(await aworld.serve(called, unary_unary=abehaviour("unary_unary", aecho_using("stock"))))

    async def many(handle: AsyncHandle) -> None:
        with bind(handle):
            assert await asyncio.gather(*(stub.acall("unary_unary") for _ in range(20))) == [b"ab"] * 20

    await asyncio.gather(many(root), many(other))
    for handle in (root, other):
        assert [(call.end, call.branches) for call in handle.calls] == [("replied", {"stock"})] * 20
    assert sorted(context.xid for context in called.contexts) == sorted([root.xid, other.xid] * 20)
    assert current() is None


class Watching(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """A user's client interceptor: adds metadata and remembers what went by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.details: list[Any] = []
        self.codes: list[Any] = []

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        self.details.append(client_call_details)
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()), (self.name, "was here"))
        call = await continuation(client_call_details._replace(metadata=metadata), request)
        self.codes.append(await call.code())
        return call


class Stamping(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """A user's server interceptor that sets trailing metadata before, or after, the handler."""

    def __init__(self, key: str, after: bool) -> None:
        self.key = key
        self.after = after

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        inner = (await continuation(handler_call_details)).unary_unary

        async def call(request: bytes, context: Any) -> bytes:
            if not self.after:
                context.set_trailing_metadata((*context.trailing_metadata(), (self.key, "1")))
            response: bytes = await inner(request, context)
            if self.after:
                context.set_trailing_metadata((*context.trailing_metadata(), (self.key, "1")))
            return response

        return grpc.unary_unary_rpc_method_handler(call)


async def test_users_interceptors_and_metadata_are_kept(aworld: AsyncWorld) -> None:
    root, seen = AsyncHandle(), {}
    outer, inner = Watching("outer"), Watching("inner")

    async def work(request: bytes, context: Any) -> bytes:
        seen.update(context.invocation_metadata())
        use("stock")
        context.set_trailing_metadata((*context.trailing_metadata(), ("mine", "yes")))
        return request

    address = await aworld.serve(
        service(),
        before=[Stamping("first", after=False)],
        after=[Stamping("second", after=False), Stamping("third", after=True)],
        unary_unary=work,
    )
    stub = await aworld.dial(address, before=[outer], after=[inner])
    with bind(root):
        call = stub.unary_unary(
            b"x", metadata=(("mine", "too"), (CONTEXT_KEY, CONTEXT)), wait_for_ready=True, timeout=7
        )
        assert await call == b"x"
    wanted = {"mine": "too", "outer": "was here", "inner": "was here"}
    assert {key: seen.get(key) for key in wanted} == wanted
    trailing = dict(iter(await call.trailing_metadata()))
    assert [trailing.get(key) for key in ("mine", "first", "second", "third")] == ["yes", "1", "1", "1"]
    assert BRANCHES_KEY in trailing
    assert (inner.details[0].timeout, inner.details[0].wait_for_ready) == (7, True)
    assert (outer.codes, inner.codes) == ([grpc.StatusCode.OK], [grpc.StatusCode.OK])
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})


class Careless(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """A user's server interceptor that replaces what was there."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        inner = (await continuation(handler_call_details)).unary_unary

        async def call(request: bytes, context: Any) -> bytes:
            response: bytes = await inner(request, context)
            context.set_trailing_metadata((("mine", "only"),))
            return response

        return grpc.unary_unary_rpc_method_handler(call)


@pytest.mark.parametrize("first", [False, True])
async def test_an_interceptor_that_throws_the_report_away_is_complained_of(
    aworld: AsyncWorld, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = AsyncHandle()
    handler = abehaviour("unary_unary", aecho_using("stock"))
    before, after = ([Careless()], []) if first else ([], [Careless()])
    stub = await aworld.dial(await aworld.serve(service(), before=before, after=after, unary_unary=handler))
    with bind(root):
        call = stub.unary_unary(b"x")
        with pytest.raises(NotJoined) if first else nullcontext():
            await call
    assert dict(iter(await call.trailing_metadata()))["mine"] == "only"
    if first:
        await auntil(lambda: "give txrpc's server interceptors first" in caplog.text)
    else:
        assert root.call.branches == {"stock"}
        assert caplog.text == ""


async def test_the_server_sees_the_smaller_deadline(aworld: AsyncWorld) -> None:
    left: list[float] = []

    async def work(request: bytes, context: Any) -> bytes:
        left.append(context.time_remaining())
        return request

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(AsyncHandle(time_left_s=8)):
        await stub.unary_unary(b"x")
        await stub.unary_unary(b"x", timeout=3)
        await stub.unary_unary(b"x", timeout=100)
    assert 6 < left[0] < 8.5
    assert 1 < left[1] < 3.5
    assert 6 < left[2] < 8.5


# ------------------------------------------------------------------------------------------------------ calls that fail


@pytest.mark.parametrize(("shape", "writes"), KINDS)
async def test_a_plain_exception_stays_what_grpc_makes_of_it(aworld: AsyncWorld, shape: str, writes: bool) -> None:
    called, root = service(), AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        raise KeyError("not here")

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work, writes)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert "not here" in str(caught.value.details())
    assert trailing_of(caught.value)["mine"] == "yes"
    assert ([type(error) for error in called.handle.errors], called.handle.lefts) == ([KeyError], 1)
    assert (root.call.end, root.call.branches) == ("replied", {"stock"})
    assert root.call.failure is not None
    assert root.call.failure.code is AbortCode.APPLICATION_ERROR
    assert root.call.kinds == (caught.value, grpc.StatusCode.UNKNOWN)


@pytest.mark.parametrize(("shape", "writes"), KINDS)
@pytest.mark.parametrize("rich", [False, True])
async def test_an_abort_keeps_its_status_and_its_metadata(
    aworld: AsyncWorld, shape: str, writes: bool, rich: bool
) -> None:
    called, root = service(), AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        mine = (("mine", "yes"),)
        if rich:
            status = SimpleNamespace(code=grpc.StatusCode.NOT_FOUND, details="no such thing", trailing_metadata=mine)
            await context.abort_with_status(status)
        context.set_trailing_metadata(mine)
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work, writes)}))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall(shape)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert trailing_of(caught.value)["mine"] == "yes"
    assert (len(called.handle.errors), called.handle.lefts) == (1, 1)
    assert (root.call.end, root.call.branches, root.call.kinds[1]) == ("replied", {"stock"}, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("swallowed", [False, True])
async def test_an_abort_in_a_try_block_is_an_abort_all_the_same(aworld: AsyncWorld, swallowed: bool) -> None:
    called, root = service(), AsyncHandle()

    async def work(request: bytes, context: Any) -> bytes:
        use("stock")
        try:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        except Exception as error:
            if not swallowed:
                raise ValueError("wrapped") from error
        return request

    stub = await aworld.dial(await aworld.serve(called, unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall("unary_unary")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (root.call.end, root.call.branches, called.handle.lefts) == ("replied", {"stock"}, 1)


async def test_a_status_without_an_exception_is_a_failure_too(aworld: AsyncWorld) -> None:
    root = AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
        context.set_details("not so")
        return b""

    stub = await aworld.dial(await aworld.serve(service(), unary_unary=work))
    with bind(root), pytest.raises(grpc.RpcError) as caught:
        await stub.acall("unary_unary")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (root.call.end, root.call.kinds[1]) == ("replied", grpc.StatusCode.FAILED_PRECONDITION)


ERRORS = [
    TransactionAborted(XID, DEADLOCK),
    TransactionTimedOut(XID, Reason(AbortCode.TIMED_OUT, "too slow")),
    LimitExceeded("too many of them"),
]


@pytest.mark.parametrize(("shape", "writes"), KINDS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_our_errors_travel_as_themselves(aworld: AsyncWorld, shape: str, writes: bool, error: TxrpcError) -> None:
    called, root = service(), AsyncHandle()

    async def work(_request: bytes, context: Any) -> bytes:
        use("stock")
        context.set_trailing_metadata((("mine", "yes"),))
        raise error

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work, writes)}))
    with bind(root), pytest.raises(type(error)) as caught:
        await stub.acall(shape)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert trailing_of(caught.value.__cause__)["mine"] == "yes"
    assert called.handle.errors == [error]
    assert (root.call.end, root.call.branches, root.call.kinds[0]) == ("replied", {"stock"}, caught.value)


@pytest.mark.parametrize(("shape", "writes"), KINDS)
async def test_in_a_doomed_transaction_the_caller_learns_why(
    aworld: AsyncWorld, shape: str, writes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    called, root = service(), AsyncHandle()
    called.doom = DEADLOCK

    async def work(_request: bytes, _context: Any) -> bytes:
        raise ZeroDivisionError("the consequence")

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work, writes)}))
    with bind(root), pytest.raises(TransactionAborted) as caught:
        await stub.acall(shape)
    assert (caught.value.reason, caught.value.xid) == (DEADLOCK, root.xid)
    assert "the consequence" in caplog.text


@pytest.mark.parametrize(("shape", "writes"), KINDS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_refused_call_does_not_run(aworld: AsyncWorld, shape: str, writes: bool, error: TxrpcError) -> None:
    called, root, ran = service(), AsyncHandle(), []
    called.refuses = error

    async def work(request: bytes, _context: Any) -> bytes:
        ran.append(request)
        return request

    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, work, writes)}))
    with bind(root), pytest.raises(type(error)) as caught:
        await stub.acall(shape, silent=True)
    assert str(caught.value) == str(error)
    assert ran == []
    assert (root.call.end, root.call.report) == ("replied", None)


async def test_too_many_branches_fail_the_call_and_say_how_many(aworld: AsyncWorld) -> None:
    called, root = service(), AsyncHandle()

    async def work(request: bytes, _context: Any) -> bytes:
        for number in range(300):
            use(f"resource-{number}")
        return request

    stub = await aworld.dial(await aworld.serve(called, unary_unary=work))
    with bind(root), pytest.raises(LimitExceeded, match="300 branches"):
        await stub.acall("unary_unary")
    assert [type(error) for error in called.handle.errors] == [LimitExceeded]
    assert root.call.report is not None
    assert root.call.report.doomed is not None
    assert root.call.report.doomed.code is AbortCode.LIMIT_EXCEEDED


@pytest.mark.parametrize(("shape", "writes"), KINDS)
@pytest.mark.parametrize("metadata", [((CONTEXT_KEY, b"\xff\xff"),), ((CONTEXT_KEY, CONTEXT),) * 2])
async def test_a_context_that_makes_no_sense_is_refused(
    aworld: AsyncWorld, shape: str, writes: bool, metadata: Any
) -> None:
    called = service()
    address = await aworld.serve(called, **{shape: abehaviour(shape, echo, writes)})
    raw = await aworld.raw(address)
    with pytest.raises(grpc.RpcError) as caught:
        await raw.acall(shape, silent=True, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert called.contexts == []
    assert await raw.acall(shape) == answer_of(shape, b"ab")


async def test_a_transaction_that_may_not_go_out_sends_nothing(aworld: AsyncWorld) -> None:
    called, root = service(), AsyncHandle()
    root.refuses = TransactionAborted(root.xid, DEADLOCK)
    stub = await aworld.dial(await aworld.serve(called, **{shape: abehaviour(shape, echo) for shape in SHAPES}))
    with bind(root):
        for shape in SHAPES:
            with pytest.raises(TransactionAborted, match="deadlock"):
                await stub.acall(shape)
    assert (called.contexts, root.calls) == ([], [])
